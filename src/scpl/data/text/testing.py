"""Labelled texts to test a trained network on: another table or data set than its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scpl.data.text.encoded import Encoded
from scpl.data.text.faults import Faults
from scpl.data.text.files import find_files
from scpl.data.text.labelled import Columns, choose_columns, labelled, read_labelled
from scpl.data.text.tables import class_names
from scpl.data.text.tokenizer import Tokenizer
from scpl.errors import DataError

__all__ = ["load_test"]


def load_test(
    name: str,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    columns: Columns,
    max_tokens: int,
    *,
    data_dir: Path | None = None,
) -> tuple[Encoded, list[str]]:
    """Load texts to test on.

    Args:
        name: A table, of which all rows are taken; a folder with a table ``test``; or a data set
            known by name, of which the test split is.
        tokenizer: That of the network.
        classes: The classes that the network tells apart.
        columns: Where texts and labels stand in a table.
        max_tokens: So many tokens of a text are read.
        data_dir: Folder that holds data sets.

    Returns:
        The texts, and what was left out or repaired.

    Raises:
        DataError: The data is missing or damaged, or has a label that is none of the classes.
    """
    files = find_files(name, data_dir=data_dir)
    paths = files.test or (files.train if Path(name).expanduser().is_file() else ())
    if not paths:
        raise DataError("a folder to test on must hold a table named test", f"Got none in {name}")
    if files.known is not None:
        columns = choose_columns(files, (), None)
    named = files.known.classes if files.known else class_names(paths[0], columns.label)
    faults = Faults()
    part = labelled(read_labelled(paths, columns, named or classes, faults), classes, paths)
    rows = tokenizer.encode(part.texts, max_tokens)
    return Encoded.of(rows, part.labels, tokenizer.vocab_size), faults.notes()
