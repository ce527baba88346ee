"""`scpl export`: the network of a finished run in formats that others load."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from scpl.app.commands import EvalConfig, ExportConfig
from scpl.app.config import TrainConfig
from scpl.app.inputs import modality_named
from scpl.app.inputs.base import inputs_of
from scpl.app.network import classify, load_network, separate, task_named, weights_epoch
from scpl.data.loader import Inputs
from scpl.errors import InputError, ScplError
from scpl.files import write_whole
from scpl.models.pretrained import CONFIG, is_pretrained
from scpl.partition.values import tensors_of, tree_map
from scpl.runs import RunFolder
from scpl.seeding import generator
from scpl.tasks import Regression, Task

__all__ = ["export"]

_CLOSE = 1e-4
"""Largest difference of a program's logits from the network's, as a share of the largest logit."""
_ROWS = 5  # of the check; the example that is traced has another number of them


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the plain network of a finished run, and what it is, for others to load.

    What a prediction needs besides, such as the tokenizer of texts, is written beside it.

    Returns:
        The file or folder, what was written beside it, the number of parameters, the number of
        keys, the epoch whose weights they are; of a network that predicts numbers, in which units;
        for a program also what it was compared on, and the largest difference.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        InputError: if a file exists or cannot be written; if the network cannot be traced, a
            package is missing, or the program's logits are others than the network's.
    """
    folder = RunFolder.open(config.run)
    network, description = load_network(folder, config.model)
    beside = {name: folder.read_bytes(name) for name in inputs_of(description).files}
    checked: dict[str, Any] = {}
    task = task_named(description)
    if config.format == "safetensors":
        if isinstance(task, Regression):
            checked = _in_units(network, task, description)
        contents = _weights(config.to, network, description, folder, beside)
    else:
        _check_new([config.to], force=config.force)  # before the work
        make = _torch_program if config.format == "torch-export" else _onnx_program
        samples = _Samples.of(config, folder, description)
        names = list(samples.example) if isinstance(samples.example, dict) else None
        program, checked = make(_Program(network, names, task).eval(), samples, config)
        contents = {config.to: program, **_beside(config.to, beside)}
    _check_new(contents, force=config.force)
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise InputError(
                "An exported file must be writable", f"{path}: {error}", "Choose another with --to"
            ) from error
    others = [str(path) for path in contents if path != config.to]
    return {
        "file": str(config.to),
        **({"beside": others} if others else {}),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "keys": len(network.state_dict()),
        **weights_epoch(folder),
        **checked,
    }


def _weights(
    to: Path,
    network: nn.Module,
    description: Mapping[str, Any],
    folder: RunFolder,
    beside: Mapping[str, bytes],
) -> dict[Path, bytes]:
    """The weights in a file that also says what they are; or a folder as `transformers` has it."""
    metadata = {"format": "pt", "scpl": json.dumps(description)}
    weights = save(separate(network.state_dict()), metadata)
    if not is_pretrained(network):
        return {to: weights, **_beside(to, beside)}
    text = folder.read_bytes(CONFIG)
    if not any(task_named(description).to_json().get(name) for name in _SCALE):
        values = folder.read_json(folder.path / CONFIG)
        kept = {key: value for key, value in values.items() if key not in _SCALE.values()}
        text = text if kept == values else json.dumps(kept, indent=2).encode()
    files = {CONFIG: text, folder.weights.name: weights, **beside}
    return {to / name: content for name, content in files.items()}


_SCALE = {"mean": "target_mean", "std": "target_std"}
"""What of a regression `config.json` says, and how it is called there."""


def _in_units(network: nn.Module, task: Regression, description: dict[str, Any]) -> dict[str, str]:
    """Let a network of `transformers` give numbers in the units of the data, where that can be.

    Its last layer takes mean and deviation up. Other networks keep them in their description.
    """
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == description["num_classes"]
    ]
    if is_pretrained(network) and layers and layers[-1][1].bias is not None:
        name, layer = layers[-1]
        inputs = inputs_of(description).draw(_ROWS, generator(0, "export"))
        with torch.no_grad():
            wanted = task.values(classify(network, inputs))
            before = [parameter.clone() for parameter in (layer.weight, layer.bias)]
            layer.weight.copy_(task.scaled(layer.weight.T).T)
            layer.bias.copy_(task.values(layer.bias[None])[0])
            found = classify(network, inputs).double()
            if torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE * float(wanted.abs().max())):
                description["task"] = Regression(nearness=task.nearness).to_json()
                return {"outputs": f"numbers in the units of the data; {name} holds their scale"}
            for parameter, old in zip((layer.weight, layer.bias), before, strict=True):
                parameter.copy_(old)  # what follows it is no plain read-out
    where = f"{CONFIG}: target_" if is_pretrained(network) else "the file's metadata: scpl, task, "
    return {"outputs": f"standardised; number = output * std + mean, which are in {where}mean, std"}


def _beside(to: Path, files: Mapping[str, bytes]) -> dict[Path, bytes]:
    return {to.with_name(f"{to.stem}.{name}"): content for name, content in files.items()}


