"""Folders of images: one folder for each class, in folders for training and testing or not.

Either ``root/train/<class>/*`` beside ``root/test/<class>/*`` (and ``root/val``), in any case and
under other usual names, or only ``root/<class>/*``. Images in sub-folders of a class belong to it.
What is a mistake is refused, and what is left out is counted, so that no number is of other images
than the user thinks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from scpl.data.classes import check_known
from scpl.data.images.decode import EXTENSIONS, reads_avif
from scpl.data.images.listing import Format, Listing, Part, Purpose
from scpl.data.notes import Faults
from scpl.data.tables import is_table
from scpl.errors import DataError
from scpl.outside import shown

__all__ = [
    "FORMAT",
    "PURPOSES",
    "has_folder",
    "image_files",
    "is_archive",
    "is_hidden",
    "list_folder",
    "nothing_in",
    "part_of",
    "purpose_of",
    "unusable",
]

PURPOSES: Mapping[Purpose, Sequence[str]] = {
    "train": ("train", "training"),
    "valid": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""How folders and files are called that train, validate and test."""
_UNLABELLED = {"images", "imgs", "unknown", "unlabelled", "unlabeled"}
"""How a folder is called that holds the images of a test without their classes."""
_HIDDEN = "__MACOSX"  # what a Mac puts beside everything that it zips
_ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip"}
_UNREADABLE = {
    ".heic": "save them as JPEG or PNG",
    ".heif": "save them as JPEG or PNG",
}
_FEW = 10  # names in a message
_MOST_LOOKED_AT = 1000  # folders, for the one that the user may have meant


# What is where


def has_folder(folder: Path) -> bool:
    """Whether ``folder``, or one for training or testing in it, holds folders with images."""
    return _holds_classes(folder)


def list_folder(folder: Path) -> Listing:
    """List an image folder; the classes are the names of the folders, sorted.

    Raises:
        DataError: There are no classes, not the same ones in all folders, or it does not become
            clear which folders are classes.
    """
    left_out = Faults()
    roots, notes = _roots(folder)
    whole = roots.get("all") or roots.get("train") or next(iter(roots.values()))
    classes = _classes(whole, left_out)
    names = _named(whole, classes, left_out)
    parts = {}
    for purpose, root in roots.items():
        found = classes if root == whole else _of_known(root, names, whole, left_out, notes)
        if found:
            parts[purpose] = _part(root, found, names)
    return Listing(parts, names, left_out, tuple(notes))


def image_files(folder: Path, left_out: Faults) -> Iterator[Path]:
    """The image files in a folder and its sub-folders, in the order of their names.

    Hidden ones are passed over; what else is left out is counted.
    """

    def unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be opened left out", str(error.filename))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for path in (Path(root, name) for name in folders):
            if path.is_symlink():  # it may lead back to where it lies
                left_out.add("links to folders left out", str(path))
        for path in (Path(root, name) for name in sorted(files) if not is_hidden(name)):
            if why := unusable(path):
                left_out.add(why, str(path))
            else:
                yield path


def unusable(path: Path) -> str:
    """Say why a file is never read; nothing if it is."""
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        advice = _UNREADABLE.get(suffix)
        kind = f"named {suffix}" if suffix else "without an ending"
        return f"files {kind} left out{f', which cannot be read ({advice})' if advice else ''}"
    if suffix == ".avif" and not reads_avif():
        return "files named .avif left out, which this Pillow cannot read (pillow 11.3 does)"
    if not path.is_file():
        return "broken links left out" if path.is_symlink() else "what is no file left out"
    return ""


def _roots(folder: Path) -> tuple[dict[Purpose, Path], list[str]]:
    """Find the folders of folders of classes; the folder itself is for ``"all"``.

    A folder called train that holds images, and no folders of them, is a class.
    """
    children = _subfolders(folder)
    purposes = {child: purpose_of(child) for child in children}
    found: dict[Purpose, Path] = {}
    for child, purpose in purposes.items():
        if purpose is not None and _holds_classes(child):
            if purpose in found:
                raise DataError(
                    "One folder must be for training, one for validating and one for testing",
                    f"Got {found[purpose]} and {child}",
                    "Put the images of both into one of them, or rename the other",
                )
            found[purpose] = child
    beside = [child for child in children if child not in found.values() and _holds_images(child)]
    classes = [child.name for child in beside if purposes[child] is None]
    if classes and found and ("train" not in found or len(found) == 1):
        raise DataError(
            "A folder must hold either train/ and test/, with a folder per class in each, or the "
            "folders of the classes themselves",
            f"Got folders of images in {_listed(str(root) for root in found.values())}, and beside "
            f"it {_listed(classes)}",
            "Move what are classes into one folder, or rename a class that is called so",
        )
    if not found:
        called = [child.name for child in beside if purposes[child] is not None]
        if called and not classes:
            raise DataError(
                "A folder for training or testing must hold one folder per class",
                f"Got images directly in {_listed(str(folder / name) for name in called)}",
                _sort_them(folder),
            )
        return {"all": folder}, [f"{folder / name} is taken as a class" for name in called]
    passed_over = [f"{child} is passed over, as it holds no folders of classes" for child in beside]
    return found, passed_over


