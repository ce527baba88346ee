"""What one variant trains, and its processes; used by this benchmark and by `ethernet`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import scpl
from scpl.app.bench.measure import Batch, Block, Contender, train_block
from scpl.app.bench.workers import Serve, Timing, Workers, sending_failures
from scpl.app.environment import peak_memory
from scpl.engine.build import build_stages
from scpl.engine.mesh import Mesh
from scpl.engine.stage import StageOptions
from scpl.errors import InputError
from scpl.heads.projection import MeanOverPositions
from scpl.methods import METHODS, MicroBatched
from scpl.models.vgg import VGG8

NUM_CLASSES = 10
NUM_BATCHES = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What one variant trains, and how.

    Attributes:
        loop: ``engine`` (a `scpl.Pipeline`), ``bp`` (a plain loop), ``ddp`` (a plain loop around
            DistributedDataParallel) or ``alone`` (each process runs only its own stages, on a
            recorded input, and talks to nobody).
        work: The network and its data.
        method: Name of the engine's method.
        micro_batches: Slices of a mini-batch, for methods that have any.
        stages: How many stages the network is cut into.
        cuts: Names of the layers that stages begin with; empty: chosen by `scpl.split`.
        processes: How many processes.
        threads: Threads of each process.
        batch_size: Rows of a mini-batch, of all processes together.
        depth: Messages in flight on a link.
        steps: Steps of a block that are timed.
        checkpoint_every: Steps between checkpoints; 0: none.
        folder: Where checkpoints go.
        quick: A narrow network.
    """

    loop: str = "engine"
    work: str = "transformer"
    method: str = "scpl"
    micro_batches: int = 1
    stages: int = 2
    cuts: tuple[str, ...] = ()
    processes: int = 1
    threads: int = 1
    batch_size: int = 64
    depth: int = 2
    steps: int = 10
    checkpoint_every: int = 0
    folder: str = ""
    quick: bool = False


def workers_of(name: str, job: Job, serve: Serve | None = None) -> Workers:
    """The processes of a variant, not yet started; ``serve`` wraps what they run."""
    run = serve or serve_job
    return Workers(name, run, job, processes=job.processes, threads=job.threads)


def contender(workers: Workers, job: Job) -> Contender:
    """A variant, as those that take turns see it."""
    samples = job.steps * job.batch_size
    if job.loop == "alone":  # the slowest one counts
        return Contender(workers, samples, train_alone, clock=max)
    return Contender(workers, samples)


def train_alone(workers: Workers) -> list[Timing]:
    """Have a block trained by processes that know nothing of each other."""
    timings = workers.train()
    workers.wake()  # they went on until the slowest one was timed
    return timings


# ---- What is trained: the same in every variant. ------------------------------------------------


