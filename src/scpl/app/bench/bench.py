"""`scpl bench`: how fast each method trains, measured in turns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from scpl.app.bench.measure import Block, Contender, measure, summary, train_block
from scpl.app.bench.workers import Workers, sending_failures
from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    connect_ranks,
)
from scpl.app.commands import BenchConfig, method_names
from scpl.app.config import TrainConfig, in_flags
from scpl.app.environment import choose_device, describe_environment, set_threads, share_of_cores
from scpl.app.inputs.base import DataSummary, ImageInputs, Inputs, TextInputs
from scpl.app.inputs.images import network_wants, side_of
from scpl.app.inputs.texts import network_sizes, pretrained_inputs
from scpl.app.launch import is_rank
from scpl.data import is_here
from scpl.data.images import EMBEDDED, IMAGE_SETS, known, load
from scpl.data.loader import Batch, EpochLoader
from scpl.data.text import TEXT_SETS
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Ranks
from scpl.errors import DataError, InputError, unknown_name
from scpl.methods import METHODS, WideBackpropagation
from scpl.seeding import derive_seed

__all__ = ["bench", "config_for", "synthetic_batches", "synthetic_data"]

ALONE = "scpl,early-exit,bp"
TOGETHER = "scpl,early-exit,bp,bp-wide,bp-cut,gpipe,1f1b,ddp"
NUM_BATCHES = 8  # of synthetic data


def bench(config: BenchConfig) -> dict[str, Any]:
    """Train blocks of steps with every method in turn, and compare samples per second.

    The processes of all methods are started first and stay alive, asleep; one method at a time is
    woken. Nothing is written.

    Returns:
        ``{"results": [one per method], "failures": {method: why}, "synthetic": ...,
        "environment": ...}``.

    Raises:
        InputError: for bad settings, or if no method can run.
        LinkError: if a process is killed.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    base = config.train
    methods = method_names(config.methods or (TOGETHER if base.run.processes > 1 else ALONE))
    config.check()
    base.check(methods)
    if is_rank():
        raise InputError(
            "scpl bench must start its processes itself",
            "It was started by torchrun",
            "Use scpl bench --processes N",
        )
    synthetic = config.synthetic or not is_here(base.data.data, base.data.data_dir)
    device = choose_device(base.run.device)
    if synthetic or base.data.data in (*known(), *TEXT_SETS) or not Path(base.data.data).exists():
        data = synthetic_data(base)
        build_partition(
            base, data.inputs, data.num_classes, task=data.task
        )  # its faults are told once

    def say(line: str) -> None:
        if not base.run.quiet:
            sys.stderr.write(f"{in_flags(line)}\n")
            sys.stderr.flush()

    say(_introduce(config, methods, synthetic=synthetic))
    own = {method: config_for(base, method) for method in methods}
    contenders = {
        method: Contender(
            Workers(
                method,
                serve,
                replace(config, train=settings, synthetic=synthetic),
                processes=settings.run.processes,
                threads=_threads(settings),
            ),
            samples=config.steps * settings.chosen.batch_size,
        )
        for method, settings in own.items()
    }
    measured, failures = measure(contenders, config.repeats, say)
    failures = {name: in_flags(why) for name, why in failures.items()}
    if base.run.quiet:  # else it was told when it happened
        sys.stderr.writelines(f"{name} cannot run: {why}\n" for name, why in failures.items())
    if not measured:
        raise InputError("A benchmark needs at least one method that runs", _reasons(failures))
    return {
        "results": [_result(own[method], measured[method], measured) for method in measured],
        "failures": failures,
        "synthetic": synthetic,
        "environment": describe_environment(device, _threads(base)),
    }


def _introduce(config: BenchConfig, methods: list[str], *, synthetic: bool) -> str:
    base = config.train
    images = base.data.data
    if synthetic:
        images = f"random images of the shape of {base.data.data}, no loading, no augmentation"
        if not config.synthetic:
            images += f" ({base.data.data} is not here: name its folder with --data-dir)"
    return (
        f"{base.network.model} on {images}: {', '.join(methods)}; "
        f"{config.repeats} rounds of {config.steps} timed steps, batch {base.chosen.batch_size}"
    )


def _threads(config: TrainConfig) -> int:
    """Threads of each process."""
    return config.run.threads or share_of_cores(config.run.processes)


def _result(
    own: TrainConfig, contender: Contender, others: Mapping[str, Contender]
) -> dict[str, Any]:
    last = contender.timings[-1]
    loads = [load["others"] for load in contender.loads]
    return {
        "method": own.method.method,
        "data": own.data.data,
        "model": own.network.model,
        "stages": len(contender.workers.cuts) + 1,
        "processes": own.run.processes,
        "threads": _threads(own),
        "batch_size": own.chosen.batch_size,
        "samples_per_second": summary(contender.rates),
        "rounds": contender.rates,
        "ratio_to": {
            name: summary(contender.ratios(other))
            for name, other in others.items()
            if other is not contender
        },
        "peak_memory_bytes": [timing.peak_memory_bytes for timing in last],
        "wait_share": [shares["wait"] for shares in contender.mean_shares()],
        "bytes_per_step": [timing.bytes_per_step for timing in last],
        "other_load": summary(loads) if loads else None,
    }


def _reasons(failures: dict[str, str]) -> str:
    """Say a reason once if all have the same: what ails the data fails every method."""
    if len(different := set(failures.values())) == 1:
        return different.pop()
    return "; ".join(f"{method}: {reason}" for method, reason in failures.items())


