"""Which encoded images a data set is made of, before any is decoded.

A `Listing` says where each image lies (a file, or a row of parquet), its label, and what was left
out. Decoding starts from it, and so does whatever else needs to know which images there are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scpl.data.cache import remember
from scpl.data.columnar import rows
from scpl.data.identity import short
from scpl.data.images.dataset import Split, check_classes, sentence
from scpl.data.images.decode import (
    AS_IT_IS,
    EIGHT_BITS,
    Decoded,
    Reading,
    WhiteLevels,
    check_readable,
    check_room,
    decode_image,
    decode_readable,
    prepare,
    white_levels,
)
from scpl.data.images.ondemand import OnDemand, Survey, survey
from scpl.data.notes import Faults
from scpl.data.sampling import held_out
from scpl.data.spool import PackedPaths, PackedTexts, Spool
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
_TRIED = 8  # of the first images, for one that can be read
_SPLIT_SEED = 0  # fixed: the same images must give the same test images in every run


class Row(NamedTuple):
    """A row of a parquet or Arrow file, with an encoded image in one of its columns."""

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
    white: WhiteLevels = EIGHT_BITS


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
        if self.classes is not None:
            check_classes(self.classes, train.place)
        if test is None:
            test = parts.get("valid")
        else:
            valid = parts.get("valid")
        if test is None:
            draws = generator(_SPLIT_SEED, "carve")
            chosen = held_out(train.labels, _TEST_SHARE, draws, "a test share of")
            test = train.take(torch.nonzero(chosen)[:, 0], f"{train.place} (a fifth, held out)")
            train = train.take(torch.nonzero(~chosen)[:, 0])
        return train, valid, test

    def to_test(self) -> Part:
        """Say which images another network than one that learnt here is tested on.

        Raises:
            DataError: All of them are to train on.
        """
        purposes: tuple[Purpose, ...] = ("test", "all", "valid")
        for purpose in purposes:
            if purpose in self.parts:
                return self.parts[purpose]
        place = self.parts["train"].place
        raise DataError(
            "A folder to test on must hold test/, or the folders of the classes themselves",
            f"Got only {place}",
            f"To test on all of it, give {place}",
        )

    def sentence(self) -> str:
        """Say how many images of which folders train, validate and test."""
        train, valid, test = self.to_learn()
        return sentence(train=train, validation=valid, test=test)

    def decoded(self, image_size: int | None = None, reading: Reading = AS_IT_IS) -> Splits:
        """Decode the images, all to the same number of channels.

        Args:
            image_size: Resize each shorter side to this and cut out the centre, in pixels.
            reading: What else is wished of it.

        Raises:
            DataError: as `to_learn`, or as `decoded`.
            InputError: Pillow is not installed.
        """
        parts = [part for part in self.to_learn() if part is not None]
        splits, white, told = decoded(parts, image_size, reading)
        valid = splits[1] if len(splits) == 3 else None
        notes = (*self.notes, *self.left_out.notes(), *told)
        return Splits(splits[0], splits[-1], self.classes, valid, notes, white)


def decoded(
    parts: Sequence[Part], image_size: int | None = None, reading: Reading = AS_IT_IS
) -> tuple[list[Split], WhiteLevels, list[str]]:
    """Decode parts together, so that all get the same number of channels and the same white.

    Returns:
        The parts, what is white in them, and what the user should know.

    Raises:
        DataError: as `decode_readable`; images cannot be read, or, where these are left out, all
            of a class in one part.
    """
    items = [item for part in parts for item in part.items]
    places = PackedTexts(map(str, items))
    images, found = _found(items, places, image_size, reading)
    if not reading.skip_unreadable:
        check_readable(found.unreadable, len(items), places.__getitem__)
    content = digests(items)
    kept = torch.ones(len(items), dtype=torch.bool)
    kept[list(found.unreadable)] = False
    left_out, sizes = Faults(), [len(part) for part in parts]
    for index, why in found.unreadable.items():
        left_out.add("images that cannot be read left out", f"{places[index]}: {why}")
    parts = [
        _kept(part, mask, left_out)
        for part, mask in zip(parts, torch.split(kept, sizes), strict=True)
    ]
    sizes = [len(part) for part in parts]
    pixels: Sequence[Tensor | OnDemand] = (
        images.split(sizes) if isinstance(images, OnDemand) else torch.split(images, sizes)
    )
    told = [images.note()] if isinstance(images, OnDemand) else []
    splits = [
        Split(each, part.labels, part.place, part.items, digested)
        for part, each, digested in zip(
            parts, pixels, torch.split(content[kept], sizes), strict=True
        )
    ]
    return splits, found.white, [*left_out.notes(), *found.white.notes(), *told]


def _found(
    items: Sequence[Item], places: PackedTexts, image_size: int | None, reading: Reading
) -> tuple[Tensor | OnDemand, Decoded | Survey]:
    """Decode images, or read them once to be decoded on demand; those that can be read."""
    files, rows = _files(items), [item.number for item in items if isinstance(item, Row)]

    def name(index: int) -> str:
        return places[index]

    def decode() -> tuple[Tensor, str]:
        return decode_readable(_sources(items), image_size, name, reading.white).stored()

    def look_at() -> tuple[Tensor, str]:
        return survey(sources, image_size, name, reading).stored()

    if image_size is not None:  # before the first is decoded
        check_room(len(items) if reading.in_memory == "yes" else 1, 1, image_size, image_size)
    if reading.holds(len(items), 3, *_size(items, image_size)):
        decoded = Decoded.of(
            *remember("images", files, (image_size, reading.white, rows), len(items), decode)
        )
        return decoded.images, decoded
    sources = _on_disk(items, places)
    how = (image_size, reading.white, rows)
    known = Survey.of(*remember("survey", files, how, len(items), look_at))
    return known.images(sources, image_size, name, reading.workers), known


def _kept(part: Part, mask: Tensor, left_out: Faults) -> Part:
    """Leave out what cannot be read; nobody wants to lose a class by that."""
    lost = set(part.labels.tolist()) - set(part.labels[mask].tolist())
    if lost:
        first = part.items[part.labels.tolist().index(min(lost))]
        raise DataError(
            "Every class must keep an image that can be read",
            f"Got none of {len(lost)} of the classes in {part.place}, such as that of {first}; "
            + "; ".join(left_out.notes()),
            "Replace these images, or remove the class",
        )
    return part.take(torch.nonzero(mask)[:, 0])


def digests(items: Sequence[Item]) -> Tensor:
    """Digest the encoded images, ``int64 [N]``; what was digested before is remembered.

    A file that cannot be read is as an empty one: decoding says why.
    """
    rows = [item for item in items if isinstance(item, Row)]

    def digest() -> tuple[Tensor, str]:
        found: dict[Item, int] = {row: short(value) for row, value in _each_row(rows)}
        for item in items:
            if isinstance(item, Path):
                found[item] = short(_content(item))
        return torch.tensor([found[item] for item in items], dtype=torch.int64), ""

    return remember("digests", _files(items), [row.number for row in rows], len(items), digest)[0]


def _content(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def _files(items: Sequence[Item]) -> list[Path]:
    return list(dict.fromkeys(item.file if isinstance(item, Row) else item for item in items))


def _sources(items: Sequence[Item]) -> Sequence[bytes | Path]:
    rows = [item for item in items if isinstance(item, Row)]
    return encoded_rows(rows) if rows else [item for item in items if isinstance(item, Path)]


def _on_disk(items: Sequence[Item], places: PackedTexts) -> Sequence[bytes | Path]:
    """The same where nothing but their places is held in memory."""
    rows = [item for item in items if isinstance(item, Row)]
    if not rows:
        return PackedPaths(places)
    numbers: dict[Row, int] = {}

    def values() -> Iterator[bytes]:
        for row, value in _each_row(rows):
            numbers[row] = len(numbers)
            yield value

    # A row of parquet cannot be read without many others.
    spool = Spool(values())
    return spool.in_order(numbers[row] for row in rows)


def encoded_rows(wanted: Sequence[Row]) -> list[bytes]:
    """Read the encoded images of some rows, in the order asked for."""
    found = dict(_each_row(wanted))
    return [found[row] for row in wanted]


def _each_row(wanted: Sequence[Row]) -> Iterator[tuple[Row, bytes]]:
    """Read the encoded images of some rows, in the order in which they lie in their files."""
    numbers: dict[tuple[Path, str], set[int]] = defaultdict(set)
    for row in wanted:
        numbers[row.file, row.column].add(row.number)
    for (file, column), chosen in numbers.items():
        for number, (value,) in enumerate(islice(rows(file, [column]), max(chosen) + 1)):
            if number in chosen:
                yield Row(file, number, column), _image_bytes(value, number, file)


def _size(items: Sequence[Item], image_size: int | None) -> tuple[int, int]:
    """Height and width of decoded images, as the first ones tell; no pixel if none can be read."""
    if image_size is not None:
        return image_size, image_size
    prepare()
    for item in items[:_TRIED]:
        with suppress(DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all are decoded again
            source = _sources([item])
            height, width, _ = decode_image(source[0], white=white_levels(source)).shape
            return height, width
    return 0, 0


def _image_bytes(value: Any, row: int, path: Path) -> bytes:
    # A row is {"bytes": ..., "path": ...} on the hub; plain bytes are as clear.
    image = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(image, bytes):
        raise DataError(
            "Rows must hold the encoded images themselves",
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
