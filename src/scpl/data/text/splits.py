"""The splits of a data set of texts: which tables, which columns, and which rows are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl.data.known import EMBEDDED, IMAGE_SETS, TEXT_SETS, TextSet, find
from scpl.data.parquet import check_shards, shards
from scpl.data.sampling import one_per_class, stratified
from scpl.data.text.tables import (
    SUFFIXES,
    Faults,
    check_columns,
    class_names,
    columns_of,
    is_table,
    label_of,
    rows_of,
    sorted_labels,
    text_of,
)
from scpl.errors import DataError, InputError, unknown_name
from scpl.seeding import generator

__all__ = [
    "Columns",
    "Files",
    "SplitSettings",
    "Splits",
    "Texts",
    "choose_columns",
    "find_files",
    "is_text",
    "locate",
    "numbered",
    "read_splits",
    "read_texts",
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
    train = _tables(path, "train")
    if not train:
        return False
    return train[0].suffix != ".parquet" or not _IMAGE_COLUMNS & set(columns_of(train[0]))


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
    train, test = _tables(path, "train"), _tables(path, "test")
    valid = next((found for name in _VALID_NAMES if (found := _tables(path, name))), ())
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


def _tables(folder: Path, split: str) -> tuple[Path, ...]:
    """The tables of one split: ``split.csv`` and so on, or shards of parquet."""
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            if suffix != ".parquet" and (place / f"{split}{suffix}").is_file():
                return (place / f"{split}{suffix}",)
        if found := shards(place, split):
            check_shards(found)
            return tuple(found)
    return ()


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
    """Names of the text columns, which are joined by a space, and of the label column."""

    text: tuple[str, ...]
    label: str


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Texts with their labels, ``int64 [N]``."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, chosen: Tensor) -> Texts:
        """Keep the rows of a mask, ``bool [N]``, in order."""
        keep = zip(self.texts, chosen.tolist(), strict=True)
        return Texts([text for text, kept in keep if kept], self.labels[chosen])


def choose_columns(files: Files, text: Sequence[str], label: str | None) -> Columns:
    """Choose the columns, by default those with the usual names.

    Raises:
        DataError: There are none of these names.
        InputError: The label is one of the text columns.
    """
    path = files.train[0]
    known = columns_of(path)
    if not text:
        usual = files.known.text if files.known else _TEXT_NAMES
        text = [next((name for name in usual if name in known), usual[0])]
    columns = Columns(tuple(text), label or _LABEL_NAME)
    check_columns(path, known, (*columns.text, columns.label))
    if columns.label in columns.text:
        raise InputError(
            "`label` must not be one of the columns in `text`: the network would read the answer",
            f"Got {columns.label!r}",
        )
    return columns


def read_texts(
    paths: Sequence[Path], columns: Columns, names: Sequence[str] | None, faults: Faults
) -> tuple[list[str], list[str]]:
    """Read the texts of some tables and the names of their classes; unlabelled rows are left out.

    Whole-numbered labels are indices into ``names``. Raises DataError where a table is damaged, or
    a value is no text or no label.
    """
    texts, labels = [], []
    for path in paths:
        for number, (*values, value) in rows_of(path, (*columns.text, columns.label), faults):
            place = f"{path.name} row {number}"
            label = label_of(value, names, place)
            if label is None:
                faults.add("rows without a label left out", place)
                continue
            texts.append(text_of(values, columns.text, place))
            labels.append(label)
    return texts, labels


def numbered(
    rows: tuple[list[str], list[str]], classes: Sequence[str], paths: Sequence[Path]
) -> Texts:
    """Turn the names of classes into numbers; DataError if there is no row, or an unknown class."""
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for label in rows[1] if label not in index})
    if unknown:
        raise DataError(
            f"Every label must be a class that is learnt: {', '.join(classes[:20])}",
            f"Got also {', '.join(map(repr, unknown[:10]))} in {paths[0].name}",
            "Correct the labels, or add training texts of these",
        )
    if not rows[0]:
        raise DataError("A split must hold at least one labelled text", f"Got none in {paths[0]}")
    return Texts(rows[0], torch.tensor([index[label] for label in rows[1]], dtype=torch.int64))


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
    """

    test_share: float = 0.2
    validation: float = 0.1
    limit_train: int | None = None
    limit_test: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """A data set of texts, divided; and what the user should know of it."""

    classes: tuple[str, ...]
    train: Texts
    valid: Texts | None
    test: Texts
    notes: tuple[str, ...] = ()