def build(job: Job) -> tuple[nn.Sequential, list[Batch]]:
    """Build the network and the data; the seed makes both the same in every process."""
    torch.manual_seed(0)
    if job.work == "transformer":
        width, tokens = (32, 8) if job.quick else (256, 32)
        model: nn.Sequential = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
                for _ in range(8)
            ),
            MeanOverPositions(),
            nn.Linear(width, NUM_CLASSES),
        )
        shape: tuple[int, ...] = (tokens, width)
    else:
        model = VGG8(NUM_CLASSES, width=0.125 if job.quick else 1.0)
        shape = (3, 32, 32)
    batches = [
        (torch.randn(job.batch_size, *shape), torch.randint(NUM_CLASSES, (job.batch_size,)))
        for _ in range(NUM_BATCHES)
    ]
    return model, batches


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def cut(job: Job, model: nn.Module, example: Tensor) -> scpl.Partition:
    """Cut where `--cuts` says; else blocks of the transformer evenly, the VGG by operations."""
    cuts = job.cuts
    if not cuts and job.work == "transformer":
        cuts = tuple(str(8 * stage // job.stages) for stage in range(1, job.stages))
    if cuts:
        return scpl.split(model, cuts, example=example)
    return scpl.split(model, num_stages=job.stages, example=example)


def method(job: Job) -> scpl.Method:
    chosen = METHODS[job.method]
    if issubclass(chosen, MicroBatched):
        return chosen(num_micro_batches=job.micro_batches)
    return chosen()


# ---- The kinds of process. ----------------------------------------------------------------------


def bp(job: Job, connection: Connection) -> None:
    """Train end to end, in the loop that everybody writes."""
    model, batches = build(job)
    connection.send(())
    plain_loop(job, connection, model, batches)


def ddp(job: Job, connection: Connection) -> None:
    """Train replicas in the loop that everybody writes, each on its own share of the batches."""
    model, batches = build(job)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if job.batch_size % ranks:
        raise InputError("ddp needs equal shares", f"Got {job.batch_size} rows for {ranks} ranks")
    own = [(inputs.chunk(ranks)[rank], target.chunk(ranks)[rank]) for inputs, target in batches]
    replica = DistributedDataParallel(model)
    connection.send(())
    plain_loop(job, connection, replica, own)


def plain_loop(job: Job, connection: Connection, model: nn.Module, batches: list[Batch]) -> None:
    optimizer = adam(model.parameters())
    model.train()

    def step(inputs: Tensor, target: Tensor) -> None:
        loss = cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    feed, block = cycle(batches), Block(job.steps)
    while True:
        connection.recv()
        for batch in islice(feed, block.warm):
            step(*batch)
        begin = perf_counter()
        for batch in islice(feed, block.steps):
            step(*batch)
        seconds = perf_counter() - begin
        connection.send(Timing(seconds, block.size, peak_memory(CPU)))


def alone(job: Job, connection: Connection) -> None:
    """Run only this rank's stages, again and again on what they would receive first."""
    model, batches = build(job)
    parts = cut(job, model, batches[0][0][:2])
    hosted = Mesh.from_env().hosted(parts.num_stages)
    features, target = batches[0]
    with torch.no_grad():
        for body in parts.bodies[: hosted.start]:
            features = body(features)
    stages = build_stages(parts, method(job), StageOptions(adam), hosted, seed=0, device=CPU)

    def step() -> None:
        received, carry = features, None
        for stage in stages:
            output, onward = stage.forward(received), stage.hand_on(target, carry)
            stage.learn(target, carry, 1)
            received, carry = output, onward

    connection.send(())
    block = Block(job.steps)
    while True:
        connection.recv()
        for _ in range(block.warm):
            step()
        begin = perf_counter()
        for _ in range(job.steps):
            step()
        connection.send(Timing(perf_counter() - begin, block.size, peak_memory(CPU)))
        while not connection.poll():
            step()  # the others are still being timed
        connection.recv()


def engine(job: Job, connection: Connection) -> None:
    """Train with a pipeline, on all ranks or on one."""
    model, recorded = build(job)
    chosen, batches = method(job), cycle(recorded)
    pipeline = scpl.Pipeline(
        cut(job, model, recorded[0][0][:2]),
        chosen,
        adam,
        ranks=scpl.connect(depth=job.depth),
        checkpoints=Path(job.folder) if job.checkpoint_every else None,
    )
    block = Block.of(job.steps, chosen, pipeline.mesh.num_ranks, job.depth)
    after_step = checkpoints(job, pipeline)
    with sending_failures(connection, pipeline.ranks):
        connection.send(pipeline.parts.cuts)
        while True:
            connection.recv()
            connection.send(train_block(pipeline, batches, block, after_step))


def checkpoints(job: Job, pipeline: scpl.Pipeline) -> Callable[[int], None]:
    """In the middle between two ends of a block, so that the writing is timed as well."""
    every = job.checkpoint_every

    def after_step(timed: int) -> None:
        if pipeline.mesh.is_first and every and timed >= 0 and timed % every == every // 2:
            pipeline.checkpoint()

    return after_step


def serve_job(connection: Connection, job: Job) -> None:
    """Be one process of a variant."""
    torch.set_num_threads(job.threads)
    {"bp": bp, "ddp": ddp, "alone": alone, "engine": engine}[job.loop](job, connection)
