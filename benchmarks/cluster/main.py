"""How fast a network trains on 2, 4, 8 or 16 machines, which this one emulates.

Each rank is in a cgroup with a quota of a core and, but for loopback, in a network namespace with a
cable of a known speed; needs root, on Linux. Behind -- come flags of scpl bench: the network,
--methods, --steps, --repeats. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "throughput"))
import machines
from machines import Machines, check_shares, cores_of, fullest
from ranks import Entry, Place, Planned, serve
from tables import check_table, draw, plan_table, tables
from writing import environment, say

import links
from links import LOOPBACK, UNSHAPED, Cable, bits_per_second, without_headers
from scpl.app.bench.bench import config_for
from scpl.app.bench.measure import Contender, measure, summary
from scpl.app.bench.workers import Timing, Workers
from scpl.app.commands import BenchConfig, method_names
from scpl.app.config import TrainConfig, in_flags
from scpl.app.planning import read_link
from scpl.app.signals import end_signals
from scpl.engine.forecast import Forecast, Measured, alone, local, micro_batched, replicated
from scpl.errors import InputError, ScplError
from scpl.methods import METHODS, MicroBatched
from scpl.simulation.machines import Link, Machine, MessageCosts

LOCAL, ONE, LIMIT, PLAN = "scpl", "bp", "limit", "plan"
SLICED = ("gpipe", "1f1b", "zero-bubble")
METHODS_HERE = ",".join((ONE, LOCAL, *SLICED, "ddp"))
DEFAULT = {
    "data": "ag_news", "model": "transformer", "layers": 8, "hidden": 256, "heads": 4,
    "max_tokens": 32, "vocab_size": 2000, "batch_size": 64,
}  # fmt: skip
QUICK = {"layers": 4, "hidden": 16, "heads": 2, "max_tokens": 4, "vocab_size": 50, "batch_size": 16}
OF_ALL_CORES = 0.9
"""Of the cores here, what all machines have together where no quota is given."""
CHECK_SECONDS = 4.0
TURNS_TO_PLAN = 1
"""Of each part of the network, in each round."""
PICTURE = "speed-up.png"
NOTHING: dict[str, Any] = {"results": [], "plans": {}, "comparisons": [], "failures": {}}
FOR_SURE = {"threads": 1, "quiet": True, "timeout": 600.0}
"""A rank with a small share of a core takes its time."""


# ---- What is measured. ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A configuration of its own beside the methods.

    Attributes:
        label: What it is called.
        flags: What it has besides the flags of all.
    """

    label: str
    flags: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Case:
        """Read ``label: flags``.

        Raises:
            ValueError: if it is not that.
        """
        label, colon, flags = text.partition(":")
        if not (colon and label.strip() and flags.strip().startswith("--")):
            raise ValueError(
                f"--also must be a name and flags, such as 'measured: --cuts layer4'; got {text!r}."
            )
        return cls(label.strip(), tuple(shlex.split(flags)))


def config_of(flags: Sequence[str], *, quick: bool) -> BenchConfig:
    """Read flags of ``scpl bench``; without --data and --model, the network of this benchmark."""
    from scpl.app.cli import _parse  # late, like all that ranks, which load this file, do not need

    another = not {"--data", "--model"}.isdisjoint(flag.partition("=")[0] for flag in flags)
    base = TrainConfig().changed(**({} if another else DEFAULT), **FOR_SURE)
    if quick and not another:
        base = base.changed(**QUICK)
    default = BenchConfig(base, METHODS_HERE, repeats=3, steps=8)
    return _parse(BenchConfig, "bench", list(flags), default)


def on_machines(base: TrainConfig, number: int) -> TrainConfig:
    """The same on so many machines: with a stage for each, unless it is said otherwise."""
    spread = base.changed(processes=number)
    if spread.network.stages is None and not spread.network.cuts:
        return spread.changed(stages=number)
    return spread


def slices(method: str, number: int, rows: int, wanted: Sequence[int]) -> list[int]:
    """Numbers of micro-batches to try on so many machines: those that can be."""
    from scpl.engine.trainers.schedule import fits

    tried = wanted or [number, 2 * number, 4 * number]
    schedule = METHODS[method].schedule  # type: ignore[attr-defined]
    return [count for count in tried if rows % count == 0 and fits(schedule, count, number)]


