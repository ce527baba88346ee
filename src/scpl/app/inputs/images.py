"""Runs on images: their loaders, and what `scpl eval` and `scpl predict` do with them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scpl import models
from scpl.app.commands import EvalConfig, PredictConfig
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, free_memory
from scpl.app.inputs.base import (
    ImageInputs,
    Loaders,
    balanced_notes,
    check_tested_on,
    check_there,
    drawn_from,
    fitted,
)
from scpl.app.inputs.pending import (
    STDIN,
    Kept,
    Named,
    Pending,
    Say,
    check_kept,
    check_rows,
    kept,
    open_stdin,
)
from scpl.app.settings import Samples
from scpl.data import images as data
from scpl.data.classes import absent, spread
from scpl.data.images import EXTENSIONS, decode_readable, normalise, with_channels
from scpl.data.notes import Faults
from scpl.data.tables import is_table
from scpl.errors import DataError, InputError
from scpl.models.pretrained import PROCESSOR, ImageSettings, image_settings
from scpl.outside import shown
from scpl.runs import RunFolder
from scpl.seeding import derive_seed
from scpl.tasks import Classes

__all__ = [
    "COLUMNS",
    "SAMPLES",
    "lie_on",
    "loaders",
    "network_wants",
    "pending",
    "side_of",
    "test_loader",
]

SAMPLES: Samples = "images"
COLUMNS: Mapping[str, Any] = {"path": ""}
"""What names an image in the output of `scpl predict`, with an example."""

_LEAST_SIDE = 16
"""Smaller images leave the later layers of a network that pools nothing to pool."""
_SHARE_OF_MEMORY = 1 / 4
"""What images may take of an accelerator's free memory: the rest is for training."""


def loaders(config: TrainConfig) -> Loaders:
    """Load a data set of images and make its loaders.

    Raises:
        DataError: if it is missing or damaged.
    """
    chosen, seed = config.data, config.run.seed
    wanted = network_wants(config)
    side = chosen.image_size or (wanted.size if wanted else None)
    given: dict[str, Any] = {
        "data_dir": chosen.data_dir,
        "reading": _reading(config),
        "table": _table(config),
    }
    source = data.load(chosen.data, image_size=side, **given)
    notes: tuple[str, ...] = ()
    size = side or side_of(source.image_size, config)
    if size != source.image_size:
        notes = (f"Images of {source.image_size} x {source.image_size} pixels are enlarged to "
                 f"{size} x {size} (--image-size)",)  # fmt: skip
        source = data.load(chosen.data, image_size=size, **given)
    source, told = _as_wanted(source, wanted)
    notes += told
    train, valid = source.train, source.valid
    if chosen.limit_train is not None and chosen.limit_train < len(train):
        train = data.limit(train, chosen.limit_train, derive_seed(seed, "limit"))
    if valid is None and chosen.validation > 0:
        train, valid = data.carve_validation(
            train, chosen.validation, derive_seed(seed, "validation")
        )
    mean, std = tuple(source.mean), tuple(source.std)
    plain = data.Augmentation("none", mean, std)
    used = {"train": train, "validation": valid, "test": source.test}
    sizes = torch.bincount(train.labels, minlength=source.num_classes)
    notes += (
        *source.notes,
        f"classes in train: {spread(sizes, source.classes, 'images')}",
        *(
            note
            for purpose, split in used.items()
            if split is not None
            for note in absent(split.labels, source.classes, f"{purpose} image")
        ),
        data.sentence(**used),
    )
    notes += data.shared_images(train, valid, source.test)
    splits = [split for split in (train, valid, source.test) if split is not None]
    device, told = lie_on(choose_device(config.run.device), splits)
    notes += told
    task = fitted(Classes, chosen, train.labels, source.num_classes)
    notes += balanced_notes(chosen, task, source.classes)
    strata = drawn_from(chosen, task, train.labels)
    given = {"batch_size": config.chosen.batch_size, "device": device}
    return Loaders(
        source.name,
        tuple(source.classes),
        ImageInputs(
            source.channels,
            source.image_size,
            mean,
            std,
            config.network.width,
            (PROCESSOR,) if wanted and wanted.text else (),
            source.white,
        ),
        data.Loader(
            train,
            data.Augmentation(chosen.augmentation, mean, std, source.flip),
            views=chosen.views,
            shuffle=True,
            seed=seed,
            strata=strata,
            **given,
        ),
        None if valid is None else data.Loader(valid, plain, **given),
        data.Loader(source.test, plain, **given),
        notes,
        {PROCESSOR: wanted.text} if wanted and wanted.text else {},
        task=task,
        identities=source.identities,
    )


