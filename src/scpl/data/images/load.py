"""Load a data set of images by name, or from a folder of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scpl.data.classes import matched
from scpl.data.images import encoded, folders, raw
from scpl.data.images.dataset import ImageData, Split, channel_stats, resize
from scpl.data.images.decode import AS_IT_IS, Reading
from scpl.data.images.listing import Format, Listing, Splits, decoded
from scpl.data.images.tables import TableSettings, image_tables
from scpl.data.known import EMBEDDED, IMAGE_SETS, TEXT_SETS, ImageSet, find
from scpl.errors import DataError, InputError, unknown_name

__all__ = ["FORMATS", "known", "load", "load_test", "locate"]


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
    reading: Reading = AS_IT_IS,
    table: TableSettings | None = None,
) -> ImageData:
    """Load a data set into memory.

    A known set is looked for in ``data_dir``, then in the folder named by the environment variable
    ``SCPL_DATA``, each time in a subfolder with its usual name and in the folder itself, in the
    formats it is published in; then on the Hugging Face hub. ``digits`` comes with the package.

    Args:
        name: One of ``known()``, or the path of a folder of images or of parquet files, or of a
            table that names images.
        data_dir: Folder that holds data sets.
        image_size: Side of the images in pixels; others are resized. By default they stay as they
            are, but for ``tiny-imagenet``, which the literature of this field uses at 32.
        download: Whether the hub may be asked.
        reading: How images are decoded.
        table: How a table is read; None for what is no table.

    Returns:
        Train and test split with ``uint8 [N, C, H, W]`` images and ``int64 [N]`` labels.

    Raises:
        InputError: The name is not known, the size is below 1, or an optional package is missing.
        DataError: The data is missing, incomplete or damaged.
    """
    if image_size is not None and image_size < 1:
        raise InputError("The image size must be at least 1 pixel", f"Got {image_size}")
    if name == EMBEDDED:
        _check_used(table, name, None)
        return _resized(raw.load_digits().each(Split.identified), image_size)
    spec, folder, files = _located(name, data_dir, download, table)
    _check_used(table, name, files)
    size = image_size or (spec.image_size if spec else None)
    found = files.read(folder)
    splits = found.decoded(size, reading) if isinstance(found, Listing) else found
    if spec is not None:
        return _resized(_known_set(name, spec, folder, splits), size)
    classes = splits.classes or _numbered(splits)
    mean, std = channel_stats(splits.train.images)
    name = folder.stem if folder.is_file() else folder.resolve().name
    return _resized(_data(name, splits, classes, mean, std), size)


def load_test(
    name: str,
    classes: Sequence[str],
    image_size: int,
    *,
    own: bool,
    data_dir: Path | None = None,
    download: bool = True,
    reading: Reading = AS_IT_IS,
    table: TableSettings | None = None,
) -> tuple[Split, tuple[str, ...]]:
    """Load images to test a trained network on.

    Args:
        name: As of `load`. Of a folder of the user's own that has no images for testing, all are
            taken, unless ``own``.
        classes: The classes that the network tells apart; labels become indices into these.
        image_size: Side of the images in pixels.
        own: Whether the network learnt from this data: then it is tested on the same images as
            after training.
        data_dir: Folder that holds data sets.
        download: Whether the hub may be asked.
        reading: How images are decoded.
        table: How a table is read; None for what is no table.

    Returns:
        The images, and what the user should know.

    Raises:
        DataError: The data is missing or damaged, or has a class that the network does not know.
        InputError: As `load`.
    """
    if name == EMBEDDED:
        data = raw.load_digits()
        return _matched(data.test, data.classes, classes, image_size)
    spec, folder, files = _located(name, data_dir, download, table)
    found = files.read(folder)
    if isinstance(found, Listing):
        part = found.to_learn()[2] if own else found.to_test()
        # Before they are decoded: a wrong folder is told at once.
        labels, told = matched(part.labels, found.classes or _known(spec), classes, part.place)
        part = dataclasses.replace(part, labels=labels)
        (test,), _, seen = decoded([part], image_size, reading)
        return resize(test, image_size), (*found.notes, *found.left_out.notes(), *told, *seen)
    return _matched(found.test, found.classes or _known(spec), classes, image_size)


def _matched(
    test: Split, found: Sequence[str] | None, classes: Sequence[str], image_size: int
) -> tuple[Split, tuple[str, ...]]:
    labels, told = matched(test.labels, found, classes, test.place)
    test = dataclasses.replace(test.identified(), labels=labels)
    return resize(test, image_size), told


def _located(
    name: str, data_dir: Path | None, download: bool, table: TableSettings | None
) -> tuple[ImageSet | None, Path, Format]:
    """Find a data set and its format: one that is known by name, or a folder."""
    if name in IMAGE_SETS:
        spec = IMAGE_SETS[name]
        folder, files = find(
            name,
            spec,
            lambda root, _: locate(root, name),
            files="; or ".join(files.files for files in _formats(spec)),
            data_dir=data_dir,
            download=download,
        )
        return spec, folder, files
    path = Path(name).expanduser()
    if tables := image_tables(path, table or TableSettings()):
        return None, path, tables
    if path.is_dir():
        return None, path, _format_of(path)
    if path.exists():
        advice = f"{'Unpack it, and g' if folders.is_archive(path) else 'G'}ive its folder"
        raise DataError(
            "Images must lie in a folder, or be named by a table", f"Got the file {path}", advice
        )
    advice = (
        "The path of a folder works too: one folder of images per class, or parquet files; or that "
        "of a table of images or texts (CSV, TSV, JSON lines, parquet). There is no "
        f"{path.absolute()}"
    )
    raise unknown_name("data set", name, (*known(), *TEXT_SETS), advice)


def _check_used(table: TableSettings | None, name: str, files: Format | None) -> None:
    """Check that what is said of a table is for one."""
    wrong = [f"`{each}`" for each in ("image", "label", "test_data") if getattr(table, each, None)]
    if wrong and files in (None, *FORMATS.values()):
        raise InputError(
            f"{', '.join(wrong)} must go with a table of images or texts",
            f"Got {name}, which is none",
            "Leave it out, or give the table as `data`",
        )


def _known(spec: ImageSet | None) -> tuple[str, ...] | None:
    return None if spec is None else spec.classes


def _known_set(name: str, spec: ImageSet, folder: Path, splits: Splits) -> ImageData:
    classes = splits.classes or spec.classes or _numbered(splits, spec.num_classes)
    channels = splits.train.images.shape[1]
    if len(classes) != spec.num_classes or channels != spec.channels:
        raise DataError(
            f"{name} has {spec.num_classes} classes and images of {spec.channels} channels",
            f"Got {len(classes)} classes and {channels} channels in {folder}",
            "To load another set, give the path of its folder instead of a name",
        )
    return _data(name, splits, classes, spec.mean, spec.std, spec.flip)


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


def _format_of(folder: Path) -> Format:
    for files in FORMATS.values():
        if files.complete(folder):
            return files
    got, advice = folders.nothing_in(folder)
    raise DataError(
        "A data folder must hold images in one folder per class, or another known format",
        got,
        advice or "Known: " + "; ".join(files.files for files in FORMATS.values()),
    )


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
    data = ImageData(
        name, train, test, classes, mean, std, flip, splits.valid, splits.notes, splits.white
    )
    return data.each(Split.identified)


def _numbered(splits: Splits, count: int = 0) -> tuple[str, ...]:
    there = (split for split in (splits.train, splits.valid, splits.test) if split is not None)
    largest = max(int(split.labels.max()) for split in there)
    return tuple(str(label) for label in range(max(count, largest + 1)))


def _resized(data: ImageData, size: int | None) -> ImageData:
    if size is None or size == data.image_size:
        return data
    return data.each(lambda split: resize(split, size))
