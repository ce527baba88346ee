"""`scpl bench`: how fast each method trains, measured in turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scpl.app.bench.synthetic import synthetic_data
from scpl.app.bench.teams import Team
from scpl.app.bench.turns import Answers, Record, Rival, paired, spread, take_turns
from scpl.app.build import build_partition
from scpl.app.config import BenchConfig, TrainConfig, method_names
from scpl.app.environment import choose_device, describe_environment, share_of_cores
from scpl.app.fairness import config_for
from scpl.app.launch import is_rank
from scpl.data.images import is_here, known
from scpl.data.text import TEXT_SETS
from scpl.errors import InputError

__all__ = ["bench"]

JOB = (sys.executable, "-m", "scpl.app.bench.job")
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
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    say(_introduce(config, methods, synthetic=synthetic))
    own = {method: config_for(base, method) for method in methods}
    rivals = {
        method: _rival(config, settings, synthetic=synthetic) for method, settings in own.items()
    }
    records, failures = take_turns(rivals, config.repeats, say)
    if base.run.quiet:  # else it was told when it happened
        sys.stderr.writelines(f"{name} cannot run: {why}\n" for name, why in failures.items())
    if not records:
        raise InputError("A benchmark needs at least one method that runs", _reasons(failures))
    return {
        "results": [_result(own[method], record, records) for method, record in records.items()],
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


def _rival(config: BenchConfig, own: TrainConfig, *, synthetic: bool) -> Rival:
    """One method: its processes, and a block of its steps."""
    plan = {"config": own.to_dict(), "steps": config.steps, "synthetic": synthetic}
    command = [*JOB, json.dumps(plan)]

    def start() -> Team:
        return Team(own.method.method, command, processes=own.run.processes, threads=_threads(own))

    def work(team: Team) -> tuple[float, Answers]:
        answers = team.work()
        return config.steps * own.data.batch_size / answers[-1][
            "seconds"
        ], answers  # the last rank's

    return Rival(own.method.method, start, work)


def _threads(config: TrainConfig) -> int:
    """Threads of each process."""
    return config.run.threads or share_of_cores(config.run.processes)


def _result(own: TrainConfig, record: Record, records: Mapping[str, Record]) -> dict[str, Any]:
    last = record.answers[-1]
    others = [load["others"] for load in record.loads]
    return {
        "method": own.method.method,
        "data": own.data.data,
        "model": own.network.model,
        "stages": record.ready[-1]["stages"],
        "processes": own.run.processes,
        "threads": _threads(own),
        "batch_size": own.data.batch_size,
        "samples_per_second": spread(record.rates),
        "rounds": record.rates,
        "ratio_to": {
            other: spread(paired(record.rates, rival.rates))
            for other, rival in records.items()
            if rival is not record
        },
        "peak_memory_bytes": [answer["peak_memory_bytes"] for answer in last],
        "wait_share": [shares["wait"] for shares in record.mean_shares()],
        "bytes_per_step": [answer["bytes_per_step"] for answer in last],
        "other_load": spread(others) if others else None,
    }


def _reasons(failures: dict[str, str]) -> str:
    """Say each reason once: what ails the data fails every method."""
    different = dict.fromkeys(failures.values())
    if len(different) == 1:
        return next(iter(different))
    return "; ".join(f"{method}: {reason}" for method, reason in failures.items())
