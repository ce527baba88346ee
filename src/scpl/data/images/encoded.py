"""Data sets of encoded images (JPEG, PNG and others): as Tiny-ImageNet, and in parquet or Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from scpl.data.columnar import check_shards, open_columnar, rows, saved, shards
from scpl.data.images.folders import PURPOSES, image_files, part_of
from scpl.data.images.listing import Format, Item, Listing, Part, Purpose, Row
from scpl.data.notes import Faults
from scpl.errors import DataError
from scpl.outside import parse_json, read_text

__all__ = ["FORMATS"]

# Tiny-ImageNet in its original layout, http://cs231n.stanford.edu/tiny-imagenet-200.zip: wnids.txt
# lists the 200 classes, train/<wnid>/images/* holds their images, and val/val_annotations.txt says
# which class each image in val/images shows. The images in test have no labels; as in the
# literature the validation images serve as test set.

_ANNOTATIONS = Path("val", "val_annotations.txt")
_UNPACK = "Unpack the archive again"


def has_tiny_imagenet(folder: Path) -> bool:
    """Whether ``folder`` holds the list of classes, the annotations and the training images."""
    files = (folder / "wnids.txt", folder / _ANNOTATIONS)
    return all(file.is_file() for file in files) and (folder / "train").is_dir()


def list_tiny_imagenet(folder: Path) -> Listing:
    """List the set; classes are named by the first words of ``words.txt``, else by their wnid."""
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip())
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    left_out, train = Faults(), []
    for wnid, label in labels.items():
        images = folder / "train" / wnid / "images"
        files = list(image_files(images, left_out))
        if not files:
            raise DataError(
                "Every class in wnids.txt needs training images", f"Got none in {images}", _UNPACK
            )
        train += [(file, label) for file in files]
    test = _annotated(folder, labels)
    if not test:
        raise DataError("The annotations must list at least one image", f"Got {_ANNOTATIONS} empty")
    parts: dict[Purpose, Part] = {
        "train": part_of(train, folder / "train"),
        "test": part_of(test, folder / "val"),
    }
    return Listing(parts, _first_words(folder / "words.txt", wnids), left_out)


def _annotated(folder: Path, labels: Mapping[str, int]) -> list[tuple[Path, int]]:
    pairs = []
    for number, line in enumerate(_lines(folder / _ANNOTATIONS), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1].strip() not in labels:
            raise DataError(
                "Each annotation must be a file name, a tab and a class of wnids.txt",
                f"Got {line!r} in line {number} of {folder / _ANNOTATIONS}",
                _UNPACK,
            )
        pairs.append((folder / "val" / "images" / fields[0], labels[fields[1].strip()]))
    missing = [file for file, _ in pairs if not file.is_file()]
    if missing:
        raise DataError(
            "Every annotated image must be there",
            f"Missing: {missing[0]} and {len(missing) - 1} more",
            _UNPACK,
        )
    return pairs


def _first_words(path: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    lines = _lines(path) if path.is_file() else []
    names = dict(line.partition("\t")[::2] for line in lines)
    known = {wnid: name.partition(",")[0].strip() for wnid, name in names.items()}
    return tuple(known.get(wnid) or wnid for wnid in wnids)


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            "A list of classes must be readable text", f"Got {path}: {error}"
        ) from error


# Parquet and Arrow: one row is one image, a column with the encoded bytes (a struct of bytes and
# path) and one with the label.

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_SUBFOLDERS = (".", "data", "plain_text")
_MOST_CLASSES = 1 << 20  # a network has an output for each


def has_parquet(folder: Path) -> bool:
    """Whether a folder, or its subfolder ``data``, holds train and test files; or one split."""
    return _locate(folder) is not None


def list_parquet(folder: Path) -> Listing:
    """List train and test images; those to validate on test if there are no others."""
    found = _locate(folder)
    if found is None:
        raise DataError(
            "Parquet data needs files train*.parquet and test*.parquet (or valid*.parquet)",
            f"Not both are in {folder}",
        )
    first = (found.get("train") or found["all"])[0]
    classes = _classes_named(first) or _classes_file(first.parent / "classes.json")
    return Listing({purpose: _list_files(files) for purpose, files in found.items()}, classes)


def _locate(folder: Path) -> dict[Purpose, list[Path]] | None:
    for subfolder in _SUBFOLDERS:
        found: dict[Purpose, list[Path]] = {}
        for purpose, names in PURPOSES.items():
            files = next(
                (files for name in names if (files := shards(folder / subfolder, name))), None
            )
            if files:
                found[purpose] = files
        if "train" in found and len(found) > 1:
            return found
    one = saved(folder)
    if one and set(_IMAGE_COLUMNS).intersection(open_columnar(one[0]).names):
        return {"all": one}
    return None


def _list_files(files: Sequence[Path]) -> Part:
    check_shards(files)
    items: list[Item] = []
    labels: list[int] = []
    for path in files:
        names = open_columnar(path).names
        image, label = _column(names, _IMAGE_COLUMNS, path), _column(names, _LABEL_COLUMNS, path)
        for number, (value,) in enumerate(rows(path, [label])):
            if not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
                raise DataError(
                    f"Labels in column {label!r} must be whole numbers, 0 .. {_MOST_CLASSES - 1}",
                    f"Got {value!r:.60} in row {number} of {path}",
                    "A label of -1 often marks an unlabelled test set; use the labelled one",
                )
            items.append(Row(path, number, image))
            labels.append(value)
    if not items:
        raise DataError("A split must hold at least one image", f"Got no row in {files[0]}")
    place = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Part(items, torch.tensor(labels, dtype=torch.int64), place)


def _classes_named(path: Path) -> tuple[str, ...] | None:
    """Read names of the classes from the hub's metadata in a file."""
    file = open_columnar(path)
    return file.class_names(_column(file.names, _LABEL_COLUMNS, path))


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"Image data in parquet or Arrow needs a column named one of: {', '.join(wanted)}",
        f"Got the columns {', '.join(names)} in {path}",
        "Rename the column",
    )


def _classes_file(path: Path) -> tuple[str, ...] | None:
    """Read names from a list of names or of objects with a ``words`` or ``name`` entry."""
    if not path.is_file():
        return None
    try:
        entries = parse_json(read_text(path))
        if entries and isinstance(entries[0], dict):
            entries = sorted(entries, key=lambda entry: int(entry["label"]))
            entries = [entry.get("words") or entry["name"] for entry in entries]
        return tuple(str(name) for name in entries)
    except (OSError, LookupError, TypeError, ArithmeticError, ValueError, AttributeError) as error:
        raise DataError(
            "classes.json must be a list of names, or of objects with 'label' and 'name'",
            f"Got {path}: {type(error).__name__}: {error}",
        ) from error


FORMATS = {
    "tiny-imagenet": Format("wnids.txt, train and val", has_tiny_imagenet, list_tiny_imagenet),
    "parquet": Format(
        "train-*.parquet and test-*.parquet, or what datasets saved (Arrow)",
        has_parquet,
        list_parquet,
    ),
}
