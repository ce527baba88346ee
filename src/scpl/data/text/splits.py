"""Labelled texts, divided: what is learnt from, validated on and tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl.data.strata import stratified
from scpl.data.text.cells import sorted_labels
from scpl.data.text.faults import Faults
from scpl.data.text.files import Files
from scpl.data.text.labelled import Columns, Texts, labelled, read_labelled
from scpl.data.text.tables import class_names
from scpl.errors import DataError, InputError
from scpl.seeding import generator

__all__ = ["SplitSettings", "Splits", "read_splits"]

_TEST_SEED = 0  # fixed: the same table must give the same test texts in every run


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """How texts are divided.

    Args:
        test_share: Share of the rows that is tested on, where the files have no test split.
        validation: Share of the training texts that is held out, where they have no such split.
        limit: Use only this many training texts, before the validation split.
        seed: Decides which texts validate and which stay; not which ones test.
    """

    test_share: float = 0.2
    validation: float = 0.1
    limit: int | None = None
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
    train_rows = read_labelled(files.train, columns, named, faults)
    classes = named or sorted_labels(train_rows[1])
    _check_classes(classes, len(train_rows[1]), columns.label, files.train[0])
    train = labelled(train_rows, classes, files.train)
    valid, test = None, None
    if files.valid:
        valid = labelled(read_labelled(files.valid, columns, named, faults), classes, files.valid)
    if files.test:
        test = labelled(read_labelled(files.test, columns, named, faults), classes, files.test)
    else:
        train, test = _hold_out(train, settings.test_share, _TEST_SEED, "test", "--test-share")
    counts = _counts(files, len(train), len(test))
    filled = torch.tensor([bool(text) for text in train.texts], dtype=torch.bool)
    if not filled.all():
        kind, count = "training texts that are empty left out", int((~filled).sum())
        for _ in range(count):
            faults.add(kind, files.train[0].name)
        train = train.where(filled)
    train = _limited(train, settings)
    if valid is None and settings.validation > 0:
        train, valid = _hold_out(train, settings.validation, settings.seed, "carve", "--validation")
    _check_all_learnt(classes, train)
    notes = (*files.notes, *counts, *faults.notes(), *_shared(train, valid, test))
    return Splits(classes, train, valid, test, (*notes, _balance(classes, train)))


def _check_classes(classes: Sequence[str], rows: int, label: str, path: Path) -> None:
    if rows == 0:
        raise DataError(
            "a table must hold labelled rows",
            f"Got no row with a label in column {label!r} of {path}",
        )
    if len(classes) < 2:
        raise DataError(
            "there must be at least two classes",
            f"Got only {classes[0]!r} in column {label!r} of {path}",
            "Choose another column with --label",
        )
    if len(classes) > max(100, rows // 2):
        raise DataError(
            "--label must name a column of classes, which many rows share",
            f"Got {len(classes):,} different values in {rows:,} rows of column {label!r}",
            "Choose another column",
        )


def _hold_out(rows: Texts, share: float, seed: int, purpose: str, flag: str) -> tuple[Texts, Texts]:
    """Divide by class; at least one text of every class stays in the first part."""
    if not 0 < share < 1:
        raise InputError(f"{flag} must be a share, above 0 and below 1", f"Got {share}")
    draws = generator(seed, purpose)
    others = torch.nonzero(~_one_per_class(rows.labels, draws))[:, 0]
    count = round(len(rows) * share)
    if not 0 < count <= len(others):
        raise DataError(
            "both parts must hold a text, and the first one of every class",
            f"Got {flag} {share} of {len(rows)} texts",
            "Use more texts or another share",
        )
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[others] = stratified(rows.labels[others], count, draws)
    return rows.where(~chosen), rows.where(chosen)


def _limited(rows: Texts, settings: SplitSettings) -> Texts:
    if settings.limit is None or settings.limit >= len(rows):
        return rows
    draws = generator(settings.seed, "limit")
    chosen = _one_per_class(rows.labels, draws)
    others = torch.nonzero(~chosen)[:, 0]
    count = settings.limit - int(chosen.sum())
    if count < 0:
        raise DataError(
            "--limit-train must leave at least one text of every class",
            f"Got {settings.limit} for {int(chosen.sum())} classes",
        )
    chosen[others] = stratified(rows.labels[others], count, draws)
    return rows.where(chosen)


def _one_per_class(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Choose one row of every class at random; ``bool [N]``."""
    order = torch.randperm(len(labels), generator=draws)
    by_class = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels)
    firsts = (sizes.cumsum(0) - sizes)[sizes > 0]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[firsts]] = True
    return chosen


def _check_all_learnt(classes: Sequence[str], train: Texts) -> None:
    sizes = torch.bincount(train.labels, minlength=len(classes))
    missing = [name for name, size in zip(classes, sizes.tolist(), strict=True) if not size]
    if missing:
        raise DataError(
            "every class needs at least one training text",
            f"Got none of {', '.join(map(repr, missing[:10]))}",
            "Add texts of it, or remove the class from the table",
        )


def _counts(files: Files, train: int, test: int) -> list[str]:
    """Say if a known set is not as it should be."""
    spec = files.known
    if spec is None or (train, test) == (spec.num_train, spec.num_test):
        return []
    return [
        f"{files.name} should have {spec.num_train:,} training and {spec.num_test:,} test texts; "
        f"there are {train:,} and {test:,}"
    ]


def _shared(train: Texts, valid: Texts | None, test: Texts) -> list[str]:
    """Count texts that occur in train as well: on these the network is only remembering."""
    seen = {_normal(text) for text in train.texts}
    notes = []
    for kind, part in (("validation", valid), ("test", test)):
        count = sum(_normal(text) in seen for text in part.texts) if part else 0
        if part and count:
            notes.append(f"{count:,} of the {len(part):,} {kind} texts occur in train as well")
    return notes


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
