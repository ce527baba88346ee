"""Data sets of encoded images (JPEG, PNG and others): in folders, as Tiny-ImageNet, in parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scpl.data.cache import remember
from scpl.data.images.dataset import Format, Split, Splits, carve_validation
from scpl.data.images.decode import EXTENSIONS, decode_images
from scpl.data.parquet import check_shards, class_names, open_parquet, rows, shards
from scpl.errors import DataError
from scpl.outside import parse_json, read_text

__all__ = ["FORMATS"]

# One folder per class: either root/train/<class>/* beside root/test/<class>/* (or another of
# _TEST_NAMES), or only root/<class>/*, of which a fifth becomes the test set.

_TEST_NAMES = ("test", "val", "valid", "validation")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: the same folder must give the same test images in every run

Classes = Mapping[str, Sequence[Path]]  # image files by name of class, in order


def has_folder(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``train``, holds folders with images in them."""
    return any(
        _is_image(path) for child in _subfolders(_train_root(folder)) for path in child.iterdir()
    )


def read_folder(folder: Path, image_size: int | None = None) -> Splits:
    """Read an image folder; the classes are the names of the folders, sorted."""
    train_root = _train_root(folder)
    train = _classes(train_root)
    names = tuple(train)
    empty = [name for name, files in train.items() if not files]
    if not names or empty:
        raise DataError(
            "An image folder needs one folder per class with at least one image in each",
            f"Got no image in {', '.join(str(train_root / name) for name in empty) or train_root}",
            f"Known image files: {', '.join(sorted(EXTENSIONS))}",
        )
    test = _test_classes(folder, names) if train_root != folder else {}
    splits = _decoded([_pairs(train, names), _pairs(test, names)], image_size)
    if len(splits) == 1:
        splits = list(carve_validation(splits[0], _TEST_SHARE, _SPLIT_SEED))
    return Splits(splits[0], splits[1], names)


def _decoded(groups: Sequence[Sequence[tuple[Path, int]]], image_size: int | None) -> list[Split]:
    """Decode groups of (file, label) together, so that all get the same number of channels.

    Returns one split for each group that is not empty.
    """
    files = [file for group in groups for file, _ in group]
    images = remember(files, image_size, len(files), lambda: decode_images(files, image_size))
    labels = torch.tensor([label for group in groups for _, label in group], dtype=torch.int64)
    sizes = [len(group) for group in groups]
    splits = zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)
    return [Split(pixels, targets) for pixels, targets in splits if len(targets)]


def _train_root(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _test_classes(folder: Path, names: Sequence[str]) -> Classes:
    """Find the test images; a ``test`` folder without classes (unlabelled) is passed over."""
    for root in (folder / name for name in _TEST_NAMES):
        classes = {name: files for name, files in _classes(root).items() if files}
        unknown = sorted(set(classes) - set(names))
        if unknown and set(classes) & set(names):
            raise DataError(
                f"The classes in {root} must be among those in {folder / 'train'}",
                f"Got also {', '.join(unknown)}",
                "Rename or remove these folders",
            )
        if classes and not unknown:
            return classes
    return {}


def _classes(root: Path) -> Classes:
    return {child.name: _image_files(child) for child in _subfolders(root)}


def _pairs(classes: Classes, names: Sequence[str]) -> list[tuple[Path, int]]:
    return [(file, names.index(name)) for name, files in classes.items() for file in files]


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    children = (child for child in root.iterdir() if not child.name.startswith("."))
    return sorted(child for child in children if child.is_dir())


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in EXTENSIONS and path.is_file()


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


def read_tiny_imagenet(folder: Path, image_size: int | None = None) -> Splits:
    """Read the set; classes are named by the first words of ``words.txt``, else by their wnid."""
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip())
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train = []
    for wnid, label in labels.items():
        images = folder / "train" / wnid / "images"
        files = _image_files(images) if images.is_dir() else []
        if not files:
            raise DataError(
                "Every class in wnids.txt needs training images", f"Got none in {images}", _UNPACK
            )
        train += [(file, label) for file in files]
    splits = _decoded([train, _annotated(folder, labels)], image_size)
    if len(splits) < 2:
        raise DataError("The annotations must list at least one image", f"Got {_ANNOTATIONS} empty")
    return Splits(splits[0], splits[1], _first_words(folder / "words.txt", wnids))


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