def config_for(base: TrainConfig, method: str) -> TrainConfig:
    """Give one method of a comparison its share of what all have in common.

    Methods that spread over several processes are compared with end-to-end training in one
    process: with the threads of one of theirs (``bp``), and with as many as all of theirs
    together (``bp-wide``, on a CPU the honest rival).
    """
    own = replace(base, method=base.method.for_method(method))
    layout, processes = METHODS[method].layout, base.run.processes
    if not METHODS[method].cuts_gradients:
        own = own.changed(replicas=())
        if layout != "stages":  # nothing is handed on
            own = own.changed(send_as="unchanged")
        elif base.optimizer.send_as == "int8":  # gradients come back, which int8 is too coarse for
            own = own.changed(send_as="bfloat16")
    if layout == "stages" or processes == 1:
        return own
    if layout == "replicas":
        return own.changed(stages_per_process=())  # every process has all stages
    threads = _threads(base)
    if METHODS[method] is WideBackpropagation:
        threads *= processes
    return own.alone().changed(threads=threads)


def serve(connection: Connection, plan: BenchConfig) -> None:
    """Be one process of a method: get ready, then train a block whenever asked."""
    config = plan.train
    mesh = Mesh.from_env()
    set_threads(config.run.threads, mesh.num_ranks)
    ranks = connect_ranks(config)
    with sending_failures(connection, ranks):
        data, batches = _data(config, ranks, synthetic=plan.synthetic)
        parts = build_partition(config, data.inputs, data.num_classes, task=data.task)
        method = build_method(config.suited, config.rows)
        total_steps = config.chosen.epochs * data.steps
        pipeline = build_pipeline(config, parts, method, total_steps, None, ranks)
        connection.send(pipeline.parts.cuts)
        block = Block.of(plan.steps, method, mesh.num_ranks, config.run.depth)
        while True:
            connection.recv()
            connection.send(train_block(pipeline, batches, block))


def _data(
    config: TrainConfig, ranks: Ranks, *, synthetic: bool
) -> tuple[DataSummary, Iterator[Batch]]:
    """What is trained on; the first rank reads it."""
    if synthetic:
        data = synthetic_data(config)
        return data, itertools.cycle(synthetic_batches(config, data))
    batches: Iterator[Batch] = iter(())
    if ranks.mesh.is_first:
        loaders, size = build_loaders(config), config.chosen.batch_size
        if loaders.train.num_samples < size:
            raise DataError(
                "A benchmark needs at least one full mini-batch",
                f"Got {loaders.train.num_samples} samples and --batch-size {size}",
            )
        ranks.share("data", DataSummary.of(loaders).to_json())
        batches = _endless(loaders.train, config.rows)
    return DataSummary.from_json(ranks.fetch("data")), batches


def _endless(loader: EpochLoader, full: int) -> Iterator[Batch]:
    """All full mini-batches, epoch after epoch, prepared as in training; ``full`` is their rows."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for inputs, target in loader:
            if len(target) == full:
                yield inputs, target


def synthetic_data(config: TrainConfig) -> DataSummary:
    """Describe a known data set without reading it.

    Raises:
        InputError: for one whose shape is not known.
    """
    if config.data.data in TEXT_SETS:
        config.check_samples("texts")
        texts = TEXT_SETS[config.data.data]
        own, classes = config.data, texts.classes
        columns, label = own.text or texts.text[:1], own.label or ("label",)
        pretrained, sizes = pretrained_inputs(config), network_sizes(config)
        drawn = TextInputs(own.vocab_size, config.chosen.max_tokens, columns, label, sizes)
        if pretrained is not None:
            drawn = replace(
                drawn,
                vocab_size=pretrained.tokenizer.vocab_size,
                max_tokens=pretrained.max_tokens,
                padding=pretrained.padding,
            )
        inputs: Inputs = drawn
    else:
        config.check_samples("images")
        classes, inputs = _images(config)
    samples = NUM_BATCHES * config.chosen.batch_size
    return DataSummary(config.data.data, classes, inputs, samples, 0, 0, steps=NUM_BATCHES)


def synthetic_batches(config: TrainConfig, data: DataSummary) -> list[Batch]:
    """Draw inputs ``[N * views, ...]`` with classes ``[N * views]``."""
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "synthetic"))
    batches = []
    for _ in range(NUM_BATCHES):
        inputs = data.inputs.draw(config.rows, generator)
        target = data.task.draw(config.chosen.batch_size, data.num_classes, generator)
        batches.append((inputs, torch.cat([target] * config.data.views)))
    return batches


def _images(config: TrainConfig) -> tuple[tuple[str, ...], Inputs]:
    if config.data.data == EMBEDDED:
        digits = load(EMBEDDED)
        num_classes, channels, size = len(digits.classes), digits.channels, digits.image_size
    elif config.data.data in IMAGE_SETS:
        images = IMAGE_SETS[config.data.data]
        num_classes, channels = images.num_classes, images.channels
        size = images.image_size or images.published_size
    else:
        advice = "A folder of images works too, or a table of texts, without --synthetic"
        raise unknown_name("--data", config.data.data, (*known(), *TEXT_SETS), advice)
    wanted = network_wants(config)
    if wanted is not None:
        channels, size = wanted.channels, config.data.image_size or wanted.size or size
    mean, std = (0.0,) * channels, (1.0,) * channels
    inputs = ImageInputs(channels, side_of(size, config), mean, std, config.network.width)
    return tuple(map(str, range(num_classes))), inputs