def _table(config: TrainConfig) -> data.TableSettings:
    """What of a configuration says how a table of images is read."""
    chosen = config.data
    if len(chosen.label) > 1:
        raise InputError(
            "The class of an image must stand in one column",
            f"Got --label {' '.join(chosen.label)}",
            "Name one of them",
        )
    label = chosen.label[0] if chosen.label else None
    return data.TableSettings(chosen.image, label, chosen.test_data, chosen.skip_unreadable)


def _reading(config: TrainConfig) -> data.Reading:
    chosen = config.data
    return data.Reading(None, chosen.skip_unreadable, chosen.in_memory, chosen.workers)


def lie_on(
    device: torch.device, splits: Sequence[data.Split]
) -> tuple[torch.device | None, tuple[str, ...]]:
    """Choose where the images of a run lie: on the accelerator, where they take little of it.

    Those that are decoded on demand never do.

    Returns:
        The device, or None to leave them in the memory of the CPU; and what to tell the user.
    """
    free, taken = free_memory(device), sum(split.nbytes for split in splits)
    held = all(isinstance(split.images, Tensor) for split in splits)
    if free is None or not held or taken > _SHARE_OF_MEMORY * free:
        return None, ()
    return device, (
        f"Images lie on {device}: they take {taken / 1e6:,.0f} of its {free / 1e6:,.0f} MB free",
    )


def network_wants(config: TrainConfig) -> ImageSettings | None:
    """How a network of ``transformers`` wants its images; None for any other.

    Raises:
        InputError: if it is none for images.
    """
    if models.origin_of(config.network.model) != "hf":
        return None
    return image_settings(config.network.model.partition(":")[2])


def _as_wanted(
    source: data.ImageData, wanted: ImageSettings | None
) -> tuple[data.ImageData, tuple[str, ...]]:
    """Give images the channels and the normalisation of the network; say what was done."""
    if wanted is None:
        return source, ()
    notes: tuple[str, ...] = ()
    if wanted.channels != source.channels:
        was = source.channels
        mean, std = ((values[0],) * wanted.channels for values in (source.mean, source.std))
        source = source.each(lambda each: each.with_channels(wanted.channels), mean=mean, std=std)
        notes += (f"Images of {was} channels are given {wanted.channels}, as the network wants",)
    if wanted.mean is None or wanted.std is None:
        return source, (*notes, "The network does not say how pixels are normalised: as the data")
    source = dataclasses.replace(source, mean=wanted.mean, std=wanted.std)
    return source, (*notes, "Pixels are normalised as the network's image processor says")


def side_of(published: int, config: TrainConfig) -> int:
    """Choose how large images are for the network: as the user says, or at least 16 pixels."""
    if config.data.image_size is not None:
        return config.data.image_size
    return published if config.network.model == "mlp" else max(published, _LEAST_SIDE)


def test_loader(
    config: EvalConfig, trained: TrainConfig, folder: RunFolder, description: Mapping[str, Any]
) -> data.Loader:
    """The test images, normalised as those that the network learnt from."""
    name, data_dir = config.data or trained.data.data, config.data_dir or trained.data.data_dir
    inputs, classes = ImageInputs.of(description), tuple(description["classes"])
    if config.data is None:
        check_there(trained)
    reading = _reading(trained)._replace(white=inputs.white)
    if config.skip_unreadable:
        reading = reading._replace(skip_unreadable=True)
    own = _same(name, trained.data.data)
    table = _table(trained)._replace(skip_missing=reading.skip_unreadable)
    if not own:
        table = table._replace(test_data=None)
    test, notes = data.load_test(
        name, classes, inputs.image_size, own=own, data_dir=data_dir, reading=reading, table=table
    )
    if config.data is None:
        check_tested_on(description, {"test": test.identity(classes)}, classes, name, "images")
    test = test.with_channels(inputs.channels)
    notes += (*absent(test.labels, classes, "test image"), data.sentence(test=test))
    sys.stderr.write("".join(f"{note}\n" for note in notes))
    batch_size = config.batch_size or trained.chosen.batch_size
    plain = data.Augmentation("none", inputs.mean, inputs.std)
    return data.Loader(test, plain, batch_size=batch_size)


