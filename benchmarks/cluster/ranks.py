"""What runs on the emulated machines: their ranks, which train whatever they are told."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeAlias

from machines import join

from links import go_to_cable, go_to_loopback
from scpl.app.bench.bench import synthetic_batches, synthetic_data
from scpl.app.bench.measure import Block, train_block
from scpl.app.bench.workers import Timing, sending_failures
from scpl.app.build import (
    build_method,
    build_pipeline,
    connect_ranks,
    optimizer_factory,
    precision_of,
)
from scpl.app.config import TrainConfig
from scpl.app.environment import peak_memory, set_threads
from scpl.app.inputs.base import DataSummary
from scpl.app.planning import measure_all
from scpl.data.loader import Batch
from scpl.engine.batches import Source
from scpl.engine.build import assign, build_stages
from scpl.engine.channel import NoChannel
from scpl.engine.forecast import Measured
from scpl.engine.mesh import Mesh
from scpl.engine.messages import Message, TrainBatch
from scpl.engine.planning import seconds_of_a_piece
from scpl.engine.ranks import Ranks
from scpl.engine.shares import dims_of, held, take_rows
from scpl.engine.stage import Stage, StageOptions
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.stream import StreamTrainer
from scpl.methods.base import Method
from scpl.partition import Partition
from scpl.partition.pieces import Dimensions
from turns import Networks, block_of

__all__ = ["Entry", "How", "Place", "Planned", "serve"]

How: TypeAlias = Literal["together", "alone", "planned"]
MANY_STEPS = 100_000  # so that learning rates stay where they are


@dataclass(frozen=True)
class Entry:
    """One of those that are measured.

    Attributes:
        label: What it is called; of several variants of it the best one counts.
        variant: Which of them: a number of micro-batches, or nothing.
        config: Its settings.
        steps: Timed steps of a block.
        how: ``alone``: every rank trains its stages by itself, on what it would receive, and talks
            to nobody; the slowest one is the limit of what a line of these stages can do, and a
            method of one process trains the whole network on every rank. ``planned``: every rank
            measures what ``scpl plan`` would there, with so many turns for each part.
    """

    label: str
    variant: str
    config: TrainConfig
    steps: int
    how: How = "together"

    @property
    def alone(self) -> bool:
        """Whether ranks talk to nobody."""
        return self.how != "together"

    @property
    def name(self) -> str:
        """What it and its variant are called."""
        return f"{self.label}/{self.variant}" if self.variant else self.label

    @property
    def num_machines(self) -> int:
        """How many it runs on."""
        return self.config.run.processes


@dataclass(frozen=True)
class Place:
    """Where ranks are.

    Attributes:
        config: How they meet.
        machines: The cgroup of each.
        idle: The cgroup of all while nothing is measured.
        cores: The core of each: which of those that this process may use.
        cable: Whether each is in a network namespace of its own.
    """

    config: TrainConfig
    machines: tuple[Path, ...]
    idle: Path
    cores: Sequence[int]
    cable: bool


@dataclass(frozen=True)
class Turn:
    """What a rank needs for a block of an entry.

    Attributes:
        entry: Whose block.
        parts: A fresh copy of its network.
        method: What its stages learn by.
        ranks: This one and the others.
        data: What mini-batches are like.
        batches: Those to train on.
        connection: To the benchmark.
    """

    entry: Entry
    parts: Partition
    method: Method
    ranks: Ranks
    data: DataSummary
    batches: list[Batch]
    connection: Connection

    def tell(self, timing: Timing, busy: Callable[[], object]) -> None:
        """Tell what a block took, and do something until all others have, who would be faster."""
        self.connection.send(timing)
        while not self.connection.poll():
            busy()
        self.connection.recv()


def serve(connection: Connection, place: Place) -> None:
    """Be a rank: get ready for an entry when it is received, and train it on anything else."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join(place.idle)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[place.cores[rank]]})
    if num_ranks > 1:
        (go_to_cable if place.cable else go_to_loopback)()
    set_threads(1, num_ranks)
    ranks = connect_ranks(place.config)
    with sending_failures(connection, ranks):
        data = synthetic_data(place.config)
        batches, networks = synthetic_batches(place.config, data), Networks(data)
        connection.send(())
        train: Callable[[], None] | None = None
        while True:
            order = connection.recv()
            if isinstance(order, Entry):
                train = None
                gc.collect()  # a replica leaves hooks on the weights until it is gone
                parts = networks.copy(order.config)
                method = build_method(order.config.suited, order.config.rows)
                turn = Turn(order, parts, method, ranks, data, batches, connection)
                train = READY[order.how](turn)
                connection.send(())
            elif train is not None:
                join(place.machines[rank])
                train()
                join(place.idle)


