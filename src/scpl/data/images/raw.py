"""Data sets published as files of raw pixels: MNIST and its like, CIFAR, and the embedded digits.

Sources of the formats: LeCun, Cortes and Burges, "The MNIST database of handwritten digits";
Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from scpl.data.images.dataset import ImageData, Split, carve_validation, channel_stats
from scpl.data.images.listing import Format, Splits
from scpl.errors import DataError
from scpl.outside import most_unpacked, read_text

__all__ = ["FORMATS", "load_digits"]

# The idx format of MNIST: a magic number, the dimensions, then the numbers, big-endian.

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SUBFOLDERS = (".", "raw")  # torchvision keeps them in MNIST/raw
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DIMS = 8  # images have three
_AGAIN = "Download the file again"


def has_mnist(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``raw``, holds all four files of an MNIST-like set."""
    return _locate(folder) is not None


def read_mnist(folder: Path) -> Splits:
    """Read a set laid out as MNIST: four idx files, ``train-*`` and ``t10k-*``, or in ``raw``."""
    files = _locate(folder)
    if files is None:
        raise DataError(
            "An MNIST-like set needs four files", f"Not all are in {folder}", ", ".join(FILES)
        )
    return Splits(_split(files[0], files[1]), _split(files[2], files[3]))


def read_idx(path: Path, dims: int) -> npt.NDArray[Any]:
    """Read one idx file of bytes in ``dims`` dimensions."""
    try:
        with path.open("rb") as file:
            values = _parse_idx(file, str(path))
    except OSError as error:
        raise DataError("An idx file must be readable", f"Got {path}: {error}") from error
    if values.ndim != dims or values.dtype != np.uint8:
        raise DataError(
            f"{path.name} must hold bytes in {dims} dimensions",
            f"Got {values.dtype} in {values.ndim} in {path}",
        )
    return values


def parse_idx(data: bytes, name: str) -> npt.NDArray[Any]:
    """Read an idx file held in memory, compressed with gzip or not; ``name`` is for messages."""
    return _parse_idx(io.BytesIO(data), name)


def _parse_idx(file: BinaryIO, name: str) -> npt.NDArray[Any]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    packed = file.read(2) == b"\x1f\x8b"  # idx begins with two zero bytes
    file.seek(0)
    if not packed:
        return _read_idx(file, size, name, packed=False)
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
            return _read_idx(unpacked, most_unpacked(size), name, packed=True)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "A gzip file must be complete and intact",
            f"Got {size} bytes that do not unpack in {name}: {error}",
            _AGAIN,
        ) from error


