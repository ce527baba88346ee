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
from scpl.app.bench.synthetic import synthetic_batches, synthetic_data
from scpl.app.bench.workers import Workers, sending_failures
from scpl.app.build import build_loaders, build_method, build_partition, build_pipeline
from scpl.app.config import BenchConfig, TrainConfig, in_flags, method_names
from scpl.app.environment import (
    choose_device,
    describe_environment,
    set_threads,
    share_of_cores,
)
from scpl.app.fairness import config_for
from scpl.app.inputs.base import DataSummary, Loader
from scpl.app.launch import is_rank
from scpl.data import is_here
from scpl.data.images import known
from scpl.data.text import TEXT_SETS
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Ranks, connect
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
    methods = method_names(config.methods or (TOGETHER if base.run.processes > 1 else ALONE))
    _check(config, methods)
    synthetic = config.synthetic or not is_here(base.data.data, base.data.data_dir)
    device = choose_device(base.run.device)
    if synthetic or base.data.data in (*known(), *TEXT_SETS) or not Path(base.data.data).exists():
        build_partition(base, synthetic_data(base))  # a fault of the network is told once

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
            samples=config.steps * settings.data.batch_size,
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


def _check(config: BenchConfig, methods: list[str]) -> None:
    config.check()
    config.train.check(methods)
    if is_rank():
        raise InputError(
            "scpl bench must start its processes itself",
            "It was started by torchrun",
            "Use scpl bench --processes N",
        )


def _introduce(config: BenchConfig, methods: list[str], *, synthetic: bool) -> str:
    base = config.train
    images = base.data.data
    if synthetic:
        images = f"random images of the shape of {base.data.data}, no loading, no augmentation"
        if not config.synthetic:
            images += f" ({base.data.data} is not here: name its folder with --data-dir)"
    return (
        f"{base.network.model} on {images}: {', '.join(methods)}; "
        f"{config.repeats} rounds of {config.steps} timed steps, batch {base.data.batch_size}"
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
        "batch_size": own.data.batch_size,
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
    mesh = Mesh.from_env()
    set_threads(config.run.threads, mesh.num_ranks)
    ranks = connect(
        choose_device(config.run.device),
        stages_per_rank=config.run.spread or None,
        depth=config.run.depth,
        timeout=config.run.timeout,
    )
    with sending_failures(connection, ranks):
        data, batches = _data(config, ranks, synthetic=plan.synthetic)
        parts, method = build_partition(config, data), build_method(config.method, config.rows)
        total_steps = config.optimizer.epochs * data.steps
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
        loaders, size = build_loaders(config), config.data.batch_size
        if loaders.train.num_samples < size:
            raise DataError(
                "A benchmark needs at least one full mini-batch",
                f"Got {loaders.train.num_samples} samples and --batch-size {size}",
            )
        ranks.share("data", DataSummary.of(loaders).to_json())
        batches = _endless(loaders.train, config.rows)
    return DataSummary.from_json(ranks.fetch("data")), batches


def _endless(loader: Loader, full: int) -> Iterator[Batch]:
    """All full mini-batches, epoch after epoch, prepared as in training; ``full`` is their rows."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for inputs, target in loader:
            if len(target) == full:
                yield inputs, target
