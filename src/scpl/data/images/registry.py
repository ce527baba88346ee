"""Load a data set by name, or from a folder of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scpl.data import hub
from scpl.data.images.catalogue import ANY_FORMATS, EMBEDDED, FOLDER, KNOWN, Format, Known
from scpl.data.images.digits import load_digits
from scpl.data.images.sets import ImageData, Parts, channel_stats, resize
from scpl.data.places import roots
from scpl.data.text.catalogue import TEXT_SETS
from scpl.data.text.files import lies_here
from scpl.errors import DataError, InputError, unknown_name

__all__ = ["is_here", "known", "load"]


def known() -> tuple[str, ...]:
    """Names of the data sets that ``load`` knows."""
    return (EMBEDDED, *KNOWN)


def is_here(name: str, data_dir: Path | None = None) -> bool:
    """Whether a known data set lies on this machine; what is not known is for `load` to judge.

    Raises:
        DataError: ``data_dir`` does not exist.
    """
    if name in TEXT_SETS:
        return lies_here(name, data_dir)
    spec = KNOWN.get(name)
    return spec is None or any(locate(root, name, spec) for root in roots(data_dir))


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
        raise InputError("the image size must be at least 1 pixel", f"Got {image_size}")
    if name == EMBEDDED:
        return _resized(load_digits(), image_size)
    if name in KNOWN:
        return _load_known(name, KNOWN[name], data_dir, image_size, download)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, image_size)
    advice = (
        "The path of a folder works too: one folder of images per class, or parquet files; or that "
        "of a table of texts (CSV, TSV, JSON lines, parquet)"
    )
    raise unknown_name("data set", name, (*known(), *TEXT_SETS), advice)


def _load_known(
    name: str, spec: Known, data_dir: Path | None, image_size: int | None, download: bool
) -> ImageData:
    size = image_size or spec.image_size
    folders = roots(data_dir)
    for root in folders:
        found = locate(root, name, spec)
        if found is not None:
            return _read_known(name, spec, *found, size)
    advice = _advice(spec)
    if not download:
        looked = " and ".join(str(root) for root in folders) or "no folder, as none was given"
        raise DataError(
            f"the data set {name} must be on this machine", f"Searched {looked}", advice
        )
    snapshot = hub.fetch(spec.repo, name, advice)
    found = locate(snapshot, name, spec)
    if found is None:
        raise DataError(
            f"{spec.repo} must hold train and test parquet files", f"Not so in {snapshot}", advice
        )
    return _read_known(name, spec, *found, size)


def locate(root: Path, name: str, spec: Known) -> tuple[Path, Format] | None:
    """Find a known data set below a folder, without reading any image."""
    for folder in _candidates(root, name, spec):
        for files in spec.formats:
            # Any folder of folders looks like images by class; in the root that proves nothing.
            if folder == root and files is FOLDER and not (root / "train").is_dir():
                continue
            if files.complete(folder):
                return folder, files
    return None


def _candidates(root: Path, name: str, spec: Known) -> Iterator[Path]:
    for folder in spec.folders:
        if (root / folder).is_dir():
            yield root / folder
    # The files of different sets have the same names, so a root named as another set is not ours.
    others = {alias for other, entry in KNOWN.items() if other != name for alias in entry.folders}
    if root.is_dir() and root.resolve().name not in others:
        yield root


def _read_known(name: str, spec: Known, folder: Path, files: Format, size: int | None) -> ImageData:
    parts = files.read(folder, size)
    classes = parts.classes or spec.classes or _numbered(parts, spec.num_classes)
    channels = parts.train.images.shape[1]
    if len(classes) != spec.num_classes or channels != spec.channels:
        raise DataError(
            f"{name} has {spec.num_classes} classes and images of {spec.channels} channels",
            f"Got {len(classes)} classes and {channels} channels in {folder}",
            f"Load another set by its path: --data {folder}",
        )
    return _resized(ImageData(name, *parts[:2], classes, spec.mean, spec.std, spec.flip), size)


def _load_folder(folder: Path, image_size: int | None) -> ImageData:
    for files in ANY_FORMATS:
        if files.complete(folder):
            parts = files.read(folder, image_size)
            train, test = parts.train, parts.test
            if image_size is not None:
                train, test = resize(train, image_size), resize(test, image_size)
            mean, std = channel_stats(train.images)
            classes = parts.classes or _numbered(parts)
            return ImageData(folder.resolve().name, train, test, classes, mean, std)
    raise DataError(
        "a data folder must hold images in one folder per class, or another known format",
        f"Got none of them in {folder}",
        "Known: " + "; ".join(files.files for files in ANY_FORMATS),
    )


def _numbered(parts: Parts, count: int = 0) -> tuple[str, ...]:
    largest = max(int(split.labels.max()) for split in parts[:2])
    return tuple(str(label) for label in range(max(count, largest + 1)))


def _resized(data: ImageData, size: int | None) -> ImageData:
    if size is None or size == data.image_size:
        return data
    train, test = resize(data.train, size), resize(data.test, size)
    return ImageData(data.name, train, test, data.classes, data.mean, data.std, data.flip)


def _advice(spec: Known) -> str:
    files = "; or ".join(files.files for files in spec.formats)
    return (
        f"Put its files into a folder {spec.folders[0]} ({files}) and name the folder above it "
        "with --data-dir or the environment variable SCPL_DATA"
    )
