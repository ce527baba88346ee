"""Parquet files, as the Hugging Face hub keeps its data sets.

Large sets come in shards, such as ``train-00000-of-00003.parquet``, and the hub's metadata in the
files may name the classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError

__all__ = ["check_shards", "class_names", "open_parquet", "reading", "shards"]

_SHARD = re.compile(r"-(\d+)-of-(\d+)")


def shards(folder: Path, split: str) -> list[Path]:
    """List ``split.parquet`` and ``split-*.parquet`` in a folder, sorted."""
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def check_shards(files: Sequence[Path]) -> None:
    """Raise DataError unless all files are there that the numbers in their names promise."""
    numbers = [(int(m[1]), int(m[2])) for file in files if (m := _SHARD.search(file.name))]
    promised = range(max((of for _, of in numbers), default=0))
    missing = sorted(set(promised) - {number for number, _ in numbers})
    if missing:
        raise DataError(
            f"All shards of {files[0].parent / files[0].name.partition('-')[0]}-* must be there",
            f"Got {len(files)} of {len(promised)}; missing: {', '.join(map(str, missing))}",
            "Download the missing files",
        )


def open_parquet(path: Path) -> Any:
    """Open a file as ``pyarrow.parquet.ParquetFile``; DataError if it is damaged."""
    parquet = import_extra("pyarrow.parquet", "parquet", "Reading parquet files")
    with reading(path):
        return parquet.ParquetFile(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of pyarrow into a DataError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise DataError(
            "A parquet file must be complete and intact", f"Got {path}: {error}", "Get it again"
        ) from error


def class_names(file: Any, label: str) -> tuple[str, ...] | None:
    """Names of whole-numbered labels, if an open file tells them."""
    try:
        about = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in about["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
