"""The line over a slow network: two ranks in two network namespaces, joined by a shaped cable.

Needs root (``ip netns``, ``tc``) on Linux. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "throughput"))
from variants import Job, contender, serve_job, workers_of
from writing import environment, say, shown, verdict

from links import (
    LOOPBACK,
    UNSHAPED,
    Cable,
    bits_per_second,
    go_to_cable,
    go_to_loopback,
    refusal,
)
from scpl.app.bench.measure import Contender, measure, summary
from scpl.app.bench.workers import Timing, Workers
from scpl.app.signals import end_signals
from scpl.errors import ScplError

LINES = ("scpl", "early-exit")
SWEPT = ("gpipe", "1f1b")
TARGET = 0.95
TARGETS = {("ddp", "1gbit"): 1.5, ("ddp", "200mbit"): 2.5}


# ---- What is measured. ---------------------------------------------------------------------------


def jobs_of(arguments: argparse.Namespace) -> dict[str, Job]:
    """Every method once; those that slice mini-batches once for each number of slices."""
    base = Job(
        work=arguments.work,
        processes=2,
        batch_size=arguments.batch_size,
        depth=arguments.depth,
        steps=arguments.steps,
        quick=arguments.quick,
    )
    jobs: dict[str, Job] = {}
    for method in arguments.methods:
        if method == "ddp":
            jobs[method] = replace(base, loop="ddp")
        elif method in SWEPT:
            for micro in arguments.micro_batches:
                jobs[f"{method}/{micro}"] = replace(base, method=method, micro_batches=micro)
        else:
            jobs[method] = replace(base, method=method)
    return jobs


def contenders_of(
    jobs: dict[str, Job], networks: Sequence[str], cable: Cable, traffic: dict[str, list[float]]
) -> dict[str, Contender]:
    """Every method on every network; over the cable the same workers, whatever its speed.

    Args:
        jobs: The methods.
        networks: Loopback, and the rates of the cable.
        cable: It is set to the rate before a block.
        traffic: Filled with the bytes that cross the cable per step, both ways, block by block.
    """
    contenders: dict[str, Contender] = {}
    for method, job in jobs.items():
        here = workers_of(f"{method} over {LOOPBACK}", job, serve_on_loopback)
        there = workers_of(f"{method} over cable", job, serve_on_cable)
        for network in networks:
            name = f"{method} {network}"
            traffic[name] = []
            contenders[name] = contender(here if network == LOOPBACK else there, job)
            if network != LOOPBACK:
                contenders[name].train = partial(train, network, cable, traffic[name])
    return contenders


def serve_on_loopback(connection: Connection, job: Job) -> None:
    go_to_loopback()
    serve_job(connection, job)


def serve_on_cable(connection: Connection, job: Job) -> None:
    go_to_cable()
    serve_job(connection, job)


def train(network: str, cable: Cable, traffic: list[float], workers: Workers) -> list[Timing]:
    """Have a block trained over the cable, and count what crosses it."""
    cable.shape(network)
    before = cable.carried_bytes()
    timings = workers.train()
    traffic.append((cable.carried_bytes() - before) / timings[-1].steps)
    return timings


def measured_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every method on every network, in turns; everything found, in JSON values."""
    jobs, networks = jobs_of(arguments), [LOOPBACK, *arguments.rate]
    traffic: dict[str, list[float]] = {}
    with Cable() as cable:
        speeds = {rate: cable.checked_speed(rate) for rate in arguments.rate}
        contenders = contenders_of(jobs, networks, cable, traffic)
        measured, failures = measure(contenders, arguments.repeats, say)
    results = {name: describe(name, measured, speeds, traffic[name]) for name in measured}
    best = {network: best_of(measured, network) for network in networks}
    return {"results": results, "ratios": ratios_of(measured, best), "failures": failures}


