"""From a configuration to what it names: data, network, method, pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from scpl import models
from scpl.app.config import MethodConfig, TrainConfig, flag
from scpl.app.environment import choose_device
from scpl.app.inputs import modality_of
from scpl.app.inputs.base import ImageInputs, Inputs, Loaders, TextInputs
from scpl.engine.checkpoint import Checkpoints
from scpl.engine.parameters import StageParameters
from scpl.engine.precision import Precision
from scpl.engine.randomness import RandomState
from scpl.engine.ranks import OneRank, Ranks, connect
from scpl.engine.stage import OptimizerFactory
from scpl.errors import InputError, unknown_name
from scpl.methods import METHODS, Method, MicroBatched
from scpl.models.own import build_timm, call_factory, read_arguments
from scpl.models.pretrained import EMBEDDINGS, embeddings_of, is_pretrained, load_pretrained
from scpl.partition import Partition, split
from scpl.pipeline import Pipeline
from scpl.seeding import derive_seed
from scpl.tasks import Task

__all__ = [
    "build_loaders",
    "build_method",
    "build_network",
    "build_partition",
    "build_pipeline",
    "connect_ranks",
    "cut_network",
    "graphs_of",
    "laid_out",
    "optimizer_factory",
    "precision_of",
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


def build_network(
    config: TrainConfig,
    inputs: Inputs,
    num_classes: int,
    initial: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Build the network with seeded weights, or load it; every rank builds the same.

    Args:
        config: Which network.
        inputs: What goes into it.
        num_classes: Number of classes.
        initial: What to begin with instead of drawn weights, on the rank that has the data.
        tell: Takes what the user should know of the network.

    Raises:
        InputError: for an unknown network, or one that cannot be built or loaded.
    """
    network = _network(config, inputs, num_classes, initial or {}, tell)
    freeze(network, config.network.freeze)
    return network


def _network(
    config: TrainConfig,
    inputs: Inputs,
    num_classes: int,
    initial: Mapping[str, Any],
    tell: Callable[[str], None],
) -> nn.Module:
    name, origin = config.network.model, models.origin_of(config.network.model)
    with RandomState(derive_seed(config.run.seed, "network"), torch.device("cpu")).active():
        if origin == "ours":
            return inputs.build(name, num_classes, **initial)
        arguments = read_arguments(config.network.model_args)
        offers = {"num_classes": num_classes, **inputs.offers}
        if origin == "factory":
            return call_factory(name, arguments, offers)
        _, _, inside = name.partition(":")
        if origin == "timm":
            if not isinstance(inputs, ImageInputs):
                raise InputError(
                    "The networks of timm are for images",
                    f"Got {name} for {inputs.modality}s",
                    "Choose another --model",
                )
            return build_timm(inside, arguments, offers)
        network = load_pretrained(inside, inputs.modality, num_classes, arguments, tell)
        if isinstance(inputs, TextInputs):
            _check_tokens(network, inputs, name)
        return network


def _check_tokens(network: Any, inputs: TextInputs, name: str) -> None:
    """Check that the network has a vector for every token and every place of a text."""
    network.config.pad_token_id = inputs.padding.number
    known = network.get_input_embeddings().num_embeddings
    if inputs.vocab_size > known:
        raise InputError(
            f"{name} must have a vector for every token of its tokenizer",
            f"Got {inputs.vocab_size:,} tokens for {known:,} vectors",
            "Take the tokenizer that belongs to it",
        )
    for key, module in network.named_modules():
        if key.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            if inputs.max_tokens > module.num_embeddings - taken:
                raise InputError(
                    f"{name} reads at most {module.num_embeddings - taken} tokens of a text",
                    f"Got `max_tokens` {inputs.max_tokens}",
                    "Lower it",
                )


def cut_network(
    config: TrainConfig,
    network: nn.Module,
    inputs: Inputs,
    num_classes: int,
    task: Task | None = None,
) -> Partition:
    """Cut a network as configured; ``task`` is what its outputs mean.

    Raises:
        PartitionError: if the cuts do not fit it.
        InputError: if it has not a logit for each class.
    """
    name, chosen = config.network.model, config.network
    network = laid_out(network, choose_device(config.run.device), precision_of(config).compute)
    example, readout = inputs.example(), models.readout(name)
    if chosen.cuts:
        parts = split(network, chosen.cuts, readout=readout, task=task, example=example)
    else:
        parts = split(
            network, num_stages=chosen.num_stages, readout=readout, task=task, example=example
        )
    if parts.num_outputs != num_classes:
        raise InputError(
            f"{name} must return a logit for each of the {num_classes} {parts.task.plural}",
            f"Got {parts.num_outputs}",
            "Let it take the argument num_classes, and end in a layer of that width",
        )
    return parts


def build_partition(
    config: TrainConfig,
    inputs: Inputs,
    num_classes: int,
    initial: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    task: Task | None = None,
) -> Partition:
    """Build the network and cut it: `build_network`, then `cut_network`."""
    network = build_network(config, inputs, num_classes, initial, tell)
    return cut_network(config, network, inputs, num_classes, task)


def freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Let layers or single weights keep their values.

    Args:
        network: Its parameters no longer ask for a gradient.
        names: Dotted names of layers or weights; ``embeddings`` are those of a network of
            ``transformers``, whatever it calls them.

    Raises:
        InputError: for a name that the network does not have, or that holds no weights.
    """
    weights = dict(network.named_parameters())
    for name in names:
        chosen = [w for key, w in weights.items() if key == name or key.startswith(f"{name}.")]
        if not chosen and name == EMBEDDINGS and is_pretrained(network):
            chosen = list(embeddings_of(network).parameters())
        if not chosen:
            layers = {key.rpartition(".")[0] for key in weights}
            raise unknown_name("--freeze", name, sorted(layers - {""}))
        for weight in chosen:
            weight.requires_grad_(False)


def laid_out(
    network: nn.Module, device: torch.device, compute: torch.dtype = torch.float32
) -> nn.Module:
    """Lay the weights of convolutions out as they are fastest on a device; their values stay.

    On a CPU that is channels last: pooling and normalisation over maps take far less time then,
    and convolutions somewhat less. On CUDA it is channels last in 16 bits, which tensor cores want
    so; in float32 the layout stays as it is.
    """
    if device.type != "cpu" and compute == torch.float32:
        return network
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def connect_ranks(config: TrainConfig) -> Ranks:
    """Meet the other ranks that the environment names."""
    run = config.run
    hosted = run.stages_per_process or None
    return connect(
        choose_device(run.device),
        stages_per_rank=hosted,
        replicas=run.replicas or None,
        depth=run.depth,
        timeout=run.timeout,
        backend=None if run.backend == "auto" else run.backend,
    )


def schedule(
    optimizer: Optimizer,
    steps: int,
    warmup: float,
    end_lr: float,
    shape: Literal["cosine", "linear"] = "cosine",
) -> LRScheduler:
    """Let the learning rate rise in a straight line, and then fall.

    Args:
        optimizer: Its rate is the highest one; parameter groups with another one keep the ratio.
        steps: Of the whole run.
        warmup: Share of them in which the rate rises.
        end_lr: The rate at the end.
        shape: Whether it falls along a cosine or in a straight line.
    """
    rising = round(warmup * steps)
    alike = len({group["lr"] for group in optimizer.param_groups}) == 1
    if not rising and shape == "cosine" and alike:
        return CosineAnnealingLR(optimizer, max(steps, 1), end_lr)
    lowest: float = end_lr / optimizer.defaults["lr"]

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min((step - rising) / max(steps - rising, 1), 1.0)
        left = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return lowest + (1 - lowest) * left

    return LambdaLR(optimizer, factor)


def optimizer_factory(config: TrainConfig) -> OptimizerFactory:
    """Say how a stage's optimizer is built from its parameters."""
    chosen, factors = config.chosen, config.optimizer.lr_factors

    def optimizer(parameters: StageParameters) -> Optimizer:
        factor = factors[parameters.stage] if factors else 1.0
        lr, decay = factor * chosen.lr, chosen.weight_decay
        trained = parameters.groups(
            decay,
            exempt_norms=chosen.exempt_norms,
            head_lr=None if chosen.head_lr == chosen.lr else factor * chosen.head_lr,
        )
        if chosen.optimizer == "sgd":
            return SGD(trained, lr=lr, momentum=0.9, weight_decay=decay)
        kind = Adam if chosen.optimizer == "adam" else AdamW
        # Fused: one pass over a parameter's memory instead of about ten. SGD has few, and loses.
        return kind(trained, lr=lr, weight_decay=decay, fused=True)

    return optimizer


def precision_of(config: TrainConfig) -> Precision:
    """The types of a run."""
    chosen = config.optimizer
    send_as = None if chosen.send_as == "unchanged" else getattr(torch, chosen.send_as)
    return Precision(getattr(torch, chosen.precision), send_as)


def graphs_of(config: TrainConfig) -> bool | Literal["auto"]:
    """Whether the steps of a run are recorded as CUDA graphs.

    By itself only where that is sure to help and to be fair: images have one shape, code of the
    user's may keep state in Python, and over several processes only some methods can.
    """
    chosen = config.optimizer.cuda_graphs
    if chosen != "auto":
        return chosen == "on"
    images = modality_of(config.data).SAMPLES == "images"
    own = models.origin_of(config.network.model) == "factory"
    several = config.run.processes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "auto" if images and not own and not several else False


def build_pipeline(
    config: TrainConfig,
    parts: Partition,
    method: Method,
    total_steps: int,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks | None = None,
) -> Pipeline:
    """Build the pipeline: optimizers, schedules, stages."""
    chosen = config.chosen

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        lowest = optimizer.defaults["lr"] / chosen.lr * chosen.end_lr
        return schedule(optimizer, total_steps, chosen.warmup, lowest, chosen.schedule)

    pipeline = Pipeline(
        parts,
        method,
        optimizer_factory(config),
        scheduler=scheduler,
        clip_norm=chosen.clip_norm or None,
        precision=precision_of(config),
        cuda_graphs=graphs_of(config),
        seed=config.run.seed,
        checkpoints=checkpoints,
        ranks=ranks or OneRank(choose_device(config.run.device)),
    )
    if config.optimizer.compile:
        pipeline.parts.compiled()  # as they are trained: end-to-end methods join the stages
    return pipeline