def entries_of(
    config: BenchConfig, numbers: Sequence[int], wanted: Sequence[int], *, plan: bool = False
) -> Iterator[Entry]:
    """Every method on every number of machines, in all variants; `bp` on each by itself."""
    if plan:
        own = replace(config.train, method=config.train.method.for_method(LOCAL))
        yield from (plan_of(own, number) for number in numbers)
    for method in method_names(config.methods or METHODS_HERE):
        own = replace(config.train, method=config.train.method.for_method(method))
        if METHODS[method].layout == "one":
            if method != ONE:
                raise InputError(
                    f"Of the methods for one process, one emulated machine trains {ONE}",
                    f"Got {method}",
                    "Leave it out",
                )
            yield from (by_itself(own, number, config.steps) for number in numbers)
            continue
        for number in numbers:
            base = config_for(on_machines(own, number), method)
            for variant, options in variants_of(method, number, base.rows, wanted):
                entry = Entry(method, variant, with_options(base, options), config.steps)
                yield from with_limit(entry)


def by_itself(own: TrainConfig, number: int, steps: int) -> Entry:
    """`bp` on so many machines, each by itself: what one machine is, to which others are ratios.

    All of them at the same time, because here machines slow each other down: what they share is
    the memory and its caches, and often two of them one core.
    """
    spread = on_machines(own, number)
    return Entry(ONE, "", replace(config_for(spread, ONE), run=spread.run), steps, "alone")


