"""Runs on images: their loaders, and what `scpl eval` and `scpl predict` do with them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scpl import models
from scpl.app.config import EvalConfig, PredictConfig, Samples, TrainConfig
from scpl.app.environment import choose_device, free_memory
from scpl.app.inputs.base import ImageInputs, Loaders, balanced_notes, drawn_from, fitted
from scpl.data import images as data
from scpl.data.images import EXTENSIONS, decode_images, normalise
from scpl.errors import DataError
from scpl.models.pretrained import PROCESSOR, ImageSettings, image_settings
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
COLUMNS: tuple[str, ...] = ("path",)
"""What names an image in the output of `scpl predict`."""

Batch = tuple[list[dict[str, Any]], Tensor]

_LEAST_SIDE = 16
"""Smaller images leave the later layers of a network that pools nothing to pool."""
_SHARE_OF_MEMORY = 1 / 4
"""What images may take of an accelerator's free memory: the rest is for training."""
_GREY = (19595, 38470, 7471)  # ITU-R 601 luma in 1/65536, as Pillow converts colour to grey


def loaders(config: TrainConfig) -> Loaders:
    """Load a data set of images and make its loaders.

    Raises:
        DataError: if it is missing or damaged.
    """
    chosen, seed = config.data, config.run.seed
    wanted = network_wants(config)
    side = chosen.image_size or (wanted.size if wanted else None)
    source = data.load(chosen.data, data_dir=chosen.data_dir, image_size=side)
    notes: tuple[str, ...] = ()
    size = side or side_of(source.image_size, config)
    if size != source.image_size:
        notes = (f"Images of {source.image_size} x {source.image_size} pixels are enlarged to "
                 f"{size} x {size} (--image-size)",)  # fmt: skip
        source = data.load(chosen.data, data_dir=chosen.data_dir, image_size=size)
    source, told = _as_wanted(source, wanted)
    notes += told
    train, valid = source.train, None
    if chosen.limit_train is not None and chosen.limit_train < len(train):
        train = data.limit(train, chosen.limit_train, derive_seed(seed, "limit"))
    if chosen.validation > 0:
        train, valid = data.carve_validation(
            train, chosen.validation, derive_seed(seed, "validation")
        )
    mean, std = tuple(source.mean), tuple(source.std)
    plain = data.Augmentation("none", mean, std)
    splits = [split for split in (train, valid, source.test) if split is not None]
    device, told = lie_on(choose_device(config.run.device), splits)
    notes += told
    task = fitted(Classes, chosen, train.labels, source.num_classes)
    notes += balanced_notes(chosen, task, source.classes)
    strata = drawn_from(chosen, task, train.labels)
    given: dict[str, Any] = {"batch_size": config.chosen.batch_size, "device": device}
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
    )


def lie_on(
    device: torch.device, splits: Sequence[data.Split]
) -> tuple[torch.device | None, tuple[str, ...]]:
    """Choose where the images of a run lie: on the accelerator, where they take little of it.

    Returns:
        The device, or None to leave them in the memory of the CPU; and what to tell the user.
    """
    free, taken = free_memory(device), sum(split.nbytes for split in splits)
    if free is None or taken > _SHARE_OF_MEMORY * free:
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
        train, test = (
            dataclasses.replace(split, images=_with_channels(split.images, wanted.channels))
            for split in (source.train, source.test)
        )
        was = source.channels
        mean, std = ((values[0],) * wanted.channels for values in (source.mean, source.std))
        source = dataclasses.replace(source, train=train, test=test, mean=mean, std=std)
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
    inputs = ImageInputs.of(description)
    source = data.load(name, data_dir=data_dir, image_size=inputs.image_size)
    if models.origin_of(description["model"]) == "hf":
        source, _ = _as_wanted(
            source, ImageSettings(inputs.channels, None, inputs.mean, inputs.std)
        )
    model, advice = f"The {description['model']} of {config.run}", "Choose another with --data"
    takes, got = (f"{x.channels} x {x.image_size} x {x.image_size}" for x in (inputs, source))
    if takes != got:
        raise DataError(f"{model} takes images of {takes}", f"Got {got}", advice)
    if source.num_classes != description["num_classes"]:
        raise DataError(
            f"{model} tells {description['num_classes']} classes apart",
            f"{source.name} has {source.num_classes}",
            advice,
        )
    batch_size = config.batch_size or trained.chosen.batch_size
    plain = data.Augmentation("none", inputs.mean, inputs.std)
    return data.Loader(source.test, plain, batch_size=batch_size)


