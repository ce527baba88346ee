"""Tables that name images and their classes: a row for each image, which is a file of its own.

A name is a path from the folder of the table or from a folder in it, with its ending or, as
in many competitions, without. The first names tell how all names of a table are to be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from scpl.data.classes import check_known, classes_in, label_of, none_labelled
from scpl.data.images.decode import EXTENSIONS
from scpl.data.images.folders import PURPOSES, is_hidden, part_of, purpose_of, unusable
from scpl.data.images.listing import Format, Listing, Purpose
from scpl.data.notes import Faults
from scpl.data.tables import (
    check_columns,
    class_names,
    columns_of,
    is_missing,
    is_table,
    rows_of,
    tables_in,
)
from scpl.errors import DataError

__all__ = ["Naming", "TableSettings", "image_tables", "names_images", "naming_of"]

Tables = Mapping[Purpose, tuple[Path, ...]]

_FIX = "Choose columns with `image` and `label`"
_TRIED = 3  # rows that tell how names are to be read
_LONGEST = 255  # characters of a name
_MOST_FOLDERS = 50  # that are looked into
_FEW = 5  # names in a message
_ENDINGS = ("", *sorted(EXTENSIONS), *sorted(ending.upper() for ending in EXTENSIONS))


class TableSettings(NamedTuple):
    """How a table of images is read.

    Attributes:
        image: The column that names the image files; by default the first one that does.
        label: The column of the classes; by default ``label``.
        test_data: Another table to test on.
        skip_missing: Leave out images that are not there.
    """

    image: str | None = None
    label: str | None = None
    test_data: Path | None = None
    skip_missing: bool = False


class Naming(NamedTuple):
    """How a table names its images: ``folder / (name + ending)``."""

    table: Path
    column: str
    folder: Path
    ending: str = ""

    def __str__(self) -> str:
        ending = f", without {self.ending}" if self.ending else ""
        return f"{self.table}: column {self.column!r} names images in {self.folder}{ending}"

    def file(self, name: Any) -> Path:
        """The file of a cell."""
        return self.folder / f"{str(name).strip()}{self.ending}"

    def images(
        self, others: Sequence[str], left_out: Faults
    ) -> Iterator[tuple[int, Path, list[Any]]]:
        """Yield of each row its number, the file that it names, and the cells of other columns.

        Rows that name no image, or one that is never read, are left out and counted.

        Raises:
            DataError: The table is damaged or lacks a column.
        """
        check_columns(self.table, columns_of(self.table), others, _FIX)
        for number, (name, *cells) in rows_of(self.table, [self.column, *others], left_out):
            if is_missing(name):
                left_out.add("rows without an image left out", f"{self.table.name} row {number}")
                continue
            file = self.file(name)
            if file.is_file() and (why := unusable(file)):
                left_out.add(why, str(file))
            else:
                yield number, file, cells


def naming_of(table: Path, column: str | None = None) -> Naming:
    """Find out how a table names images; ``column``: the one that does, if the user says so.

    Raises:
        DataError: It does not become clear.
    """
    if column is not None:
        check_columns(table, columns_of(table), [column], _FIX)
    found = _naming(table, column)
    if found is None:
        named = "a column" if column is None else f"in column {column!r}"
        raise DataError(
            f"A table of images must have {named} names of files that are there: paths from its "
            "folder or from a folder in it, with their ending or without",
            f"Got the columns {', '.join(columns_of(table))} in {table}; looked in "
            f"{', '.join(map(str, _folders(table)))} for what the first {_TRIED} rows name",
            f"Write paths from {table.parent} into the table",
        )
    return found


def names_images(name: str) -> bool:
    """Whether a table, or the table ``train`` in a folder, names image files."""
    tables = _tables(Path(name).expanduser())
    return bool(tables) and _naming(next(iter(tables.values()))[0]) is not None


def image_tables(name: Path, settings: TableSettings) -> Format | None:
    """Return what lists the images of a table, or of the tables in a folder; None if it has none.

    Args:
        name: A table, or a folder with a table ``train``, and perhaps ``valid`` and ``test``.
        settings: How they are read.
    """
    tables = _tables(name)
    if not tables or (settings.image is None and not names_images(str(name))):
        return None
    what = "a table that names images and their classes"
    return Format(what, lambda _: True, lambda _: _listed(tables, settings))


def _tables(name: Path) -> Tables:
    """The tables of a data set by what they are for; of one alone that is for all."""
    if not name.is_dir():
        return {"all": (name,)} if is_table(name) and name.is_file() else {}
    found: dict[Purpose, tuple[Path, ...]] = {}
    for purpose, usual in PURPOSES.items():
        if tables := next((there for each in usual if (there := tables_in(name, each))), ()):
            found[purpose] = tables
    return found if "train" in found else {}


# How names are to be read


def _naming(table: Path, column: str | None = None) -> Naming | None:
    """Find a column of which the first names are files; else one that at least looks so."""
    known = columns_of(table)
    wanted = [name for name in known if known.count(name) == 1] if column is None else [column]
    first = [values for _, values in islice(rows_of(table, wanted, Faults()), _TRIED)]
    alike = None
    for place, name in enumerate(wanted):
        cells = [values[place] for values in first if not is_missing(values[place])]
        names = [str(cell).strip() for cell in cells if isinstance(cell, (str, int))]
        if not names or max(map(len, names)) > _LONGEST:
            continue
        if found := _found(table, name, names):
            return found
        if alike is None and all(Path(each).suffix.lower() in EXTENSIONS for each in names):
            alike = Naming(table, name, table.parent)
    return alike


def _found(table: Path, column: str, names: Sequence[str]) -> Naming | None:
    """Find the folder and the ending with which most of some names are files."""
    ways = [Naming(table, column, folder, end) for folder in _folders(table) for end in _ENDINGS]
    hits = [sum(way.file(name).is_file() for name in names) for way in ways]
    best = [way for way, count in zip(ways, hits, strict=True) if count and count == max(hits)]
    usual = [way for way in best if way.folder in _usual_folders(table)]
    folders = list(dict.fromkeys(way.folder for way in best))
    if best and not usual and len(folders) > 1:
        raise DataError(
            "It must be clear which images a table names",
            f"Got {names[0]!r} in {table}, and images of this name in "
            f"{', '.join(map(str, folders[:_FEW]))}",
            f"Write paths from {table.parent} into the table",
        )
    return next(iter(usual or best), None)


def _folders(table: Path) -> list[Path]:
    """Where the images of a table may lie, the usual places first."""
    return list(dict.fromkeys([*_usual_folders(table), *_inside(table)]))[:_MOST_FOLDERS]


def _usual_folders(table: Path) -> list[Path]:
    """The folder of a table; in it the one that is called as the table, or for training."""
    inside, stem = _inside(table), table.stem.lower()
    called = [folder for folder in inside if folder.name.lower() == stem]
    return [table.parent, *called, *(folder for folder in inside if purpose_of(folder) == "train")]


def _inside(table: Path) -> list[Path]:
    return sorted(p for p in table.parent.iterdir() if p.is_dir() and not is_hidden(p.name))


# Images and their classes


def _listed(tables: Tables, settings: TableSettings) -> Listing:
    """List the images of some tables."""
    label, left_out = settings.label or "label", Faults()
    whole: Purpose = "train" if "train" in tables else "all"
    tables, notes = dict(tables), []
    if settings.test_data is not None:
        tables = {"train": tables.pop(whole), **tables, "test": (settings.test_data.expanduser(),)}
        whole = "train"
    for purpose, (first, *_) in list(tables.items()):
        given = purpose == whole or first == settings.test_data
        if not given and label not in columns_of(first):
            notes.append(f"{first} is passed over, as it has no column {label!r}")
            del tables[purpose]
    pairs = {
        purpose: _labelled(each, settings, label, left_out, notes)
        for purpose, each in tables.items()
    }
    named = class_names(tables[whole][0], label)
    names = classes_in([name for _, name in pairs[whole]], label, tables[whole][0], named)
    index, parts = {name: number for number, name in enumerate(names)}, {}
    for purpose, found in pairs.items():
        table = tables[purpose][0]
        check_known({n for _, n in found}, names, str(table), "Correct them, or train on them")
        parts[purpose] = part_of([(file, index[name]) for file, name in found], table)
    return Listing(parts, names, left_out, tuple(notes))


def _labelled(
    tables: Sequence[Path],
    settings: TableSettings,
    label: str,
    left_out: Faults,
    notes: list[str],
) -> list[tuple[Path, str]]:
    """The images of some tables with the names of their classes; those without are left out."""
    pairs, missing = [], []
    for table in tables:
        naming, known = naming_of(table, settings.image), class_names(table, label)
        notes.append(str(naming))
        for number, file, (cell,) in naming.images([label], left_out):
            name = label_of(cell, known, f"{table.name} row {number}")
            if name is None:
                left_out.add("rows without a label left out", f"{table.name} row {number}")
            elif file.is_file():
                pairs.append((file, name))
            else:
                missing.append(file)
                left_out.add("images that are not there left out", str(file))
    if missing and not (settings.skip_missing and pairs):
        more = f" and {len(missing) - _FEW:,} more" if len(missing) > _FEW else ""
        raise DataError(
            "Every image that a table names must be there, as a path from its folder or a folder "
            "in it",
            f"{len(missing):,} of {len(missing) + len(pairs):,} are not: "
            f"{', '.join(map(str, missing[:_FEW]))}{more}",
            "Correct or remove these rows, or leave them out with `skip_unreadable`",
        )
    if not pairs:
        raise none_labelled([label], tables[0])
    return pairs
