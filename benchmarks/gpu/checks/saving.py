"""What is saved can be used elsewhere: checkpoints, exported networks, the command line."""

from __future__ import annotations

import importlib.util
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scpl
from checks.base import Setup, check, distance, require
from checks.subjects import LOCAL, adam, learn, make_pipeline, task_named
from scpl.app.cli import run
from scpl.data.images.raw import load_digits


@check(
    "checkpoint",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method, name in (
            *(("scpl", name) for name in ("small-cnn", "transformer")),
            *(("al", "small-cnn"), ("bp", "mlp")),
        )
    },
    tolerance=5e-2,
)
def checkpoints(setup: Setup, method: str, name: str) -> str:
    """A run goes on on a CPU from the device's checkpoint, and back, as if it had stayed."""
    task = task_named(name, setup)

    kept = scpl.Checkpoints(setup.folder / "checkpoints", keep=9)

    def begin(device: str) -> scpl.Pipeline:
        return make_pipeline(task, method, device, optimizer=adam, checkpoints=kept)

    def go_on(device: str, step: int, saved: list[dict[str, Any]]) -> scpl.Pipeline:
        pipeline = begin(device)
        learn(pipeline, task.batches[:2], epochs=1)  # what is restored must replace this
        require(pipeline.restore(step) is not None, f"there must be a checkpoint of step {step}")
        apart = distance(states(pipeline), saved)
        require(apart == 0, f"every entry must be restored on {device}; {apart:.1e} apart")
        return pipeline

    stays = begin(setup.device)
    learn(stays, task.batches, epochs=1)
    stays.checkpoint()
    step, saved = stays.step, states(stays)
    expected = [learn(stays, task.batches, epochs=1).losses for _ in range(2)]
    stays.close()
    moved = go_on("cpu", step, saved)
    found = [learn(moved, task.batches, epochs=1).losses]
    moved.checkpoint()
    moved.close()
    back = go_on(setup.device, moved.step, states(moved))
    found.append(learn(back, task.batches, epochs=1).losses)
    places = ("on the CPU", f"back on {setup.device}")
    told = [
        setup.near(where, distance(*pair))
        for where, *pair in zip(places, found, expected, strict=True)
    ]
    return "; ".join([*told, f"every entry of {len(back.stages)} stages restored"])


def states(pipeline: scpl.Pipeline) -> list[dict[str, Any]]:
    """What a checkpoint holds, but for the random state, which is of one kind of device."""
    snapshots = [stage.snapshot(pipeline.step) for stage in pipeline.stages]
    return [{key: part for key, part in each.items() if key != "random"} for each in snapshots]


@check(
    "export",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method in (*LOCAL, "bp")
        for name in ("small-cnn", "transformer")
        if name == "small-cnn" or method in ("scpl", "al")
    },
    tolerance=1e-4,
)
def exports(setup: Setup, method: str, name: str) -> str:
    """The exported network lies on the CPU, and predicts on both devices what the pipeline does."""
    task = task_named(name, setup)
    pipeline = make_pipeline(task, method, setup.device)
    pipeline.train(task.batches)
    inputs = task.batches[0][0]
    expected = pipeline.predict(inputs)
    networks = {"network": pipeline.export()}
    if pipeline.has_exits:
        networks["network with exits"] = pipeline.export_exits()
    told = []
    for what, network in networks.items():
        places = {str(value.device) for value in network.state_dict().values()}
        require(places == {"cpu"}, f"an exported {what} must lie on the CPU; it is on {places}")
        for device in dict.fromkeys(("cpu", setup.device)):
            told.append(_predicts(setup, what, network, inputs, expected, device))
    return "; ".join(told)


def _predicts(
    setup: Setup, what: str, network: nn.Module, inputs: Any, expected: Tensor | None, device: str
) -> str:
    network.to(device)
    with torch.no_grad():
        logits = network(inputs.to(device))
    return setup.near(f"{what} on {device}: logits", distance(logits, expected))


@check("command-line", limit=150.0)
def command_line(setup: Setup) -> str:
    """`scpl train --device` learns the digits; eval, predict and export work on its run."""
    folder, device = setup.folder / "run", ["--device", setup.device]
    trained = scpl_json(
        "train", "--data", "digits", "--model", "mlp" if setup.tiny else "small-cnn", *device,
        "--epochs", "1", "--threads", torch.get_num_threads(), "--out", folder, "--quiet",
    )  # fmt: skip
    tested = scpl_json("eval", folder, *device)
    accuracy = tested["test_accuracy"]
    require(
        abs(accuracy - trained["test_accuracy"]) <= 0.01,
        f"eval must find train's accuracy {trained['test_accuracy']:.3f}; it found {accuracy:.3f}",
    )
    require(accuracy > 0.2, f"the digits must be learned; accuracy {accuracy:.3f}")
    told = [f"accuracy {accuracy:.3f} in train and eval"]
    if setup.device == "cuda":
        graphs = scpl_json(
            "train", "--data", "digits", "--model", "small-cnn", *device, "--epochs", "1",
            "--cuda-graphs", "on", "--precision", "bfloat16", "--out", setup.folder / "graphs",
            "--quiet",
        )["test_accuracy"]  # fmt: skip
        require(graphs > 0.2, f"with graphs they must be learned, too; accuracy {graphs:.3f}")
        told.append(f"{graphs:.3f} with graphs in bf16")
    if importlib.util.find_spec("PIL") is not None:
        told.append(_right(setup, folder, device))
    for kind in ("torch-export", "onnx"):
        lacking = _lacking(kind)
        if lacking:
            told.append(f"{kind} not tried: {lacking} is not here")
            continue
        made = scpl_json("export", folder, "--format", kind, "--to", setup.folder / kind)
        require("largest_difference" in made, f"{kind} must be compared; {made['checked']}")
        told.append(f"{kind}: logits {made['largest_difference']:.1e} apart")
    return "; ".join(told)


def _right(setup: Setup, folder: Path, device: list[str]) -> str:
    """Predict some digits from picture files."""
    from PIL import Image

    test = load_digits().test
    count = 20
    files = [setup.folder / f"{number}.png" for number in range(count)]
    for file, image in zip(files, test.images[:count], strict=True):
        Image.fromarray(image[0].numpy()).save(file)
    lines = scpl_command("predict", folder, *files, *device, "--json").splitlines()
    require(len(lines) == count, f"{count} pictures need {count} answers; got {len(lines)}")
    return f"{count} pictures predicted"


def _lacking(kind: str) -> str:
    packages = ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ()
    return next((name for name in packages if importlib.util.find_spec(name) is None), "")


def scpl_json(*arguments: Any) -> dict[str, Any]:
    """What a command answers as JSON."""
    found: dict[str, Any] = json.loads(scpl_command(*arguments, "--json"))
    return found


def scpl_command(*arguments: Any) -> str:
    """Run ``scpl`` in this process; returns what it wrote to stdout."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run([str(argument) for argument in arguments])
    command = " ".join(map(str, arguments[:1]))
    require(status == 0, f"scpl {command} ended with status {status}: {err.getvalue()[-600:]}")
    return out.getvalue()
