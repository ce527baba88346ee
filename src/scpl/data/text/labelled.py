"""From tables to labelled texts: which columns, which classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl.data.text.cells import label_of, text_of
from scpl.data.text.faults import Faults
from scpl.data.text.files import Files
from scpl.data.text.tables import check_columns, columns_of, rows_of
from scpl.errors import DataError, InputError

__all__ = ["Columns", "Texts", "choose_columns", "labelled", "read_labelled"]

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
        DataError: There are none of these names; the answer lists the columns.
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
            "--label must not be one of the --text columns: the network would read the answer",
            f"Got {columns.label!r}",
        )
    return columns


def read_labelled(
    paths: Sequence[Path], columns: Columns, names: Sequence[str] | None, faults: Faults
) -> tuple[list[str], list[str]]:
    """Read the texts of some tables and the names of their classes; unlabelled rows are left out.

    Args:
        paths: The tables, of the same columns.
        columns: Which columns.
        names: Names of whole-numbered labels, if they have some.
        faults: Takes what was left out or repaired.

    Raises:
        DataError: A table is damaged, or a value is no text or no label.
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


def labelled(
    rows: tuple[list[str], list[str]], classes: Sequence[str], paths: Sequence[Path]
) -> Texts:
    """Turn the names of classes into their numbers.

    Raises:
        DataError: There is no row, or a label is none of the classes.
    """
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for label in rows[1] if label not in index})
    if unknown:
        raise DataError(
            f"every label must be a class that is learnt: {', '.join(classes[:20])}",
            f"Got also {', '.join(map(repr, unknown[:10]))} in {paths[0].name}",
            "Correct the labels, or add training texts of these",
        )
    if not rows[0]:
        raise DataError("a split must hold at least one labelled text", f"Got none in {paths[0]}")
    return Texts(rows[0], torch.tensor([index[label] for label in rows[1]], dtype=torch.int64))
