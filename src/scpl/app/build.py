"""From a configuration to the things it names: data, network, method, pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from scpl import models
from scpl.app.config import TrainConfig
from scpl.app.kinds import kind_of
from scpl.app.kinds.base import Inputs, Loaders
from scpl.engine.checkpoint import Checkpoints
from scpl.engine.randomness import RandomState
from scpl.engine.ranks import OneRank, Ranks
from scpl.errors import InputError, unknown_name
from scpl.methods import METHODS, Method, MicroBatched
from scpl.partition import Partition, split
from scpl.pipeline import Pipeline
from scpl.seeding import derive_seed

__all__ = [
    "METHOD_FLAGS",
    "build_loaders",
    "build_method",
    "build_partition",
    "build_pipeline",
    "choose_device",
    "cut_network",
    "laid_out",
    "set_threads",
]  # fmt: skip

_CONTRASTIVE = ("temperature", "normalization", "head", "head_depth", "head_width",
                "cross_entropy", "standardise", "label_smoothing",
                "classifier_gradient")  # fmt: skip
METHOD_FLAGS: dict[str, tuple[str, ...]] = {
    "scpl": _CONTRASTIVE,
    "dascpl": ("temperature", "normalization", "head", "head_depth", "head_width", "standardise"),
    "al": ("label_features",),
    "predsim": ("similarity_weight",),
    "dgl": ("auxiliary",),
}
"""The fields of a configuration that belong to a method."""


def build_loaders(config: TrainConfig) -> Loaders:
    """Load the data set and make its loaders.

    Raises:
        DataError: if it is missing or damaged.
        InputError: if a setting is for data of another kind.
    """
    return kind_of(config).loaders(config)


def build_method(config: TrainConfig) -> Method:
    """Build the method.

    Raises:
        InputError: for an unknown name.
    """
    kind = METHODS.get(config.method)
    if kind is None:
        raise unknown_name("--method", config.method, METHODS)
    options = {name: getattr(config, name) for name in METHOD_FLAGS.get(config.method, ())}
    if issubclass(kind, MicroBatched):
        rows, count = config.batch_size * config.views, config.micro_batches
        if rows % count:
            raise InputError(
                f"{kind.name} needs a mini-batch that --micro-batches divides",
                f"Got {rows} rows and {count} micro-batches",
                "Change --batch-size or --micro-batches",
            )
        options["num_micro_batches"] = count
    return kind(**options)


class Outline(Protocol):
    """What a network depends on."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def inputs(self) -> Inputs:
        """What goes into it."""


def build_partition(
    config: TrainConfig, facts: Outline, initial: Mapping[str, Any] | None = None
) -> Partition:
    """Build the network with seeded weights and cut it.

    Args:
        config: Which network, and how to cut it.
        facts: The data in numbers, or what of it the network depends on.
        initial: What to begin with instead of drawn weights, on the rank that has the data.

    Raises:
        InputError: for an unknown network or cuts that do not fit it.
    """
    with RandomState(derive_seed(config.seed, "network"), torch.device("cpu")).active():
        model = facts.inputs.build(config.model, facts.num_classes, **(initial or {}))
    return cut_network(config, laid_out(model, choose_device(config.device)), facts.inputs)


def laid_out(network: nn.Module, device: torch.device) -> nn.Module:
    """Lay the weights of convolutions out as they are fastest on a device; their values stay.

    On a CPU that is channels last: pooling and normalisation over maps take far less time then,
    and convolutions somewhat less. On CUDA it depends on the type, so the layout stays as it is.
    """
    if device.type != "cpu":
        return network
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def cut_network(config: TrainConfig, model: nn.Module, inputs: Inputs) -> Partition:
    """Cut a network as configured.

    Raises:
        PartitionError: for cuts that do not fit it.
    """
    example = inputs.example()
    readout = models.readout(config.model)
    if config.cuts:
        return split(model, before=config.cuts, readout=readout, example=example)
    return split(model, num_stages=config.num_stages, readout=readout, example=example)


def build_pipeline(
    config: TrainConfig,
    parts: Partition,
    method: Method,
    total_steps: int,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks | None = None,
) -> Pipeline:
    """Build the pipeline: optimizers, schedules, stages."""

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        lr, decay = config.lr, config.weight_decay
        if config.optimizer == "sgd":
            return SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
        kind = Adam if config.optimizer == "adam" else AdamW
        # Fused: one pass over a parameter's memory instead of about ten. SGD has few, and loses.
        return kind(parameters, lr=lr, weight_decay=decay, fused=True)

    return Pipeline(
        parts,
        method,
        optimizer,
        scheduler=lambda opt: CosineAnnealingLR(opt, max(total_steps, 1), config.end_lr),
        clip_norm=config.clip_norm,
        precision=getattr(torch, config.precision),
        seed=config.seed,
        checkpoints=checkpoints,
        ranks=ranks or OneRank(choose_device(config.device)),
    )


def choose_device(name: str) -> torch.device:
    """Turn ``--device`` into a device.

    Raises:
        InputError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process of a machine its own
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            "--device must name a device of this machine",
            f"Got {name!r}: {reason}",
            "Use auto or cpu",
        ) from error
    return device


def set_threads(threads: int | None, processes: int) -> int:
    """Give this process its share of the cores: two pools on the same cores slow each other."""
    chosen = threads or share_of_cores(processes)
    torch.set_num_threads(chosen)
    return chosen


def share_of_cores(processes: int) -> int:
    """Cores for each of several processes of this machine, at least one."""
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    return max(1, available // processes)
