"""What a finished run is good for: `scpl eval`, `scpl predict` and `scpl export`.

All three need only what `scpl.run.trained` reads: the plain network, or the one with exits.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from scpl import data
from scpl.data.augment import normalise
from scpl.data.decode import decode_images
from scpl.data.folder import EXTENSIONS
from scpl.errors import DataError, InputError
from scpl.run.build import check_fit, choose_device, set_threads
from scpl.run.config import TrainConfig, read_toml
from scpl.run.early import Exits
from scpl.run.environment import peak_memory
from scpl.run.folder import RunFolder
from scpl.run.settings import EvalConfig, ExportConfig, PredictConfig
from scpl.run.trained import load_exits, load_network

__all__ = ["evaluate", "export", "predict"]

_GREY = (19595, 38470, 7471)  # ITU-R 601 luma in 1/65536, as Pillow converts colour to grey


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Test a finished run, by default exactly as it was tested at its end.

    Returns:
        The result, with the keys of ``summary.json`` that apply to a test. With an exit threshold
        also the share of the samples that left after each stage, how many stages a sample went
        through on average, and the share of all stages that was saved.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: if the data is missing, or does not fit the network.
        InputError: for an exit threshold that is none, or a run without early exits.
    """
    started = time.perf_counter()
    folder, trained, network, description, device = _open(config, config.exit_threshold)
    set_threads(trained.threads, trained.processes)  # thread counts decide the last bit of a sum
    loader = _test_loader(config, trained, description)
    loaded = time.perf_counter()
    correct, loss, count = 0, 0.0, 0
    exits = Exits(network, config.exit_threshold)
    for inputs, target in loader:
        logits = _logits(exits, inputs, device, trained.precision)
        target = target.to(device)
        correct += int((logits.argmax(1) == target).sum())
        loss += float(functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)  # sums and counts, so that a ragged batch weighs right
    ended = time.perf_counter()
    # A method that does not cut the network has one stage, whatever the configuration says.
    summary = folder.read_json(folder.summary) if folder.summary.is_file() else {}
    return {
        "method": trained.method,
        "data": config.data or trained.data,
        "model": trained.model,
        "stages": summary.get("stages", trained.stages),
        **{name: getattr(trained, name) for name in ("processes", "epochs", "seed")},
        "test_accuracy": correct / count,
        "test_loss": loss / count,
        **exits.result(count),
        "samples_per_second": count / max(ended - loaded, 1e-9),
        "wall_seconds": ended - started,
        "peak_memory_bytes": [peak_memory(device)],
        "run": str(folder.path),
    }


def predict(config: PredictConfig, out: TextIO) -> None:
    """Classify images and write a line for each, batch by batch.

    Images that cannot be read are named on stderr; the others go on.

    Args:
        config: Which run, which files and folders, how many classes per image.
        out: Where the lines go.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: before anything, if an input is missing or there is no image; at the end, if
            images could not be read.
    """
    _, trained, network, description, device = _open(config)
    classes, top, size = description["classes"], config.top, config.batch_size
    for flag, value, most in (("--top", top, len(classes)), ("--batch-size", size, 1 << 16)):
        if not 1 <= value <= most:
            raise InputError(f"{flag} must lie in 1 .. {most}", f"Got {value}")
    files = _find_images(config.inputs)
    set_threads(trained.threads, 1)
    table = csv.DictWriter(out, list(_row("", [""] * top, [0.0] * top)), lineterminator="\n")
    if not config.json:
        table.writeheader()
    failed = 0
    for start in range(0, len(files), size):
        chunk = files[start : start + size]
        paths, images = _read_images(chunk, description["image_size"], description["in_channels"])
        failed += len(chunk) - len(paths)
        if not paths:
            continue
        inputs = normalise(images, tuple(description["mean"]), tuple(description["std"]))
        best = _logits(network, inputs, device, trained.precision).softmax(1).topk(top)
        chances, indices = best.values.tolist(), best.indices.tolist()
        for number, path in enumerate(paths):
            labels = [classes[index] for index in indices[number]]
            row = _row(_shown(path), labels, chances[number])
            if config.json:
                out.write(json.dumps(row) + "\n")
            else:
                table.writerow(row)
        out.flush()
    if failed:
        raise DataError(
            "Every image must be readable",
            f"{failed} of {len(files)} were not; they are named above",
            "Replace or remove them; all others were classified",
        )


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the plain network of a finished run, and what it is, into one safetensors file.

    Returns:
        The file, the number of parameters, and the number of keys.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        InputError: if the file exists, or cannot be written.
    """
    network, description = load_network(RunFolder.open(config.run))
    if config.to.exists() and not config.force:
        advice = "Choose another with --to, or overwrite it with --force"
        raise InputError("An exported file must not exist yet", f"Got {config.to}", advice)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    content = save(state, {"format": "pt", "scpl": json.dumps(description)})
    draft = config.to.parent / f".{config.to.name}.tmp"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        os.replace(draft, config.to)
    except OSError as error:
        if draft.is_file():
            draft.unlink()
        raise InputError(
            "An exported file must be writable", f"{config.to}: {error}", "Choose another with --to"
        ) from error
    return {
        "file": str(config.to),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "keys": len(state),
    }


def _open(
    config: EvalConfig | PredictConfig, threshold: float | None = None
) -> tuple[RunFolder, TrainConfig, nn.Module, dict[str, Any], torch.device]:
    folder = RunFolder.open(config.run)
    trained = TrainConfig.from_dict(read_toml(folder.config), str(folder.config))
    network, description = load_network(folder) if threshold is None else load_exits(folder)
    # By default the device of the run, so that its numbers come out again.
    device = choose_device(trained.device if config.device == "auto" else config.device)
    return folder, trained, network.to(device), description, device


def _test_loader(
    config: EvalConfig, trained: TrainConfig, description: Mapping[str, Any]
) -> data.Loader:
    """The test images, normalised as those that the network learnt from."""
    name, folder = config.data or trained.data, config.data_dir or trained.data_dir
    size = trained.image_size if config.data is None else description["image_size"]
    source = data.load(name, data_dir=folder, image_size=size)
    model, advice = f"The {description['model']} of {config.run}", "Choose another with --data"
    try:
        channels, image_size = description["in_channels"], description["image_size"]
        check_fit(source, channels=channels, image_size=image_size, name=model)
    except DataError as error:  # its advice is for commands that choose an image size
        raise DataError(error.rule, error.got, advice) from None
    if source.num_classes != description["num_classes"]:
        raise DataError(
            f"{model} tells {description['num_classes']} classes apart",
            f"{source.name} has {source.num_classes}",
            advice,
        )
    batch_size = config.batch_size or trained.batch_size
    mean, std = tuple(description["mean"]), tuple(description["std"])
    return data.Loader(source.test, batch_size=batch_size, mean=mean, std=std)


def _logits(
    network: Callable[[Tensor], Tensor], inputs: Tensor, device: torch.device, precision: str
) -> Tensor:
    """Compute float32 logits ``[N, C]`` in the precision the network was trained in."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        return network(inputs.to(device)).float()


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


def _row(path: str, labels: Sequence[str], chances: Sequence[float]) -> dict[str, str | float]:
    """One image's line: path, label, probability, label2, probability2, ..."""
    row: dict[str, str | float] = {"path": path}
    for place, (label, chance) in enumerate(zip(labels, chances, strict=True), start=1):
        number = "" if place == 1 else place
        row |= {f"label{number}": label, f"probability{number}": round(chance, 6)}
    return row


def _shown(path: Path) -> str:
    """A path as text that every stream can write, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