def _check_new(paths: Iterable[Path], *, force: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        advice = "Choose another with --to, or overwrite it with --force"
        raise InputError("An exported file must not exist yet", f"Got {existing[0]}", advice)


class _Program(nn.Module):
    """A network that takes its inputs by name or in order, and returns nothing but logits.

    Args:
        network: The network.
        names: Of the parts of a batch; None if it is one tensor.
        task: What the outputs mean: numbers are returned in the units of the data.
    """

    def __init__(self, network: nn.Module, names: Sequence[str] | None, task: Task) -> None:
        super().__init__()
        self.network = network
        mean, std = (task.mean, task.std) if isinstance(task, Regression) else ((), ())
        self.scale = nn.Buffer(torch.tensor(std or 1.0))
        self.shift = nn.Buffer(torch.tensor(mean or 0.0))

        def in_units(logits: Tensor) -> Tensor:
            return logits * self.scale + self.shift if std or mean else logits

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            if names is None:
                return in_units(classify(network, *args, **kwargs))
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return in_units(classify(network, given))

        # The names become those of the program's inputs.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        asked = [inspect.Parameter(name, kind) for name in names or ["inputs"]]
        forward.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
        self.forward = forward


def _torch_program(
    network: _Program, samples: _Samples, config: ExportConfig
) -> tuple[bytes, dict[str, Any]]:
    """A program of ``torch.export``, and what it was compared on."""
    args, kwargs = _arguments(samples.example)
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, args, kwargs, dynamic_shapes=_free(samples.example), strict=False
            )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
    except Exception as error:
        raise _cannot(config, error) from error

    def run(inputs: Inputs) -> Tensor:
        args, kwargs = _arguments(inputs)
        logits: Tensor = loaded(*args, **kwargs)
        return logits

    return file.getvalue(), _compared(network, run, samples, config)


def _onnx_program(
    network: _Program, samples: _Samples, config: ExportConfig
) -> tuple[bytes, dict[str, Any]]:
    """An ONNX model, and what it was compared on, if onnxruntime is there to run it."""
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                "--format onnx needs the packages 'onnx' and 'onnxscript'",
                f"{package} cannot be imported: {error}",
                "Install them, or choose --format torch-export",
            ) from error
    args, kwargs = _arguments(samples.example)
    names = list(kwargs) or ["inputs"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            with torch.no_grad():
                program = torch.onnx.export(
                    network,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=_free(samples.example),
                    input_names=names,
                    output_names=["logits"],
                    dynamo=True,
                    verbose=False,
                )
            assert program is not None
            program.save(path, external_data=False)
        except Exception as error:
            raise _cannot(config, error) from error
        content = path.read_bytes()
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return content, {"checked": "not at all: onnxruntime is not installed"}
    session = runtime.InferenceSession(content)

    def run(inputs: Inputs) -> Tensor:
        values = [tensor.numpy() for tensor in tensors_of(inputs)]
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return content, _compared(network, run, samples, config)


@dataclass(frozen=True)
class _Samples:
    """What a program is made and checked with.

    Attributes:
        example: Inputs that it is traced on.
        batches: Inputs that it is compared on, with other numbers of rows than the example.
        origin: Where those come from.
    """

    example: Inputs
    batches: tuple[Inputs, ...]
    origin: str

    @classmethod
    def of(
        cls, config: ExportConfig, folder: RunFolder, description: Mapping[str, Any]
    ) -> _Samples:
        """Take the run's own test data; drawn inputs if it is not here."""
        drawn = inputs_of(description).draw(_ROWS + 2, generator(0, "export"))
        trained = TrainConfig.read(folder.config)
        wanted = EvalConfig(config.run, batch_size=_ROWS)
        try:
            loader = modality_named(description).test_loader(wanted, trained, folder, description)
            found, origin = next(iter(loader))[0], f"test data of {trained.data.data}"
        except (ScplError, OSError):
            found, origin = _rows(drawn, _ROWS), "random inputs, for the run's data is not here"
        return cls(_rows(drawn, 3), (found, _rows(found, 1)), origin)


def _rows(inputs: Inputs, count: int) -> Inputs:
    taken: Inputs = tree_map(lambda tensor: tensor[:count], inputs)
    return taken


def _arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def _free(inputs: Inputs) -> dict[str, Any]:
    """Leave the number of rows free, and the length of texts."""

    def sizes(tensor: Tensor) -> dict[int, Any]:
        free = {0: torch.export.Dim.DYNAMIC}
        return free | ({1: torch.export.Dim.AUTO} if tensor.ndim == 2 else {})

    if isinstance(inputs, dict):
        return {name: sizes(tensor) for name, tensor in inputs.items()}
    return {"inputs": sizes(inputs)}


def _compared(
    network: nn.Module, run: Callable[[Inputs], Tensor], samples: _Samples, config: ExportConfig
) -> dict[str, Any]:
    """Compare a program with the network.

    Raises:
        InputError: if its logits are others.
    """
    worst = 0.0
    for inputs in samples.batches:
        args, kwargs = _arguments(inputs)
        with torch.no_grad():
            expected = network(*args, **kwargs)
            try:
                found = run(inputs)
            except Exception as error:
                raise _cannot(config, error) from error
        scale = float(expected.abs().max())
        apart = float((expected - found).abs().max()) if found.shape == expected.shape else math.inf
        worst = max(worst, apart)
        if not apart <= _CLOSE * max(scale, 1.0):
            raise InputError(
                f"A {config.format} program must give the network's logits",
                f"Got others by up to {apart:.2g} on {len(expected)} rows, of at most {scale:.2g}",
                "Export it as safetensors",
            )
    rows = " and ".join(str(len(tensors_of(inputs)[0])) for inputs in samples.batches)
    checked = f"batches of {rows} rows, {samples.origin}"
    return {"checked": checked, "largest_difference": worst}


def _cannot(config: ExportConfig, error: Exception) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(
        f"torch must be able to make a {config.format} program of the network, for any batch size",
        f"It raised {type(error).__name__}: {lines[0][:300] if lines else 'no message'}",
        "Export it as safetensors",
    )
