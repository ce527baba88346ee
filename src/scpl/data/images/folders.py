"""Folders of images: one folder for each class, in folders for training and testing or not.

Either ``root/train/<class>/*`` beside ``root/test/<class>/*`` (and ``root/val``), in any case and
under other usual names, or only ``root/<class>/*``. Images in sub-folders of a class belong to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from scpl.data.images.decode import EXTENSIONS
from scpl.data.images.listing import Format, Listing, Part, Purpose
from scpl.data.notes import Faults
from scpl.errors import DataError

__all__ = ["FORMAT", "PURPOSES", "has_folder", "image_files", "list_folder", "part_of"]

PURPOSES: Mapping[Purpose, Sequence[str]] = {
    "train": ("train", "training"),
    "valid": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""How folders and files are called that train, validate and test."""
_HIDDEN = "__MACOSX"  # what a Mac puts beside everything that it zips


def has_folder(folder: Path) -> bool:
    """Whether ``folder``, or one for training or testing in it, holds folders with images."""
    return any(map(_holds_classes, (folder, *_purposes(folder).values())))


def list_folder(folder: Path) -> Listing:
    """List an image folder; the classes are the names of the folders, sorted.

    Raises:
        DataError: There are no classes, or not the same ones in all folders.
    """
    left_out = Faults()
    roots = _purposes(folder)
    if "train" not in roots:
        classes = _classes(folder, left_out)
        names = _named(folder, classes)
        return Listing({"all": _part(folder, classes, names)}, names, left_out)
    train = _classes(roots["train"], left_out)
    names = _named(roots["train"], train)
    parts: dict[Purpose, Part] = {"train": _part(roots["train"], train, names)}
    for purpose, root in roots.items():
        if purpose != "train" and (classes := _of_train(root, names, roots["train"], left_out)):
            parts[purpose] = _part(root, classes, names)
    return Listing(parts, names, left_out)


def image_files(folder: Path, left_out: Faults) -> Iterator[Path]:
    """The image files in a folder and its sub-folders, in the order of their names.

    Hidden ones are passed over; what else is left out is counted.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            path = Path(root, name)
            if not _is_hidden(name) and path.suffix.lower() in EXTENSIONS and path.is_file():
                yield path


def _purposes(folder: Path) -> dict[Purpose, Path]:
    """The folders for training, validating and testing."""
    found: dict[Purpose, Path] = {}
    for purpose, names in PURPOSES.items():
        for child in _subfolders(folder):
            if child.name.lower() in names:
                found[purpose] = child
    return found


def _holds_classes(root: Path) -> bool:
    return any(next(image_files(child, Faults()), None) for child in _subfolders(root))


def _classes(root: Path, left_out: Faults) -> dict[str, list[Path]]:
    """The image files of each class, in order."""
    return {child.name: list(image_files(child, left_out)) for child in _subfolders(root)}


def _named(root: Path, classes: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """The names of the classes that are learnt."""
    empty = [name for name, files in classes.items() if not files]
    if not classes or empty:
        raise DataError(
            "An image folder needs one folder per class with at least one image in each",
            f"Got no image in {', '.join(str(root / name) for name in empty) or root}",
            f"Known image files: {', '.join(sorted(EXTENSIONS))}",
        )
    return tuple(classes)


def _of_train(
    root: Path, names: Sequence[str], train: Path, left_out: Faults
) -> dict[str, list[Path]]:
    """Find images of the classes; a folder without classes (unlabelled) is passed over."""
    classes = {name: files for name, files in _classes(root, left_out).items() if files}
    unknown = sorted(set(classes) - set(names))
    if unknown and set(classes) & set(names):
        raise DataError(
            f"The classes in {root} must be among those in {train}",
            f"Got also {', '.join(unknown)}",
            "Rename or remove these folders",
        )
    return {} if unknown else classes


def part_of(pairs: Sequence[tuple[Path, int]], root: Path) -> Part:
    """Make a part of files below a folder with their labels."""
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Part([file for file, _ in pairs], labels, str(root))


def _part(root: Path, classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> Part:
    index = {name: label for label, name in enumerate(names)}
    pairs = [(file, index[name]) for name, files in classes.items() for file in files]
    return part_of(pairs, root)


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    children = (child for child in root.iterdir() if not _is_hidden(child.name))
    return sorted(child for child in children if child.is_dir())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _HIDDEN


FORMAT = Format("folders train/<class> and test/<class> of images", has_folder, list_folder)
