"""Bit for bit: deterministic algorithms, and captured graphs against launching one by one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import scpl
from checks.base import Differs, Setup, Skipped, check, distance, require
from checks.subjects import (
    NUM_CLASSES,
    Learned,
    Task,
    adam,
    deterministic,
    larger,
    learn,
    make_pipeline,
    sgd,
    task_named,
)  # fmt: skip
from scpl.errors import InputError

DROPOUT = 0.2


def same_bits(what: str, found: Learned, expected: Learned) -> str:
    """Check that losses and weights are the same bit for bit."""
    losses = distance(found.losses, expected.losses)
    weights = distance(found.weights, expected.weights)
    text = f"{what}: losses {losses:.1e} and weights {weights:.1e} apart"
    require(losses == weights == 0, f"{text}; they must be equal bit for bit")
    return f"{text}; {found.summary()}"


@check(
    "deterministic",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method in ("scpl", "early-exit", "bp")
        for name in ("small-cnn", "vgg8", "transformer", "lstm")
        if method == "scpl" or name in ("small-cnn", "transformer")
    },
)
def determinism(setup: Setup, method: str, name: str) -> str:
    """Two runs with deterministic algorithms are equal bit for bit, dropout included."""
    task = task_named(name, setup, dropout=DROPOUT)
    with deterministic():
        first, second = (
            learn(make_pipeline(task, method, setup.device, optimizer=adam), task.batches)
            for _ in range(2)
        )
    return same_bits("two runs", first, second)


GRAPHS = {
    **{
        f"{method}-{name}": {"method": method, "name": name}
        for method, name in [
            *(("scpl", name) for name in ("vgg8", "resnet18", "mlp", "transformer", "lstm")),
            *(("early-exit", name) for name in ("small-cnn", "transformer")),
            *((method, "small-cnn") for method in ("al", "predsim", "deinforeg", "dascpl")),
            *((method, "transformer") for method in ("dgl", "al", "bp")),
        ]
    },
    "scpl-sgd": {"method": "scpl", "name": "small-cnn", "optimizer": sgd},
    "scpl-clipped": {"method": "scpl", "name": "small-cnn", "clip_norm": 0.5},
    "scpl-large-texts": {"method": "scpl", "name": "transformer", "times": 8},
    "scpl-bf16": {"method": "scpl", "name": "transformer", "precision": torch.bfloat16},
    "scpl-fp16": {"method": "scpl", "name": "transformer", "precision": torch.float16},
}


def exact_adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam with a rate that float32 has, too: a recorded one reads it so."""
    return torch.optim.AdamW(parameters, lr=2.0**-9, fused=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    """A rate that does not stay: one that is baked into a graph shows."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)


@check("graphs", GRAPHS, needs_cuda=True, limit=90.0)
def graphs(setup: Setup, method: str, name: str, *, times: int = 1, **options: Any) -> str:
    """Captured graphs give the bits of the same kernels launched one by one.

    With dropout, a smaller last batch, evaluations between, a schedule of the rate, and a run that
    is restored from the middle.
    """
    if "cuda_graphs" not in inspect.signature(scpl.Pipeline).parameters:
        raise Skipped("scpl.Pipeline has no argument cuda_graphs")
    task = larger(task_named(name, setup, dropout=DROPOUT), times)
    options = {"optimizer": exact_adam, "scheduler": halving, **options}

    def run(*, cuda_graphs: bool) -> Learned:
        folder = setup.folder / f"{cuda_graphs}"
        return interrupted(task, method, setup.device, folder, cuda_graphs=cuda_graphs, **options)

    with deterministic():
        plain = run(cuda_graphs=False)
        with replays() as seen:
            captured = run(cuda_graphs=True)
    require(len(seen) > 0, "graphs must be replayed; none was")
    return f"{same_bits('captured and launched', captured, plain)}; {len(seen)} replays"


class Looks(torch.nn.Module):
    """Waits for the device in the middle of a step."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return features / max(1.0, float(features.abs().max()))


@check("graphs-fail", needs_cuda=True)
def recording_fails(setup: Setup) -> str:
    """What cannot be recorded is refused with its stage, or runs as it is, and both go on.

    Also where random numbers are drawn afterwards, and on the stream that was in use before.
    """
    task = task_named("mlp", setup)

    def make() -> torch.nn.Module:
        layers = [torch.nn.Flatten(), torch.nn.LazyLinear(24), Looks(), torch.nn.Linear(24, 16)]
        last = [torch.nn.ReLU(), torch.nn.Dropout(DROPOUT), torch.nn.Linear(16, NUM_CLASSES)]
        torch.manual_seed(0)
        return torch.nn.Sequential(*layers, *last)

    task = replace(task, make=make, cuts=2)

    def run(cuda_graphs: Any) -> Learned:
        pipeline = make_pipeline(task, "scpl", setup.device, cuda_graphs=cuda_graphs)
        return learn(pipeline, task.batches)

    stream = torch.cuda.current_stream()
    try:
        run(True)
    except InputError as error:
        told = str(error)
    else:
        raise Differs("a stage that waits for the device must be refused")
    require(torch.cuda.current_stream() == stream, "the stream in use must be the old one")
    require("cannot be recorded" in told, f"the refusal must say what it is; {told}")
    with deterministic():
        plain = run(False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            automatic = run("auto")
    require(any("without CUDA graphs" in str(w.message) for w in caught), "auto must say so")
    return f"{told.split('. ')[1][:90]}; {same_bits('auto and launched', automatic, plain)}"


@contextmanager
def replays() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """Watch which graphs are replayed: what is never captured is the same for another reason."""
    seen: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def watched(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", watched):
        yield seen


def interrupted(task: Task, method: str, device: str, folder: Path, **options: Any) -> Learned:
    """Train two epochs; then forget all, and train two more from the checkpoint of the first."""
    first = make_pipeline(task, method, device, checkpoints=folder, **options)
    before = learn(first, task.batches, epochs=1)
    first.checkpoint()
    before += learn(first, task.batches, epochs=1)
    first.close()
    second = make_pipeline(task, method, device, checkpoints=folder, **options)
    learn(second, task.batches[:2], epochs=1)  # what is restored must replace this
    require(second.restore() is not None, "there must be a checkpoint to restore")
    return before + learn(second, task.batches, epochs=2)


@check("graphs-on-a-cpu")
def graphs_on_a_cpu(setup: Setup) -> str:
    """Asking for CUDA graphs on a CPU is refused with a sentence that says why."""
    if "cuda_graphs" not in inspect.signature(scpl.Pipeline).parameters:
        raise Skipped("scpl.Pipeline has no argument cuda_graphs")
    task = task_named("mlp", setup)
    try:
        make_pipeline(task, "scpl", "cpu", cuda_graphs=True)
    except InputError as error:
        return f"refused: {error}"
    return require(False, "graphs on a CPU must be refused; they were accepted") or ""
