"""Images that stay encoded until a mini-batch asks for them, for more of them than memory holds.

Nothing decoded is kept, in memory or on disk, where a million photos of 224 pixels would take
150 GB: threads decode the next batches while the network learns from this one.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scpl.data.images.decode import (
    Pixels,
    Reading,
    WhiteLevels,
    check_same_size,
    decode_image,
    doubts_counted,
    prepare,
    white_levels,
)
from scpl.data.loader import mapped_ahead
from scpl.errors import DataError
from scpl.outside import parse_json

__all__ = ["OnDemand", "Survey", "pixel_sums", "survey", "with_channels"]

Source = bytes | Path

_CHUNK = 256
_GREY = (19595, 38470, 7471)  # ITU-R 601 luma in 1/65536, as Pillow converts colour to grey


@dataclasses.dataclass(frozen=True, eq=False)
class OnDemand:
    """Images that are read and decoded whenever they are asked for.

    They are indexed as a tensor ``uint8 [N, C, H, W]`` is, and give the same bytes.

    Args:
        sources: Encoded images, or paths of image files.
        name: Says what the i-th of ``sources`` is, for messages.
        decode: Decodes one of them, ``uint8 [H, W, 1 or 3]``; called by several threads.
        size: Height and width of each, in pixels.
        channels: 1 for grey images, 3 for colour.
        sums: Of the pixels of each of ``sources``, see `pixel_sums`; None: not known.
        rows: Which of ``sources`` these images are, ``int64 [N]``.
        workers: How many threads decode.
    """

    sources: Sequence[Source]
    name: Callable[[int], str]
    decode: Callable[[Source], Pixels]
    size: tuple[int, int]
    channels: int
    sums: Tensor | None
    rows: Tensor
    workers: int

    dtype = torch.uint8
    device = torch.device("cpu")
    ndim = 4

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """``[N, C, H, W]``."""
        return torch.Size((len(self), self.channels, *self.size))

    @property
    def nbytes(self) -> int:
        """Bytes that all would take, decoded."""
        return self.shape.numel()

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        """Decode one image, or several.

        Raises:
            DataError: One can no longer be read, or is of another size now.
        """
        chosen = self.rows[which]
        numbers = chosen.view(-1).tolist()
        # What the decoder has doubts about was told when all were read once.
        warnings.filterwarnings("ignore", module=r"PIL|scpl\.data\.images\.decode")
        array = np.empty((len(numbers), *self.size, 3), np.uint8)
        colour = False
        for place, number in enumerate(numbers):
            pixels = self._unchanged(number)
            array[place] = pixels  # one grey channel spreads over all three
            colour |= pixels.shape[2] == 3
        images = torch.from_numpy(array if colour else array[..., :1]).permute(0, 3, 1, 2)
        images = with_channels(images, self.channels).contiguous()
        return images[0] if chosen.ndim == 0 else images

    def _unchanged(self, number: int) -> Pixels:
        """Decode one of the sources, which could be read before."""
        try:
            pixels = self.decode(self.sources[number])
            height, width = pixels.shape[:2]
            if (height, width) == self.size:
                return pixels
            got = f"{width} x {height} pixels, which were {self.size[1]} x {self.size[0]}"
        except (OSError, DataError) as error:
            got = error.got if isinstance(error, DataError) else str(error)
        raise DataError(
            "Images must stay as they are while they are used",
            f"Got {self.name(number)}: {got}",
            "Put it back, and go on from the last checkpoint",
        )

    def each(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode batch after batch of places ``int64 [M]``; workers are some batches ahead."""
        return mapped_ahead(self.__getitem__, batches, self.workers)

    def subset(self, which: Tensor) -> OnDemand:
        """Return the images at some places, ``int64 [M]``; nothing is decoded."""
        return dataclasses.replace(self, rows=self.rows[which])

    def split(self, sizes: list[int]) -> list[OnDemand]:
        """Divide them into so many images each; nothing is decoded."""
        return [dataclasses.replace(self, rows=rows) for rows in torch.split(self.rows, sizes)]

    def note(self) -> str:
        """Say what the user should know."""
        return (
            f"Images are decoded when a mini-batch needs them, by {self.workers} threads: in "
            f"memory they would take {self.nbytes / 1e6:,.0f} MB (--in-memory)"
        )

    def with_channels(self, channels: int) -> OnDemand:
        """Return the same images in grey or colour; nothing is decoded."""
        sums = self.sums if channels >= self.channels else None
        return dataclasses.replace(self, channels=channels, sums=sums)


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What is known of images that were all read once.

    Attributes:
        size: Height and width of each, in pixels.
        channels: 3 if any is in colour, else 1.
        sums: Of the pixels of each, see `pixel_sums`; 0 where it could not be read.
        white: What deeper values are scaled by.
        unreadable: Why some could not be read, by their places among the sources.
    """

    size: tuple[int, int]
    channels: int
    sums: Tensor
    white: WhiteLevels
    unreadable: Mapping[int, str]

    def stored(self) -> tuple[Tensor, str]:
        """Return a tensor and a text that `of` makes the same of."""
        about = {"size": self.size, "channels": self.channels, "white": self.white}
        return self.sums, json.dumps({**about, "unreadable": list(self.unreadable.items())})

    @classmethod
    def of(cls, sums: Tensor, text: str) -> Survey:
        """Rebuild from `stored`."""
        about = parse_json(text)
        height, width = about["size"]
        white, faults = WhiteLevels.of(about["white"]), dict(about["unreadable"])
        return cls((height, width), about["channels"], sums, white, faults)

    def images(
        self,
        sources: Sequence[Source],
        image_size: int | None,
        name: Callable[[int], str],
        workers: int,
    ) -> OnDemand:
        """Return those that could be read, in their order; arguments as for `survey`."""
        prepare()
        readable = torch.ones(len(sources), dtype=torch.bool)
        readable[list(self.unreadable)] = False
        return OnDemand(
            sources,
            name,
            partial(decode_image, image_size=image_size, white=self.white),
            self.size,
            self.channels,
            self.sums,
            torch.nonzero(readable)[:, 0],
            workers,
        )


def survey(
    sources: Sequence[Source],
    image_size: int | None,
    name: Callable[[int], str],
    reading: Reading,
) -> Survey:
    """Read every image once, so that none is found unreadable in the middle of a run.

    Args:
        sources: Encoded images or paths of image files.
        image_size: As for `decode_readable`.
        name: Says what the i-th of them is, for messages.
        reading: What is white, and how many threads decode.

    Raises:
        DataError: Sizes differ and no ``image_size`` was given, or as `white_levels`.
        InputError: Pillow is not installed.

    Warns:
        ImageWarning: Once, if the decoder had doubts about images that it did read.
    """
    prepare()
    with doubts_counted(len(sources)):
        white = white_levels(sources) if reading.white is None else reading.white
        decode = partial(decode_image, image_size=image_size, white=white)
        return _survey(sources, name, decode, white, reading.workers)


def _survey(
    sources: Sequence[Source],
    name: Callable[[int], str],
    decode: Callable[[Source], Pixels],
    white: WhiteLevels,
    workers: int,
) -> Survey:
    faults: dict[int, str] = {}

    def pixels(number: int) -> Pixels | None:
        try:
            return decode(sources[number])
        except DataError as error:
            faults[number] = error.got
            return None

    readable = ((i, found) for i in range(len(sources)) if (found := pixels(i)) is not None)
    first, shown = next(readable, (0, np.empty((0, 0, 3), np.uint8)))
    height, width = shown.shape[:2]

    def read(start: int) -> tuple[bool, Tensor]:
        colour, sums = False, torch.zeros(min(_CHUNK, len(sources) - start), 2, 3).long()
        for place in range(len(sums)):
            found = pixels(start + place)
            if found is None:
                continue
            check_same_size({first: shown, start + place: found}, name)
            colour |= found.shape[2] == 3
            flat = found.reshape(height * width, -1).astype(np.int64)
            sums[place, 0] = torch.from_numpy(flat.sum(0))
            sums[place, 1] = torch.from_numpy(np.square(flat, out=flat).sum(0))
        return colour, sums

    parts = list(mapped_ahead(read, range(0, len(sources), _CHUNK), workers))
    channels = 3 if any(colour for colour, _ in parts) else 1
    sums = torch.cat([each for _, each in parts])
    return Survey((height, width), channels, sums, white, dict(sorted(faults.items())))


def pixel_sums(images: Tensor) -> Tensor:
    """Sum the pixels of each channel, and their squares: ``int64 [N, 2, C]``.

    Whole numbers come to the same sum in any order.
    """
    wide = images.int()
    return torch.stack([wide.sum((2, 3)), wide.square_().sum((2, 3))], 1)


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Turn ``uint8 [N, C, H, W]`` from grey to colour or back."""
    if images.shape[1] in (1, channels):
        return images.expand(-1, channels, -1, -1)
    weights = torch.tensor(_GREY, dtype=torch.int32).view(1, 3, 1, 1)
    luma = (images.int() * weights).sum(1, keepdim=True) + (1 << 15)
    return (luma >> 16).to(torch.uint8)
