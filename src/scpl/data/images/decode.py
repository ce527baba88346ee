"""From image files, on disk or in memory, to one tensor of bytes.

An image is opened here and nowhere else. Pillow looks at the content, not at the name, and has
decoders that start other programs (PostScript) or are hardly ever used; only those of ``FORMATS``
are asked.

What a picture's pixels are is the same for all that read it:

- It is turned upright, as its EXIF orientation says.
- What is transparent shows the white that pages have, and most viewers.
- Eight bits are what they are. Which deeper value is white, only the data set tells: a camera of
  12 bits writes files of 16, and floating-point numbers have no largest one. So `WhiteLevels` are
  chosen once for all images of a run, and kept with it. To stretch each image by its own values
  takes away how bright it is, and by those that its file could hold turns 12 bits nearly black.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scpl.data.extras import import_extra
from scpl.data.spool import InMemory, fits
from scpl.errors import DataError, ImageWarning
from scpl.outside import machine_memory, parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AS_IT_IS",
    "EIGHT_BITS",
    "EXTENSIONS",
    "FORMATS",
    "Decoded",
    "Reading",
    "WhiteLevels",
    "check_readable",
    "check_room",
    "check_same_size",
    "decode_image",
    "decode_images",
    "decode_readable",
    "doubts_counted",
    "prepare",
    "reads_avif",
    "white_levels",
]

# What Pillow logs of a damaged image comes before an exception, which is told in our words.
logging.getLogger("PIL").addHandler(logging.NullHandler())

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take an image for."""
_PLAIN = ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
EXTENSIONS = frozenset((".avif", *_PLAIN.split()))
"""How the names of such files end."""

_MOST_PIXELS = 1 << 26  # of one image, before it is made smaller: 8192 x 8192, 200 MB in colour
_GREY_MODES = ("1", "L", "LA", "La")
_CLEAR_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_MAY_BE_DEEP = (b"\x89P", b"II", b"MM", b"P")  # PNG, TIFF, PPM
_ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_WHOLE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_CHUNK = 256
# Below this, Python's own work per image outweighs the decoder's, and threads only fight for the
# interpreter: 50,000 CIFAR JPEGs took 5.8 s with one thread and 9.3 s with two.
_SMALL_BYTES = 16 * 1024
_LISTED = 20  # unreadable images that a message names


class WhiteLevels(NamedTuple):
    """Which value is white in images of more than 8 bits; 0 is black.

    Attributes:
        whole: Where values are whole numbers, as in 16-bit PNG and TIFF, and in 32-bit TIFF.
        real: Where they are floating-point numbers.
    """

    whole: int = 255
    real: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> WhiteLevels:
        """Rebuild from a list of both.

        Raises:
            TypeError, ValueError: They are none.
        """
        whole, real = values
        if whole not in _WHOLE_LEVELS or real not in _REAL_LEVELS:
            raise ValueError(f"{whole!r} and {real!r} are no values of white")
        return cls(int(whole), float(real))

    def notes(self) -> list[str]:
        """Say what differs from 8 bits and from 0 to 1."""
        kinds = {"whole": "whole numbers", "real": "floating-point numbers"}
        return [
            f"Where images hold {kind} of more than 8 bits, {value:,g} is white: the values of all "
            "images fit below it"
            for (name, kind), usual in zip(kinds.items(), EIGHT_BITS, strict=True)
            if (value := getattr(self, name)) != usual
        ]


class Reading(NamedTuple):
    """What is wished of decoding, but for the size.

    Attributes:
        white: What deeper values are scaled by; None: `white_levels` of all images.
        skip_unreadable: Leave out images that cannot be read.
        in_memory: yes: decode all at once, and hold them in memory; no: whenever a mini-batch needs
            them; auto: as `fits` says.
        workers: How many threads decode what is not held in memory.
    """

    white: WhiteLevels | None = None
    skip_unreadable: bool = False
    in_memory: InMemory = "auto"
    workers: int = 2

    def holds(self, *shape: int) -> bool:
        """Whether images ``uint8 [N, C, H, W]`` are held in memory."""
        return fits(self.in_memory, math.prod(shape))


AS_IT_IS = Reading()

