"""`scpl bench`: how fast each method trains, measured in turns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scpl.app.bench.measure import Batch, Block, Contender, measure, summary, train_block
from scpl.app.bench.synthetic import synthetic_batches, synthetic_facts
from scpl.app.bench.workers import Workers, sending_failures
from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    choose_device,
    set_threads,
    share_of_cores,
)
from scpl.app.config import BenchConfig, TrainConfig
from scpl.app.environment import describe_environment
from scpl.app.fairness import config_for, method_names
from scpl.app.kinds.base import Facts, Loader
from scpl.app.launch import is_rank
from scpl.data.images import is_here, known
from scpl.data.text import TEXT_SETS
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Control, connect
from scpl.errors import DataError, InputError

__all__ = ["bench"]

ALONE = "scpl,early-exit,bp"
TOGETHER = "scpl,early-exit,bp,bp-wide,bp-cut,gpipe,1f1b,ddp"


def bench(config: BenchConfig) -> dict[str, Any]:
    """Train blocks of steps with every method in turn, and compare samples per second.

    The processes of all methods are started first and stay alive, asleep; one method at a time is
    woken. Nothing is written.

    Args:
        config: Methods, length, and what is trained.

    Returns:
        ``{"results": [one per method], "failures": {method: why}, "synthetic": ...,
        "environment": ...}``.

    Raises:
        InputError: for bad settings, or if no method can run.
        LinkError: if a process is killed.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    base = config.train
    _check(config)
    methods = method_names(config.methods or (TOGETHER if base.processes > 1 else ALONE))
    synthetic = config.synthetic or not is_here(base.data, base.data_dir)
    device = choose_device(base.device)
    if synthetic or base.data in (*known(), *TEXT_SETS) or not Path(base.data).exists():
        build_partition(base, synthetic_facts(base))  # a fault of the network is told once

    def say(line: str) -> None:
        if not base.quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    say(_introduce(config, methods, synthetic=synthetic))
    own = {method: config_for(base, method) for method in methods}
    contenders = {
        method: Contender(
            Workers(
                method,
                serve,
                replace(config, train=settings, synthetic=synthetic),
                processes=settings.processes,
                threads=_threads(settings),
            ),
            samples=config.steps * settings.batch_size,
        )
        for method, settings in own.items()
    }
    measured, failures = measure(contenders, config.repeats, say)
    if base.quiet:  # else it was told when it happened
        sys.stderr.writelines(f"{name} cannot run: {why}\n" for name, why in failures.items())
    if not measured:
        raise InputError("A benchmark needs at least one method that runs", _reasons(failures))
    return {
        "results": [_result(own[method], measured[method], measured) for method in measured],
        "failures": failures,
        "synthetic": synthetic,
        "environment": describe_environment(device, _threads(base)),
    }


def _check(config: BenchConfig) -> None:
    config.check()
    config.train.check()
    if is_rank():
        raise InputError(
            "scpl bench must start its processes itself",
            "It was started by torchrun",
            "Use scpl bench --processes N",
        )


def _introduce(config: BenchConfig, methods: list[str], *, synthetic: bool) -> str:
    base = config.train
    images = base.data
    if synthetic:
        images = f"random images of the shape of {base.data}, no loading, no augmentation"
        if not config.synthetic:
            images += f" ({base.data} is not here: name its folder with --data-dir)"
    return (
        f"{base.model} on {images}: {', '.join(methods)}; "
        f"{config.repeats} rounds of {config.steps} timed steps, batch {base.batch_size}"
    )


def _threads(config: TrainConfig) -> int:
    """Threads of each process."""
    return config.threads or share_of_cores(config.processes)


def _result(
    own: TrainConfig, contender: Contender, others: Mapping[str, Contender]
) -> dict[str, Any]:
    last = contender.timings[-1]
    loads = [load["others"] for load in contender.loads]
    return {
        "method": own.method,
        "data": own.data,
        "model": own.model,
        "stages": len(contender.workers.cuts) + 1,
        "processes": own.processes,
        "threads": _threads(own),
        "batch_size": own.batch_size,
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
    """Say each reason once: what ails the data fails every method."""
    different = dict.fromkeys(failures.values())
    if len(different) == 1:
        return next(iter(different))
    return "; ".join(f"{method}: {reason}" for method, reason in failures.items())


def serve(connection: Connection, plan: BenchConfig) -> None:
    """Be one process of a method: get ready, then train a block whenever asked."""
    config = plan.train
    mesh = Mesh.from_env(config.spread or None)
    set_threads(config.threads, mesh.num_ranks)
    control = connect(mesh, choose_device(config.device), config.timeout)
    with sending_failures(connection, control):
        facts, batches = _data(config, control, synthetic=plan.synthetic)
        parts, method = build_partition(config, facts), build_method(config)
        total_steps = config.epochs * facts.steps
        pipeline = build_pipeline(config, parts, method, total_steps, None, control)
        connection.send(pipeline.parts.cuts)
        block = Block.of(plan.steps, method, mesh.num_ranks, config.depth)
        while True:
            connection.recv()
            connection.send(train_block(pipeline, batches, block))


def _data(
    config: TrainConfig, control: Control, *, synthetic: bool
) -> tuple[Facts, Iterator[Batch]]:
    """What is trained on; the first rank reads it."""
    if synthetic:
        facts = synthetic_facts(config)
        return facts, itertools.cycle(synthetic_batches(config, facts))
    batches: Iterator[Batch] = iter(())
    if control.mesh.is_first:
        loaders = build_loaders(config)
        if loaders.train.num_samples < config.batch_size:
            raise DataError(
                "A benchmark needs at least one full mini-batch",
                f"Got {loaders.train.num_samples} samples and --batch-size {config.batch_size}",
            )
        control.share("facts", Facts.of(loaders).to_json())
        batches = _endless(loaders.train, config.batch_size * config.views)
    return Facts.from_json(control.fetch("facts")), batches


def _endless(loader: Loader, full: int) -> Iterator[Batch]:
    """All full mini-batches, epoch after epoch, prepared as in training; ``full`` is their rows."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for inputs, target in loader:
            if len(target) == full:
                yield inputs, target
