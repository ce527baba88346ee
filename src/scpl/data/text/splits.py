"""The splits of a data set of texts: which tables, which columns, and which rows are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from scpl.data import columnar
from scpl.data.columnar import check_shards, saved, shards
from scpl.data.identity import shared, short
from scpl.data.known import EMBEDDED, IMAGE_SETS, TEXT_SETS, TextSet, find
from scpl.data.notes import Faults
from scpl.data.sampling import held_out, one_per_class, stratified
from scpl.data.spool import SpooledTexts
from scpl.data.tables import (
    SUFFIXES,
    check_columns,
    class_names,
    columns_of,
    is_table,
    rows_of,
    tables_in,
    text_of,
)
from scpl.data.text.targets import Targets, targets_of
from scpl.errors import DataError, InputError, unknown_name
from scpl.seeding import generator
from scpl.tasks import TASKS, Classes

__all__ = [
    "Columns",
    "Files",
    "Hold",
    "SplitSettings",
    "Splits",
    "Texts",
    "choose_columns",
    "find_files",
    "is_text",
    "labelled",
    "locate",
    "numbered",
    "read_splits",
    "read_texts",
    "targets_in",
]

# Which tables

_IMAGE_COLUMNS = {"image", "img"}
_VALID_NAMES = ("validation", "valid", "val", "dev")


@dataclasses.dataclass(frozen=True)
class Files:
    """The tables of a text data set; without any for ``test``, rows of ``train`` are held out."""

    name: str
    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    known: TextSet | None = None
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, in a fixed order."""
        return (*self.train, *self.valid, *self.test)


def is_text(name: str) -> bool:
    """Whether a name is that of a text data set, of a table, or of a folder of tables of texts."""
    if name in TEXT_SETS or name in IMAGE_SETS or name == EMBEDDED:
        return name in TEXT_SETS
    path = Path(name).expanduser()
    if not path.is_dir():
        return is_table(path)
    train = tables_in(path, "train") or saved(path)
    if not train:
        return False
    names = columns_of(train[0]) if train[0].suffix in columnar.SUFFIXES else ()
    return not _IMAGE_COLUMNS.intersection(names)


def find_files(
    name: str,
    *,
    data_dir: Path | None = None,
    test_data: Path | None = None,
    download: bool = True,
) -> Files:
    """Find the files of a text data set, without reading them.

    A name is a key of ``TEXT_SETS``, a table, or a folder with a table ``train.*`` or shards
    ``train-*.parquet``, and perhaps others for ``valid`` and ``test``.

    Raises:
        DataError: Files are missing.
        InputError: The name is not known.
    """
    if name in TEXT_SETS:
        known = TEXT_SETS[name]
        found = find(
            name,
            known,
            lambda root, certain: (_inside if certain else locate)(root, name),
            files=f"train-*.parquet and {known.test}-*.parquet",
            data_dir=data_dir,
            download=download,
        )
    else:
        found = _find_own(name)
    if test_data is not None:
        if not test_data.is_file():
            raise DataError("`test_data` must be an existing table", f"Got {test_data}")
        found = dataclasses.replace(found, test=(test_data.expanduser(),))
    return found


def _find_own(name: str) -> Files:
    path = Path(name).expanduser()
    if path.is_file() or (is_table(path) and not path.is_dir()):
        columns_of(path)  # which says what is wrong with it
        return Files(path.stem, (path,))
    if not path.is_dir():
        advice = f"The path of a table works too ({', '.join(SUFFIXES)}), or of a folder of tables"
        raise unknown_name("text data set", name, TEXT_SETS, advice)
    train, test = tables_in(path, "train"), tables_in(path, "test")
    valid = next((found for name in _VALID_NAMES if (found := tables_in(path, name))), ())
    if not train and (train := tuple(saved(path))):  # one split: a share of it tests
        return Files(path.resolve().name, train)
    if not train:
        raise DataError(
            "A folder of tables must hold one named train",
            f"Got none in {path}",
            f"Name it train with one of: {', '.join(SUFFIXES)}",
        )
    notes: tuple[str, ...] = ()
    if valid and not test:
        notes = (f"tested on {valid[0].name}, as there is no table named test",)
        valid, test = (), valid
    return Files(path.resolve().name, train, valid, test, notes=notes)