def _read_idx(
    file: BinaryIO | gzip.GzipFile, most: int, name: str, *, packed: bool
) -> npt.NDArray[Any]:
    """Read the header, and no more than it announces; a file has room for ``most`` bytes."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or head[3] > _MOST_DIMS:
        raise DataError(
            "An idx file must begin with two zero bytes, a known type and up to 8 dimensions",
            f"Got bytes {head.hex(' ') or '(none)'} in {name}",
            _AGAIN,
        )
    dtype, numbers = np.dtype(_TYPES[head[2]]), file.read(4 * head[3])
    expected = 4 + 4 * head[3]
    shape: tuple[int, ...] = ()
    if 4 + len(numbers) == expected:
        shape = struct.unpack(f">{head[3]}I", numbers)
        expected += math.prod(shape) * dtype.itemsize
    # Numpy multiplies the sides out, though one of them be 0.
    has_room = expected <= most and math.prod(max(side, 1) for side in shape) < 1 << 56
    data = file.read(expected - 4 - len(numbers)) if has_room else b""
    got = 4 + len(numbers) + len(data)
    if not has_room or got != expected or file.read(1):
        got += got == expected
        size = f"at least {got}" if packed and has_room else f"{'at most ' * packed}{most}"
        raise DataError(
            f"{name} must hold the {expected} bytes its header announces",
            f"Got {size} bytes: the file is {'truncated' if got < expected else 'too long'}",
            _AGAIN,
        )
    values = np.frombuffer(data, dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="))  # a copy in native order, which torch can share


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
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            "The two files must hold as many images as labels, and at least one",
            f"Got {len(images)} images in {images_file} and {len(labels)} labels in {labels_file}",
            "Download both again",
        )
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


# CIFAR-10 and CIFAR-100 in their *binary version*: a row is one or two label bytes, then 3 x 32 x
# 32 pixels. The Python version is a pickle, which can run code when it is opened; it is not read.

_SIDE = 32


class _Cifar(NamedTuple):
    """Files and rows of one of the two sets; of several label bytes the last one counts."""

    train: tuple[str, ...]
    test: str
    names: str
    num_classes: int
    num_labels: int

    def complete(self, folder: Path) -> bool:
        """Whether all files are there but that of the names."""
        return all((folder / name).is_file() for name in (*self.train, self.test))

    def read(self, folder: Path) -> Splits:
        """Read the set."""
        classes = _cifar_classes(folder / self.names, self.num_classes)
        train = [self._read_file(folder / name) for name in self.train]
        images = torch.cat([split.images for split in train])
        labels = torch.cat([split.labels for split in train])
        return Splits(Split(images, labels), self._read_file(folder / self.test), classes)

    def _read_file(self, path: Path) -> Split:
        size = self.num_labels + 3 * _SIDE * _SIDE
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataError("A CIFAR file must be readable", f"Got {path}: {error}") from error
        whole, more = divmod(data.size, size)
        if whole == 0 or more:
            raise DataError(
                f"{path} must hold whole rows of {size} bytes",
                f"Got {data.size} bytes: {whole} rows and {more} bytes more",
                "Download the binary version again",
            )
        rows = torch.from_numpy(data.reshape(-1, size))
        labels = rows[:, self.num_labels - 1].long()
        if int(labels.max()) >= self.num_classes:
            raise DataError(
                f"Labels in {path} must be 0..{self.num_classes - 1}",
                f"Got {int(labels.max())} in row {int(labels.argmax())}",
                "Download the binary version again",
            )
        return Split(rows[:, self.num_labels :].reshape(-1, 3, _SIDE, _SIDE), labels)


def _cifar_classes(path: Path, num_classes: int) -> tuple[str, ...] | None:
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError):
        return None  # the file of names is optional: the known names serve as well
    names = tuple(line.strip() for line in lines if line.strip())
    if names and len(names) != num_classes:
        raise DataError(f"{path} must name {num_classes} classes", f"Got {len(names)} names")
    return names or None


_TRAIN_10 = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR10 = _Cifar(_TRAIN_10, "test_batch.bin", "batches.meta.txt", 10, 1)
_CIFAR100 = _Cifar(("train.bin",), "test.bin", "fine_label_names.txt", 100, 2)  # coarse, fine

FORMATS = {
    "idx": Format(
        "train-images-idx3-ubyte(.gz) and the other three idx files", has_mnist, read_mnist
    ),
    "cifar10": Format(
        "data_batch_1.bin .. 5.bin and test_batch.bin", _CIFAR10.complete, _CIFAR10.read
    ),
    "cifar100": Format("train.bin and test.bin", _CIFAR100.complete, _CIFAR100.read),
}

# Handwritten digits that come with the package: 1,797 images of 8 x 8 pixels, for tests and tries.
# Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
# Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; changes: files/ATTRIBUTION.txt.

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: the test images must be the same for every user and every run


def load_digits() -> ImageData:
    """Read the embedded digits: 1,438 train and 359 test images, ``uint8 [N, 1, 8, 8]``.

    Raises:
        DataError: The installed files are damaged.
    """
    folder = resources.files("scpl.data") / "files"
    images, labels = (
        torch.from_numpy(parse_idx((folder / name).read_bytes(), name))
        for name in ("digits-images-idx3-ubyte.gz", "digits-labels-idx1-ubyte.gz")
    )
    everything = Split(images[:, None], labels.long(), "the digits")
    train, test = carve_validation(everything, _TEST_SHARE, _SPLIT_SEED)
    mean, std = channel_stats(train.images)
    return ImageData("digits", train, test, tuple("0123456789"), mean, std, flip=False)
