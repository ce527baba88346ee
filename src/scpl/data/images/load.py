"""Load a data set of images by name, or from a folder of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from scpl.data.images import encoded, folders, raw
from scpl.data.images.dataset import ImageData, Split, channel_stats, resize
from scpl.data.images.listing import Format, Listing, Splits
from scpl.data.known import EMBEDDED, IMAGE_SETS, TEXT_SETS, ImageSet, find
from scpl.errors import DataError, InputError, unknown_name

__all__ = ["FORMATS", "known", "load", "locate"]


# In a folder of the user's own they are tried in this order: a known layout before any other folder
# of folders.
FORMATS: Mapping[str, Format] = {
    "tiny-imagenet": encoded.FORMATS["tiny-imagenet"],
    "parquet": encoded.FORMATS["parquet"],
    **raw.FORMATS,
    "folder": folders.FORMAT,
}


def known() -> tuple[str, ...]:
    """Names of the data sets that ``load`` knows."""
    return (EMBEDDED, *IMAGE_SETS)


def load(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    download: bool = True,
) -> ImageData:
    """Load a data set into memory.

    A known set is looked for in ``data_dir``, then in the folder named by the environment variable
    ``SCPL_DATA``, each time in a subfolder with its usual name and in the folder itself, in the
    formats it is published in; then on the Hugging Face hub. ``digits`` comes with the package.

    Args:
        name: One of ``known()``, or the path of a folder of images or of parquet files.
        data_dir: Folder that holds data sets.
        image_size: Side of the images in pixels; others are resized. By default they stay as they
            are, but for ``tiny-imagenet``, which the literature of this field uses at 32.
        download: Whether the hub may be asked.

    Returns:
        Train and test split with ``uint8 [N, C, H, W]`` images and ``int64 [N]`` labels.

    Raises:
        InputError: The name is not known, the size is below 1, or an optional package is missing.
        DataError: The data is missing, incomplete or damaged.
    """
    if image_size is not None and image_size < 1:
        raise InputError("The image size must be at least 1 pixel", f"Got {image_size}")
    if name == EMBEDDED:
        return _resized(raw.load_digits().each(Split.identified), image_size)
    if name in IMAGE_SETS:
        return _load_known(name, data_dir, image_size, download)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, image_size)
    advice = (
        "The path of a folder works too: one folder of images per class, or parquet files; or that "
        "of a table of texts (CSV, TSV, JSON lines, parquet)"
    )
    raise unknown_name("data set", name, (*known(), *TEXT_SETS), advice)


def _load_known(
    name: str, data_dir: Path | None, image_size: int | None, download: bool
) -> ImageData:
    spec = IMAGE_SETS[name]
    size = image_size or spec.image_size
    folder, files = find(
        name,
        spec,
        lambda root, _: locate(root, name),
        files="; or ".join(files.files for files in _formats(spec)),
        data_dir=data_dir,
        download=download,
    )
    splits = _read(files, folder, size)
    classes = splits.classes or spec.classes or _numbered(splits, spec.num_classes)
    channels = splits.train.images.shape[1]
    if len(classes) != spec.num_classes or channels != spec.channels:
        raise DataError(
            f"{name} has {spec.num_classes} classes and images of {spec.channels} channels",
            f"Got {len(classes)} classes and {channels} channels in {folder}",
            "To load another set, give the path of its folder instead of a name",
        )
    return _resized(_data(name, splits, classes, spec.mean, spec.std, spec.flip), size)


def locate(root: Path, name: str) -> tuple[Path, Format] | None:
    """Find a data set of ``IMAGE_SETS`` below a folder, without reading any image."""
    for folder in _candidates(root, name):
        for files in _formats(IMAGE_SETS[name]):
            # Any folder of folders looks like images by class; in the root that proves nothing.
            if files is folders.FORMAT and folder == root and not (root / "train").is_dir():
                continue
            if files.complete(folder):
                return folder, files
    return None


def _formats(spec: ImageSet) -> list[Format]:
    return [FORMATS[name] for name in (spec.published_as, "parquet", "folder")]


def _candidates(root: Path, name: str) -> Iterator[Path]:
    for folder in IMAGE_SETS[name].folders:
        if (root / folder).is_dir():
            yield root / folder
    # The files of different sets have the same names, so a root named as another set is not ours.
    others = {
        alias for other, spec in IMAGE_SETS.items() if other != name for alias in spec.folders
    }
    if root.is_dir() and root.resolve().name not in others:
        yield root


def _load_folder(folder: Path, image_size: int | None) -> ImageData:
    for files in FORMATS.values():
        if files.complete(folder):
            splits = _read(files, folder, image_size)
            classes = splits.classes or _numbered(splits)
            mean, std = channel_stats(splits.train.images)
            return _resized(_data(folder.resolve().name, splits, classes, mean, std), image_size)
    raise DataError(
        "A data folder must hold images in one folder per class, or another known format",
        f"Got none of them in {folder}",
        "Known: " + "; ".join(files.files for files in FORMATS.values()),
    )


def _read(files: Format, folder: Path, image_size: int | None) -> Splits:
    found = files.read(folder)
    return found.decoded(image_size) if isinstance(found, Listing) else found


def _data(
    name: str,
    splits: Splits,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    flip: bool = True,
) -> ImageData:
    train, test = (
        split if split.place else dataclasses.replace(split, place=f"the {purpose} files of {name}")
        for purpose, split in (("training", splits.train), ("test", splits.test))
    )
    data = ImageData(name, train, test, classes, mean, std, flip, splits.valid, splits.notes)
    return data.each(Split.identified)


def _numbered(splits: Splits, count: int = 0) -> tuple[str, ...]:
    there = (split for split in (splits.train, splits.valid, splits.test) if split is not None)
    largest = max(int(split.labels.max()) for split in there)
    return tuple(str(label) for label in range(max(count, largest + 1)))


def _resized(data: ImageData, size: int | None) -> ImageData:
    if size is None or size == data.image_size:
        return data
    return data.each(lambda split: resize(split, size))
