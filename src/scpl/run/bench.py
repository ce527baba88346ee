"""`scpl bench`: how fast each method trains, measured in turns."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from scpl.data import is_here, known
from scpl.errors import InputError, Interrupted
from scpl.run.build import build_partition, choose_device, share_of_cores
from scpl.run.config import TrainConfig
from scpl.run.environment import describe_environment
from scpl.run.fairness import config_for, method_names
from scpl.run.launch import is_rank
from scpl.run.settings import BenchConfig
from scpl.run.synthetic import synthetic_facts
from scpl.run.teams import Team, Teams, Unable
from scpl.run.turns import Load, forth_and_back, paired, spread

__all__ = ["bench"]

JOB = (sys.executable, "-m", "scpl.run.bench_job")
ALONE = "scpl,early-exit,bp"
TOGETHER = "scpl,early-exit,bp,bp-wide,bp-cut,gpipe,1f1b,ddp"


@dataclass
class _Entry:
    """One method: its settings, and what was measured of it."""

    config: TrainConfig
    threads: int
    stages: int = 0
    rates: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    answers: list[list[dict[str, Any]]] = field(default_factory=list)


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
        Interrupted: after SIGTERM.
    """
    base = config.train
    _check(config)
    methods = method_names(config.methods or (TOGETHER if base.processes > 1 else ALONE))
    synthetic = config.synthetic or not is_here(base.data, base.data_dir)
    device = choose_device(base.device)
    if synthetic or base.data in known() or not Path(base.data).is_dir():
        build_partition(base, synthetic_facts(base))  # a fault of the network is told once
    _say(base, _introduce(config, methods, synthetic=synthetic))
    entries: dict[str, _Entry] = {}
    failures: dict[str, str] = {}
    for method in methods:
        own = config_for(base, method)
        entries[method] = _Entry(own, own.threads or share_of_cores(own.processes))
    with _ended_by_signals(), Teams() as teams:
        _start(config, teams, entries, failures, synthetic=synthetic)
        if entries:
            _measure(config, teams, entries, failures)
    if not entries:
        raise InputError("A benchmark needs at least one method that runs", _reasons(failures))
    return {
        "results": _results(entries),
        "failures": failures,
        "synthetic": synthetic,
        "environment": describe_environment(device, base.threads or share_of_cores(base.processes)),
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


def _start(
    config: BenchConfig,
    teams: Teams,
    entries: dict[str, _Entry],
    failures: dict[str, str],
    *,
    synthetic: bool,
) -> None:
    """Start every method's processes; those that cannot run leave the benchmark."""
    for method, entry in list(entries.items()):
        _say(config.train, f"starting {method}")
        plan = {"config": entry.config.to_dict(), "steps": config.steps, "synthetic": synthetic}
        command = [*JOB, json.dumps(plan)]
        team = Team(method, command, processes=entry.config.processes, threads=entry.threads)
        try:
            entry.stages = teams.start(method, team)[-1]["stages"]
        except Unable as error:
            _leave(method, error, entries, failures)


def _measure(
    config: BenchConfig, teams: Teams, entries: dict[str, _Entry], failures: dict[str, str]
) -> None:
    samples = config.steps * config.train.batch_size
    for number, order in enumerate(forth_and_back(list(entries), config.repeats), 1):
        for method in order:
            entry = entries.get(method)
            if entry is None:
                continue  # it failed in an earlier round
            load = Load(teams[method])
            try:
                answers = teams[method].work()
            except Unable as error:
                teams.drop(method)
                _leave(method, error, entries, failures)
                continue
            if (cores := load.cores()) is not None:
                entry.loads.append(cores["others"])
            entry.answers.append(answers)
            entry.rates.append(samples / answers[-1]["seconds"])  # the last rank's clock
        rates = ", ".join(f"{name} {entry.rates[-1]:,.1f}" for name, entry in entries.items())
        clock = time.strftime("%H:%M:%S")
        _say(config.train, f"{clock} round {number}/{config.repeats}, samples/s: {rates}")


def _leave(
    method: str, error: Unable, entries: dict[str, _Entry], failures: dict[str, str]
) -> None:
    failures[method] = str(error)
    del entries[method]
    sys.stderr.write(f"{method} cannot run: {error}\n")


def _results(entries: dict[str, _Entry]) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "data": entry.config.data,
            "model": entry.config.model,
            "stages": entry.stages,
            "processes": entry.config.processes,
            "threads": entry.threads,
            "batch_size": entry.config.batch_size,
            "samples_per_second": spread(entry.rates),
            "rounds": entry.rates,
            "ratio_to": {
                other: spread(paired(entry.rates, rival.rates))
                for other, rival in entries.items()
                if other != method
            },
            "peak_memory_bytes": [answer["peak_memory_bytes"] for answer in entry.answers[-1]],
            "wait_share": _means(entry, "wait"),
            "other_load": spread(entry.loads) if entry.loads else None,
        }
        for method, entry in entries.items()
    ]


def _means(entry: _Entry, activity: str) -> list[float]:
    """For every rank, the mean over rounds of the share of time of an activity."""
    ranks = zip(*entry.answers, strict=True)
    return [sum(a["shares"][activity] for a in rank) / len(rank) for rank in ranks]


def _reasons(failures: dict[str, str]) -> str:
    """Say each reason once: a network that cannot be built fails every method."""
    different = dict.fromkeys(failures.values())
    if len(different) == 1:
        return next(iter(different))
    return "; ".join(f"{method}: {reason}" for method, reason in failures.items())


def _say(base: TrainConfig, line: str) -> None:
    if not base.quiet:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM into an error, as Python does with Ctrl-C, so that all processes are ended.

    Raises:
        Interrupted: when it comes.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        error = Interrupted("The benchmark was interrupted")
        error.signal = number
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
