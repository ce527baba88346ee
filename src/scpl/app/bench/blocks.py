"""A block of training steps in the stream, timed while the line is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from scpl.app.bench.orders import Orders
from scpl.app.environment import peak_memory
from scpl.engine.worker import Report
from scpl.methods import Method
from scpl.pipeline import Pipeline

__all__ = ["Block", "serve", "train_block"]

Batch = tuple[Tensor, Tensor]
HEAD_START = 3
"""Batches that a loader has ready when a block begins: they must not count as its speed."""
MAIN_THREAD = ("forward", "learn", "backward", "update", "wait", "snapshot")


@dataclass(frozen=True)
class Block:
    """How many steps a team trains when it is woken.

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


def serve(
    pipeline: Pipeline,
    orders: Orders,
    batches: Iterator[Batch],
    block: Block,
    *,
    after_step: Callable[[int], None] = lambda timed: None,
    losses: bool = False,
) -> None:
    """Train a block whenever it is ordered, until the benchmark ends.

    Args:
        pipeline: This rank's part of what is trained.
        orders: Read by the first rank; the others work on what comes.
        batches: Endless; read by the first rank.
        block: How long.
        after_step: Called with the number of timed steps done so far, negative before the first.
        losses: Answer with the losses as well.

    Raises:
        Interrupted: on other ranks than the first, when the stream ends.
    """

    def train(batches: Iterator[Batch]) -> None:
        answer, reports = train_block(pipeline, batches, block, after_step)
        if losses and pipeline.mesh.is_last:
            answer["losses"] = {r.step: sum(sum(t.values()) for t in r.values()) for r in reports}
        orders.answer(**answer)

    if pipeline.mesh.is_first:
        for _ in orders:
            train(islice(batches, block.size))
        return
    while True:
        train(iter(()))


def train_block(
    pipeline: Pipeline,
    batches: Iterator[Batch],
    block: Block,
    after_step: Callable[[int], None] = lambda timed: None,
) -> tuple[dict[str, Any], list[Report]]:
    """Train a block as one epoch of the stream.

    The clock of a rank runs from one report to another one. The last rank's is that of the line:
    it knows that a step is done when all stages have learned from it.

    Args:
        pipeline: This rank's part of what is trained.
        batches: As many as the block has steps; read by the first rank.
        block: How long.
        after_step: Called with the number of timed steps done so far, negative before the first.

    Returns:
        What it took on this rank, and the reports.
    """
    reports: list[Report] = []
    begin = end = 0.0
    for report in pipeline.steps(batches):
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
    answer = {
        "steps": len(reports),
        "seconds": seconds,
        "shares": shares,
        "peak_memory_bytes": peak_memory(pipeline.device),
        "bytes_per_step": pipeline.bytes_per_step,
    }
    return answer, reports


def _now(device: torch.device) -> float:
    """The moment at which everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
