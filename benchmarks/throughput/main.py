"""Samples per second of the line against its rivals, and against its limit.

All variants stay alive and train in turns, block by block. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from variants import Job, contender, workers_of
from writing import environment, say, shown, verdict

from scpl.app.bench.measure import Contender, measure, summary
from scpl.errors import ScplError
from scpl.report.formats import memory

LINES = ("line", "one", "saving")  # the same stages: every loss must be the same
SWEPT = ("gpipe", "1f1b", "zero-bubble")
ABOUT = {
    "bp": "bp, 1 process x 1 thread",
    "one": "line, {stages} stages on 1 process x 1 thread",
    "line": "line, {stages} stages on {processes} processes x 1 thread",
    "bp-wide": "bp, 1 process x {processes} threads",
    "limit": "its stages alone, {processes} processes, no links",
    "saving": "line on {processes} processes, a checkpoint every {every} steps",
    "bp-cut": "bp, stages on {processes} processes, one works at a time",
    "ddp": "bp, {processes} replicas, DistributedDataParallel",
    "gpipe": "GPipe on {processes} processes, {micro} micro-batches",
    "1f1b": "1F1B on {processes} processes, {micro} micro-batches",
    "zero-bubble": "zero bubble on {processes} processes, {micro} micro-batches",
}
TARGETS = {
    ("line", "one"): 1.9,
    ("line", "limit"): 0.95,
    ("line", "bp"): 1.75,
    ("line", "bp-wide"): 1.05,
    ("line", "gpipe"): 1.3,
    ("line", "1f1b"): 1.25,
    ("line", "ddp"): 1.0,
    ("saving", "line"): 0.97,
}
PAIRS = (
    *TARGETS,
    ("line", "zero-bubble"),
    ("line", "bp-cut"),
    ("bp-wide", "bp"),
    ("one", "bp"),
    ("limit", "one"),
)
CHECKPOINT_EVERY = 10
ACTIVITIES = ("forward", "learn", "backward", "update", "wait", "snapshot", "rest", "receive")


def variants(arguments: argparse.Namespace, folder: str) -> dict[str, Job]:
    """Every variant by name; those that slice mini-batches once for each number of slices."""
    base = Job(
        work=arguments.work,
        method=arguments.method,
        stages=arguments.stages,
        cuts=tuple(arguments.cuts),
        batch_size=arguments.batch_size,
        depth=arguments.depth,
        steps=arguments.steps,
        quick=arguments.quick,
    )
    line = replace(base, processes=arguments.processes)
    every = min(CHECKPOINT_EVERY, arguments.steps)
    jobs = {
        "bp": replace(base, loop="bp"),
        "one": base,
        "line": line,
        "bp-wide": replace(base, loop="bp", threads=arguments.processes),
        "limit": replace(line, loop="alone"),
        "saving": replace(line, checkpoint_every=every, folder=folder),
        "bp-cut": replace(line, method="bp-cut"),
        "ddp": replace(line, loop="ddp"),
    }
    jobs |= {
        f"{name}/{micro}": replace(line, method=name, micro_batches=micro)
        for name in SWEPT
        for micro in arguments.micro_batches
    }
    return {name: job for name, job in jobs.items() if family(name) in arguments.variants}


def family(name: str) -> str:
    """The variant without its number of micro-batches."""
    return name.partition("/")[0]


def results(jobs: Mapping[str, Job], measured: Mapping[str, Contender]) -> dict[str, Any]:
    """Everything that was found, in JSON values."""
    best = best_of_families(measured)
    ratios = {}
    for pair in PAIRS:
        if all(name in best for name in pair):
            ours, theirs = (measured[best[name]] for name in pair)
            ratio = summary(ours.ratios(theirs))
            ratios["/".join(pair)] = {**ratio, "target": TARGETS.get(pair), "below": best[pair[1]]}
    return {
        "variants": {name: describe(name, jobs[name], one) for name, one in measured.items()},
        "ratios": ratios,
        "equal_losses": compared_losses(measured),
    }


def best_of_families(measured: Mapping[str, Contender]) -> dict[str, str]:
    """For a method that slices mini-batches the best number of slices: it is what one would use."""
    best: dict[str, str] = {}
    for name in sorted(measured, key=lambda name: -median(measured[name].rates)):
        best.setdefault(family(name), name)
    return best


def compared_losses(measured: Mapping[str, Contender]) -> int:
    """One process or several: every loss must be the same, to the last bit.

    Returns:
        On how many steps that was checked.
    """
    found = []
    for name in LINES:
        timings = measured[name].timings if name in measured else []
        losses = {step: loss for block in timings for step, loss in block[-1].losses.items()}
        found += [losses] if losses else []
    if len(found) < 2:
        return 0
    first, *others = found
    for other in others:
        for step in first.keys() & other.keys():
            if first[step] != other[step]:
                raise SystemExit(f"step {step}: losses {first[step]} and {other[step]} differ")
    return len(set(first).intersection(*others))


def describe(name: str, job: Job, contender: Contender) -> dict[str, Any]:
    """One variant in JSON values."""
    last = contender.timings[-1]
    loads = {
        key: summary([load[key] for load in contender.loads]) if contender.loads else None
        for key in ("others", "steal")
    }
    return {
        "about": ABOUT[family(name)].format(
            stages=job.stages,
            processes=max(job.processes, job.threads),
            every=job.checkpoint_every,
            micro=job.micro_batches,
        ),
        "samples_per_second": summary(contender.rates),
        "rates": contender.rates,
        **loads,
        "shares": contender.mean_shares() if job.loop == "engine" else [],
        "cuts": list(contender.workers.cuts) if job.loop == "engine" else None,
        "last_step_seconds": [timing.seconds / job.steps for timing in last],
        "peak_memory_bytes": [timing.peak_memory_bytes for timing in last],
    }


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| variant | samples/s: median (min .. max) | memory per process | other load, cores |"
    yield "|---|---:|---:|---:|"
    for row in found["variants"].values():
        rate, others = shown(row["samples_per_second"], 1), shown(row["others"], 2)
        peak = ", ".join(map(memory, row["peak_memory_bytes"]))
        yield f"| {row['about']} | {rate} | {peak} | {others} |"
    yield ""
    yield "| ratio, paired | median (min .. max) | target | |"
    yield "|---|---:|---:|---|"
    for name, row in found["ratios"].items():
        sliced = f" ({row['below']})" if "/" in row["below"] else ""
        yield f"| {name}{sliced} | {shown(row)} | {row['target'] or ''} | {verdict(row)} |"
    yield ""
    yield f"| where the time goes | {' | '.join(ACTIVITIES)} (thread) |"
    yield f"|---|{'---:|' * len(ACTIVITIES)}"
    for name, row in found["variants"].items():
        for rank, shares in enumerate(row["shares"]):
            cells = " | ".join(f"{100 * shares[key]:.1f} %" for key in ACTIVITIES)
            yield f"| {name}, rank {rank} | {cells} |"
    yield ""
    if found["equal_losses"]:
        yield f"Losses compared bit for bit on {found['equal_losses']} steps: equal."
    for name, reason in found["failures"].items():
        yield f"{name} cannot run: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=["transformer", "vgg8"], default="transformer")
    parser.add_argument("--method", choices=["scpl", "early-exit"], default="scpl")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--cuts", nargs="+", default=[], help="first layer of each later stage")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(ABOUT), default=list(ABOUT))
    parser.add_argument("--quick", action="store_true", help="narrow network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="scpl-throughput-") as folder:
        jobs = variants(arguments, folder)
        contenders = {name: contender(workers_of(name, job), job) for name, job in jobs.items()}
        try:
            measured, failures = measure(contenders, arguments.repeats, say)
        except ScplError as error:
            raise SystemExit(str(error)) from None
    found = {**results(jobs, measured), "failures": failures}
    found |= {"environment": environment(), "load_before": load, "arguments": vars(arguments)}
    print(json.dumps(found) if arguments.json else "\n".join(tables(found)))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
