"""How good a finished run is: `scpl eval`; and what `scpl predict` does alike.

Both need only what `scpl.app.network` reads: the plain network, or the one with exits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scpl.app.build import laid_out
from scpl.app.commands import EvalConfig, PredictConfig
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, peak_memory, set_threads
from scpl.app.inputs import modality_named
from scpl.app.inputs.base import measured, shown_samples, with_samples
from scpl.app.network import classify, load_exits, load_network, task_named, weights_epoch
from scpl.data.loader import EpochLoader, Inputs
from scpl.engine.export import ExitNetwork
from scpl.engine.ranks import OneRank
from scpl.engine.scores import Counts, Scores
from scpl.partition.values import tree_map
from scpl.runs import RunFolder
from scpl.runs.columns import PICTURE

__all__ = ["Exits", "compute_logits", "evaluate", "open_run"]


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Test a finished run, by default exactly as it was tested at its end.

    Returns:
        The result, with the keys of ``summary.json`` that apply to a test, and those of
        ``test.json`` but for pictures. With an exit threshold also the share of the samples that
        left after each stage, how many stages a sample went through on average, and the share of
        all stages that was saved.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: if the data is missing, or does not fit the network.
        InputError: for an exit threshold that is none, or a run without early exits or on numbers.
    """
    started = time.perf_counter()
    folder, trained, network, description, device = open_run(config, config.exit_threshold)
    # The number of threads decides the last bit of a sum.
    set_threads(trained.run.threads, trained.run.processes)
    loader = modality_named(description).test_loader(config, trained, folder, description)
    loaded = time.perf_counter()
    task = task_named(description)
    counts, seen = Counts(1, task), 0
    exits = Exits(network, config.exit_threshold)
    for inputs, target in loader:
        logits = compute_logits(exits, inputs, device, trained.optimizer.precision)
        counts.add(0, logits, task.prepare(target).to(device), last=True, first=seen)
        seen += len(target)
    scores = Scores(counts.stages, 1, OneRank(), task)
    found, details = scores.result(), scores.details(description["classes"]) or {}
    count = found.num_samples
    ended = time.perf_counter()
    # A method that does not cut the network has one stage, whatever the configuration says.
    summary = folder.read_json(folder.summary) if folder.summary.is_file() else {}
    return {
        "method": trained.method.method,
        "data": config.data or trained.data.data,
        "model": trained.network.model,
        "stages": summary.get("stages", trained.network.num_stages),
        "processes": trained.run.processes,
        "epochs": trained.chosen.epochs,
        **weights_epoch(folder),
        "seed": trained.run.seed,
        "task": task.kind,
        "metric": task.metrics[0],
        **measured(found),
        **exits.result(count),
        "samples_per_second": count / max(ended - loaded, 1e-9),
        "wall_seconds": ended - started,
        "peak_memory_bytes": [peak_memory(device)],
        "run": str(folder.path),
        **with_samples(details, _named(loader, details)),
    }


def _named(loader: EpochLoader, details: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name the samples of mistakes, without pictures."""
    shown = shown_samples(loader, (mistake["sample"] for mistake in details["mistakes"]))
    return [{key: row[key] for key in row if key != PICTURE} for row in shown]


def open_run(
    config: EvalConfig | PredictConfig, threshold: float | None = None
) -> tuple[RunFolder, TrainConfig, nn.Module, dict[str, Any], torch.device]:
    """Open a finished run: its folder, configuration, network, description and device."""
    folder = RunFolder.open(config.run)
    trained = TrainConfig.read(folder.config)
    load = load_network if threshold is None else load_exits
    if threshold is not None:
        _check_exits(folder)
    network, description = load(folder, config.model)
    # By default the device of the run, so that its numbers come out again.
    device = choose_device(trained.run.device if config.device == "auto" else config.device)
    return folder, trained, laid_out(network.to(device), device), description, device


def _check_exits(folder: RunFolder) -> None:
    """Check that predictions of a run say how sure they are."""
    task = task_named(folder.read_json(folder.description, optional=True))
    if not task.exits_early:
        task.confidence(torch.zeros(1, 1))  # which says why not


def compute_logits(
    network: Callable[[Inputs], Tensor], inputs: Inputs, device: torch.device, precision: str
) -> Tensor:
    """Compute float32 logits ``[N, C]`` in the precision the network was trained in."""
    dtype = None if precision == "float32" else getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        return network(tree_map(lambda tensor: tensor.to(device), inputs)).float()


class Exits:
    """A network whose samples leave at a threshold, and a count of where they left.

    Without a threshold, which is a probability, any network will do and all of it runs.

    Attributes:
        stages: At which stage each sample of the last batch left, from 0; None without a threshold.
    """

    def __init__(self, network: nn.Module, threshold: float | None) -> None:
        self._network, self._threshold = network, threshold
        self._left: list[int] = []
        self.stages: Tensor | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return logits ``[N, C]``."""
        if self._threshold is None:
            return classify(self._network, inputs)
        assert isinstance(self._network, ExitNetwork)
        found = self._network.leave_early(inputs, self._threshold)
        counts = found.stages.bincount(minlength=self._network.num_stages).tolist()
        self.stages = found.stages
        self._left = [a + b for a, b in zip(self._left or [0] * len(counts), counts, strict=True)]
        return found.logits

    def result(self, count: int) -> dict[str, Any]:
        """Return what early exits came to for so many samples; nothing without a threshold."""
        if self._threshold is None:
            return {}
        run = sum(left * (stage + 1) for stage, left in enumerate(self._left)) / count
        return {
            "exit_threshold": self._threshold,
            "exit_share": [left / count for left in self._left],
            "stages_per_sample": run,
            "stages_saved": 1 - run / len(self._left),
        }
