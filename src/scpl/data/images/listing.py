"""Which encoded images a data set is made of, before any is decoded.

A `Listing` says where each image lies (a file, or a row of parquet), its label, and what was left
out. Decoding starts from it, and so does whatever else needs to know which images there are.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scpl.data.cache import remember
from scpl.data.identity import short
from scpl.data.images.dataset import Split, sentence
from scpl.data.images.decode import decode_images
from scpl.data.notes import Faults
from scpl.data.parquet import rows
from scpl.data.sampling import stratified
from scpl.errors import DataError
from scpl.seeding import generator

__all__ = [
    "Format",
    "Item",
    "Listing",
    "Part",
    "Purpose",
    "Row",
    "Splits",
    "decoded",
    "digests",
    "encoded_rows",
]

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: the same images must give the same test images in every run


class Row(NamedTuple):
    """A row of a parquet file, with an encoded image in one of its columns."""

    file: Path
    number: int
    column: str

    def __str__(self) -> str:
        return f"row {self.number} of {self.file}"


Item = Path | Row
"""Where an encoded image lies."""

Purpose = Literal["all", "train", "valid", "test"]
"""What folders and files say that their images are for; all, where they do not say."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Images that are learnt from or tested on, none of them decoded.

    Args:
        items: Where each lies: all in files of their own, or all in rows; in a fixed order.
        labels: ``int64 [N]``, an index into the names of the classes.
        place: Which images these are, for messages, e.g. ``"photos/train"``.
    """

    items: Sequence[Item]
    labels: Tensor
    place: str

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Tensor, place: str = "") -> Part:
        """Return the images at ``indices`` (``int64 [M]``), in that order."""
        items = [self.items[index] for index in indices.tolist()]
        return Part(items, self.labels[indices], place or self.place)


class Splits(NamedTuple):
    """Images that were read; ``classes`` is None where the files do not name them."""

    train: Split
    test: Split
    classes: tuple[str, ...] | None = None
    valid: Split | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The images of a data set.

    Args:
        parts: By what they are for; ``"all"`` stands alone.
        classes: Name of each class; None where the files do not name them.
        left_out: What was left out, counted by reason.
        notes: What else the user should know.
    """

    parts: Mapping[Purpose, Part]
    classes: tuple[str, ...] | None
    left_out: Faults = dataclasses.field(default_factory=Faults)
    notes: tuple[str, ...] = ()

    def to_learn(self) -> tuple[Part, Part | None, Part]:
        """Say which images train, which validate (None: it is not said), and which test.

        Where none are for testing, those for validation test, or else a fifth is held out, the same
        in every run.

        Raises:
            DataError: None are to train on, or there are too few.
        """
        parts = self.parts
        train, valid, test = parts.get("train", parts.get("all")), None, parts.get("test")
        if train is None:
            seen = ", ".join(part.place for part in parts.values())
            raise DataError(
                "There must be images to train on", f"Got only {seen}", "Put them into train/"
            )
        if test is None:
            test = parts.get("valid")
        else:
            valid = parts.get("valid")
        if test is None:
            count = round(len(train) * _TEST_SHARE)
            chosen = stratified(train.labels, count, generator(_SPLIT_SEED, "carve"))
            test = train.take(torch.nonzero(chosen)[:, 0], f"{train.place} (a fifth, held out)")
            train = train.take(torch.nonzero(~chosen)[:, 0])
        return train, valid, test

    def sentence(self) -> str:
        """Say how many images of which folders train, validate and test."""
        train, valid, test = self.to_learn()
        return sentence(train=train, validation=valid, test=test)

    def decoded(self, image_size: int | None = None) -> Splits:
        """Decode the images, all to the same number of channels.

        Args:
            image_size: Resize each shorter side to this and cut out the centre, in pixels.

        Raises:
            DataError: as `to_learn`, or an image cannot be read.
            InputError: Pillow is not installed.
        """
        parts = [part for part in self.to_learn() if part is not None]
        splits = decoded(parts, image_size)
        valid = splits[1] if len(splits) == 3 else None
        notes = (*self.notes, *self.left_out.notes())
        return Splits(splits[0], splits[-1], self.classes, valid, notes)


def decoded(parts: Sequence[Part], image_size: int | None = None) -> list[Split]:
    """Decode parts together, so that all get the same number of channels."""
    items = [item for part in parts for item in part.items]
    files = dict.fromkeys(item.file if isinstance(item, Row) else item for item in items)

    def decode() -> Tensor:
        return decode_images(_sources(items), image_size, lambda index: str(items[index]))

    images = remember("images", list(files), image_size, len(items), decode)
    sizes = [len(part) for part in parts]
    each = zip(parts, torch.split(images, sizes), torch.split(digests(items), sizes), strict=True)
    return [Split(pixels, part.labels, part.place, content) for part, pixels, content in each]


def digests(items: Sequence[Item]) -> Tensor:
    """Digest the encoded images, ``int64 [N]``; what was digested before is remembered.

    Raises:
        DataError: An image cannot be read.
    """
    files = list(dict.fromkeys(item.file if isinstance(item, Row) else item for item in items))

    def digest() -> Tensor:
        groups = groupby(items, lambda item: item[::2] if isinstance(item, Row) else None)
        found = [each for _, group in groups for each in _digested(list(group))]
        return torch.tensor(found, dtype=torch.int64)

    return remember("digests", files, None, len(items), digest)


def _digested(items: Sequence[Item]) -> Iterator[int]:
    """Digest files, or rows of one file and column."""
    if isinstance(items[0], Row):
        file, _, column = items[0]
        wanted = {item.number for item in items if isinstance(item, Row)}
        found = {
            number: short(_image_bytes(value, number, file))
            for number, (value,) in enumerate(rows(file, [column]))
            if number in wanted
        }
        yield from (found[item.number] for item in items if isinstance(item, Row))
        return
    for item in items:
        assert isinstance(item, Path)
        try:
            yield short(item.read_bytes())
        except OSError as error:
            raise DataError(
                "An image must be readable", f"Got {item}: {error}", "Replace or remove it"
            ) from error


def _sources(items: Sequence[Item]) -> Sequence[bytes | Path]:
    rows = [item for item in items if isinstance(item, Row)]
    return encoded_rows(rows) if rows else [item for item in items if isinstance(item, Path)]


def encoded_rows(wanted: Sequence[Row]) -> list[bytes]:
    """Read the encoded images of some rows, in the order asked for."""
    numbers: dict[tuple[Path, str], set[int]] = defaultdict(set)
    for row in wanted:
        numbers[row.file, row.column].add(row.number)
    found = {}
    for (file, column), chosen in numbers.items():
        for number, (value,) in enumerate(rows(file, [column])):
            if number in chosen:
                found[Row(file, number, column)] = _image_bytes(value, number, file)
    return [found[row] for row in wanted]


def _image_bytes(value: Any, row: int, path: Path) -> bytes:
    # A row is {"bytes": ..., "path": ...} on the hub; plain bytes are as clear.
    image = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(image, bytes):
        raise DataError(
            "Parquet rows must hold the encoded images themselves",
            f"Got {type(value).__name__} without them in row {row} of {path}",
            "Embed the image files, or load the folder of images instead",
        )
    return image


class Format(NamedTuple):
    """A format in which data sets of images are kept.

    ``files`` says which files these are, for messages, and ``complete`` whether a folder holds all
    of them. ``read`` lists the encoded images of such a folder, or reads raw pixels. It raises
    DataError if a file is missing or damaged, and InputError if an optional package is missing.
    """

    files: str
    complete: Callable[[Path], bool]
    read: Callable[[Path], Listing | Splits]