def together(turn: Turn) -> Callable[[], None]:
    """Get ready for a block of an entry: the first steps take longer, and do not count."""
    config, method, ranks = turn.entry.config, turn.method, turn.ranks
    pipeline = build_pipeline(config, turn.parts, method, MANY_STEPS, None, ranks)
    train_block(pipeline, cycle(turn.batches), Block(1, warm=1))
    block = block_of(turn.entry.steps, method, ranks.mesh.num_ranks, config.run.depth)

    def train() -> None:
        turn.connection.send(train_block(pipeline, cycle(turn.batches), block))
        pipeline.close()

    return train


def alone(turn: Turn) -> Callable[[], None]:
    """Get ready for a block of this rank's stages alone."""
    config, method, ranks = turn.entry.config, turn.method, turn.ranks
    options = StageOptions(
        optimizer_factory(config),
        clip_norm=config.chosen.clip_norm or None,
        precision=precision_of(config),
    )
    mesh = ranks.mesh if method.layout == "stages" else Mesh()
    parts = turn.parts if method.layout == "stages" else turn.parts.merged()
    hosted, _ = assign(method, mesh, parts)

    def stages(numbers: range) -> list[Stage]:
        return build_stages(
            parts, method, options, numbers, seed=config.run.seed, device=ranks.device
        )

    source = Source(parts.num_outputs, parts.task, ranks.device, parts.form)
    message = source.to_train(1, turn.batches[0])
    if hosted.start:
        kept = Kept()
        StreamTrainer(stages(range(hosted.start)), kept, Timeline()).train(message, ())
        message = kept.batch
    message = share_of(message, mesh, parts.batch_dims[hosted.start - 1])
    step = partial(StreamTrainer(stages(hosted), NoChannel(), Timeline()).train, message, ())
    step()

    def train() -> None:
        block = Block(turn.entry.steps, warm=1)
        for _ in range(block.warm):
            step()
        begin = perf_counter()
        for _ in range(block.steps):
            step()
        seconds = perf_counter() - begin
        turn.tell(Timing(seconds, block.size, peak_memory(ranks.device)), step)

    return train


@dataclass(frozen=True, kw_only=True)
class Planned(Timing):
    """What measuring for a plan took, and found.

    Attributes:
        measured: What the parts of the network cost on this machine.
    """

    measured: Measured


def planned(turn: Turn) -> Callable[[], None]:
    """Get ready to measure what `scpl plan` does, with the cuts of the others."""
    config, device = turn.entry.config.changed(cuts=turn.parts.cuts), turn.ranks.device
    repeats = turn.entry.steps

    def measure() -> None:
        begin = perf_counter()
        measured = measure_all(config, turn.data, turn.batches[0], {}, repeats)
        seconds = perf_counter() - begin
        timing = Planned(seconds, repeats, peak_memory(device), measured=measured)
        turn.tell(timing, partial(seconds_of_a_piece, device))

    return measure


READY = {"together": together, "alone": alone, "planned": planned}


def share_of(batch: TrainBatch, mesh: Mesh, dims: Dimensions) -> TrainBatch:
    """What a replica works on: its rows, and their targets."""
    if mesh.num_replicas == 1:
        return batch
    rows = held(batch.rows, mesh.num_replicas, mesh.replica)
    places = dims_of(batch.features, None if mesh.group == 0 else dims)
    features = take_rows(batch.features, places, rows)
    return replace(batch, features=features, target=batch.target[rows.start : rows.stop])


class Kept(NoChannel):
    """Keeps the mini-batch that would be sent on."""

    batch: TrainBatch

    def send(self, message: Message) -> int:
        """Keep it."""
        assert isinstance(message, TrainBatch), "nothing else is sent"
        self.batch = message
        return 0
