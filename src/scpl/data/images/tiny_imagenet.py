"""Tiny-ImageNet in its original layout.

``wnids.txt`` lists the 200 classes, ``train/<wnid>/images/*`` holds their images, and
``val/val_annotations.txt`` says which class each image in ``val/images`` shows. The images in
``test`` have no labels; as in the literature the validation images serve as test set.

Source of the layout: http://cs231n.stanford.edu/tiny-imagenet-200.zip.
"""

from __future__ import annotations

from pathlib import Path

from scpl.data.images.folder import image_files, labelled_images
from scpl.data.images.sets import Parts
from scpl.errors import DataError

__all__ = ["has_tiny_imagenet", "read_tiny_imagenet"]

_ANNOTATIONS = Path("val", "val_annotations.txt")


def has_tiny_imagenet(folder: Path) -> bool:
    """Whether ``folder`` holds the list of classes, the annotations and the training images."""
    files = (folder / "wnids.txt", folder / _ANNOTATIONS)
    return all(file.is_file() for file in files) and (folder / "train").is_dir()


def read_tiny_imagenet(folder: Path, image_size: int | None = None) -> Parts:
    """Read the set; classes are named by the first words of ``words.txt``, else by their wnid.

    Args:
        folder: The unpacked archive, usually named ``tiny-imagenet-200``.
        image_size: Resize to this, in pixels; the original images have 64.

    Raises:
        DataError: A class has no image, an annotation is malformed, or an image is unreadable.
        InputError: Pillow is not installed.
    """
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip())
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train = []
    for wnid, label in labels.items():
        images = folder / "train" / wnid / "images"
        files = image_files(images) if images.is_dir() else []
        if not files:
            raise DataError(
                "every class in wnids.txt needs training images",
                f"Got none in {images}",
                "Unpack the archive again",
            )
        train += [(file, label) for file in files]
    splits = labelled_images([train, _validation(folder, labels)], image_size)
    if len(splits) < 2:
        raise DataError("the annotations must list at least one image", f"Got {_ANNOTATIONS} empty")
    return Parts(splits[0], splits[1], _names(folder / "words.txt", wnids))


def _validation(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    pairs = []
    for number, line in enumerate(_lines(folder / _ANNOTATIONS), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1].strip() not in labels:
            raise DataError(
                "each annotation must be a file name, a tab and a class of wnids.txt",
                f"Got {line!r} in line {number} of {folder / _ANNOTATIONS}",
                "Unpack the archive again",
            )
        pairs.append((folder / "val" / "images" / fields[0], labels[fields[1].strip()]))
    missing = [file for file, _ in pairs if not file.is_file()]
    if missing:
        raise DataError(
            "every annotated image must be there",
            f"Missing: {missing[0]} and {len(missing) - 1} more",
            "Unpack the archive again",
        )
    return pairs


def _names(words: Path, wnids: list[str]) -> tuple[str, ...]:
    known = {}
    for line in _lines(words) if words.is_file() else []:
        wnid, _, name = line.partition("\t")
        known[wnid] = name.partition(",")[0].strip()
    return tuple(known.get(wnid) or wnid for wnid in wnids)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "a list of classes must be readable text", f"Got {path}: {error}"
        ) from error
