"""`--probe`: how much a linear classifier finds in the features after every stage.

The same procedure for every method, so that stages that learned locally stand beside the same depth
of a network that was trained end to end: features in evaluation mode, maps averaged to at most
2 x 2 and sequences to one row, standardised, then ridge regression onto one-hot classes. It has a
closed form: no learning rate, no seed, one pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from scpl.app.build import build_loaders
from scpl.app.commands import EvalConfig
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, set_threads
from scpl.app.network import load_stages
from scpl.data.loader import Batch
from scpl.errors import InputError
from scpl.partition import Partition
from scpl.partition.values import tree_map
from scpl.runs import RunFolder
from scpl.tasks import Classes

__all__ = ["probe", "probe_run"]

_SIDE = 2
_RIDGE = 1e-3
"""Added to the correlation matrix of the features, whose diagonal is 1."""

Batches: TypeAlias = Iterable[Batch]


def probe(config: EvalConfig) -> list[float]:
    """Fit a linear classifier, a probe, to the features after every stage.

    Probes are fitted to the run's training samples, without augmentation, and judged on its
    validation samples; where none were held out, on the test samples.

    Returns:
        The accuracy of each stage's probe, 0 .. 1.

    Raises:
        InputError: if other data than the run's own is asked for, or it is of other than classes.
        CheckpointError: if the run is not finished or damaged.
    """
    if config.data is not None:
        raise InputError(
            "--probe uses the data of the run", f"Got --data {config.data}", "Leave it out"
        )
    folder = RunFolder.open(config.run)
    parts = load_stages(folder, config.model)
    if parts.task.kind != Classes.kind:
        raise InputError(
            "A probe is a linear classifier, for runs on classes",
            f"Got a run on {parts.task.kind}",
            "Leave --probe out",
        )
    trained = TrainConfig.read(folder.config)
    set_threads(trained.run.threads, trained.run.processes)
    loaders = build_loaders(
        trained.changed(
            data_dir=config.data_dir or trained.data.data_dir,
            batch_size=config.batch_size or 256,
            device=config.device,
            augmentation="none",
            views=1,
        )
    )
    device = choose_device(config.device)
    judge = loaders.valid or loaders.test
    return probe_partition(parts, loaders.train, judge, len(loaders.classes), device)


def probe_run(path: Path, model: str | None = None) -> list[float]:
    """Add the probes of a run to its summary, as ``readout_accuracy``; else as `probe`.

    Args:
        path: Its folder.
        model: The network as the user names it now.

    Returns:
        Their accuracies; nothing if the summary had them already.
    """
    folder = RunFolder(path)
    summary = folder.read_json(folder.summary)
    if "readout_accuracy" in summary:
        return []
    found = probe(EvalConfig(path, model=model))
    folder.write_json(folder.summary, {**summary, "readout_accuracy": found})
    return found


def probe_partition(
    parts: Partition, train: Batches, judge: Batches, num_classes: int, device: torch.device
) -> list[float]:
    """Fit a probe after every stage on ``train``, and count how often it is right on ``judge``.

    The network is put into evaluation mode, and moved to the device.
    """
    for body in parts.bodies:
        body.eval().to(device)
    sums: list[tuple[Tensor, Tensor]] = []
    for inputs, target in train:
        wanted = functional.one_hot(target.to(device), num_classes).double()
        features = _features(parts, inputs, device)
        fresh = [(rows.T @ rows, rows.T @ wanted) for rows in features]
        sums = (
            [(a + c, b + d) for (a, b), (c, d) in zip(sums, fresh, strict=True)] if sums else fresh
        )
    probes = [_solve(*each) for each in sums]
    correct, count = torch.zeros(len(probes), dtype=torch.long), 0
    for inputs, target in judge:
        count += len(target)
        for stage, rows in enumerate(_features(parts, inputs, device)):
            correct[stage] += ((rows @ probes[stage]).argmax(1).cpu() == target.cpu()).sum()
    return [int(number) / count for number in correct]


@torch.no_grad()
def _features(parts: Partition, inputs: Any, device: torch.device) -> list[Tensor]:
    """Compute ``[N, D + 1]`` in float64 after every stage; the last column is 1."""
    found = []
    values = tree_map(lambda tensor: tensor.to(device), parts.form.arrange(inputs))
    for body, reading in zip(parts.bodies, parts.readings, strict=True):
        values = body(values)
        seen = reading(values) if reading else values
        if seen.ndim == 4:
            height, width = (min(_SIDE, side) for side in seen.shape[2:])
            rows = functional.adaptive_avg_pool2d(seen, (height, width)).flatten(1)
        else:
            rows = seen.mean(dim=1) if seen.ndim == 3 else seen
        found.append(torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).double())
    return found


def _solve(square: Tensor, product: Tensor) -> Tensor:
    """Ridge regression from sums: ``[D + 1, D + 1]`` and ``[D + 1, C]`` to weights of that shape.

    Standardising the features amounts to a penalty on each weight in proportion to the variance of
    its feature; the weight of the constant is free.
    """
    count, total = square[-1, -1], square[-1]
    variance = (square.diagonal() - total.square() / count).clamp(min=1e-9 * count)
    penalty = _RIDGE * variance
    penalty[-1] = 0
    solution: Tensor = torch.linalg.solve(square + penalty.diag(), product)
    return solution
