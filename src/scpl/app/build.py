"""From a configuration to what it names: data, network, method, pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from scpl import models
from scpl.app.config import MethodConfig, TrainConfig, flag
from scpl.app.environment import choose_device
from scpl.app.inputs import modality_of
from scpl.app.inputs.base import Inputs, Loaders
from scpl.engine.checkpoint import Checkpoints
from scpl.engine.parameters import StageParameters
from scpl.engine.precision import Precision
from scpl.engine.randomness import RandomState
from scpl.engine.ranks import OneRank, Ranks, connect
from scpl.errors import InputError, unknown_name
from scpl.methods import METHODS, Method, MicroBatched
from scpl.partition import Partition, split
from scpl.pipeline import Pipeline
from scpl.seeding import derive_seed

__all__ = [
    "build_loaders",
    "build_method",
    "build_partition",
    "build_pipeline",
    "connect_ranks",
    "laid_out",
    "schedule",
]


def build_loaders(config: TrainConfig) -> Loaders:
    """Load the data set and make its loaders.

    Raises:
        DataError: if it is missing or damaged.
        InputError: if a setting is for data of another kind.
    """
    modality = modality_of(config.data)
    config.check_samples(modality.SAMPLES)
    return modality.loaders(config)


def build_method(config: MethodConfig, rows: int | None = None) -> Method:
    """Build the method; ``rows`` are those of a mini-batch, if one is to be trained on.

    Raises:
        InputError: for an unknown name, an option that it does not have, or a value out of range.
    """
    config.check([config.method])
    method = METHODS[config.method](**config.arguments())
    if isinstance(method, MicroBatched) and rows is not None and rows % method.num_micro_batches:
        raise InputError(
            f"{method.name} needs a mini-batch that {flag('num_micro_batches')} divides",
            f"Got {rows} rows and {method.num_micro_batches} micro-batches",
            "Change --batch-size or --micro-batches",
        )
    return method


def build_partition(
    config: TrainConfig,
    inputs: Inputs,
    num_classes: int,
    initial: Mapping[str, Any] | None = None,
) -> Partition:
    """Build the network with seeded weights and cut it.

    Args:
        config: Which network, and how to cut it.
        inputs: What goes into it.
        num_classes: Number of classes.
        initial: What to begin with instead of drawn weights, on the rank that has the data.

    Raises:
        InputError: for an unknown network or layer, or cuts that do not fit it (PartitionError).
    """
    with RandomState(derive_seed(config.run.seed, "network"), torch.device("cpu")).active():
        model = inputs.build(config.network.model, num_classes, **(initial or {}))
    freeze(model, config.network.freeze)
    network = laid_out(model, choose_device(config.run.device))
    example, readout = inputs.example(), models.readout(config.network.model)
    if config.network.cuts:
        return split(network, before=config.network.cuts, readout=readout, example=example)
    stages = config.network.num_stages
    return split(network, num_stages=stages, readout=readout, example=example)


def freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Let layers or single weights keep their values.

    Raises:
        InputError: for a name that the network does not have, or that holds no weights.
    """
    weights = dict(network.named_parameters())
    for name in names:
        chosen = [w for key, w in weights.items() if key == name or key.startswith(f"{name}.")]
        if not chosen:
            layers = {key.rpartition(".")[0] for key in weights}
            raise unknown_name("--freeze", name, sorted(layers - {""}))
        for weight in chosen:
            weight.requires_grad_(False)


def laid_out(network: nn.Module, device: torch.device) -> nn.Module:
    """Lay the weights of convolutions out as they are fastest on a device; their values stay.

    On a CPU that is channels last: pooling and normalisation over maps take far less time then,
    and convolutions somewhat less. On CUDA it depends on the type, so the layout stays as it is.
    """
    if device.type != "cpu":
        return network
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def connect_ranks(config: TrainConfig) -> Ranks:
    """Meet the other ranks that the environment names."""
    run = config.run
    hosted = run.stages_per_process or None
    device = choose_device(run.device)
    return connect(device, stages_per_rank=hosted, depth=run.depth, timeout=run.timeout)


def schedule(optimizer: Optimizer, steps: int, warmup: float, end_lr: float) -> LRScheduler:
    """Let the learning rate rise in a straight line, and then fall along a cosine.

    Args:
        optimizer: Its rate is the highest one.
        steps: Of the whole run.
        warmup: Share of them in which the rate rises.
        end_lr: The rate at the end.
    """
    rising = round(warmup * steps)
    if not rising:
        return CosineAnnealingLR(optimizer, max(steps, 1), end_lr)
    lowest: float = end_lr / optimizer.param_groups[0]["lr"]

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min((step - rising) / max(steps - rising, 1), 1.0)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def build_pipeline(
    config: TrainConfig,
    parts: Partition,
    method: Method,
    total_steps: int,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks | None = None,
) -> Pipeline:
    """Build the pipeline: optimizers, schedules, stages."""
    chosen = config.optimizer

    def optimizer(parameters: StageParameters) -> Optimizer:
        factor = chosen.lr_factors[parameters.stage] if chosen.lr_factors else 1.0
        lr, decay = factor * config.learning_rate, chosen.weight_decay
        trained = parameters.groups(decay) if chosen.exempt_norms else parameters
        if chosen.optimizer == "sgd":
            return SGD(trained, lr=lr, momentum=0.9, weight_decay=decay)
        kind = Adam if chosen.optimizer == "adam" else AdamW
        # Fused: one pass over a parameter's memory instead of about ten. SGD has few, and loses.
        return kind(trained, lr=lr, weight_decay=decay, fused=True)

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        factor = optimizer.param_groups[0]["lr"] / config.learning_rate
        return schedule(optimizer, total_steps, chosen.warmup, factor * chosen.end_lr)

    send_as = None if chosen.send_as == "unchanged" else getattr(torch, chosen.send_as)
    pipeline = Pipeline(
        parts,
        method,
        optimizer,
        scheduler=scheduler,
        clip_norm=chosen.clip_norm,
        precision=Precision(getattr(torch, chosen.precision), send_as),
        seed=config.run.seed,
        checkpoints=checkpoints,
        ranks=ranks or OneRank(choose_device(config.run.device)),
    )
    if chosen.compile:
        pipeline.parts.compiled()  # as they are trained: end-to-end methods join the stages
    return pipeline
