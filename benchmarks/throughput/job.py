"""One process of one variant; `plan.py` starts it. Says that it is ready, then answers each order.

usage: job.py JOB(JSON)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from plan import Job
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import scpl
from scpl.app.bench.blocks import Block, serve
from scpl.app.bench.orders import Orders
from scpl.app.environment import peak_memory
from scpl.engine.build import build_stages
from scpl.engine.stage import StageOptions
from scpl.errors import InputError, Interrupted
from scpl.heads import MeanOverPositions
from scpl.methods import METHODS, MicroBatched
from scpl.models.vgg import VGG8

NUM_CLASSES = 10
NUM_BATCHES = 16
CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


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
    kind = METHODS[job.method]
    if issubclass(kind, MicroBatched):
        return kind(NUM_CLASSES, job.micro_batches)
    return kind(NUM_CLASSES)


# ---- The kinds of process. ----------------------------------------------------------------------


def bp(job: Job, orders: Orders) -> None:
    """Train end to end, in the loop that everybody writes."""
    model, batches = build(job)
    orders.answer(ready=True)
    plain_loop(job, orders, model, batches)


def ddp(job: Job, orders: Orders) -> None:
    """Train replicas in the loop that everybody writes, each on its own share of the batches."""
    model, batches = build(job)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if job.batch_size % ranks:
        raise InputError("ddp needs equal shares", f"Got {job.batch_size} rows for {ranks} ranks")
    own = [(inputs.chunk(ranks)[rank], target.chunk(ranks)[rank]) for inputs, target in batches]
    replica = DistributedDataParallel(model)
    orders.answer(ready=True)
    plain_loop(job, orders, replica, own)


def plain_loop(job: Job, orders: Orders, model: nn.Module, batches: list[Batch]) -> None:
    optimizer = adam(model.parameters())
    model.train()

    def step(inputs: Tensor, target: Tensor) -> None:
        loss = cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    feed, block = cycle(batches), Block(job.steps)
    for _ in orders:
        for batch in islice(feed, block.warm):
            step(*batch)
        begin = perf_counter()
        for batch in islice(feed, block.steps):
            step(*batch)
        seconds = perf_counter() - begin
        orders.answer(steps=block.size, seconds=seconds, peak_memory_bytes=peak_memory(CPU))


def alone(job: Job, orders: Orders) -> None:
    """Run only this rank's stages, again and again on what they would receive first."""
    model, batches = build(job)
    parts = cut(job, model, batches[0][0][:2])
    hosted = scpl.Mesh.from_env().hosted(parts.num_stages)
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

    orders.answer(ready=True)
    for _ in orders:
        for _ in range(Block(job.steps).warm):
            step()
        begin = perf_counter()
        for _ in range(job.steps):
            step()
        orders.answer(seconds=perf_counter() - begin, peak_memory_bytes=peak_memory(CPU))
        while not orders.waiting():
            step()  # the others are still being timed
        sys.stdin.readline()


def engine(job: Job, orders: Orders) -> None:
    """Train with a pipeline, on all ranks or on one."""
    model, batches = build(job)
    chosen = method(job)
    pipeline = scpl.Pipeline(
        cut(job, model, batches[0][0][:2]),
        chosen,
        adam,
        mesh=scpl.Mesh.from_env(),
        depth=job.depth,
        checkpoints=Path(job.folder) if job.checkpoint_every else None,
    )
    block = Block.of(job.steps, chosen, pipeline.mesh.num_ranks, job.depth)
    with orders.reporting(pipeline.control):
        orders.answer(ready=True, cuts=list(pipeline.parts.cuts))
        with suppress(Interrupted):  # how the stream ends on other ranks than the first
            serve(
                pipeline,
                orders,
                cycle(batches),
                block,
                after_step=checkpoints(job, pipeline),
                losses=chosen.cuts_gradients,
            )
        pipeline.close()
        pipeline.control.close()


def checkpoints(job: Job, pipeline: scpl.Pipeline) -> Callable[[int], None]:
    """In the middle between two ends of a block, so that the writing is timed as well."""
    every = job.checkpoint_every

    def after_step(timed: int) -> None:
        if pipeline.mesh.is_first and every and timed >= 0 and timed % every == every // 2:
            pipeline.checkpoint()

    return after_step


def main() -> None:
    orders, job = Orders(), Job.read(sys.argv[1])
    torch.set_num_threads(job.threads)
    with orders.reporting():
        {"bp": bp, "ddp": ddp, "alone": alone, "engine": engine}[job.kind](job, orders)
    sys.stderr.flush()
    os._exit(0)  # nobody waits for what the interpreter does at its end


if __name__ == "__main__":
    main()
