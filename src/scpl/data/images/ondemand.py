"""Images that stay encoded until a mini-batch asks for them, for more of them than memory holds.

Nothing decoded is kept, in memory or on disk, where a million photos of 224 pixels would take
150 GB: threads decode the next batches while the network learns from this one.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scpl.data.loader import mapped_ahead
from scpl.errors import DataError
from scpl.outside import available_memory

__all__ = ["Decoding", "InMemory", "OnDemand", "Survey", "pixel_sums", "survey", "with_channels"]

Source = bytes | Path
InMemory = Literal["auto", "yes", "no"]
Pixels = npt.NDArray[np.uint8]

_CHUNK = 256
_GREY = (19595, 38470, 7471)  # ITU-R 601 luma in 1/65536, as Pillow converts colour to grey
_MOST_OF_MEMORY = 1 / 4  # that is free: images are copied while they are decoded and divided


class Decoding(NamedTuple):
    """When images are decoded.

    Attributes:
        in_memory: ``yes``: once, and they are held in memory; ``no``: whenever a batch needs them;
            ``auto``: in memory if they take at most a quarter of what is free.
        workers: How many threads decode what is not held in memory.
    """

    in_memory: InMemory = "auto"
    workers: int = 2

    def holds(self, *shape: int) -> bool:
        """Whether images ``uint8 [N, C, H, W]`` are held in memory."""
        if self.in_memory == "auto":
            return math.prod(shape) <= _MOST_OF_MEMORY * available_memory()
        return self.in_memory == "yes"


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
            pixels = self.decode(self.sources[number])
            if pixels.shape[:2] != self.size:
                height, width = pixels.shape[:2]
                raise DataError(
                    "Images must stay as they are while they are used",
                    f"Got {self.name(number)} with {width} x {height} pixels, which had "
                    f"{self.size[1]} x {self.size[0]}",
                    "Start again when nothing changes them any more",
                )
            array[place] = pixels  # one grey channel spreads over all three
            colour |= pixels.shape[2] == 3
        images = torch.from_numpy(array if colour else array[..., :1]).permute(0, 3, 1, 2)
        images = with_channels(images, self.channels).contiguous()
        return images[0] if chosen.ndim == 0 else images

    def each(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode batch after batch of places ``int64 [M]``; workers are some batches ahead."""
        return mapped_ahead(self.__getitem__, batches, self.workers)

    def subset(self, which: Tensor) -> OnDemand:
        """Return the images at some places, ``int64 [M]``; nothing is decoded."""
        return dataclasses.replace(self, rows=self.rows[which])

    def between(self, start: int, end: int) -> OnDemand:
        """Return the images from ``start`` to before ``end``; nothing is decoded."""
        return dataclasses.replace(self, rows=self.rows[start:end])

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
        sums: Of the pixels of each, see `pixel_sums`.
        unreadable: Why some could not be read, by their places among the sources.
    """

    size: tuple[int, int]
    channels: int
    sums: Tensor
    unreadable: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Survey:
        """Rebuild from `tensors`."""
        height, width, channels = tensors["shape"].tolist()
        return cls((height, width), channels, tensors["sums"])

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is known, if all could be read."""
        return {"shape": torch.tensor([*self.size, self.channels]), "sums": self.sums}


def survey(
    sources: Sequence[Source],
    name: Callable[[int], str],
    decode: Callable[[Source], Pixels],
    workers: int,
) -> Survey:
    """Read every image once, so that none is found unreadable in the middle of a run.

    Raises:
        DataError: Sizes differ, or no image can be read.
    """
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
            if found.shape[:2] != (height, width):
                raise DataError(
                    "Images must all be of one size unless a size is given",
                    f"Got {name(first)} with {width} x {height} pixels and "
                    f"{name(start + place)} with {found.shape[1]} x {found.shape[0]}",
                    "Give `image_size`: each shorter side is resized to it and the centre cut out",
                )
            colour |= found.shape[2] == 3
            flat = found.reshape(height * width, -1).astype(np.int64)
            sums[place, 0] = torch.from_numpy(flat.sum(0))
            sums[place, 1] = torch.from_numpy(np.square(flat, out=flat).sum(0))
        return colour, sums

    parts = list(mapped_ahead(read, range(0, len(sources), _CHUNK), workers))
    channels = 3 if any(colour for colour, _ in parts) else 1
    sums = torch.cat([each for _, each in parts])
    return Survey((height, width), channels, sums, dict(sorted(faults.items())))


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
