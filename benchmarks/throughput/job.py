"""One process of one variant; `team.py` starts it. Says "ready", then answers each "go" on stdin.

usage: job.py JOB(JSON) RANK
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from team import Job
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import scpl
from scpl.assembly import build_stages
from scpl.errors import Interrupted
from scpl.heads import MeanOverPositions
from scpl.models.vgg import VGG8
from scpl.stage import StageOptions

NUM_CLASSES = 10
NUM_BATCHES = 16
MAIN_THREAD = ("forward", "learn", "wait", "snapshot")
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
    return scpl.SCPL(NUM_CLASSES) if job.method == "scpl" else scpl.EarlyExit(NUM_CLASSES)


# ---- The three kinds of process. ----------------------------------------------------------------


def bp(job: Job) -> None:
    """Train end to end, in the loop that everybody writes."""
    model, batches = build(job)
    optimizer = adam(model.parameters())
    model.train()

    def step(inputs: Tensor, target: Tensor) -> None:
        loss = cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    feed = _endless(batches)
    answer({"ready": True})
    for _ in orders():
        for batch in islice(feed, job.warm):
            step(*batch)
        begin = perf_counter()
        for batch in islice(feed, job.steps):
            step(*batch)
        answer({"seconds": perf_counter() - begin})


def alone(job: Job, rank: int) -> None:
    """Run only this rank's stages, again and again on what they would receive first."""
    model, batches = build(job)
    parts = cut(job, model, batches[0][0][:2])
    mesh = scpl.Mesh(rank, job.processes)
    hosted = mesh.hosted(parts.num_stages)
    features, target = batches[0]
    with torch.no_grad():
        for body in parts.bodies[: hosted.start]:
            features = body(features)
    stages = build_stages(
        parts, method(job), StageOptions(adam), hosted, seed=0, device=torch.device("cpu")
    )

    def step() -> None:
        received, carry = features, None
        for stage in stages:
            output, onward = stage.forward(received), stage.hand_on(target, carry)
            stage.learn(target, carry, 1)
            received, carry = output, onward

    answer({"ready": True})
    for _ in orders():
        for _ in range(job.warm):
            step()
        begin = perf_counter()
        for _ in range(job.steps):
            step()
        answer({"seconds": perf_counter() - begin})
        while not select.select([sys.stdin], [], [], 0)[0]:
            step()  # the others are still being timed
        sys.stdin.readline()


def line(job: Job) -> None:
    """Train with the engine, on all ranks or on one."""
    model, batches = build(job)
    mesh = scpl.Mesh.from_env()
    pipeline = scpl.Pipeline(
        cut(job, model, batches[0][0][:2]),
        method(job),
        adam,
        mesh=mesh,
        depth=job.depth,
        checkpoints=Path(job.folder) if job.checkpoint_every else None,
    )
    feed = _endless(batches)
    size = job.warm + job.steps + job.cool
    try:
        answer({"ready": True})
        if mesh.is_first:
            for _ in orders():
                block(job, pipeline, list(islice(feed, size)))
        else:
            while True:
                block(job, pipeline, [])
    except Interrupted:
        pass  # the first rank has closed the line
    except Exception as error:
        pipeline.abort()
        if pipeline.control.fail(error, f"Rank {mesh.rank}: {error}"):
            sys.stderr.write(f"rank {mesh.rank}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    pipeline.close()
    pipeline.control.close()


def block(job: Job, pipeline: scpl.Pipeline, batches: list[Batch]) -> None:
    """Train a block of steps as one epoch of the stream, and say what it took on this rank."""
    reports = []
    for index, report in enumerate(pipeline.train(batches)):
        reports.append(report)
        timed = index - job.warm
        every = job.checkpoint_every
        # In the middle between two ends of a block, so that the writing is timed as well.
        if batches and every and timed >= 0 and timed % every == every // 2:
            pipeline.checkpoint()
    last = pipeline.step - job.cool
    losses = {}
    if pipeline.mesh.is_last:
        losses = {r.step: sum(sum(terms.values()) for terms in r.values()) for r in reports}
    answer({**_window(pipeline, last - job.steps, last), "losses": losses})


def _window(pipeline: scpl.Pipeline, first: int, last: int) -> dict[str, Any]:
    """Where the time went from the end of one step to the end of another one, on this rank."""
    events = pipeline.timeline.events()
    stage = pipeline.stages[-1].index
    ends = {
        event["step"]: event["end"]
        for event in events
        if event["activity"] == "learn" and event["stage"] == stage
    }
    begin, end = ends[first], ends[last]
    spent: dict[str, float] = {}
    for event in events:
        inside = min(event["end"], end) - max(event["begin"], begin)
        if inside > 0:
            spent[event["activity"]] = spent.get(event["activity"], 0.0) + inside
    shares = {name: spent.get(name, 0.0) / (end - begin) for name in (*MAIN_THREAD, "receive")}
    shares["rest"] = 1.0 - sum(shares[name] for name in MAIN_THREAD)
    return {"seconds": end - begin, "shares": shares, "cuts": list(pipeline.parts.cuts)}


# ---- Talking with the parent. -------------------------------------------------------------------


def orders() -> Iterator[str]:
    """Wait for the next "go"; ends when the parent closes the pipe."""
    while order := sys.stdin.readline():
        yield order


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _endless(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def main() -> None:
    fields = json.loads(sys.argv[1])
    job, rank = Job(**{**fields, "cuts": tuple(fields["cuts"])}), int(sys.argv[2])
    torch.set_num_threads(job.threads)
    if job.kind == "bp":
        bp(job)
    elif job.kind == "alone":
        alone(job, rank)
    else:
        line(job)


if __name__ == "__main__":
    main()
