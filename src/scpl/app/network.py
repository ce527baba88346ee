"""The network that a finished run leaves behind: what it is, how it is written and read again.

``model.json`` says what to build, ``model.safetensors`` holds the weights of the network that
predicts, and ``exits.safetensors`` what is needed besides to predict after earlier stages. With
``config.json`` and the tokenizer's files, the folder of a network of ``transformers`` is one that
``from_pretrained`` loads.

A folder may come from someone else. Code of the user that makes a network is run only if the user
names it again; and a network is not built larger than its weights, whatever ``model.json`` says.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scpl import models
from scpl.app.build import build_method, build_network, cut_network
from scpl.app.config import TrainConfig
from scpl.app.inputs.base import DataSummary, inputs_of
from scpl.data.identity import identities_to_json
from scpl.data.loader import Inputs as Batch
from scpl.engine.export import ExitNetwork, build_exits
from scpl.errors import CheckpointError, InputError
from scpl.models.pretrained import CONFIG, config_text, describe, is_pretrained, rebuild
from scpl.partition import Partition
from scpl.partition.pieces import find_logits
from scpl.runs import RunFolder
from scpl.tasks import Classes, Task, task_of

__all__ = [
    "check_named",
    "classify",
    "describe_network",
    "load_exits",
    "load_network",
    "load_stages",
    "save_exits",
    "save_network",
    "separate",
    "task_named",
    "weights_epoch",
]

Network = TypeVar("Network", bound=nn.Module)


def describe_network(config: TrainConfig, data: DataSummary, parts: Partition) -> dict[str, Any]:
    """Say all that is needed to build the network again, without its data set."""
    model, method = config.network.model, config.suited.resolved()
    cut = {"stages": parts.num_stages, "cuts": list(parts.cuts)}
    own = {"model": model, "model_args": list(config.network.model_args)}
    return {
        "model": model,
        "num_classes": data.num_classes,
        **data.inputs.describe(),
        "classes": list(data.classes),
        "task": data.task.to_json(),
        "data": identities_to_json(data.identities),
        **({"config": describe(parts.model)} if is_pretrained(parts.model) else {}),
        "recipe": {**own, "method": method.method, **cut, **method.options},
    }


def save_network(
    network: nn.Module, folder: RunFolder, classes: Sequence[str], task: Task | None = None
) -> None:
    """Write the network that predicts, under its own keys, whole or not at all."""
    if is_pretrained(network):
        text = config_text(network, classes, (task or Classes()).to_json())
        folder.write_text(folder.path / CONFIG, text)
    _write(network.state_dict(), folder, folder.weights)


def save_exits(exits: ExitNetwork, network: nn.Module, folder: RunFolder) -> None:
    """Write what the network with exits has besides the one that predicts."""
    known = network.state_dict().keys()
    state = {key: value for key, value in exits.state_dict().items() if key not in known}
    _write(state, folder, folder.exits)


def load_network(folder: RunFolder, named: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a finished run and load its weights.

    Args:
        folder: Of the run.
        named: The network as the user names it now; needed where it is made by code of his.

    Returns:
        The plain network on the CPU, in eval mode, and its description (``model.json``).

    Raises:
        CheckpointError: if the run is not finished, or a file is damaged or of another network.
        InputError: if the network is made by code that is not named.
    """
    return _load(folder, named, _network, [folder.weights])


def load_stages(folder: RunFolder, named: str | None = None) -> Partition:
    """Build the network of a finished run, cut as it was trained; else as `load_network`.

    Where the method has a readout of its own, the network's has weights of no meaning.
    """
    network, description = load_network(folder, named)
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


def load_exits(folder: RunFolder, named: str | None = None) -> tuple[ExitNetwork, dict[str, Any]]:
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
    return _load(folder, named, _exits, [folder.weights, folder.exits])


def weights_epoch(folder: RunFolder) -> dict[str, Any]:
    """Say of which epoch the network of a finished run is, as in its summary, if that says so."""
    summary = folder.read_json(folder.summary, optional=True)
    return {key: summary[key] for key in ("weights_epoch", "best_by") if key in summary}


def check_named(folder: RunFolder, model: str, named: str | None) -> None:
    """Check that code of the user's own may run to make the network of a run.

    Args:
        folder: Of the run.
        model: The network that it names.
        named: The network as the user names it now, if he does.

    Raises:
        InputError: if the folder alone names that code.
    """
    if named is not None and named != model:
        raise InputError(
            f"--model must be the network of {folder.path}", f"Got {named}, not {model}"
        )
    if models.origin_of(model) == "factory" and named is None:
        raise InputError(
            "Code that makes a network must be named by you, for a run folder may come from "
            "someone else",
            f"{folder.path} wants to run {model}",
            f"If you trust it, add: --model {model}",
        )