def locate(root: Path, name: str) -> Files | None:
    """Find a known set in its folder below ``root``, or in ``root`` if that is its folder."""
    (folder,) = TEXT_SETS[name].folders
    found = _inside(root / folder, name)
    # All sets have files of the same names, so a folder of another name proves nothing.
    return _inside(root, name) if found is None and root.resolve().name == folder else found


def _inside(folder: Path, name: str) -> Files | None:
    known = TEXT_SETS[name]
    for place in (folder, folder / known.subfolder):
        train, test = shards(place, "train"), shards(place, known.test)
        notes = []
        if not train and (train := shards(place, "train_partial")):
            notes.append(f"trains on {train[0].name}: a part of {name}, without the rest")
        if not (train and test):
            continue
        check_shards(train)
        check_shards(test)
        if known.test != "test":
            notes.append(
                f"tested on the {known.test} split, as in the literature: the hub hides the labels "
                "of test"
                + (f" ({place / 'test-*.parquet'} is not used)" if shards(place, "test") else "")
            )
        return Files(name, tuple(train), (), tuple(test), known, tuple(notes))
    return None


# Which columns

_TEXT_NAMES = ("text", "sentence", "content")
_LABEL_NAME = "label"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the text columns, which are joined by a space, and of the target columns."""

    text: tuple[str, ...]
    label: tuple[str, ...]


Hold: TypeAlias = Callable[[Iterable[str]], list[str] | SpooledTexts]
"""Takes texts that come one by one, and holds them: in memory (``list``), or in a file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Texts with their labels: ``int64 [N]``, or ``[N, C]`` for another task than classes."""

    texts: list[str] | SpooledTexts
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, chosen: Tensor) -> Texts:
        """Keep the rows of a mask, ``bool [N]``, in order."""
        places = torch.nonzero(chosen)[:, 0].numpy()
        if isinstance(self.texts, SpooledTexts):
            return Texts(self.texts.in_order(places), self.labels[chosen])
        return Texts([self.texts[place] for place in places], self.labels[chosen])

    def digests(self) -> Tensor:
        """Digest the texts, ``int64 [N]``; case and spaces do not count."""
        normal = (" ".join(text.lower().split()) for text in self.texts)
        return _column((short(text.encode("utf-8", "surrogatepass")) for text in normal), np.int64)

    def filled(self) -> Tensor:
        """Which are not empty, ``bool [N]``."""
        return _column(map(bool, self.texts), np.bool_)


def _column(values: Iterable[int], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.fromiter(values, dtype))


def choose_columns(files: Files, text: Sequence[str], label: Sequence[str]) -> Columns:
    """Choose the columns, by default those with the usual names.

    Raises:
        DataError: There are none of these names.
        InputError: A label is one of the text columns, or named twice.
    """
    path = files.train[0]
    known = columns_of(path)
    if not text:
        usual = files.known.text if files.known else _TEXT_NAMES
        text = [next((name for name in usual if name in known), usual[0])]
    columns = Columns(tuple(text), tuple(label) or (_LABEL_NAME,))
    check_columns(path, known, (*columns.text, *columns.label))
    for name in columns.label:
        if name in columns.text:
            raise InputError(
                "`label` must not be one of the columns in `text`: the network would read the "
                "answer",
                f"Got {name!r}",
            )
        if columns.label.count(name) > 1:
            raise InputError("`label` must name each column once", f"Got {name!r} twice")
    return columns


def labelled(files: Files, columns: Columns, wanted: Path | None) -> Files:
    """Pass over tables that have no targets, as the test table of many a competition.

    Args:
        files: Those of a data set.
        columns: Where texts and targets stand.
        wanted: What the user says is to be tested on: reading it says what is wrong with it.
    """
    there: dict[str, Any] = {}
    notes = list(files.notes)
    for name, paths in (("valid", files.valid), ("test", files.test)):
        missing = sorted(set(columns.label) - set(columns_of(paths[0]))) if paths else []
        if missing and paths != (wanted,):
            notes.append(f"{paths[0]} is passed over, as it has no column {missing[0]!r}")
            paths = ()
        there[name] = paths
    return dataclasses.replace(files, notes=tuple(notes), **there)


def read_texts(
    paths: Sequence[Path],
    columns: Columns,
    targets: Targets[Any],
    faults: Faults,
    hold: Hold = list,
) -> tuple[list[str] | SpooledTexts, Sequence[Any]]:
    """Read the texts of some tables and what is to be predicted; unlabelled rows are left out.

    Raises DataError where a table is damaged, or a value is no text or no target.
    """
    values = targets.column()

    def texts() -> Iterator[str]:
        for path in paths:
            for number, cells in rows_of(path, (*columns.text, *columns.label), faults):
                place = f"{path.name} row {number}"
                value = targets.read(cells[len(columns.text) :], place)
                if value is None:
                    faults.add("rows without a label left out", place)
                    continue
                text = text_of(cells[: len(columns.text)], columns.text, place)
                values.append(value)
                yield text

    return hold(texts()), values


def numbered(
    rows: tuple[list[str] | SpooledTexts, Sequence[Any]],
    targets: Targets[Any],
    names: Sequence[str],
    paths: Sequence[Path],
) -> Texts:
    """Turn targets into numbers; DataError if there is no row, or an unknown class."""
    if not rows[0]:
        raise DataError("A split must hold at least one labelled text", f"Got none in {paths[0]}")
    return Texts(rows[0], targets.tensor(rows[1], names, paths[0]))


# Which rows

_TEST_SEED = 0  # fixed: the same table must give the same test texts in every run


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """How texts are divided.

    Args:
        test_share: Share of the rows that is tested on, where the files have no test split.
        validation: Share of the training texts that is held out, where they have no such split.
        limit_train: Use only this many training texts, before the validation split.
        limit_test: Test on only this many.
        seed: Decides which texts validate and which stay; not which ones test.
        task: What is learnt, see `scpl.tasks.TASKS`.
    """

    test_share: float = 0.2
    validation: float = 0.1
    limit_train: int | None = None
    limit_test: int | None = None
    seed: int = 0
    task: str = Classes.kind

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A data set of texts, divided; and what the user should know of it.

    ``classes`` are the names of the outputs of a network: of classes, labels or numbers.
    """

    classes: tuple[str, ...]
    train: Texts
    valid: Texts | None
    test: Texts
    notes: tuple[str, ...] = ()


