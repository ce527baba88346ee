"""Samples per second of the line against one process, against more threads, and against its limit.

All variants stay alive and train in turns, block by block. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from team import Job, Load, Team, Teams, environment, shown, spread

ABOUT = {
    "bp": "bp, 1 process x 1 thread",
    "one": "line, {stages} stages on 1 process x 1 thread",
    "line": "line, {stages} stages on {processes} processes x 1 thread",
    "bp-wide": "bp, 1 process x {processes} threads",
    "limit": "its stages alone, {processes} processes, no links",
    "saving": "line on {processes} processes, a checkpoint every {every} steps",
}
TARGETS = {
    ("line", "one"): 1.9,
    ("line", "limit"): 0.95,
    ("line", "bp"): 1.75,
    ("saving", "line"): 0.97,
}
PAIRS = [*TARGETS, ("line", "bp-wide"), ("bp-wide", "bp"), ("one", "bp"), ("limit", "one")]
CHECKPOINT_EVERY = 10


def variants(arguments: argparse.Namespace, folder: str) -> dict[str, Job]:
    base = Job(
        "line",
        work=arguments.work,
        method=arguments.method,
        stages=arguments.stages,
        cuts=tuple(arguments.cuts),
        batch_size=arguments.batch_size,
        depth=arguments.depth,
        steps=arguments.steps,
        quick=arguments.quick,
    )
    # What fits into the line: the first rank may be that far ahead of the last one.
    margin = (arguments.processes - 1) * (arguments.depth + 1)
    line = replace(base, processes=arguments.processes, warm=max(1, margin), cool=margin)
    every = min(CHECKPOINT_EVERY, arguments.steps)
    return {
        "bp": replace(base, kind="bp"),
        "one": base,
        "line": line,
        "bp-wide": replace(base, kind="bp", threads=arguments.processes),
        "limit": replace(base, kind="alone", processes=arguments.processes),
        "saving": replace(line, checkpoint_every=every, folder=folder),
    }


def measure(jobs: dict[str, Job], repeats: int) -> dict[str, dict[str, Any]]:
    """Let the variants take turns; forth and back, so that a steady drift cancels out."""
    results: dict[str, dict[str, Any]] = {
        name: {"rates": [], "others": [], "steal": [], "shares": [], "losses": {}} for name in jobs
    }
    with Teams() as teams:
        for name, job in jobs.items():
            print(f"starting {name}", file=sys.stderr)
            teams.start(name, Team(job))
        for repeat in range(repeats):
            for name in list(jobs) if repeat % 2 == 0 else list(reversed(jobs)):
                team, result = teams.of[name], results[name]
                load = Load(team)
                answers = team.train_block()
                for key, cores in load.cores().items():
                    result[key].append(cores)
                # The last rank's clock; without links it is the slowest process that counts.
                slowest = max(a["seconds"] for a in answers)
                seconds = slowest if team.job.kind == "alone" else answers[-1]["seconds"]
                result["rates"].append(team.job.steps * team.job.batch_size / seconds)
                result["seconds"] = [answer["seconds"] / team.job.steps for answer in answers]
                if team.job.kind == "line":
                    result["shares"].append([answer["shares"] for answer in answers])
                    result["losses"].update(answers[-1]["losses"])
                    result["cuts"] = answers[-1]["cuts"]
            print(_progress(repeat, results), file=sys.stderr)
    _check_same_numbers(results)
    return results


def _progress(repeat: int, results: dict[str, dict[str, Any]]) -> str:
    rates = ", ".join(f"{name} {result['rates'][-1]:.1f}" for name, result in results.items())
    others = ", ".join(f"{result['others'][-1]:.2f}" for result in results.values())
    return f"{time.strftime('%H:%M:%S')} repeat {repeat + 1}: {rates}; other cores: {others}"


def _check_same_numbers(results: dict[str, dict[str, Any]]) -> None:
    """One process or several: every loss must be the same, to the last bit."""
    first, *others = [r["losses"] for r in results.values() if r["losses"]] or [{}]
    for other in others:
        for step in first.keys() & other.keys():
            if first[step] != other[step]:
                raise SystemExit(f"step {step}: losses {first[step]} and {other[step]} differ")


def summary(jobs: dict[str, Job], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"variants": {}, "ratios": {}}
    for name, result in results.items():
        job = jobs[name]
        about = ABOUT[name].format(
            stages=job.stages, processes=max(job.processes, job.threads), every=job.checkpoint_every
        )
        found["variants"][name] = {
            "about": about,
            "samples_per_second": spread(result["rates"]),
            "rates": result["rates"],
            "others": spread(result["others"]),
            "steal": spread(result["steal"]),
            "shares": _mean_shares(result["shares"]),
            "cuts": result.get("cuts"),
            "last_step_seconds": result["seconds"],
        }
    for pair in PAIRS:
        if pair[0] in results and pair[1] in results:
            above, below = (results[name]["rates"] for name in pair)
            ratios = spread([a / b for a, b in zip(above, below, strict=True)])
            target = TARGETS.get(pair)
            found["ratios"]["/".join(pair)] = {**ratios, "target": target}
    compared = [set(r["losses"]) for r in results.values() if r["losses"]]
    found["equal_losses"] = len(set.intersection(*compared)) if compared else 0
    return found


def _mean_shares(blocks: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """For every rank, the mean over blocks of the share of time of each activity."""
    ranks = zip(*blocks, strict=True)
    return [
        {name: sum(block[name] for block in rank) / len(rank) for name in rank[0]} for rank in ranks
    ]


def tables(found: dict[str, Any]) -> Iterator[str]:
    yield "| variant | samples/s: median (min .. max) | other load, cores: median (min .. max) |"
    yield "|---|---:|---:|"
    for row in found["variants"].values():
        rate, others = shown(row["samples_per_second"], 1), shown(row["others"], 2)
        yield f"| {row['about']} | {rate} | {others} |"
    yield ""
    yield "| ratio, paired | median (min .. max) | target | |"
    yield "|---|---:|---:|---|"
    for name, row in found["ratios"].items():
        target = row["target"]
        verdict = "" if target is None else "met" if row["median"] >= target else "missed"
        yield f"| {name} | {shown(row)} | {target or ''} | {verdict} |"
    yield ""
    yield "| where the time goes | forward | learn | wait | snapshot | rest | receive (thread) |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, row in found["variants"].items():
        for rank, shares in enumerate(row["shares"]):
            keys = ("forward", "learn", "wait", "snapshot", "rest", "receive")
            cells = " | ".join(f"{100 * shares[key]:.1f} %" for key in keys)
            yield f"| {name}, rank {rank} | {cells} |"
    yield ""
    yield f"Losses compared bit for bit on {found['equal_losses']} steps: equal."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=["transformer", "vgg8"], default="transformer")
    parser.add_argument("--method", choices=["scpl", "early-exit"], default="scpl")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--cuts", nargs="+", default=[], help="first layer of each later stage")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(ABOUT), default=list(ABOUT))
    parser.add_argument("--quick", action="store_true", help="narrow network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="scpl-throughput-") as folder:
        jobs = variants(arguments, folder)
        jobs = {name: job for name, job in jobs.items() if name in arguments.variants}
        found = summary(jobs, measure(jobs, arguments.repeats))
    found |= {"environment": environment(), "load_before": load, "arguments": vars(arguments)}
    print(json.dumps(found) if arguments.json else "\n".join(tables(found)))


if __name__ == "__main__":
    main()
