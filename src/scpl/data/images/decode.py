"""From image files, on disk or in memory, to one tensor of bytes.

An image is opened here and nowhere else. Pillow looks at the content, not at the name, and has
decoders that start other programs (PostScript) or are hardly ever used; only those of ``FORMATS``
are asked.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scpl.data.extras import import_extra
from scpl.errors import DataError, ImageWarning
from scpl.outside import machine_memory

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EXTENSIONS", "FORMATS", "check_room", "decode_images", "reads_avif"]

# What Pillow logs of a damaged image comes before an exception, which is told in our words.
logging.getLogger("PIL").addHandler(logging.NullHandler())

Pixels = npt.NDArray[np.uint8]

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take an image for."""
_PLAIN = ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
EXTENSIONS = frozenset((".avif", *_PLAIN.split()))
"""How the names of such files end."""

_MOST_PIXELS = 1 << 26  # of one image, before it is made smaller: 8192 x 8192, 200 MB in colour
_GREY_MODES = ("1", "L", "LA", "La")
_CHUNK = 256
# Below this, Python's own work per image outweighs the decoder's, and threads only fight for the
# interpreter: 50,000 CIFAR JPEGs took 5.8 s with one thread and 9.3 s with two.
_SMALL_BYTES = 16 * 1024


@cache
def reads_avif() -> bool:
    """Whether Pillow reads AVIF: it does from 11.3 on, unless it was built without."""
    import_extra("PIL.Image", "images", "Decoding images")
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return bool(AvifImagePlugin.SUPPORTED)


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
        DataError: An image cannot be read or has more than 67 million pixels, all together are too
            many for this machine, or sizes differ and no ``image_size`` was given.
        InputError: Pillow is not installed.

    Warns:
        ImageWarning: Once, if the decoder had doubts about images that it did read.
    """
    import_extra("PIL.Image", "images", "Decoding images")
    if not sources:
        raise DataError("There must be at least one image to decode", "Got none")

    def name(index: int) -> str:
        if name_of is not None:
            return name_of(index)
        source = sources[index]
        return f"image {index}" if isinstance(source, bytes) else str(source)

    with _doubts_counted(len(sources)):
        return _decode(sources, image_size, name)


def _decode(
    sources: Sequence[bytes | Path], image_size: int | None, name: Callable[[int], str]
) -> Tensor:
    height, width, _ = _pixels(sources[0], image_size, name(0)).shape
    check_room(len(sources), 3, height, width)
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


def check_room(*shape: int) -> None:
    """Check that images ``uint8 [N, C, H, W]`` have room in the memory of this machine.

    Raises:
        DataError: They have none.
    """
    size, memory = math.prod(shape), machine_memory()
    if size > memory:
        raise DataError(
            "All images together must have room in the memory of this machine",
            f"Got {' x '.join(map(str, shape))} bytes, {size / 1e9:,.0f} of {memory / 1e9:,.0f} GB",
            "Give a smaller `image_size`, or fewer images",
        )


@contextmanager
def _doubts_counted(count: int) -> Iterator[None]:
    """Say in one sentence what Pillow would warn of image by image."""
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        yield
    if doubts:
        text = " ".join(str(doubts[0].message).split())
        warnings.warn(
            ImageWarning(
                "Every image should be what its format says",
                f"{len(doubts)} warning{'s' * (len(doubts) != 1)} on {count} images that were read "
                f"all the same; the first: {text[:200]}",
                "Save them anew if they look wrong",
            ),
            stacklevel=4,
        )


def _pixels(source: bytes | Path, image_size: int | None, name: str) -> Pixels:
    """Decode one image, ``[H, W, 1 or 3]``."""
    from PIL import Image

    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(content, formats=FORMATS[not reads_avif() :]) as image:
            _check_size(*image.size)  # which the header tells; nothing is decoded yet
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


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}")


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
    _check_size(width, height)  # a long and narrow image
    image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