def read_splits(
    files: Files, columns: Columns, settings: SplitSettings, hold: Hold = list
) -> Splits:
    """Read all texts and divide them.

    Training texts that are empty are left out; others stay, for the network must answer them.

    Args:
        files: Where the texts are.
        columns: Where texts and targets stand.
        settings: How they are divided.
        hold: Holds the texts.

    Raises:
        DataError: There are fewer than two classes, a class has no training text, a label of
            another split is unknown, or a share is too small or large for the rows.
    """
    faults = Faults()
    targets = targets_in(files, columns, settings.task)
    rows = read_texts(files.train, columns, targets, faults, hold)
    classes = targets.names(rows[1], files.train[0])

    def read(paths: Sequence[Path]) -> Texts:
        return numbered(read_texts(paths, columns, targets, faults, hold), targets, classes, paths)

    train = numbered(rows, targets, classes, files.train)
    valid = read(files.valid) if files.valid else None
    if files.test:
        test = read(files.test)
    else:
        fixed = dataclasses.replace(settings, seed=_TEST_SEED)
        train, test = _hold_out(train, settings.test_share, fixed, "test", "test_share")
    notes = list(files.notes)
    known, sizes = files.known, (len(train), len(test))
    if known is not None and sizes != (known.num_train, known.num_test):
        notes.append(
            f"{files.name} should have {known.num_train:,} training and {known.num_test:,} test "
            f"texts; there are {sizes[0]:,} and {sizes[1]:,}"
        )
    filled = train.filled()
    for _ in range(int((~filled).sum())):
        faults.add("training texts that are empty left out", files.train[0].name)
    train = _limited(train.where(filled), "limit_train", settings)
    test = _limited(test, "limit_test", dataclasses.replace(settings, seed=_TEST_SEED))
    if valid is None and settings.validation > 0:
        train, valid = _hold_out(train, settings.validation, settings, "carve", "validation")
    targets.check_learnt(train.labels, classes)
    keys = {"validation": None if valid is None else valid.digests(), "test": test.digests()}
    notes += [*faults.notes(), *shared("texts", train.digests(), **keys), *targets.hints]
    notes.append(targets.balance(train.labels, classes))
    notes += targets.absent(test.labels, classes, "test")
    return Splits(classes, train, valid, test, tuple(notes))