def pending(
    config: PredictConfig, folder: RunFolder, description: Mapping[str, Any]
) -> Iterator[Batch]:
    """Read the images that are to be classified, batch by batch.

    Images that cannot be read are named on stderr; the others go on.

    Returns:
        What names each image, and the normalised images ``[N, C, H, W]``.

    Raises:
        DataError: at once, if an input is missing or there is no image; at the end, if images
            could not be read.
    """
    files = _find_images([Path(name) for name in config.inputs])
    return _batches(files, config.batch_size, ImageInputs.of(description))


def _batches(files: Sequence[Path], size: int, inputs: ImageInputs) -> Iterator[Batch]:
    failed = 0
    for start in range(0, len(files), size):
        chunk = files[start : start + size]
        paths, images = _read_images(chunk, inputs.image_size, inputs.channels)
        failed += len(chunk) - len(paths)
        if paths:
            names = [{"path": _shown(path)} for path in paths]
            yield names, normalise(images, inputs.mean, inputs.std)
    if failed:
        raise DataError(
            "Every image must be readable",
            f"{failed} of {len(files)} were not; they are named above",
            "Replace or remove them; all others were classified",
        )


def _find_images(inputs: Sequence[Path]) -> list[Path]:
    """List the image files that were named, and those in named folders, each once."""
    missing = [_shown(path) for path in inputs if not path.exists()]
    if missing:
        raise DataError("Every input must exist", f"Not found: {', '.join(missing)}")
    found = [file for path in inputs for file in (_walk(path) if path.is_dir() else [path])]
    if not found:
        raise DataError(
            "There must be at least one image to classify",
            f"Got none in {', '.join(map(_shown, inputs)) or 'no input'}",
            f"Known image files: {', '.join(sorted(EXTENSIONS))}",
        )
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> Iterator[Path]:
    """The image files below a folder, in the order of their names, without hidden ones."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = (Path(root, name) for name in sorted(files) if not name.startswith("."))
        yield from (file for file in shown if file.suffix.lower() in EXTENSIONS)


def _read_images(files: Sequence[Path], size: int, channels: int) -> tuple[list[Path], Tensor]:
    """Decode files into ``uint8 [N, channels, size, size]``; unreadable ones are left out."""
    try:
        return list(files), _with_channels(decode_images(files, size), channels)
    except DataError as error:
        if len(files) == 1:
            reason = error.__cause__ or error
            sys.stderr.write(f"{_shown(files[0])}: {type(reason).__name__}: {reason}\n")
            return [], torch.empty(0, channels, size, size, dtype=torch.uint8)
    # One of them is bad: one by one, so that the others are still read.
    parts = [_read_images([file], size, channels) for file in files]
    return [path for paths, _ in parts for path in paths], torch.cat([each for _, each in parts])


def _with_channels(images: Tensor, channels: int) -> Tensor:
    """Turn ``uint8 [N, C, H, W]`` from grey to colour or back, if the network needs it."""
    if images.shape[1] in (1, channels):
        return images.expand(-1, channels, -1, -1)
    weights = torch.tensor(_GREY, dtype=torch.int32).view(1, 3, 1, 1)
    luma = (images.int() * weights).sum(1, keepdim=True) + (1 << 15)
    return (luma >> 16).to(torch.uint8)


def _shown(path: Path) -> str:
    """A path as text that every stream can write, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
