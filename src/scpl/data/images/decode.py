"""From image files, on disk or in memory, to one tensor of bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scpl.data.extras import import_extra
from scpl.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode_images"]

Pixels = npt.NDArray[np.uint8]

_GREY_MODES = ("1", "L", "LA", "La")
_CHUNK = 256
# Below this, Python's own work per image outweighs the decoder's, and threads only fight for the
# interpreter: 50,000 CIFAR JPEGs took 5.8 s with one thread and 9.3 s with two.
_SMALL_BYTES = 16 * 1024


def decode_images(
    sources: Sequence[bytes | Path],
    image_size: int | None = None,
    name_of: Callable[[int], str] | None = None,
) -> Tensor:
    """Decode images into ``uint8 [N, C, H, W]``: C is 3 if any image is in colour, else 1.

    Args:
        sources: Encoded images or paths of image files; at least one.
        image_size: Resize each shorter side to this and cut out the centre, in pixels.
        name_of: Name of source i for messages; by default its path or its number.

    Raises:
        DataError: An image cannot be read, or sizes differ and no ``image_size`` was given.
        InputError: Pillow is not installed.
    """
    import_extra("PIL.Image", "images", "Decoding images")
    if not sources:
        raise DataError("There must be at least one image to decode", "Got none")

    def name(index: int) -> str:
        if name_of is not None:
            return name_of(index)
        source = sources[index]
        return f"image {index}" if isinstance(source, bytes) else str(source)

    height, width, _ = _pixels(sources[0], image_size, name(0)).shape
    # Each image is written straight into its row of one array, so that nothing is held twice.
    array = np.empty((len(sources), height, width, 3), np.uint8)
    colour = np.zeros(len(sources), bool)

    def decode(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(sources))):
            pixels = _pixels(sources[index], image_size, name(index))
            if pixels.shape[:2] != (height, width):
                raise DataError(
                    "Images must all be of one size unless a size is given",
                    f"Got {name(0)} with {width} x {height} pixels and {name(index)} with "
                    f"{pixels.shape[1]} x {pixels.shape[0]}",
                    "Give `image_size`: each shorter side is resized to it and the centre cut out",
                )
            array[index] = pixels  # one grey channel spreads over all three
            colour[index] = pixels.shape[2] == 3

    starts = range(0, len(sources), _CHUNK)
    first = sources[0]
    if (len(first) if isinstance(first, bytes) else first.stat().st_size) < _SMALL_BYTES:
        for start in starts:
            decode(start)
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(decode, starts))
    chosen = array if colour.any() else array[..., :1]
    return torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()


def _pixels(source: bytes | Path, image_size: int | None, name: str) -> Pixels:
    """Decode one image, ``[H, W, 1 or 3]``."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            plain = _plain(image)
            if image_size is not None:
                plain = _fit(plain, image_size)
            pixels = np.asarray(plain)
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(
            "Every image must be readable",
            f"Got {name}: {type(error).__name__}: {error}",
            "Replace or remove that image",
        ) from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _plain(image: Image) -> Image:
    """Convert to 8-bit grey or RGB, without transparency."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in _GREY_MODES:
        return image.convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image, size: int) -> Image:
    """Resize the shorter side to ``size`` and cut out the centre."""
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