def read_splits(files: Files, columns: Columns, settings: SplitSettings) -> Splits:
    """Read all texts and divide them.

    Training texts that are empty are left out; others stay, for the network must answer them.

    Raises:
        DataError: There are fewer than two classes, a class has no training text, a label of
            another split is unknown, or a share is too small or large for the rows.
    """
    faults = Faults()
    named = files.known.classes if files.known else class_names(files.train[0], columns.label)
    rows = read_texts(files.train, columns, named, faults)
    classes = named or sorted_labels(rows[1])
    _check_classes(classes, len(rows[1]), columns.label, files.train[0])

    def read(paths: Sequence[Path]) -> Texts:
        return numbered(read_texts(paths, columns, named, faults), classes, paths)

    train = numbered(rows, classes, files.train)
    valid = read(files.valid) if files.valid else None
    if files.test:
        test = read(files.test)
    else:
        train, test = _hold_out(train, settings.test_share, _TEST_SEED, "test", "test_share")
    notes = list(files.notes)
    known, sizes = files.known, (len(train), len(test))
    if known is not None and sizes != (known.num_train, known.num_test):
        notes.append(
            f"{files.name} should have {known.num_train:,} training and {known.num_test:,} test "
            f"texts; there are {sizes[0]:,} and {sizes[1]:,}"
        )
    filled = torch.tensor([bool(text) for text in train.texts], dtype=torch.bool)
    for _ in range(int((~filled).sum())):
        faults.add("training texts that are empty left out", files.train[0].name)
    train = _limited(train.where(filled), settings.limit_train, settings.seed, "limit_train")
    test = _limited(test, settings.limit_test, _TEST_SEED, "limit_test")
    if valid is None and settings.validation > 0:
        train, valid = _hold_out(train, settings.validation, settings.seed, "carve", "validation")
    _check_all_learnt(classes, train)
    notes += [*faults.notes(), *_shared(train, valid, test), _balance(classes, train)]
    return Splits(classes, train, valid, test, tuple(notes))


def _check_classes(classes: Sequence[str], rows: int, label: str, path: Path) -> None:
    if rows == 0:
        raise DataError(
            "A table must hold labelled rows",
            f"Got no row with a label in column {label!r} of {path}",
        )
    if len(classes) < 2:
        raise DataError(
            "There must be at least two classes",
            f"Got only {classes[0]!r} in column {label!r} of {path}",
            "Choose another column with `label`",
        )
    if len(classes) > max(100, rows // 2):
        raise DataError(
            "`label` must name a column of classes, which many rows share",
            f"Got {len(classes):,} different values in {rows:,} rows of column {label!r}",
            "Choose another column",
        )


def _hold_out(rows: Texts, share: float, seed: int, purpose: str, name: str) -> tuple[Texts, Texts]:
    """Divide by class; at least one text of every class stays in the first part."""
    if not 0 < share < 1:
        raise InputError(f"`{name}` must be a share, above 0 and below 1", f"Got {share}")
    draws = generator(seed, purpose)
    others = torch.nonzero(~one_per_class(rows.labels, draws))[:, 0]
    count = round(len(rows) * share)
    if not 0 < count <= len(others):
        raise DataError(
            "Both parts must hold a text, and the first one of every class",
            f"Got `{name}` {share} of {len(rows)} texts",
            "Use more texts or another share",
        )
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[others] = stratified(rows.labels[others], count, draws)
    return rows.where(~chosen), rows.where(chosen)


def _limited(rows: Texts, limit: int | None, seed: int, name: str) -> Texts:
    """Keep so many texts, with the same share of every class, and at least one of each."""
    if limit is None or limit >= len(rows):
        return rows
    draws = generator(seed, "limit")
    chosen = one_per_class(rows.labels, draws)
    others = torch.nonzero(~chosen)[:, 0]
    count = limit - int(chosen.sum())
    if count < 0:
        raise DataError(
            f"`{name}` must leave at least one text of every class",
            f"Got {limit} for {int(chosen.sum())} classes",
        )
    chosen[others] = stratified(rows.labels[others], count, draws)
    return rows.where(chosen)


def _check_all_learnt(classes: Sequence[str], train: Texts) -> None:
    sizes = torch.bincount(train.labels, minlength=len(classes))
    missing = [name for name, size in zip(classes, sizes.tolist(), strict=True) if not size]
    if missing:
        raise DataError(
            "Every class needs at least one training text",
            f"Got none of {', '.join(map(repr, missing[:10]))}",
            "Add texts of it, or remove the class from the table",
        )


def _shared(train: Texts, valid: Texts | None, test: Texts) -> Iterator[str]:
    """Count texts that occur in train as well: on these the network is only remembering."""
    seen = {_normal(text) for text in train.texts}
    for name, split in (("validation", valid), ("test", test)):
        count = sum(_normal(text) in seen for text in split.texts) if split else 0
        if split and count:
            yield f"{count:,} of the {len(split):,} {name} texts occur in train as well"


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _balance(classes: Sequence[str], train: Texts) -> str:
    sizes = torch.bincount(train.labels, minlength=len(classes)).tolist()
    pairs = sorted(zip(sizes, classes, strict=True), key=lambda pair: -pair[0])
    if len(pairs) <= 10:
        shown = ", ".join(f"{name} {size:,}" for size, name in pairs)
    else:
        (most, first), (least, last) = pairs[0], pairs[-1]
        shown = f"{len(pairs)}, from {least:,} ({last}) to {most:,} ({first}) texts each"
    return f"classes in train: {shown}"