def purpose_of(folder: Path) -> Purpose | None:
    """What the name of a folder says that its images are for."""
    name = folder.name.lower()
    return next((purpose for purpose, names in PURPOSES.items() if name in names), None)


def _holds_classes(root: Path) -> bool:
    return any(map(_holds_images, _subfolders(root)))


def _holds_images(folder: Path) -> bool:
    return next(image_files(folder, Faults()), None) is not None


# Classes


def _classes(root: Path, left_out: Faults) -> dict[str, list[Path]]:
    """The image files of each class, in order."""
    found = {}
    for child in _subfolders(root):
        found[shown(child.name)] = files = list(image_files(child, left_out))
        for file in files:
            if file.parent != child:
                left_out.add("images in sub-folders of a class, taken as of that class", str(file))
    for path in sorted(root.iterdir()):
        if not is_hidden(path.name) and path.suffix.lower() in EXTENSIONS and path.is_file():
            left_out.add("images in no folder of a class left out", str(path))
    return found


def _named(root: Path, classes: Mapping[str, Sequence[Path]], left_out: Faults) -> tuple[str, ...]:
    """The names of the classes."""
    if not classes:
        got, advice = nothing_in(root)
        raise DataError("An image folder needs one folder per class", got, advice)
    empty = [str(root / name) for name, files in classes.items() if not files]
    if empty:
        raise DataError(
            "An image folder needs one folder per class with at least one image in each",
            f"Got no image in {_listed(empty)}{''.join(f'; {note}' for note in left_out.notes())}",
            f"Remove what is no class. Known image files: {', '.join(sorted(EXTENSIONS))}",
        )
    direct = any(file.parent == root / name for name, files in classes.items() for file in files)
    if len(classes) == 1 and not direct and (right := _right_folder(root)):
        raise DataError(
            "An image folder must hold one folder per class",
            f"Got only {_listed(classes)} in {root}, and {_seen(right)} in {right}",
            f"Give the folder {right}",
        )
    return tuple(classes)


def _of_known(
    root: Path, names: Sequence[str], train: Path, left_out: Faults, notes: list[str]
) -> dict[str, list[Path]]:
    """Find images of the classes; a folder of images without classes is passed over."""
    classes = {name: files for name, files in _classes(root, left_out).items() if files}
    unknown = sorted(set(classes) - set(names))
    if len(unknown) == len(classes) == 1 and unknown[0].lower() in _UNLABELLED:
        notes.append(f"{root} is passed over, as its images have no classes, only {unknown[0]}/")
        return {}
    check_known(classes, names, str(root), f"Rename or remove them; those learnt are in {train}")
    return classes


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
    children = (child for child in root.iterdir() if not is_hidden(child.name))
    return sorted(child for child in children if child.is_dir())


def is_hidden(name: str) -> bool:
    """Whether what is called so is never looked into."""
    return name.startswith(".") or name == _HIDDEN


# What to say of a folder that is none


def nothing_in(folder: Path) -> tuple[str, str]:
    """Say what a folder without folders of images holds instead, and what to do."""
    seen = f"Got {_seen(folder) or 'nothing'} in {folder}"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if right := _right_folder(folder):
        return seen, f"Give the folder {right}"
    if archives := [path.name for path in files if is_archive(path)]:
        return seen, f"Unpack {_listed(archives)}"
    if any(path.suffix.lower() in EXTENSIONS for path in files):
        return seen, _sort_them(folder)
    return seen, ""


def _sort_them(folder: Path) -> str:
    """Say what to do with images that lie in no folder of a class."""
    near = [folder, folder.parent] if purpose_of(folder) else [folder]
    tables = [path for each in near for path in sorted(each.iterdir()) if is_table(path)]
    found = f" (there are {_listed(map(str, tables))})" if tables else ""
    return (
        "Sort the images into folders named as the classes, or give as `data` a table that names "
        f"each image and its class{found}: the columns are `image` and `label`"
    )


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of one that holds others."""
    return path.suffix.lower() in _ARCHIVES


def _right_folder(folder: Path) -> Path | None:
    """Find the folder below that holds folders of images: the one that the user may mean."""
    looked = [folder]
    for root in looked:
        children = _subfolders(root)
        direct = [child for child in children if _has_direct(child)]
        if root != folder and (len(direct) > 1 or "train" in _trained_on(children)):
            return root
        looked += children[: _MOST_LOOKED_AT - len(looked)]
    return None


def _trained_on(children: Sequence[Path]) -> set[Purpose | None]:
    return {purpose_of(child) for child in children if _holds_classes(child)}


def _has_direct(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


def _seen(folder: Path) -> str:
    children = _subfolders(folder)
    files = [path for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
    ends = Counter(path.suffix.lower() or "without an ending" for path in files)
    seen = [f"{count:,} file{'s' * (count != 1)} {end}" for end, count in ends.most_common(_FEW)]
    if children:
        named = _listed(child.name for child in children)
        seen.insert(0, f"{len(children):,} folder{'s' * (len(children) != 1)} ({named})")
    return ", ".join(seen)


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _FEW:,} more" if len(shown) > _FEW else ""
    return ", ".join(shown[:_FEW]) + more


FORMAT = Format("folders train/<class> and test/<class> of images", has_folder, list_folder)
