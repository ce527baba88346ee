"""Images in parquet files, as the Hugging Face hub keeps them.

One row is one image: a column ``image`` or ``img`` with the encoded bytes (a struct of ``bytes``
and ``path``), and a column with the label. Large sets come in shards, such as
``train-00000-of-00003.parquet``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scpl.data.cache import remember
from scpl.data.extras import require
from scpl.data.images.decode import decode_images
from scpl.data.images.sets import Parts, Split
from scpl.errors import DataError

__all__ = ["check_shards", "has_parquet", "read_parquet", "shards"]

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_TEST_KINDS = ("test", "valid", "validation", "val")
_SUBFOLDERS = (".", "data", "plain_text")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")


class _Rows(NamedTuple):
    """The columns of some parquet files; ``places`` holds file and row of each image."""

    images: list[bytes]
    labels: Tensor
    places: list[tuple[Path, int]]
    classes: tuple[str, ...] | None


def has_parquet(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``data``, holds train and test parquet files."""
    return _locate(folder) is not None


def read_parquet(folder: Path, image_size: int | None = None) -> Parts:
    """Read train and test images; a validation set serves as test set if there is no other.

    Args:
        folder: Holds ``train*.parquet`` and ``test*.parquet`` or ``valid*.parquet``.
        image_size: Resize the shorter side to this and cut out the centre, in pixels.

    Raises:
        DataError: A file or shard is missing or damaged, a column is missing, an image unreadable.
        InputError: pyarrow or pillow is not installed.
    """
    found = _locate(folder)
    if found is None:
        raise DataError(
            "parquet data needs files train*.parquet and test*.parquet (or valid*.parquet)",
            f"Not both are in {folder}",
        )
    train, test = (_read_files(files) for files in found)
    encoded, places = train.images + test.images, train.places + test.places

    def decode() -> Tensor:
        return decode_images(encoded, image_size, lambda i: f"row {places[i][1]} of {places[i][0]}")

    images = remember([*found[0], *found[1]], image_size, len(encoded), decode)
    count = len(train.images)
    classes = train.classes or _classes_file(found[0][0].parent / "classes.json")
    return Parts(Split(images[:count], train.labels), Split(images[count:], test.labels), classes)


def _locate(folder: Path) -> tuple[list[Path], list[Path]] | None:
    for subfolder in _SUBFOLDERS:
        train = shards(folder / subfolder, "train")
        tests = (shards(folder / subfolder, kind) for kind in _TEST_KINDS)
        test = next((files for files in tests if files), None)
        if train and test:
            return train, test
    return None


def shards(folder: Path, kind: str) -> list[Path]:
    """List ``kind.parquet`` and ``kind-*.parquet`` in a folder, sorted."""
    return sorted([*folder.glob(f"{kind}.parquet"), *folder.glob(f"{kind}-*.parquet")])


def _read_files(files: list[Path]) -> _Rows:
    check_shards(files)
    parts = [_read_file(file) for file in files]
    return _Rows(
        [image for part in parts for image in part.images],
        torch.cat([part.labels for part in parts]),
        [place for part in parts for place in part.places],
        parts[0].classes,
    )


def check_shards(files: list[Path]) -> None:
    """Check that all files are there that the numbers in their names promise.

    Raises:
        DataError: Naming the missing ones.
    """
    numbers = [(int(m[1]), int(m[2])) for file in files if (m := _SHARD.search(file.name))]
    missing = sorted(
        set(range(max((of for _, of in numbers), default=0))) - {n for n, _ in numbers}
    )
    if missing:
        raise DataError(
            f"all shards of {files[0].parent / files[0].name.partition('-')[0]}-* must be there",
            f"Got {len(files)} of {numbers[0][1]}; missing: {', '.join(map(str, missing))}",
            "Download the missing files",
        )


def _read_file(file: Path) -> _Rows:
    parquet = require("pyarrow.parquet", "parquet", "Reading parquet files")
    try:
        table = parquet.read_table(file, partitioning=None)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise DataError(
            "a parquet file must be complete and intact", f"Got {file}: {error}", "Fetch it again"
        ) from error
    image, label = _column(table, _IMAGE_COLUMNS, file), _column(table, _LABEL_COLUMNS, file)
    labels = table.column(label).to_pylist()
    images = _encoded(table.column(image), file)
    wrong = [i for i, value in enumerate(labels) if not isinstance(value, int)]
    if wrong:
        raise DataError(
            f"labels in column {label!r} must be whole numbers",
            f"Got {labels[wrong[0]]!r} in row {wrong[0]} of {file}",
        )
    return _Rows(
        images,
        torch.tensor(labels, dtype=torch.int64),
        [(file, row) for row in range(len(images))],
        _class_names(table.schema.metadata, label),
    )


def _column(table: Any, names: tuple[str, ...], file: Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(
        f"image data in parquet needs a column named one of: {', '.join(names)}",
        f"Got the columns {', '.join(table.column_names)} in {file}",
        "Rename the column",
    )


def _encoded(column: Any, file: Path) -> list[bytes]:
    images: list[bytes] = []
    for index, row in enumerate(column.to_pylist()):
        # A row is {"bytes": ..., "path": ...} on the hub; plain bytes are as clear.
        image = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(image, bytes):
            raise DataError(
                "parquet rows must hold the encoded images themselves",
                f"Got {type(row).__name__} without them in row {index} of {file}",
                "Embed the image files, or load the folder of images instead",
            )
        images.append(image)
    return images


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None  # the names are optional


def _classes_file(path: Path) -> tuple[str, ...] | None:
    """Read names from a list of names or of objects with a ``words`` or ``name`` entry."""
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries and isinstance(entries[0], dict):
            entries = sorted(entries, key=lambda entry: int(entry["label"]))
            entries = [entry.get("words") or entry["name"] for entry in entries]
        return tuple(str(name) for name in entries)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "classes.json must be a list of names, or of objects with 'label' and 'name'",
            f"Got {path}: {type(error).__name__}: {error}",
        ) from error