# Parquet: one row is one image, a column with the encoded bytes (a struct of bytes and path) and
# one with the label.

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_SUBFOLDERS = (".", "data", "plain_text")
_MOST_CLASSES = 1 << 20  # a network has an output for each


class _Rows(NamedTuple):
    """The columns of some parquet files; ``origins`` holds file and row of each image."""

    images: list[bytes]
    labels: Tensor
    origins: list[tuple[Path, int]]
    classes: tuple[str, ...] | None


def has_parquet(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``data``, holds train and test parquet files."""
    return _locate(folder) is not None


def read_parquet(folder: Path, image_size: int | None = None) -> Splits:
    """Read train and test images; a validation set serves as test set if there is no other."""
    found = _locate(folder)
    if found is None:
        raise DataError(
            "Parquet data needs files train*.parquet and test*.parquet (or valid*.parquet)",
            f"Not both are in {folder}",
        )
    train, test = (_read_files(files) for files in found)
    encoded, origins = train.images + test.images, train.origins + test.origins

    def decode() -> Tensor:
        return decode_images(encoded, image_size, lambda i: "row {1} of {0}".format(*origins[i]))

    images = remember([*found[0], *found[1]], image_size, len(encoded), decode)
    count = len(train.images)
    classes = train.classes or _classes_file(found[0][0].parent / "classes.json")
    return Splits(Split(images[:count], train.labels), Split(images[count:], test.labels), classes)


def _locate(folder: Path) -> tuple[list[Path], list[Path]] | None:
    for subfolder in _SUBFOLDERS:
        train = shards(folder / subfolder, "train")
        tests = (shards(folder / subfolder, name) for name in _TEST_NAMES)
        test = next((files for files in tests if files), None)
        if train and test:
            return train, test
    return None


def _read_files(files: Sequence[Path]) -> _Rows:
    check_shards(files)
    images: list[bytes] = []
    labels: list[int] = []
    origins: list[tuple[Path, int]] = []
    classes = None
    for path in files:
        file = open_parquet(path)
        names = file.schema_arrow.names
        image, label = _column(names, _IMAGE_COLUMNS, path), _column(names, _LABEL_COLUMNS, path)
        for row, (encoded, value) in enumerate(rows(path, [image, label])):
            images.append(_image_bytes(encoded, row, path))
            if not isinstance(value, int) or not 0 <= value < _MOST_CLASSES:
                raise DataError(
                    f"Labels in column {label!r} must be whole numbers, 0 .. {_MOST_CLASSES - 1}",
                    f"Got {value!r:.60} in row {row} of {path}",
                    "A label of -1 often marks an unlabelled test set; use the labelled one",
                )
            labels.append(value)
            origins.append((path, row))
        if path == files[0]:
            classes = class_names(file, label)
    return _Rows(images, torch.tensor(labels, dtype=torch.int64), origins, classes)


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"Image data in parquet needs a column named one of: {', '.join(wanted)}",
        f"Got the columns {', '.join(names)} in {path}",
        "Rename the column",
    )


def _image_bytes(value: Any, row: int, path: Path) -> bytes:
    # A row is {"bytes": ..., "path": ...} on the hub; plain bytes are as clear.
    image = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(image, bytes):
        raise DataError(
            "Parquet rows must hold the encoded images themselves",
            f"Got {type(value).__name__} without them in row {row} of {path}",
            "Embed the image files, or load the folder of images instead",
        )
    return image


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
    "tiny-imagenet": Format("wnids.txt, train and val", has_tiny_imagenet, read_tiny_imagenet),
    "parquet": Format("train-*.parquet and test-*.parquet", has_parquet, read_parquet),
    "folder": Format("folders train/<class> and test/<class> of images", has_folder, read_folder),
}