def _same(name: str, other: str) -> bool:
    """Whether two names are of one data set, or of one folder."""
    paths = [Path(each).expanduser() for each in (name, other)]
    return name == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def pending(config: PredictConfig, folder: RunFolder, description: Mapping[str, Any]) -> Pending:
    """Find the images that are to be classified: files, those in folders, or named on stdin.

    Raises:
        DataError: if an input is missing, or there is no image.
        InputError: if stdin is said to be a table.
    """
    if config.stdin != "lines":
        raise InputError(
            "Standard input must hold paths, one per line, for a run on images",
            f"Got --stdin {config.stdin}",
        )
    return _Images(config, ImageInputs.of(description))


class _Images(Pending):
    def __init__(self, config: PredictConfig, network: ImageInputs) -> None:
        names = [str(name) for name in config.inputs]
        self._size, self._network = config.batch_size, network
        self._found = self._failed = 0
        self._left_out = Faults()
        self.waits = STDIN in names
        paths = (Path(name) for name in names if name != STDIN)
        missing = [shown(path) for path in paths if not path.exists()]
        if missing:
            raise DataError("Every input must exist", f"Not found: {', '.join(missing)}")
        tables = [Path(name) for name in names if is_table(Path(name))]
        check_kept(config.keep, [name for name in names if not is_table(Path(name))])
        self._wanted = _Wanted(
            names, {table: data.naming_of(table, config.image) for table in tables}, config.keep
        )
        # Listing a folder twice takes little beside decoding what is in it.
        left_out = Faults()
        self.total = None if self.waits else sum(1 for _ in _files(self._wanted, left_out))
        if self.total == 0:
            where = ", ".join(shown(Path(name)) for name in names) or "no input"
            raise DataError(
                "There must be at least one image to classify",
                "; ".join([f"Got none in {where}", *map(shown, left_out.notes())]),
                f"Known image files: {', '.join(sorted(EXTENSIONS))}",
            )

    def batches(self, say: Say) -> Iterator[Named]:
        files, network = _files(self._wanted, self._left_out), self._network
        while chunk := list(islice(files, self._size)):
            read, images = _read_images([path for path, _ in chunk], network, say)
            self._found += len(chunk)
            self._failed += len(chunk) - len(read)
            if read:
                names = [{"path": shown(chunk[i][0]), **chunk[i][1]} for i in read]
                yield names, normalise(images, network.mean, network.std)

    def check(self, say: Say) -> None:
        for note in self._left_out.notes():
            say(shown(note))
        check_rows(self._left_out)
        if self._failed:
            raise DataError(
                "Every image must be readable",
                f"{self._failed} of {self._found} were not; they are named above",
                "Replace or remove them; all others were classified",
            )


class _Wanted(NamedTuple):
    """The inputs: their names; of those that are tables, how they name images; what is kept."""

    names: Sequence[str]
    tables: Mapping[Path, data.Naming]
    keep: Sequence[str]


def _files(wanted: _Wanted, left_out: Faults) -> Iterator[tuple[Path, Kept]]:
    """List the image files that were named, and those in named folders, each once.

    Tables name one in each row, with the cells that are kept. What is held are the names, not what
    is found in them; what stdin and tables name is not compared.
    """
    before: set[Path] = set()
    for name in wanted.names:
        path = Path(name)
        if name == STDIN:
            yield from ((file, {}) for file in _named_on_stdin())
        elif path in wanted.tables:
            for _, file, cells in wanted.tables[path].images(wanted.keep, left_out):
                yield file, kept(wanted.keep, cells)
        else:
            for file in data.image_files(path, left_out) if path.is_dir() else [path]:
                if not (before and _is_among(file, before)):
                    yield file, {}
            before.add(path)


def _is_among(file: Path, inputs: Collection[Path]) -> bool:
    """Whether a file is one of the inputs, or found in one that is a folder."""
    if file in inputs:
        return True
    above = [folder for folder in file.parents if folder in inputs]
    hidden = (any(part.startswith(".") for part in file.relative_to(f).parts) for f in above)
    return file.suffix.lower() in EXTENSIONS and not all(hidden)


def _named_on_stdin() -> Iterator[Path]:
    with open_stdin("paths of images") as lines:
        for line in lines:
            if name := line.rstrip(b"\r\n"):
                yield Path(os.fsdecode(name))


def _read_images(files: Sequence[Path], network: ImageInputs, say: Say) -> tuple[list[int], Tensor]:
    """Decode files into ``uint8 [N, C, H, W]``; unreadable ones are named and left out.

    Returns:
        The places of the others in ``files``, and their images.
    """
    decoded = decode_readable(files, network.image_size, white=network.white)
    for index, why in decoded.unreadable.items():
        say(f"{shown(files[index])}: {why}")
    read = [index for index in range(len(files)) if index not in decoded.unreadable]
    return read, with_channels(decoded.images, network.channels)
