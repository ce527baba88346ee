"""Images in folders, one folder per class.

Either ``root/train/<class>/*`` beside ``root/test/<class>/*`` (or ``val``, ``valid``,
``validation``), or only ``root/<class>/*``, of which a fifth becomes the test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl.data.cache import remember
from scpl.data.images.decode import decode_images
from scpl.data.images.sets import Parts, Split, carve_validation
from scpl.errors import DataError

__all__ = ["EXTENSIONS", "has_folder", "image_files", "labelled_images", "read_folder"]

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: the same folder must give the same test images in every run

Classes = Mapping[str, Sequence[Path]]  # image files by name of class, in order


def has_folder(folder: Path) -> bool:
    """Whether ``folder``, or its subfolder ``train``, holds folders with images in them."""
    return any(_has_images(child) for child in _subfolders(_train_root(folder)))


def read_folder(folder: Path, image_size: int | None = None) -> Parts:
    """Read an image folder; the classes are the names of the folders, sorted.

    Args:
        folder: The folder that holds ``train``, or the folders of the classes themselves.
        image_size: Resize the shorter side to this and cut out the centre, in pixels.

    Raises:
        DataError: There is no class, a class is empty or unknown, an image is unreadable, or sizes
            differ and no ``image_size`` was given.
        InputError: Pillow is not installed.
    """
    train_root = _train_root(folder)
    train = _classes(train_root)
    names = tuple(train)
    empty = [name for name, files in train.items() if not files]
    if not names or empty:
        raise DataError(
            "an image folder needs one folder per class with at least one image in each",
            f"Got no image in {', '.join(str(train_root / name) for name in empty) or train_root}",
            f"Known image files: {', '.join(sorted(EXTENSIONS))}",
        )
    test = _test_classes(folder, names) if train_root != folder else None
    splits = labelled_images(
        [_pairs(train, names), _pairs(test, names) if test else []], image_size
    )
    if len(splits) == 1:
        splits = list(carve_validation(splits[0], _TEST_SHARE, _SPLIT_SEED))
    return Parts(splits[0], splits[1], names)


def labelled_images(
    groups: Sequence[Sequence[tuple[Path, int]]], image_size: int | None
) -> list[Split]:
    """Decode groups of (file, label) together, so that all get the same number of channels.

    Returns:
        One split for each group that is not empty.
    """
    pairs = [pair for group in groups for pair in group]
    files = [file for file, _ in pairs]

    def decode() -> Tensor:
        return decode_images(files, image_size)

    images = remember(files, image_size, len(files), decode)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    sizes = [len(group) for group in groups]
    parts = zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)
    return [Split(part, targets) for part, targets in parts if len(targets)]


def image_files(folder: Path) -> list[Path]:
    """List the image files directly in ``folder``, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _train_root(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _test_classes(folder: Path, names: Sequence[str]) -> Classes | None:
    """Find the test images; a ``test`` folder without classes (unlabelled) is passed over."""
    for root in (folder / name for name in _TEST_FOLDERS):
        classes = {name: files for name, files in _classes(root).items() if files}
        unknown = sorted(set(classes) - set(names))
        if unknown and set(classes) & set(names):
            raise DataError(
                f"the classes in {root} must be among those in {folder / 'train'}",
                f"Got also {', '.join(unknown)}",
                "Rename or remove these folders",
            )
        if classes and not unknown:
            return classes
    return None


def _classes(root: Path) -> Classes:
    return {child.name: image_files(child) for child in _subfolders(root)}


def _pairs(classes: Classes, names: Sequence[str]) -> list[tuple[Path, int]]:
    return [(file, names.index(name)) for name, files in classes.items() for file in files]


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    children = (child for child in root.iterdir() if not child.name.startswith("."))
    return sorted(child for child in children if child.is_dir())


def _has_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in EXTENSIONS and path.is_file()