_WHOLE_LEVELS = tuple((1 << bits) - 1 for bits in (8, 10, 12, 14, 16))
"""What sensors and files hold."""
_REAL_LEVELS = (1.0, *map(float, _WHOLE_LEVELS))
EIGHT_BITS = WhiteLevels()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images, and how they were read.

    Attributes:
        images: ``uint8 [N, C, H, W]``: those that could be read, in their order.
        white: What their deeper values were scaled by.
        unreadable: Why the others could not be, by their places among the sources.
    """

    images: Tensor
    white: WhiteLevels
    unreadable: Mapping[int, str]

    @classmethod
    def of(cls, images: Tensor, about: str) -> Decoded:
        """Rebuild from `stored`."""
        values = parse_json(about)
        unreadable = {int(index): why for index, why in values["unreadable"].items()}
        return cls(images, WhiteLevels.of(values["white"]), unreadable)

    def stored(self) -> tuple[Tensor, str]:
        """Return the images, and a text that says all else."""
        return self.images, json.dumps({"white": self.white, "unreadable": self.unreadable})


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
    white: WhiteLevels | None = None,
) -> Tensor:
    """Decode images into ``uint8 [N, C, H, W]``; all must be readable.

    Otherwise as `decode_readable`.

    Raises:
        DataError: Some cannot be read.
    """
    decoded = decode_readable(sources, image_size, name_of, white)
    check_readable(decoded.unreadable, len(sources), name_of or _names(sources))
    return decoded.images


def decode_readable(
    sources: Sequence[bytes | Path],
    image_size: int | None = None,
    name_of: Callable[[int], str] | None = None,
    white: WhiteLevels | None = None,
) -> Decoded:
    """Decode images into ``uint8 [N, C, H, W]``: C is 3 if any image is in colour, else 1.

    Args:
        sources: Encoded images or paths of image files; at least one.
        image_size: Resize each shorter side to this and cut out the centre, in pixels.
        name_of: Name of source i for messages; by default its path or its number.
        white: What deeper values are scaled by; by default `white_levels` of these images.

    Raises:
        DataError: All together are too many for this machine, sizes differ and no ``image_size``
            was given, or `white_levels` are not to be had.
        InputError: Pillow is not installed.

    Warns:
        ImageWarning: Once, if the decoder had doubts about images that it did read.
    """
    prepare()
    if not sources:
        raise DataError("There must be at least one image to decode", "Got none")
    with doubts_counted(len(sources)):
        white = white_levels(sources) if white is None else white
        return _decode(sources, image_size, name_of or _names(sources), white)


def check_readable(faults: Mapping[int, str], count: int, name_of: Callable[[int], str]) -> None:
    """Check that all of so many images could be read; ``faults`` say why some could not.

    Raises:
        DataError: Naming those that could not, up to 20 of them, and why.
    """
    if faults:
        told = [f"{name_of(index)}: {why}" for index, why in islice(faults.items(), _LISTED)]
        more = [f"{len(faults) - _LISTED:,} more"] if len(faults) > _LISTED else []
        raise DataError(
            "Every image must be readable",
            f"{len(faults):,} of {count:,} are not: {'; '.join(told + more)}",
            "Replace or remove them, or leave them out with `skip_unreadable`",
        )


def decode_image(
    source: bytes | Path, image_size: int | None = None, white: WhiteLevels = EIGHT_BITS
) -> Pixels:
    """Decode one image into ``uint8 [H, W, C]``, C being 1 or 3.

    Args:
        source: The encoded image, or the path of a file.
        image_size: Resize the shorter side to this and cut out the centre, in pixels.
        white: What deeper values are scaled by.

    Raises:
        DataError: It cannot be read, has more than 67 million pixels, or values outside of black
            to white.
    """
    with _opened(source) as image:
        plain = _plain(image, white)
        pixels = np.asarray(plain if image_size is None else _fit(plain, image_size))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def white_levels(sources: Sequence[bytes | Path]) -> WhiteLevels:
    """Choose the white of the deeper images among some: the least level that holds all values.

    The levels are those of 8, 10, 12, 14 and 16 bits; of floating-point numbers 1 comes first. What
    cannot be read, or lies outside of all of them, decides nothing.

    Raises:
        DataError: Images in colour have 16 bits but leave the upper ones unused. Pillow reads no
            others.
    """
    prepare()
    with warnings.catch_warnings():  # told where they are decoded
        warnings.simplefilter("ignore")
        chunks = list(_chunks(sources, lambda index: _peak(sources[index])))
    peaks: dict[str, list[float]] = {"whole": [0], "real": [0], "upper": []}
    for kind, peak in filter(None, chain.from_iterable(chunks)):
        peaks[kind].append(peak)
    upper = max(peaks["upper"], default=0)
    if 0 < upper < 1 << 6:
        raise DataError(
            "Images in colour of 16 bits must use the upper two: the upper 8 are read",
            f"Got up to {(int(upper) << 8) + 255:,} in {len(peaks['upper']):,} such images",
            "Scale them to 0 .. 65,535, or save them with 8 bits",
        )
    whole = next(level for level in _WHOLE_LEVELS if max(peaks["whole"]) <= level)
    return WhiteLevels(whole, next(level for level in _REAL_LEVELS if max(peaks["real"]) <= level))


def _peak(source: bytes | Path) -> tuple[str, float] | None:
    """Find the kind and the largest of an image's deeper values; None if there are none."""
    start = _start(source)
    # Few images are opened twice: of a PNG, this byte of the header says how many bits it has.
    if not start.startswith(_MAY_BE_DEEP) or (start[0] == 0x89 and start[24:25] != b"\x10"):
        return None
    with suppress(DataError), _opened(source) as image:
        kind: str | None = _kind(image)
        if kind is None and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            kind = "upper"  # of 16 bits, in colour
        if kind is not None:
            values = np.asarray(image)
            low, high = float(values.min()), float(values.max())
            return (kind, high) if low >= 0 and high <= _WHOLE_LEVELS[-1] else None
    return None