def targets_in(
    files: Files, columns: Columns, task: str, known: Sequence[str] | None = None
) -> Targets[Any]:
    """Choose how the target columns of some files are read.

    Args:
        files: Where they stand.
        columns: Which they are.
        task: What is learnt.
        known: Names of the classes, where the files do not tell them.

    Raises:
        InputError: if a data set that is known by name has other targets.
    """
    if files.known is not None and task != Classes.kind:
        raise InputError(
            f"The texts of {files.name} have one class each", f"Got `task` {task}", "Leave it out"
        )
    named = files.known.classes if files.known else None
    if task == Classes.kind and named is None and len(columns.label) == 1:
        named = _class_names(files, columns.label[0])
    return targets_of(task, columns.label, named or known)


def _class_names(files: Files, column: str) -> tuple[str, ...] | None:
    """Read the names of numbered classes; those of all splits must be the same."""
    firsts = [paths[0] for paths in (files.train, files.valid, files.test) if paths]
    named = {path: class_names(path, column) for path in firsts}
    known = [(path, names) for path, names in named.items() if names is not None]
    for path, names in known[1:]:
        if names != known[0][1]:
            raise DataError(
                "Numbered classes must have the same names in all files",
                f"Got {', '.join(known[0][1][:20])} in {known[0][0]}, "
                f"but {', '.join(names[:20])} in {path}",
                "Write the names themselves as labels",
            )
    return known[0][1] if known else None


def _hold_out(
    rows: Texts, share: float, settings: SplitSettings, purpose: str, name: str
) -> tuple[Texts, Texts]:
    """Divide by class (or what the task sorts by); one text of each at least stays in the first."""
    draws, strata = generator(settings.seed, purpose), TASKS[settings.task].strata(rows.labels)
    chosen = held_out(strata, share, draws, f"`{name}`")
    return rows.where(~chosen), rows.where(chosen)


def _limited(rows: Texts, name: str, settings: SplitSettings) -> Texts:
    """Keep so many texts, with the same share of every class, and at least one of each."""
    limit: int | None = getattr(settings, name)
    if limit is None or limit >= len(rows):
        return rows
    draws, strata = generator(settings.seed, "limit"), TASKS[settings.task].strata(rows.labels)
    chosen = one_per_class(strata, draws)
    others = torch.nonzero(~chosen)[:, 0]
    count = limit - int(chosen.sum())
    if count < 0:
        raise DataError(
            f"`{name}` must leave at least one text of every class",
            f"Got {limit} for {int(chosen.sum())} classes",
        )
    chosen[others] = stratified(strata[others], count, draws)
    return rows.where(chosen)