def variants_of(
    method: str, number: int, rows: int, wanted: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a method is tried with, as one would who wants it to be fast: options by a name."""
    if issubclass(METHODS[method], MicroBatched):
        counts = slices(method, number, rows, wanted)
        yield from ((str(count), {"micro_batches": count}) for count in counts)
    else:
        yield "", {}
    if method == "ddp":
        yield "bf16", {"compress_gradients": "bfloat16"}


def with_limit(entry: Entry) -> Iterator[Entry]:
    """An entry, and its stages alone if they learn by themselves."""
    yield entry
    if METHODS[entry.config.method.method].cuts_gradients:
        yield limit_of(entry)


def limit_of(entry: Entry) -> Entry:
    """What nothing like this entry can be faster than."""
    label = LIMIT if entry.label == LOCAL else f"{LIMIT} of {entry.label}"
    return replace(entry, label=label, variant="", how="alone")


def plan_of(own: TrainConfig, number: int) -> Entry:
    """What `scpl plan` measures on each of so many machines while all of them are busy with it."""
    return Entry(PLAN, "", config_for(on_machines(own, number), LOCAL), TURNS_TO_PLAN, "planned")


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The same with further options of its method."""
    chosen = {**config.method.options, **options}
    return replace(config, method=replace(config.method, options=chosen))


def cases_of(
    cases: Sequence[Case], flags: Sequence[str], numbers: Sequence[int], *, quick: bool
) -> Iterator[Entry]:
    """The other cases, each with its own limit."""
    for case in cases:
        config = config_of([*flags, "--methods", LOCAL, *case.flags], quick=quick)
        (method,) = method_names(config.methods or LOCAL)
        own = replace(config.train, method=config.train.method.for_method(method))
        number = own.run.processes if own.run.processes > 1 else max(numbers)
        base = config_for(on_machines(own, number), method)
        yield from with_limit(Entry(case.label, "", base, config.steps))


# ---- The measurement. ----------------------------------------------------------------------------


@dataclass
class Bench:
    """The processes on all machines, and whoever has a turn.

    Attributes:
        machines: Those that are emulated.
        cable: Between them; None if nothing is measured over one.
        traffic: Bytes per step over all cables, block by block.
    """

    machines: Machines
    cable: Cable | None
    traffic: dict[str, list[float]] = field(default_factory=dict)
    _workers: dict[Any, Workers] = field(default_factory=dict)

    def contender(self, entry: Entry, link: str) -> Contender:
        """Someone who takes turns with the others."""
        name, samples = name_of(entry, link), entry.steps * entry.config.chosen.batch_size
        self.traffic[name] = []
        train = partial(self._train, entry, link)
        if entry.alone:
            clock = self._of_one if entry.label == ONE else max  # the slowest one counts
            return Contender(self._workers_for(entry, link), samples, train, clock=clock)
        return Contender(self._workers_for(entry, link), samples, train)

    def _of_one(self, seconds: Sequence[float]) -> float:
        """The mean of machines of speed 1."""
        shares = self.machines.shares[: len(seconds)]
        return fmean(each for each, own in zip(seconds, shares, strict=True) if own == max(shares))

    def _workers_for(self, entry: Entry, link: str) -> Workers:
        """Processes that are laid out as the entry wants them; many entries share them."""
        run, cable = entry.config.run, link != LOOPBACK
        if (run, cable) not in self._workers:
            number = entry.num_machines
            how = f"{number} machines" + (" behind cables" if cable else "")
            own = cores_of(self.machines.shares, cores())
            folders, idle = self.machines.folders[:number], self.machines.idle
            place = Place(entry.config, folders, idle, own[:number], cable)
            self._workers[run, cable] = Workers(how, serve, place, processes=number)
        return self._workers[run, cable]

    def _train(self, entry: Entry, link: str, workers: Workers) -> list[Timing]:
        """Have a block trained; cables are slow while that is done, and no longer."""
        workers.train(entry)
        cable = self.cable if link != LOOPBACK else None
        if cable is not None:
            cable.shape(link)
        before = cable.carried_bytes() if cable is not None else 0
        timings = workers.train()
        if entry.alone:
            workers.wake()  # they went on until the slowest one was timed
        seconds = timings[-1].seconds / entry.steps
        say(f"{time.strftime('%H:%M:%S')} {name_of(entry, link)}: {seconds:.2f} s per step")
        if cable is not None:
            carried = cable.carried_bytes() - before
            self.traffic[name_of(entry, link)].append(carried / timings[-1].steps)
            cable.shape(UNSHAPED)
        return timings


def name_of(entry: Entry, link: str) -> str:
    return f"{entry.name} x{entry.num_machines}" + ("" if entry.alone else f" {link}")


def turns_of(entries: Sequence[Entry], wanted: Sequence[str]) -> list[tuple[Entry, str]]:
    """Every entry over every link; once what needs none."""
    return [(entry, link) for entry in entries for link in ([LOOPBACK] if entry.alone else wanted)]


def check_itself(
    emulated: Machines, cable: Cable | None, rates: Sequence[str], number: int
) -> list[dict[str, Any]]:
    """Measure what machines and cables give, beside what they were asked for."""
    rows = []
    got = emulated.measured_shares(CHECK_SECONDS, range(number))
    for which, (wanted, share) in enumerate(zip(emulated.shares, got, strict=False)):
        rows.append(checked(f"machine {which}", "of a core", wanted, share, machines.TOLERANCE))
    for rate in rates if cable is not None else ():
        assert cable is not None
        cable.shape(rate)
        for sender in range(len(cable.ends)):
            receiver = (sender + 1) % len(cable.ends)
            speed = cable.speed(sender, receiver) / 1e6
            wanted = speed if rate == UNSHAPED else without_headers(rate) / 1e6
            way = f"machine {sender} to {receiver}, {rate}"
            rows.append(checked(way, "Mbit/s", wanted, speed, links.TOLERANCE))
        cable.shape(UNSHAPED)
    return rows


def checked(what: str, unit: str, wanted: float, got: float, tolerance: float) -> dict[str, Any]:
    """A line of the check."""
    off = got / wanted - 1
    values = {"what": what, "unit": unit, "wanted": wanted, "got": got, "off": off}
    return {**values, "tolerance": tolerance, "good": abs(off) <= tolerance}


def measured_by(arguments: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Check the machines, and measure everything on them, in turns; all of it in JSON values."""
    config = config_of(flags, quick=arguments.quick)
    cases = [Case.of(text) for text in arguments.also]
    entries = [
        *entries_of(config, arguments.machines, arguments.micro_batches, plan=arguments.plan),
        *cases_of(cases, flags, arguments.machines, quick=arguments.quick),
    ]
    for entry in entries:
        if entry.label != ONE:  # that is one process, many times
            entry.config.check([entry.config.method.method])
    if all(entry.how == "planned" for entry in entries):
        tried = " ".join(map(str, arguments.micro_batches))
        raise ValueError(
            f"Of --micro-batches at least one must fit the mini-batch and the machines. Got {tried}"
        )
    number = max(entry.num_machines for entry in entries)
    shares = shares_of(number, arguments.quota, arguments.speeds, cores())
    rates = [link for link in arguments.links if link != LOOPBACK]
    with (
        Machines(shares) as emulated,
        Cable(number) if rates else nullcontext() as cable,
    ):
        check = check_itself(emulated, cable, rates, number)
        what = {"check": check, "shares": shares, "cgroups": emulated.controller.version}
        say("\n".join(check_table(check)))
        if not all(row["good"] for row in check):
            if not arguments.anyway:
                raise RuntimeError(
                    "Machines and cables must be what they were asked to be, see the table. "
                    "Some are not. Let nothing else run, give a smaller --quota, or go on with "
                    "--anyway."
                )
            say("Not all of it is what was asked for; going on, as --anyway says.")
        if arguments.check:
            return {**NOTHING, **what}
        bench = Bench(emulated, cable)
        turns = {name_of(*turn): turn for turn in turns_of(entries, arguments.links)}
        contenders = {name: bench.contender(*turn) for name, turn in turns.items()}
        measured, failures = measure(contenders, config.repeats, say)
    results = [
        describe(*turns[name], measured, bench.traffic[name], emulated.shares)
        for name in measured
        if turns[name][0].how != "planned"
    ]
    return {
        "results": results,
        "plans": {
            name: [[asdict(timing.measured) for timing in block] for block in each.timings]
            for name, each in measured.items()
            if turns[name][0].how == "planned"
        },
        "comparisons": list(comparisons(measured, turns)),
        "failures": failures,
        **what,
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def shares_of(
    number: int, quota: float | None, speeds: Sequence[float], num_cores: int
) -> list[float]:
    """Share of a core of each machine.

    Args:
        number: How many.
        quota: That of a machine of speed 1; default: as much as there is.
        speeds: Of each; those that are not given have speed 1.
        num_cores: What there is.

    Raises:
        ValueError: if there is not as much.
    """
    if len(speeds) > number or not all(speed > 0 for speed in speeds):
        told = " ".join(f"{speed:g}" for speed in speeds)
        raise ValueError(
            f"--speeds must give at most {number} machines a number above 0. Got {told}."
        )
    factors = [*speeds, *[1.0] * (number - len(speeds))]
    if quota is None:
        quota = min(OF_ALL_CORES / fullest(factors, num_cores), 1 / max(factors))
    shares = [quota * factor for factor in factors]
    check_shares(shares, num_cores)
    return shares


# ---- What was found. -----------------------------------------------------------------------------


def describe(
    entry: Entry,
    link: str,
    measured: Mapping[str, Contender],
    traffic: Sequence[float],
    shares: Sequence[float],
) -> dict[str, Any]:
    """One method on some machines over a link, in JSON values."""
    contender = measured[name_of(entry, link)]
    one = measured.get(f"{ONE} x{entry.num_machines}")
    limit = measured.get(name_of(limit_of(entry), LOOPBACK)) if not entry.alone else None
    others = [load["others"] for load in contender.loads]
    last = contender.timings[-1]
    plan = measured.get(f"{PLAN} x{entry.num_machines}")
    simulated = list(simulated_ratios(entry, link, plan, shares)) if plan else []
    return {
        "label": entry.label,
        "variant": entry.variant,
        "machines": entry.num_machines,
        "link": "" if entry.alone else link,
        "cuts": list(entry.config.network.cuts),
        "rates": contender.rates,
        "samples_per_second": summary(contender.rates),
        "to_one": summary(contender.ratios(one)) if one else None,
        "of_limit": summary(contender.ratios(limit)) if limit else None,
        "simulated": summary(simulated) if simulated else None,
        "bytes_per_step": summary(traffic) if traffic else None,
        "step_seconds": [
            [timing.seconds / entry.steps for timing in timings] for timings in contender.timings
        ],
        "wait": [s["wait"] for s in contender.mean_shares()] if last[-1].shares else [],
        "peak_memory_bytes": [timing.peak_memory_bytes for timing in last],
        "others": summary(others) if others else None,
    }


def simulated_ratios(
    entry: Entry, link: str, plan: Contender, shares: Sequence[float]
) -> Iterator[float]:
    """What `scpl plan` would say on each machine in each round of an entry, beside `bp` on one.

    Nothing of cases with flags of their own.
    """
    if entry.label not in (LIMIT, LOCAL, *SLICED, "ddp"):
        return
    way = Link() if entry.alone or link == UNSHAPED else read_link(link)
    for timings in plan.timings:
        for timing, own in zip(timings, shares, strict=False):
            assert isinstance(timing, Planned)
            costs = MessageCosts() if entry.alone else timing.measured.messages
            machines = [Machine(share / own, way, costs) for share in shares[: entry.num_machines]]
            found = forecast(entry, timing.measured, machines)
            yield found.samples_per_second / alone(timing.measured, machines).samples_per_second


def forecast(entry: Entry, measured: Measured, machines: Sequence[Machine]) -> Forecast:
    """Simulate an entry."""
    if entry.label in SLICED:
        return micro_batched(measured, machines, entry.label, [int(entry.variant)])
    if entry.label == "ddp":
        return replicated(measured, machines, compression=2.0 if entry.variant else 1.0)
    return local(measured, machines)


def comparisons(
    measured: Mapping[str, Contender], turns: Mapping[str, tuple[Entry, str]]
) -> Iterator[dict[str, Any]]:
    """`scpl` against every other method at its best, and against the best of the pipelines."""
    for name, ours in measured.items():
        entry, link = turns[name]
        if entry.label != LOCAL:
            continue
        others = {
            other: turns[other][0]
            for other in measured
            if not turns[other][0].alone
            and turns[other][0].label != LOCAL
            and (turns[other][0].num_machines, turns[other][1]) == (entry.num_machines, link)
        }
        groups: dict[str, tuple[str, ...]]
        groups = {each.label: (each.label,) for each in others.values()}
        groups |= {f"best of {', '.join(SLICED)}": SLICED}
        for title, labels in groups.items():
            own = [other for other, each in others.items() if each.label in labels]
            if not own:
                continue
            best = max(own, key=lambda other: median(measured[other].rates))
            yield {
                "machines": entry.num_machines,
                "link": link,
                "against": title,
                "which": others[best].name,
                **summary(ours.ratios(measured[best])),
            }


# ---- The command. --------------------------------------------------------------------------------


def read_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags of this script, and those for ``scpl bench`` behind ``--``."""
    own, flags = list(words), []
    if "--" in own:
        place = own.index("--")
        own, flags = own[:place], own[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [flags] [-- flags of scpl bench]", allow_abbrev=False
    )
    parser.add_argument("--machines", type=int, nargs="+", default=[4], help="how many, e.g. 2 4 8")
    parser.add_argument(
        "--speeds", type=float, nargs="+", default=[], help="of each, e.g. 1 0.5; default: 1"
    )
    parser.add_argument(
        "--quota",
        type=float,
        help=f"share of a core of a machine of speed 1; default: {OF_ALL_CORES} of what is here, "
        "divided by the largest number of machines",
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=[LOOPBACK, "1gbit", "200mbit"],
        help=f"{LOOPBACK}, rates such as 1gbit, or {UNSHAPED}: cables without a limit",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[],
        help="default: once, twice and four times as many as machines",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="'NAME: FLAGS'",
        help="a further case with flags of its own, such as 'measured: --cuts layer4'",
    )
    parser.add_argument("--anyway", action="store_true", help="measure even if the check fails")
    parser.add_argument("--check", action="store_true", help="check machines and links, no more")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="also measure what scpl plan does, on every machine, and compare what it simulates",
    )
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md, speed-up.png")
    parser.add_argument(
        "--draw", type=Path, nargs="+", help="measure nothing: draw what these files hold"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(own)
    if arguments.draw and not arguments.out:
        parser.error("--draw needs --out, the folder of the figure")
    return arguments, flags


def check_here(arguments: argparse.Namespace) -> None:
    """Refuse with a sentence what cannot work.

    Raises:
        RuntimeError: if this machine cannot.
        ValueError: for a bad number or rate.
    """
    if min(arguments.machines) < 2:
        raise ValueError("--machines must be numbers of at least 2; one machine is always measured")
    rates = [link for link in arguments.links if link != LOOPBACK]
    for rate in rates:
        if rate != UNSHAPED:
            bits_per_second(rate)
    if reason := machines.refusal() or (links.refusal() if rates else ""):
        raise RuntimeError(reason)


def results_in(path: Path) -> list[dict[str, Any]]:
    """What an earlier run found."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return found


def interrupt(received: int) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments, flags = read_arguments(sys.argv[1:])
    load, begin = os.getloadavg(), time.monotonic()
    try:
        if arguments.draw:
            rows = [row for path in arguments.draw for row in results_in(path)]
            arguments.out.mkdir(parents=True, exist_ok=True)
            draw(rows, arguments.out / PICTURE)
            print("\n".join(plan_table(rows)))
            return
        check_here(arguments)
        with end_signals(interrupt):
            found = measured_by(arguments, flags)
    except (KeyboardInterrupt, OSError, RuntimeError, ValueError, ScplError) as error:
        raise SystemExit(in_flags(str(error)) or "Interrupted") from None
    settings = json.loads(json.dumps(vars(arguments), default=str))  # paths among them
    found |= {"environment": environment(), "load_before": load}
    found |= {"arguments": settings, "flags": flags, "minutes": (time.monotonic() - begin) / 60}
    lines = "\n".join([*tables(found), "", *plan_table(found["results"])])
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, values in {"plans": found.pop("plans"), "results": found}.items():
            path = arguments.out / f"{name}.json"
            path.write_text(json.dumps(values, indent=1), encoding="utf-8")
        (arguments.out / "table.md").write_text(f"{lines}\n", encoding="utf-8")
        if ONE in {row["label"] for row in found["results"]}:  # to which speed-ups are ratios
            draw(found["results"], arguments.out / PICTURE)
    print(json.dumps(found) if arguments.json else lines)
    say(f"{found['minutes']:.1f} minutes")
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
