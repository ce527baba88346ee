"""How speed is measured: all train in turns, block by block, timed while the line is full."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from time import perf_counter
from typing import Any

import torch

from scpl.app.bench.workers import CannotRun, Timing, Workers
from scpl.app.environment import peak_memory
from scpl.app.signals import end_signals
from scpl.data.loader import Batch
from scpl.errors import Interrupted
from scpl.methods import Method
from scpl.pipeline import Pipeline
from scpl.report.groups import Sample

__all__ = ["Block", "Contender", "measure", "summary", "train_block"]

HEAD_START = 3
"""Batches that a loader has ready when a block begins: they must not count as its speed."""
MAIN_THREAD = ("forward", "learn", "backward", "update", "wait", "snapshot")


@dataclass(frozen=True)
class Block:
    """How many steps are trained when workers are woken.

    Attributes:
        steps: Steps that are timed.
        warm: Steps before the clock starts; at least 1.
        cool: Steps after that, so that no rank is idle while another one is timed.
    """

    steps: int
    warm: int = HEAD_START
    cool: int = 0

    @classmethod
    def of(cls, steps: int, method: Method, num_ranks: int, depth: int) -> Block:
        """Choose what comes before and after the timed steps.

        In a stream the first rank may be ahead of the last one by as many mini-batches as fit
        between them: so long the line takes to fill. Other methods end every step together; the
        last rank hears of that when the next step begins.
        """
        streams = method.layout == "stages" and method.cuts_gradients
        margin = (num_ranks - 1) * (depth + 1) if streams else min(num_ranks - 1, 1)
        return cls(steps, max(HEAD_START, margin), margin)

    @property
    def size(self) -> int:
        """All steps."""
        return self.warm + self.steps + self.cool


def train_block(
    pipeline: Pipeline,
    batches: Iterator[Batch],
    block: Block,
    after_step: Callable[[int], None] = lambda timed: None,
) -> Timing:
    """Train a block as one epoch of the stream.

    The clock of a rank runs from one report to another one. The last rank's is that of the line:
    it knows that a step is done when all stages have learned from it.

    Args:
        pipeline: This rank's share of what is trained.
        batches: Endless; read by the first rank, the others work on what comes.
        block: How long.
        after_step: Called with the number of timed steps done so far, negative before the first.
    """
    reports = []
    begin = end = 0.0
    for report in pipeline.steps(islice(batches, block.size)):
        reports.append(report)
        timed = len(reports) - block.warm
        if timed == 0:
            begin = _now(pipeline.device)
        elif timed == block.steps:
            end = _now(pipeline.device)
        after_step(timed)
    seconds = end - begin
    spent = pipeline.timeline.during_window(begin, end)
    shares = {name: spent.get(name, 0.0) / seconds for name in (*MAIN_THREAD, "receive")}
    shares["rest"] = 1.0 - sum(shares[name] for name in MAIN_THREAD)
    memory = peak_memory(pipeline.device)
    losses = {}
    if pipeline.mesh.is_last:
        losses = {r.step: sum(sum(terms.values()) for terms in r.values()) for r in reports}
    return Timing(seconds, len(reports), memory, pipeline.bytes_per_step, shares, losses)


def _now(device: torch.device) -> float:
    """The moment at which everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


@dataclass
class Contender:
    """One of those that are compared, and what was measured of it, round by round.

    Attributes:
        workers: Its processes; several contenders may share them.
        samples: Samples of a block's timed steps.
        train: Has a block trained.
        clock: Whose of the ranks' seconds count; those of the last one unless told otherwise.
        rates: Samples per second.
        loads: Cores that others used meanwhile; empty where the system does not tell.
        timings: Of every rank.
    """

    workers: Workers
    samples: int
    train: Callable[[Workers], list[Timing]] = Workers.train
    clock: Callable[[Sequence[float]], float] = itemgetter(-1)
    rates: list[float] = field(default_factory=list)
    loads: list[dict[str, float]] = field(default_factory=list)
    timings: list[list[Timing]] = field(default_factory=list)

    def measure(self) -> None:
        """Train a block, and keep what it took."""
        before = _ticks(self.workers)
        timings = self.train(self.workers)
        after = _ticks(self.workers)
        if before is not None and after is not None:
            others, stolen, total = (b - a for a, b in zip(before, after, strict=True))
            scale = (os.cpu_count() or 1) / max(total, 1.0)
            self.loads.append({"others": max(0.0, others) * scale, "steal": stolen * scale})
        self.rates.append(self.samples / self.clock([timing.seconds for timing in timings]))
        self.timings.append(timings)

    def ratios(self, other: Contender) -> list[float]:
        """Compare round by round: what slows the machine for a while slows both."""
        return [ours / theirs for ours, theirs in zip(self.rates, other.rates, strict=True)]

    def mean_shares(self) -> list[dict[str, float]]:
        """For every rank, the mean over rounds of the share of time of each activity."""
        return [
            {name: statistics.fmean(t.shares[name] for t in rank) for name in rank[0].shares}
            for rank in zip(*self.timings, strict=True)
        ]


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation (None of one value), median, least, most, and how many."""
    return Sample.of(values).statistics()


def measure(
    contenders: Mapping[str, Contender], repeats: int, say: Callable[[str], None]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Start all processes; then let one contender at a time train a block, forth and back.

    Args:
        contenders: By name.
        repeats: Blocks of each.
        say: Takes lines of progress.

    Returns:
        The contenders that ran to the end, and why the others could not.

    Raises:
        LinkError: if a process is killed.
        Interrupted: if this process is told to end; all others are ended first.
    """
    left = dict(contenders)
    failures: dict[str, str] = {}

    def attempt(workers: Workers, action: Callable[[], None]) -> None:
        try:
            action()
        except CannotRun as error:
            workers.kill()
            say(f"{workers.name} cannot run: {error}")
            for name in [name for name in left if left[name].workers is workers]:
                failures[name] = str(error)
                del left[name]

    everyone = {id(contender.workers): contender.workers for contender in contenders.values()}
    with end_signals(_interrupt):
        try:
            for workers in everyone.values():
                say(f"starting {workers.name}")
                attempt(workers, workers.start)
            for number in range(1, repeats + 1):
                # Every other round backwards, so that a steady drift cancels out.
                for name in list(left) if number % 2 else list(reversed(left)):
                    if name in left:
                        attempt(left[name].workers, left[name].measure)
                if not left:
                    break
                rates = ", ".join(f"{name} {left[name].rates[-1]:,.1f}" for name in left)
                say(f"{time.strftime('%H:%M:%S')} round {number}/{repeats}, samples/s: {rates}")
        finally:
            for workers in everyone.values():
                workers.kill()
    return left, failures


def _ticks(workers: Workers) -> tuple[float, float, float] | None:
    """Ticks of all cores so far: busy with others, stolen by other guests of the host, all."""
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            ticks: Any = map(int, file.readline().split()[1:9])
        user, nice, system, idle, io_wait, irq, soft_irq, steal = ticks
        busy = user + nice + system + irq + soft_irq
        return busy - workers.processor_ticks(), steal, busy + steal + idle + io_wait
    except OSError:
        return None  # not Linux


def _interrupt(received: signal.Signals) -> None:
    """Turn Ctrl-C and SIGTERM into an error, so that all processes are ended."""
    error = Interrupted("The benchmark was interrupted")
    error.signal = received
    raise error