def describe(
    name: str,
    measured: dict[str, Contender],
    speeds: dict[str, float],
    traffic: list[float],
) -> dict[str, Any]:
    """One method on one network in JSON values."""
    method, _, network = name.partition(" ")
    contender = measured[name]
    others = [load["others"] for load in contender.loads]
    found = {
        "method": method,
        "network": network,
        "samples_per_second": summary(contender.rates),
        "rates": contender.rates,
        "others": summary(others) if others else None,
        "shares": contender.mean_shares() if contender.timings[-1][-1].shares else [],
        "bytes_per_step": summary(traffic) if traffic else None,
        "bits_per_second": speeds.get(network),
    }
    base = measured.get(f"{method} {LOOPBACK}")
    if base is not None and network != LOOPBACK:
        ratio = summary(contender.ratios(base))
        found["to_loopback"] = {**ratio, "target": TARGET if method in LINES else None}
    return found


def best_of(measured: dict[str, Contender], network: str) -> dict[str, str]:
    """The best number of slices of each method on a network: it is what one would use there."""
    best: dict[str, str] = {}
    here = [name for name in measured if name.endswith(f" {network}")]
    for name in sorted(here, key=lambda name: -median(measured[name].rates)):
        best.setdefault(re.split("[ /]", name)[0], name)
    return best


def ratios_of(measured: dict[str, Contender], best: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The line against every rival, network by network."""
    ratios = {}
    for network, names in best.items():
        for line in LINES:
            for method, name in names.items():
                if line in names and method not in LINES:
                    ratio = summary(measured[names[line]].ratios(measured[name]))
                    target = TARGETS.get((method, network)) if line == "scpl" else None
                    ratios[f"{line}/{name}"] = {**ratio, "target": target}
    return ratios


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    loopback = f"to loopback, paired (target of the line {TARGET})"
    yield (
        f"| method | network | measured speed | samples/s: median (min .. max) | {loopback} "
        "| MB per step | rank 1 waits | other load, cores |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for row in found["results"].values():
        speed, traffic, ratio = (
            row.get(key) for key in ("bits_per_second", "bytes_per_step", "to_loopback")
        )
        network = row["network"]
        cells = [
            row["method"],
            network if network == LOOPBACK else f"cable, {network.replace(UNSHAPED, 'no limit')}",
            "" if speed is None else f"{speed / 1e6:.0f} Mbit/s",
            shown(row["samples_per_second"], 1),
            shown(ratio),
            "" if traffic is None else f"{traffic['median'] / 1e6:.2f}",
            f"{100 * row['shares'][1]['wait']:.1f} %" if row["shares"] else "",
            shown(row["others"], 2),
        ]
        yield f"| {' | '.join(cells)} |"
    if found["ratios"]:
        yield ""
        yield "| ratio, paired | median (min .. max) | target | |"
        yield "|---|---:|---:|---|"
    for name, row in found["ratios"].items():
        yield f"| {name} | {shown(row)} | {row['target'] or ''} | {verdict(row)} |"
    for name, reason in found["failures"].items():
        yield f"{name} cannot run: {reason}"


def check_machine(rates: list[str]) -> None:
    """Refuse with one sentence what cannot work."""
    if reason := refusal():
        raise SystemExit(reason)
    try:
        for rate in rates:
            if rate != UNSHAPED:
                bits_per_second(rate)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def interrupt(received: int) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", nargs="+", default=[UNSHAPED, "1gbit", "200mbit"])
    parser.add_argument("--work", choices=["transformer", "vgg8"], default="transformer")
    parser.add_argument("--methods", nargs="+", choices=[*LINES, "ddp", *SWEPT], default=["scpl"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each network")
    parser.add_argument("--quick", action="store_true", help="narrow network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    check_machine(arguments.rate)
    load = os.getloadavg()
    try:
        with end_signals(interrupt):
            found = measured_by(arguments)
    except (KeyboardInterrupt, RuntimeError, ScplError) as error:
        raise SystemExit(str(error) or "Interrupted") from None
    if arguments.json:
        extra = {"environment": environment(), "load_before": load, "arguments": vars(arguments)}
        print(json.dumps({**found, **extra}))
    else:
        print("\n".join(tables(found)))
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
