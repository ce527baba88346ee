"""The idx format of MNIST: a magic number, the dimensions, then the numbers, big-endian.

Source of the format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scpl.data.images.sets import Parts, Split
from scpl.errors import DataError

__all__ = ["FILES", "has_mnist", "parse_idx", "read_idx", "read_mnist"]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SUBFOLDERS = (".", "raw")  # torchvision keeps them in MNIST/raw
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read one idx file, compressed with gzip or not.

    Raises:
        DataError: The file cannot be read or is not a complete idx file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError("an idx file must be readable", f"Got {path}: {error}") from error
    return parse_idx(data, str(path))


def parse_idx(data: bytes, name: str) -> npt.NDArray[Any]:
    """Read an idx file held in memory; ``name`` is for messages.

    Raises:
        DataError: The bytes are not a complete idx file.
    """
    if data[:2] == b"\x1f\x8b":  # idx begins with two zero bytes, so gzip cannot be mistaken
        data = _unpack(data, name)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES:
        raise DataError(
            "an idx file must begin with two zero bytes, a known type and the number of dimensions",
            f"Got bytes {data[:4].hex(' ') or '(none)'} in {name}",
            "Download the file again",
        )
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise _wrong_size(name, start, len(data))
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    dtype = np.dtype(_TYPES[data[2]])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise _wrong_size(name, expected, len(data))
    values = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))  # a copy in native order, which torch can share


def has_mnist(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``raw``, holds all four files of an MNIST-like set."""
    return _locate(folder) is not None


def read_mnist(folder: Path, image_size: int | None = None) -> Parts:
    """Read a set laid out as MNIST: four idx files, ``train-*`` and ``t10k-*``.

    Args:
        folder: Holds the files, or a subfolder ``raw`` that does.
        image_size: Ignored; the images of such a set are of one size already.

    Raises:
        DataError: A file is missing, damaged, or does not hold what its name says.
    """
    files = _locate(folder)
    if files is None:
        raise DataError(
            "an MNIST-like set needs four files", f"Not all are in {folder}", ", ".join(FILES)
        )
    return Parts(_split(files[0], files[1]), _split(files[2], files[3]))


def _locate(folder: Path) -> list[Path] | None:
    for subfolder in _SUBFOLDERS:
        found = [_variant(folder / subfolder, name) for name in FILES]
        files = [file for file in found if file is not None]
        if len(files) == len(FILES):
            return files
    return None


def _variant(folder: Path, name: str) -> Path | None:
    dotted = name.replace("-idx", ".idx")
    names = (name, f"{name}.gz", dotted, f"{dotted}.gz")
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _split(images_file: Path, labels_file: Path) -> Split:
    images, labels = read_idx(images_file), read_idx(labels_file)
    for path, values, dims in ((images_file, images, 3), (labels_file, labels, 1)):
        if values.ndim != dims or values.dtype != np.uint8:
            raise DataError(
                f"{path.name} must hold bytes in {dims} dimensions",
                f"Got {values.dtype} in {values.ndim} in {path}",
            )
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            "the two files must hold as many images as labels, and at least one",
            f"Got {len(images)} images in {images_file} and {len(labels)} labels in {labels_file}",
            "Download both again",
        )
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _unpack(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "a gzip file must be complete and intact",
            f"Got {len(data)} bytes that do not unpack in {name}: {error}",
            "Download the file again",
        ) from error


def _wrong_size(name: str, expected: int, found: int) -> DataError:
    state = "truncated" if found < expected else "too long"
    return DataError(
        f"{name} must hold the {expected} bytes its header announces",
        f"Got {found} bytes: the file is {state}",
        "Download the file again",
    )
