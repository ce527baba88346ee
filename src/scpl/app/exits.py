"""What early exits come to: accuracy against how deep samples go, for `scpl eval`."""

from __future__ import annotations

from typing import Any

import torch

from scpl.app.commands import EvalConfig
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, set_threads
from scpl.app.inputs import modality_named
from scpl.app.network import load_exits, task_named
from scpl.errors import InputError
from scpl.files import write_whole
from scpl.partition.values import tree_map
from scpl.report import can_draw, exits_picture
from scpl.runs import RunFolder
from scpl.tasks import Classes

__all__ = ["exits"]


def exits(config: EvalConfig) -> dict[str, Any]:
    """Let the test samples leave early at several thresholds, in one pass over them.

    Returns:
        ``exit_accuracy``: that of each exit by itself, on all samples. ``exits``: for each
        threshold the accuracy, how many stages a sample went through on average, and the share of
        the samples that left after each stage.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        InputError: if a threshold is none, the run has no early exits, or a picture cannot be
            written.
    """
    thresholds = sorted(set(config.exit_thresholds))
    _check(thresholds, config)
    folder = RunFolder.open(config.run)
    trained = TrainConfig.read(folder.config)
    network, description = load_exits(folder, config.model)
    task = task_named(description)
    if task.kind != Classes.kind:
        raise InputError(
            "--exit-thresholds compare accuracies, which need one class for each sample",
            f"{folder.path} learned {task.kind}",
            "Use --exit-threshold, which gives the metrics of one threshold"
            if task.exits_early
            else "Leave it out",
        )
    set_threads(trained.run.threads, trained.run.processes)
    device = choose_device(trained.run.device if config.device == "auto" else config.device)
    network.to(device)
    dtype = getattr(torch, trained.optimizer.precision)
    found = []  # for each batch: which class each exit says, how sure it is, which is right
    with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
        for inputs, target in modality_named(description).test_loader(
            config, trained, folder, description
        ):
            logits = network.every_exit(tree_map(lambda tensor: tensor.to(device), inputs))
            sure, says = torch.stack([each.softmax(1) for each in logits]).max(2)
            found.append((says.cpu() == target.cpu(), sure.cpu()))
    right, sure = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))  # [S, N]
    rows = [_row(threshold, right, sure) for threshold in thresholds]
    result: dict[str, Any] = {"exit_accuracy": right.double().mean(1).tolist(), "exits": rows}
    if config.picture is not None:
        try:
            write_whole(config.picture, exits_picture(result, trained.run_name))
        except OSError as error:
            raise InputError(
                "A picture must be writable", f"{config.picture}: {error}", "Choose another file"
            ) from error
        result["picture"] = str(config.picture)
    return result


def _check(thresholds: list[float], config: EvalConfig) -> None:
    if not all(0 < threshold <= 1 for threshold in thresholds):
        raise InputError(
            "--exit-thresholds must be probabilities, above 0 and at most 1",
            f"Got {' '.join(map(str, config.exit_thresholds))}",
        )
    if config.picture is None:
        return
    if not thresholds:
        raise InputError(
            "--picture draws what early exits come to",
            "Got no --exit-thresholds",
            "Add some, for instance --exit-thresholds 0.5 0.7 0.9 1",
        )
    if not can_draw():
        raise InputError(
            "--picture needs the package 'matplotlib'",
            "It cannot be imported",
            "Install it with: pip install 'scpl[plots]'",
        )


def _row(threshold: float, right: torch.Tensor, sure: torch.Tensor) -> dict[str, Any]:
    """What one threshold comes to; arguments ``[S, N]``."""
    stages, count = right.shape
    leaves = sure >= threshold
    leaves[-1] = True
    left = leaves.int().argmax(0)  # the first exit that is sure
    share = left.bincount(minlength=stages).double() / count
    return {
        "threshold": threshold,
        "accuracy": float(right[left, torch.arange(count)].double().mean()),
        "stages_per_sample": float((left + 1).double().mean()),
        "exit_share": share.tolist(),
    }
