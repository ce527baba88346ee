"""The network that a finished run leaves behind: what it is, how it is written and read again.

``model.json`` says what to build, ``model.safetensors`` holds the weights of the network that
predicts, and ``exits.safetensors`` what is needed besides to predict after earlier stages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from scpl.app.build import build_method, build_partition
from scpl.app.config import TrainConfig
from scpl.app.inputs.base import DataSummary, inputs_of
from scpl.engine.export import ExitNetwork, build_exits
from scpl.errors import CheckpointError, InputError
from scpl.partition import Partition
from scpl.runs import RunFolder

__all__ = [
    "describe_network",
    "load_exits",
    "load_network",
    "load_stages",
    "save_exits",
    "save_network",
]

Network = TypeVar("Network", bound=nn.Module)


def describe_network(config: TrainConfig, data: DataSummary, parts: Partition) -> dict[str, Any]:
    """Say all that is needed to build the network again, without its data set."""
    model, method = config.network.model, config.method.resolved()
    cut = {"stages": parts.num_stages, "cuts": list(parts.cuts)}
    return {
        "model": model,
        "num_classes": data.num_classes,
        **data.inputs.describe(),
        "classes": list(data.classes),
        "recipe": {"model": model, "method": method.method, **cut, **method.options},
    }


def save_network(network: nn.Module, folder: RunFolder) -> None:
    """Write the network that predicts, under its own keys, whole or not at all."""
    _write(network.state_dict(), folder, folder.weights)


def save_exits(exits: ExitNetwork, network: nn.Module, folder: RunFolder) -> None:
    """Write what the network with exits has besides the one that predicts."""
    known = network.state_dict().keys()
    state = {key: value for key, value in exits.state_dict().items() if key not in known}
    _write(state, folder, folder.exits)


def load_network(folder: RunFolder) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a finished run and load its weights.

    Returns:
        The plain network on the CPU, in eval mode, and its description (``model.json``).

    Raises:
        CheckpointError: if the run is not finished, or a file is damaged or of another network.
    """
    return _load(folder, _network, [folder.weights])


def load_stages(folder: RunFolder) -> Partition:
    """Build the network of a finished run, cut as it was trained; else as `load_network`.

    Where the method has a readout of its own, the network's has weights of no meaning.
    """
    network, description = load_network(folder)
    if "recipe" not in description:
        raise CheckpointError(
            "The run must say where its network was cut",
            f"{folder.description} has no recipe",
            "Train it again",
        )
    with torch.random.fork_rng(devices=[]):
        parts = _parts(description)
    parts.model.load_state_dict(network.state_dict(), strict=False)
    parts.model.eval()
    return parts


def load_exits(folder: RunFolder) -> tuple[ExitNetwork, dict[str, Any]]:
    """Build the network of a finished run with an exit after every stage; else as `load_network`.

    Raises:
        InputError: if the run's method has no early exits.
        CheckpointError: as `load_network`.
    """
    if not folder.exits.is_file():
        raise InputError(
            "Early exits need a run whose stages all predict, and its exits.safetensors",
            f"Got {folder.path} without",
            "Train with a method whose stages all predict, such as early-exit",
        )
    return _load(folder, _exits, [folder.weights, folder.exits])


def _load(
    folder: RunFolder, build: Callable[[dict[str, Any]], Network], files: list[Path]
) -> tuple[Network, dict[str, Any]]:
    if not folder.weights.is_file():
        lost = folder.summary.is_file()  # which is written after the weights
        raise CheckpointError(
            "A run must be finished and complete to be used",
            f"{folder.path} {'lost its' if lost else 'is not finished: no'} {folder.weights.name}",
            "Train it again" if lost else f"Finish it with: scpl train --resume {folder.path}",
        )
    description = folder.read_json(folder.description)
    try:
        num_classes, classes = description["num_classes"], description["classes"]
        if len(classes) != num_classes:
            raise ValueError(f"classes has {len(classes)} entries, not {num_classes}")
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, only to be replaced
            network = build(description)
        network.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        names = " and ".join(str(file) for file in files)
        raise CheckpointError(
            f"{names} and {folder.description.name} beside it must be intact, and the "
            "weights those of the network that is described",
            f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}",
            "Copy the files from the run again, or train it again",
        ) from error
    return network.eval(), description


def _network(description: dict[str, Any]) -> nn.Module:
    if "recipe" in description:  # earlier versions had no method that replaces the readout
        method = build_method(_recipe(description).method)
        if method.replaces_readout:
            parts = _parts(description)
            return build_exits(parts, method, [parts.num_stages - 1])[0]
    return inputs_of(description).build(description["model"], description["num_classes"])


def _exits(description: dict[str, Any]) -> ExitNetwork:
    method, parts = build_method(_recipe(description).method), _parts(description)
    return build_exits(parts, method, range(parts.num_stages))[0]


def _recipe(description: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(description["recipe"], "the recipe in model.json")


def _parts(description: dict[str, Any]) -> Partition:
    inputs = inputs_of(description)
    return build_partition(_recipe(description), inputs, description["num_classes"])


def _write(state: Mapping[str, Tensor], folder: RunFolder, path: Path) -> None:
    plain = {name: value.contiguous() for name, value in state.items()}
    folder.write_bytes(path, save(plain, metadata={"format": "pt"}))
