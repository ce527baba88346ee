"""The line over a slow network: two ranks in two network namespaces, joined by a shaped cable.

Needs root (``ip netns``, ``tc``) on Linux. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "throughput"))
from cable import UNSHAPED, Cable
from plan import Job, team_of, work
from writing import environment, say, shown, verdict

from scpl.app.bench.teams import Team
from scpl.app.bench.turns import Answers, Record, Rival, paired, spread, take_turns
from scpl.errors import ScplError

LOOPBACK = "loopback"
LINES = ("scpl", "early-exit")
SWEPT = ("gpipe", "1f1b")
TARGET = 0.95
TARGETS = {("ddp", "1gbit"): 1.5, ("ddp", "200mbit"): 2.5}


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
            jobs[method] = replace(base, kind="ddp")
        elif method in SWEPT:
            for micro in arguments.micro_batches:
                jobs[f"{method}/{micro}"] = replace(base, method=method, micro_batches=micro)
        else:
            jobs[method] = replace(base, method=method)
    return jobs


def rivals_of(
    jobs: dict[str, Job], networks: Sequence[str], cable: Cable, traffic: dict[str, list[float]]
) -> dict[str, Rival]:
    """Every method on every network; over the cable one team, whatever the cable's speed.

    Args:
        jobs: The methods.
        networks: Loopback, and the rates of the cable.
        cable: It is set to the rate before a block.
        traffic: Filled with the bytes that cross the cable per step, both ways, block by block.
    """
    rivals: dict[str, Rival] = {}
    for method, job in jobs.items():
        for network in networks:
            place = network if network == LOOPBACK else "cable"
            name = f"{method} {network}"
            traffic[name] = []
            rivals[name] = Rival(
                f"{method} over {place}",
                partial(start, method, job, None if network == LOOPBACK else cable),
                partial(train, job, network, cable, traffic[name]),
            )
    return rivals


def start(method: str, job: Job, cable: Cable | None) -> Team:
    """Start the ranks of a method here, or one at each end of the cable."""
    if cable is None:
        return team_of(method, job, environment={"GLOO_SOCKET_IFNAME": "lo"})
    # The device of the other end has another name: gloo reads it from each rank's own
    # environment, set behind `ip netns exec`.
    prefixes = [(*end.prefix, "env", f"GLOO_SOCKET_IFNAME={end.device}") for end in cable.ends]
    return team_of(method, job, address=cable.ends[0].address, prefixes=prefixes)


def train(
    job: Job, network: str, cable: Cable, traffic: list[float], team: Team
) -> tuple[float, Answers]:
    """Have a team train a block over a network, and count what crosses the cable."""
    if network == LOOPBACK:
        return work(team, job)
    cable.shape(network)
    before = cable.carried_bytes()
    rate, answers = work(team, job)
    traffic.append((cable.carried_bytes() - before) / answers[-1]["steps"])
    return rate, answers


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every method on every network, in turns; everything found, in JSON values."""
    jobs, networks = jobs_of(arguments), [LOOPBACK, *arguments.rate]
    traffic: dict[str, list[float]] = {}
    with Cable() as cable:
        speeds = {}
        for rate in arguments.rate:
            cable.shape(rate)
            speeds[rate] = cable.speed()
        rivals = rivals_of(jobs, networks, cable, traffic)
        records, failures = take_turns(rivals, arguments.repeats, say)
    results = {
        name: describe(name, record, records, speeds, traffic[name])
        for name, record in records.items()
    }
    best = {network: best_of(records, network) for network in networks}
    return {"results": results, "ratios": ratios_of(records, best), "failures": failures}


def describe(
    name: str,
    record: Record,
    records: dict[str, Record],
    speeds: dict[str, float],
    traffic: list[float],
) -> dict[str, Any]:
    """One method on one network in JSON values."""
    method, _, network = name.partition(" ")
    others = [load["others"] for load in record.loads]
    found = {
        "method": method,
        "network": network,
        "samples_per_second": spread(record.rates),
        "rates": record.rates,
        "others": spread(others) if others else None,
        "shares": record.mean_shares() if "shares" in record.answers[-1][-1] else [],
        "bytes_per_step": spread(traffic) if traffic else None,
        "bits_per_second": speeds.get(network),
    }
    base = records.get(f"{method} {LOOPBACK}")
    if base is not None and network != LOOPBACK:
        ratio = spread(paired(record.rates, base.rates))
        found["to_loopback"] = {**ratio, "target": TARGET if method in LINES else None}
    return found


def best_of(records: dict[str, Record], network: str) -> dict[str, str]:
    """The best number of slices of each method on a network: it is what one would use there."""
    best: dict[str, str] = {}
    here = [name for name in records if name.endswith(f" {network}")]
    for name in sorted(here, key=lambda name: -median(records[name].rates)):
        best.setdefault(re.split("[ /]", name)[0], name)
    return best


def ratios_of(records: dict[str, Record], best: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The line against every rival, network by network."""
    ratios = {}
    for network, names in best.items():
        for line in LINES:
            for method, name in names.items():
                if line in names and method not in LINES:
                    ratio = spread(paired(records[names[line]].rates, records[name].rates))
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
    if os.geteuid() != 0:
        raise SystemExit("This benchmark makes network namespaces and so must run as root.")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"This benchmark needs {' and '.join(missing)} (package iproute2).")
    for rate in rates:
        if rate != UNSHAPED and not re.fullmatch(r"\d+(k|m|g)bit", rate):
            raise SystemExit(f"A rate must look like 200mbit, 1gbit or none; got {rate!r}.")


def _interrupt(number: int, frame: FrameType | None) -> None:
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
    signal.signal(signal.SIGTERM, _interrupt)
    load = os.getloadavg()
    try:
        found = measure(arguments)
    except (KeyboardInterrupt, ScplError) as error:
        reason = str(error) or "interrupted"
        raise SystemExit(f"{reason} The network namespaces are removed.") from None
    if arguments.json:
        extra = {"environment": environment(), "load_before": load, "arguments": vars(arguments)}
        print(json.dumps({**found, **extra}))
    else:
        print("\n".join(tables(found)))
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