def prepare() -> None:
    """Get Pillow ready; once, before `decode_image`.

    Raises:
        InputError: It is not installed.
    """
    import_extra("PIL.Image", "images", "Decoding images")
    _silence_libtiff()


@cache
def _silence_libtiff() -> None:
    """Keep it from writing to the terminal, from C, what Pillow's exceptions say."""
    from PIL import _imaging

    with suppress(OSError, AttributeError):  # a Pillow without it, or with its names hidden
        silence = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        silence.argtypes, silence.restype = [ctypes.c_void_p], ctypes.c_void_p
        silence(None)


def _start(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:25]
    with suppress(OSError), source.open("rb", buffering=0) as file:
        return file.read(25)
    return b""  # decoding says why


def _kind(image: Image) -> Literal["whole", "real"] | None:
    """Tell of which kind the values of an image are; None: they are scaled already."""
    if image.mode == "F":
        return "real"
    # Of PPM, Pillow has stretched the values to 16 bits by the largest that the file names.
    return "whole" if image.mode in _WHOLE_MODES and image.format != "PPM" else None


def _decode(
    sources: Sequence[bytes | Path],
    image_size: int | None,
    name: Callable[[int], str],
    white: WhiteLevels,
) -> Decoded:
    faults: dict[int, str] = {}

    def pixels(index: int) -> Pixels | None:
        try:
            return decode_image(sources[index], image_size, white)
        except DataError as error:
            faults[index] = error.got
            return None

    found = ((index, each) for index in range(len(sources)) if (each := pixels(index)) is not None)
    first, shown = next(found, (0, np.empty((0, 0, 3), np.uint8)))
    height, width, _ = shown.shape
    check_room(len(sources), 3, height, width)
    # Each image is written straight into its row of one array, so that nothing is held twice.
    array = np.empty((len(sources), height, width, 3), np.uint8)
    colour = np.zeros(len(sources), bool)

    def write(index: int) -> None:
        image = shown if index == first else None if index in faults else pixels(index)
        if image is None:
            return
        check_same_size({first: shown, index: image}, name)
        array[index] = image  # one grey channel spreads over all three
        colour[index] = image.shape[2] == 3

    for _ in _chunks(sources, write):
        pass
    if faults:
        kept = np.ones(len(sources), bool)
        kept[list(faults)] = False
        array = array[kept]
    chosen = array if colour.any() else array[..., :1]
    images = torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()
    return Decoded(images, white, dict(sorted(faults.items())))


def _chunks(sources: Sequence[bytes | Path], work: Callable[[int], T]) -> Iterator[list[T]]:
    """Do something for each source, by its place: in threads, unless they are small."""

    def chunk(start: int) -> list[T]:
        return [work(index) for index in range(start, min(start + _CHUNK, len(sources)))]

    starts = range(0, len(sources), _CHUNK)
    if _bytes(sources[0]) < _SMALL_BYTES:
        yield from map(chunk, starts)
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            yield from pool.map(chunk, starts)


