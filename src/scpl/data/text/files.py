"""Which files a text data set consists of: a known set, or the user's own tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from scpl.data import hub
from scpl.data.images.catalogue import EMBEDDED, KNOWN
from scpl.data.images.parquet import check_shards, shards
from scpl.data.places import roots
from scpl.data.text.catalogue import TEXT_SETS, TextSet
from scpl.data.text.tables import SUFFIXES, columns_of, is_table
from scpl.errors import DataError, unknown_name

__all__ = ["Files", "find_files", "is_text", "lies_here"]

_IMAGE_COLUMNS = {"image", "img"}
_VALID_KINDS = ("validation", "valid", "val", "dev")


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a text data set.

    Args:
        name: Name of the set.
        train: Tables to learn from.
        valid: Tables to validate on; if there is none, rows of ``train`` are held out.
        test: Tables to test on; if there is none, rows of ``train`` are held out.
        known: What is known of the set, if it has a name.
        notes: What the user should know of the choice.
    """

    name: str
    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    known: TextSet | None = None
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, in a fixed order."""
        return (*self.train, *self.valid, *self.test)


def is_text(name: str) -> bool:
    """Whether a name is that of a text data set, of a table, or of a folder of tables of texts."""
    if name in TEXT_SETS or name in KNOWN or name == EMBEDDED:
        return name in TEXT_SETS
    path = Path(name).expanduser()
    if not path.is_dir():
        return is_table(path)
    train = _tables(path, "train")
    if not train:
        return False
    return train[0].suffix != ".parquet" or not _IMAGE_COLUMNS & set(columns_of(train[0]))


def lies_here(name: str, data_dir: Path | None = None) -> bool:
    """Whether a data set of ``TEXT_SETS`` lies on this machine.

    Raises:
        DataError: ``data_dir`` does not exist, or a shard is missing.
    """
    return _on_this_machine(name, TEXT_SETS[name], roots(data_dir)) is not None


def find_files(
    name: str, *, data_dir: Path | None = None, test: Path | None = None, download: bool = True
) -> Files:
    """Find the files of a text data set, without reading them.

    Args:
        name: A key of ``TEXT_SETS``, a table, or a folder with a table ``train.*`` or
            ``train-*.parquet`` and perhaps others for ``valid`` and ``test``.
        data_dir: Folder that holds data sets; ``SCPL_DATA`` is searched as well.
        test: A table of the user's own to test on.
        download: Whether the hub may be asked.

    Raises:
        DataError: Files are missing.
        InputError: The name is not known.
    """
    if name in TEXT_SETS:
        found = _find_known(name, TEXT_SETS[name], data_dir, download)
    else:
        found = _find_own(name)
    if test is not None:
        if not test.is_file():
            raise DataError("--test-data must be an existing table", f"Got {test}")
        found = dataclasses.replace(found, test=(test.expanduser(),))
    return found


def _find_own(name: str) -> Files:
    path = Path(name).expanduser()
    if path.is_file() or (is_table(path) and not path.is_dir()):
        columns_of(path)  # which says what is wrong with it
        return Files(path.stem, (path,))
    if not path.is_dir():
        advice = f"The path of a table works too ({', '.join(SUFFIXES)}), or of a folder of tables"
        raise unknown_name("text data set", name, TEXT_SETS, advice)
    train, test = _tables(path, "train"), _tables(path, "test")
    valid = next((found for kind in _VALID_KINDS if (found := _tables(path, kind))), ())
    if not train:
        raise DataError(
            "a folder of tables must hold one named train",
            f"Got none in {path}",
            f"Name it train with one of: {', '.join(SUFFIXES)}",
        )
    notes: tuple[str, ...] = ()
    if valid and not test:
        notes = (f"tested on {valid[0].name}, as there is no table named test",)
        valid, test = (), valid
    return Files(path.resolve().name, train, valid, test, notes=notes)


def _tables(folder: Path, kind: str) -> tuple[Path, ...]:
    """The tables of one split: ``kind.csv`` and so on, or shards of parquet."""
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            if suffix != ".parquet" and (place / f"{kind}{suffix}").is_file():
                return (place / f"{kind}{suffix}",)
        found = shards(place, kind)
        if found:
            check_shards(found)
            return tuple(found)
    return ()


def _find_known(name: str, spec: TextSet, data_dir: Path | None, download: bool) -> Files:
    folders = roots(data_dir)
    if found := _on_this_machine(name, spec, folders):
        return found
    advice = (
        f"Put its files (train-*.parquet and {spec.test}-*.parquet) into a folder {spec.folder} "
        "and name the folder above it with --data-dir or the environment variable SCPL_DATA"
    )
    if not download:
        looked = " and ".join(map(str, folders)) or "no folder, as none was given"
        raise DataError(
            f"the data set {name} must be on this machine", f"Searched {looked}", advice
        )
    wanted = [f"{spec.subfolder}/{kind}-*.parquet" for kind in ("train", spec.test)]
    snapshot = hub.fetch(spec.repo, name, advice, wanted)
    found = _in_folder(name, spec, snapshot)
    if not found:
        raise DataError(
            f"{spec.repo} must hold train and {spec.test} parquet files",
            f"Not so in {snapshot}",
            advice,
        )
    return found


def _on_this_machine(name: str, spec: TextSet, folders: list[Path]) -> Files | None:
    places = (place for root in folders for place in _candidates(root, spec))
    return next((found for place in places if (found := _in_folder(name, spec, place))), None)


def _candidates(root: Path, spec: TextSet) -> Iterator[Path]:
    yield root / spec.folder
    # All sets have files of the same names, so a folder of another name proves nothing.
    if root.resolve().name == spec.folder:
        yield root


def _in_folder(name: str, spec: TextSet, folder: Path) -> Files | None:
    for place in (folder, folder / spec.subfolder):
        train, test = shards(place, "train"), shards(place, spec.test)
        notes = []
        if not train and (train := shards(place, "train_partial")):
            notes.append(f"trains on {train[0].name}: a part of {name}, without the rest")
        if not (train and test):
            continue
        check_shards(train)
        check_shards(test)
        if spec.test != "test":
            notes.append(
                f"tested on the {spec.test} split, as in the literature: the hub hides the labels "
                "of test"
                + (f" ({place / 'test-*.parquet'} is not used)" if shards(place, "test") else "")
            )
        return Files(name, tuple(train), (), tuple(test), spec, tuple(notes))
    return None