def classify(network: nn.Module, inputs: Batch) -> Tensor:
    """Compute the logits ``[N, C]`` of a batch, however the network takes it and returns them."""
    if isinstance(inputs, dict) and not isinstance(network, ExitNetwork):
        result = network(**inputs)
    else:
        result = network(inputs)
    logits: Tensor = find_logits(result, None)
    return logits


def _load(
    folder: RunFolder,
    named: str | None,
    build: Callable[[dict[str, Any]], Network],
    files: list[Path],
) -> tuple[Network, dict[str, Any]]:
    if not folder.weights.is_file():
        lost = folder.summary.is_file()  # which is written after the weights
        raise CheckpointError(
            "A run must be finished and complete to be used",
            f"{folder.path} {'lost its' if lost else 'is not finished: no'} {folder.weights.name}",
            "Train it again" if lost else f"Finish it with: scpl train --resume {folder.path}",
        )
    description = folder.read_json(folder.description)
    recipe = description.get("recipe")
    inner = recipe.get("model") if isinstance(recipe, dict) else None
    for model in {str(description.get("model")), str(inner or description.get("model"))}:
        check_named(folder, model, named)
    try:
        num_classes, classes = description["num_classes"], description["classes"]
        if len(classes) != num_classes:
            raise ValueError(f"classes has {len(classes)} entries, not {num_classes}")
        task_named(description).check_outputs(num_classes)
        # Fresh weights are drawn, only to be replaced.
        with (
            torch.random.fork_rng(devices=[]),
            _Bounded(sum(file.stat().st_size for file in files)),
        ):
            network = build(description)
        network.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError) and named is not None:
            raise  # what the user's own code says
        names = " and ".join(str(file) for file in files)
        raise CheckpointError(
            f"{names} and {folder.description.name} beside it must be intact, and the "
            "weights those of the network that is described",
            f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}",
            "Copy the files from the run again, or train it again",
        ) from error
    return network.eval(), description


class _Bounded(TorchFunctionMode):
    """Refuses to make tensors much larger than the files that hold their values.

    Args:
        size: Bytes of the files.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        # Some networks are built several times, with examples of what goes in, and buffers that
        # are not kept; float16 in the file is float32 here.
        self._most = self._left = _SLACK + 8 * size

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what a function that makes a tensor will take before it does."""
        if func in _MAKERS:
            self._left -= 4 * _numel(*args, **(kwargs or {}))
            if self._left < 0:
                raise ValueError(
                    f"the network that is described takes more than {self._most:,} bytes"
                )
        return func(*args, **(kwargs or {}))


_SLACK = 64 << 20
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}
_MAKERS |= {torch.arange, torch.linspace}


def _numel(*args: Any, size: Any = None, **_: Any) -> int:
    """Numbers in a tensor of which these are the arguments; of `arange` and such at least those."""
    sizes = size if size is not None else args[0] if args and _is_size(args[0]) else args
    return math.prod(abs(int(side)) for side in sizes if isinstance(side, (int, float)))


def _is_size(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _network(description: dict[str, Any]) -> nn.Module:
    if "recipe" in description:  # earlier versions had no method that replaces the readout
        method = build_method(_recipe(description).method)
        if method.replaces_readout:
            parts = _parts(description)
            return build_exits(parts, method, [parts.num_stages - 1])[0]
    return _plain(description)


def _exits(description: dict[str, Any]) -> ExitNetwork:
    method, parts = build_method(_recipe(description).method), _parts(description)
    return build_exits(parts, method, range(parts.num_stages))[0]


def task_named(description: Mapping[str, Any]) -> Task:
    """Find out what the outputs of a network mean; earlier versions knew only classes."""
    return task_of(description.get("task", {"kind": Classes.kind}))


def _recipe(description: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(description["recipe"], "the recipe in model.json")


def _parts(description: dict[str, Any]) -> Partition:
    config, inputs = _recipe(description), inputs_of(description)
    task = task_named(description)
    return cut_network(config, _plain(description), inputs, description["num_classes"], task)


def _plain(description: dict[str, Any]) -> nn.Module:
    """Build the network with weights of no meaning."""
    inputs = inputs_of(description)
    if "config" in description:
        return rebuild(description["config"], inputs.modality)
    config = TrainConfig.of(
        model=description["model"],
        model_args=tuple(description.get("recipe", {}).get("model_args", ())),
    )
    return build_network(config, inputs, description["num_classes"])


def _write(state: Mapping[str, Tensor], folder: RunFolder, path: Path) -> None:
    folder.write_bytes(path, save(separate(state), metadata={"format": "pt"}))


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as the file format wants it; tied ones are copied."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value.contiguous()
        seen.add(place)
    return found