def _bytes(source: bytes | Path) -> int:
    if isinstance(source, bytes):
        return len(source)
    with suppress(OSError):
        return source.stat().st_size
    return 0


def _names(sources: Sequence[bytes | Path]) -> Callable[[int], str]:
    def name(index: int) -> str:
        source = sources[index]
        return f"image {index}" if isinstance(source, bytes) else str(source)

    return name


def check_same_size(images: Mapping[int, Pixels], name_of: Callable[[int], str]) -> None:
    """Check that decoded images, ``[H, W, C]`` by number, all have the first one's size.

    Raises:
        DataError: One has not.
    """
    (first, one), *others = images.items()
    for index, other in others:
        if one.shape[:2] != other.shape[:2]:
            (height, width, _), (tall, wide, _) = one.shape, other.shape
            raise DataError(
                "Images must all be of one size unless a size is given",
                f"Got {name_of(first)} with {width} x {height} pixels and {name_of(index)} with "
                f"{wide} x {tall}",
                "Give `image_size`: each shorter side is resized to it and the centre cut out",
            )


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
            "Give a smaller `image_size`, fewer images, or `in_memory` no",
        )


@contextmanager
def doubts_counted(count: int) -> Iterator[None]:
    """Say in one sentence what Pillow would warn of image by image."""
    from PIL import Image

    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        # Of what is too large for Pillow, our own error says so.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
    if doubts:
        text = " ".join(str(doubts[0].message).split())
        warnings.warn(
            ImageWarning(
                "Every image should be what its format says",
                f"{len(doubts)} warning{'s' * (len(doubts) != 1)} while {count} images were read; "
                f"the first: {text[:200]}",
                "Save them anew if they look wrong",
            ),
            stacklevel=4,
        )


@contextmanager
def _opened(source: bytes | Path) -> Iterator[Image]:
    """Open an image, turned upright; what goes wrong then is a DataError, too."""
    from PIL import Image

    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(content, formats=FORMATS[not reads_avif() :]) as image:
            _check_size(*image.size)  # which the header tells; nothing is decoded yet
            yield image
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(
            "Every image must be readable",
            f"{type(error).__name__}: {error}",
            "Replace or remove that image",
        ) from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}")


def _upright(image: Image) -> None:
    """Turn an image as its EXIF data say."""
    from PIL import ImageOps

    image.load()
    if image.format != "TIFF" and not _ORIENTED & image.info.keys():
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow raises almost anything on damaged EXIF data
        warnings.warn(f"Its EXIF data cannot be read: {error}", stacklevel=2)


def _plain(image: Image, white: WhiteLevels) -> Image:
    """Convert to 8-bit grey or RGB, upright, on a white ground."""
    _upright(image)
    if image.mode == "F" or image.mode in _WHOLE_MODES:
        kind = _kind(image)
        return _scaled(image, _WHOLE_LEVELS[-1] if kind is None else getattr(white, kind))
    grey = image.mode in _GREY_MODES
    if image.mode in _CLEAR_MODES or "transparency" in image.info:
        return _on_white(image.convert("LA" if grey else "RGBA"))
    return image.convert("L" if grey else "RGB")


def _scaled(image: Image, white: float) -> Image:
    """Bring deeper values to 8 bits."""
    from PIL import Image as pillow

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # nor any that is no number
        raise ValueError(
            f"its values, {low:,} .. {high:,}, must lie within black, 0, and white, {white:,}: "
            "scale them"
        )
    scaled = values.astype(np.float32) * np.float32(255 / white)
    return pillow.fromarray(np.rint(scaled).astype(np.uint8))


def _on_white(image: Image) -> Image:
    """Lay an image of mode LA or RGBA on a white ground."""
    from PIL import Image as pillow

    alpha = image.getchannel("A")
    plain = image.convert(image.mode[:-1])
    if alpha.getextrema() == (255, 255):
        return plain
    ground = pillow.new(plain.mode, plain.size, "white")
    ground.paste(plain, mask=alpha)
    if ground.getcolors(1) and not image.getcolors(1):
        warnings.warn("Nothing shows of a transparent image on a white ground", stacklevel=2)
    return ground


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
