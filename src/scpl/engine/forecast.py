"""How fast a network would train on several machines, by simulation from measured times.

What the parts of the network cost is measured on one machine (`engine.planning`), in mini-batches
of several sizes, because small micro-batches are less efficient. What the machines would make of it
is simulated (`simulation.schedules`). Not simulated: loading data, what a schedule costs by itself,
and targets on their way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scpl.engine.costs import Costs, Held, Unit
from scpl.errors import InputError
from scpl.methods import METHODS
from scpl.methods.bp import MicroBatched
from scpl.simulation.machines import Link, Machine, MessageCosts
from scpl.simulation.schedules import (
    SCHEDULES,
    Layers,
    Outcome,
    Part,
    in_flight,
    replicas,
    schedule,
    stream,
)

__all__ = [
    "Forecast",
    "Limit",
    "Measured",
    "Memory",
    "alone",
    "forecasts",
    "local",
    "micro_batched",
    "most_helpful",
    "replicated",
    "sizes",
    "with_replicas",
]

SMALLEST_SHARE = 32
"""Micro-batches down to this fraction of a mini-batch are measured."""
GAIN = 1.02
"""More machines help if they make a method faster by this factor; less than that nobody notices."""
REPLICA = 1e-4
"""By this factor a stage counts as slower for each further replica."""
NEARLY = 0.95
"""What takes this share of a mini-batch's time is what limits it."""


def sizes(rows: int) -> list[int]:
    """The sizes of mini-batches to measure: halves of halves, down to 2 rows."""
    found = [rows]
    while found[-1] // 2 >= max(2, rows // SMALLEST_SHARE):
        found.append(found[-1] // 2)
    return found


@dataclass(frozen=True)
class Measured:
    """What the parts of a network cost.

    Attributes:
        method: The local method.
        local: With the heads of the local method.
        whole: Without heads, the loss at the end alone, by the rows of a mini-batch.
        depth: Mini-batches in flight between two machines, of a local method.
        num_stages: How many stages there must be; None: one for each machine.
        messages: What these cost, for `Machine`.
    """

    method: str
    local: Costs
    whole: Mapping[int, Costs]
    depth: int = 2
    num_stages: int | None = None
    messages: MessageCosts = field(default_factory=MessageCosts)

    @property
    def rows(self) -> int:
        """Of a mini-batch."""
        return max(self.whole)

    def at(self, rows: float) -> Costs:
        """What so many rows cost without heads.

        Between two sizes that were measured times lie on a straight line, and below the smallest
        on that of the two smallest, but no row is faster there.
        """
        known = sorted(self.whole)
        if len(known) == 1:
            return _scaled(self.whole[known[0]], self.whole[known[0]], 0.0, rows / known[0])
        place = min(max(bisect_left(known, rows), 1), len(known) - 1)
        few, many = known[place - 1], known[place]
        share = (rows - few) / (many - few)
        return _scaled(self.whole[few], self.whole[many], share, rows / few)


_TIMES = ("forward", "backward", "forward_first", "backward_first", "inputs", "objective")


def _scaled(few: Costs, many: Costs, share: float, factor: float) -> Costs:
    """Costs on the way from few rows to many; `factor` is that of their number to few."""

    def between(one: Unit, other: Unit) -> Unit:
        changed: dict[str, Any] = {}
        for name in _TIMES:
            begin, end = getattr(one, name), getattr(other, name)
            seconds = begin + share * (end - begin)
            changed[name] = max(seconds, begin * min(factor, 1.0))
        return replace(
            one,
            **changed,
            bytes_in=round(one.bytes_in * factor),
            bytes_out=round(one.bytes_out * factor),
            held=_of_rows(one.held, factor),
            objective_held=_of_rows(one.objective_held, factor),
        )

    units = map(between, few.units, many.units)
    return replace(few, units=tuple(units), num_samples=round(few.num_samples * factor))


def _of_rows(held: Held, factor: float) -> Held:
    return replace(held, activations=held.activations * factor)


@dataclass(frozen=True)
class Memory:
    """Bytes that one machine needs.

    Attributes:
        parameters: Of layers and heads.
        gradients: At the same time.
        optimizer: Its state.
        activations: In flight, with messages that wait.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a method on some machines; simulated.

    Attributes:
        method: Its name.
        num_machines: How many of them it uses: a line has at most one for each unit of the
            network, and replicas one for each sample.
        micro_batches: How many were the fastest; 1 where there are none.
        cuts: The layers that later stages begin with.
        stages_per_machine: How many stages each machine has.
        samples_per_second: Once the line is full.
        wait_shares: Of each machine, 0 .. 1.
        memory: Of each machine.
        bytes_sent: By each machine per mini-batch.
        outcome: What was simulated.
        replicas: How many machines share each stage; empty: one.
    """

    method: str
    num_machines: int
    micro_batches: int
    cuts: tuple[str, ...]
    stages_per_machine: tuple[int, ...]
    samples_per_second: float
    wait_shares: tuple[float, ...]
    memory: tuple[Memory, ...]
    bytes_sent: tuple[float, ...]
    outcome: Outcome
    replicas: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        found = asdict(self)
        del found["outcome"]
        return found


def forecasts(measured: Measured, machines: Sequence[Machine]) -> list[Forecast]:
    """Simulate the local method, the schedules, replicas, and backpropagation on one machine.

    Each uses as many of the machines as it can; the one machine is the fastest of them. What needs
    more than one is left out on a single one. The local method with replicas of stages stands there
    where they make it faster.
    """
    found = [local(measured, machines)]
    if len(machines) > 1:
        shared = with_replicas(measured, machines)
        if (
            shared is not None
            and max(shared.replicas) > 1
            and shared.samples_per_second > GAIN * found[0].samples_per_second
        ):
            found.append(shared)
        found += [micro_batched(measured, machines, name) for name in SCHEDULES]
        found.append(replicated(measured, machines))
    return [*found, alone(measured, machines)]


def local(measured: Measured, machines: Sequence[Machine]) -> Forecast:
    """A local method: a line of stages, each with a head."""
    costs, wanted = measured.local, measured.num_stages
    machines = machines[: wanted or len(costs.units)]
    speeds = [machine.speed for machine in machines]
    plan = costs.plan(wanted or len(machines), len(machines), speeds)
    parts: list[Part] = []
    memory: list[Memory] = []
    stages = iter(costs.joined(plan.cuts).units)
    for rank, count in enumerate(plan.stages_per_rank):
        *before, last = own = [next(stages) for _ in range(count)]
        sends = last.bytes_out if rank + 1 < len(machines) else 0
        parts.append(
            Part(
                forward=sum(map(_seconds, before)) + last.forward_first,
                backward=_seconds(last) - last.forward_first,
                sends=sends,
            )
        )
        memory.append(_local_memory(own, sends, measured.depth if rank > 0 else 1))
    outcome = stream(machines, parts, measured.depth)
    return _forecast(
        measured.method, measured, machines, outcome, memory, plan.cuts, plan.stages_per_rank
    )


def _seconds(stage: Unit) -> float:
    """Of a mini-batch on a stage that learns by itself."""
    return _seconds_of_rows(stage) + stage.update


def _seconds_of_rows(stage: Unit) -> float:
    """What of it their number changes."""
    return stage.forward_first + stage.backward_first + stage.objective


def _gradients(stage: Unit) -> float:
    """Bytes, those of the head among them."""
    return stage.held.gradients + stage.objective_held.gradients


def _local_memory(stages: Sequence[Unit], sends: float, waiting: int) -> Memory:
    """A stage's activations and gradients are gone before the next one of its rank runs."""
    both = [stage.held + stage.objective_held for stage in stages]
    return Memory(
        parameters=sum(held.parameters for held in both),
        gradients=max(held.gradients for held in both),
        optimizer=sum(held.optimizer for held in both),
        activations=max(held.activations for held in both) + waiting * stages[0].bytes_in + sends,
    )


def with_replicas(measured: Measured, machines: Sequence[Machine]) -> Forecast | None:
    """A local method where several machines may share a stage, each with its part of the rows.

    Cuts and replicas are those with which the slowest stage is the fastest. A group of machines
    stands for one that is as fast as all of them together, whose link carries what all of theirs
    do; while nothing else is done, its replicas add up their gradients in a ring, and the first
    machine gives the others of its group their rows.

    Returns:
        None if there are not as many machines as stages, or no two stages.
    """
    costs = measured.local
    groups = _groups(measured, machines)
    if groups is None:
        return None
    stages = [costs.range_of(begin, end) for begin, end, _ in groups]
    merged: list[Machine] = []
    parts: list[Part] = []
    memory: list[Memory] = []
    rings: list[float] = []
    for place, (stage, (_, _, own)) in enumerate(zip(stages, groups, strict=True)):
        count = len(own)
        link = Link(
            count * min(machine.link.rate for machine in own),
            max(machine.link.latency for machine in own),
        )
        sends = stage.bytes_out if place + 1 < len(groups) else 0
        gradients = _gradients(stage)
        inputs = 0 if place else stage.bytes_in
        together = _shared_seconds(
            measured, _seconds_of_rows(stage), stage.update, gradients, inputs, own
        )
        speed = min(machine.speed for machine in own)
        forward = stage.forward_first * _share(measured, count) / speed
        parts.append(Part(forward, together - forward, sends=sends))
        each = own[0].costs
        together_costs = MessageCosts(each.message / speed, each.byte / count / speed)
        merged.append(Machine(1.0, link, together_costs))
        share = replace(
            stage,
            held=_of_rows(stage.held, 1 / count),
            objective_held=_of_rows(stage.objective_held, 1 / count),
            bytes_in=round(stage.bytes_in / count),
        )
        memory += [_local_memory([share], sends / count, measured.depth if place else 1)] * count
        rings.append(2 * (count - 1) / count * gradients)
    outcome = stream(merged, parts, measured.depth)
    sizes_of = tuple(len(own) for _, _, own in groups)
    read = (sizes_of[0] - 1) / sizes_of[0] * stages[0].bytes_in
    found = _forecast(
        f"{measured.method}+replicas",
        measured,
        machines[: sum(sizes_of)],
        outcome,
        memory,
        tuple(costs.cuts[begin - 1] for begin, _, _ in groups[1:]),
        (1,) * len(groups),
    )
    sent = [
        each / count + ring for each, ring, count in zip(outcome.sent, rings, sizes_of, strict=True)
    ]
    first, *others = _spread(sent, sizes_of)
    return replace(
        found,
        replicas=sizes_of,
        wait_shares=_spread(outcome.wait_shares, sizes_of),
        bytes_sent=(first + read, *others),
    )


def _spread(values: Sequence[float], counts: Sequence[int]) -> tuple[float, ...]:
    return tuple(value for value, count in zip(values, counts, strict=True) for _ in range(count))


def _shared_seconds(
    measured: Measured,
    rows: Any,
    update: Any,
    gradients: Any,
    inputs: Any,
    machines: Sequence[Machine],
) -> Any:
    """Of a mini-batch on a stage that these machines share; every one of them updates it all.

    Args:
        measured: How much less efficient small mini-batches are.
        rows: Seconds for all rows, of one stage or of many; as the others.
        update: Seconds that the number of rows does not change.
        gradients: Bytes.
        inputs: Bytes of all rows that one of the machines has, and gives the others.
        machines: Whose replicas it has.
    """
    count, speed = len(machines), min(machine.speed for machine in machines)
    rate = min(machine.link.rate for machine in machines)
    latency = max(machine.link.latency for machine in machines)
    costs, rounds, piece = machines[0].costs, 2 * (count - 1), gradients / count
    adding = rounds * (piece * max(1 / rate, costs.added / speed) + latency)
    sharing = (count - 1) / count * inputs / rate
    return (rows * _share(measured, count) + update) / speed + adding + sharing


def _share(measured: Measured, count: int) -> float:
    """What one of so many machines takes of a mini-batch's time; few rows are less efficient."""
    part, whole = (
        sum(unit.forward + unit.backward for unit in measured.at(measured.rows / n).units)
        for n in (count, 1)
    )
    return part / whole


def _groups(
    measured: Measured, machines: Sequence[Machine]
) -> list[tuple[int, int, Sequence[Machine]]] | None:
    """Cut the network into stages, and the line of machines into as many groups.

    Exact for times of computing: by dynamic programming over the first machines and units, where of
    two groups the slower one counts.

    Returns:
        For each group the units ``begin .. end - 1``, and its machines.
    """
    costs, wanted = measured.local, measured.num_stages
    size, count = len(costs.units), len(machines)
    if min(count, size) < max(wanted or 2, 2):
        return None
    rows, update, gradients, inputs = torch.zeros(4, size + 1, size + 1, dtype=torch.float64)
    inputs[0] = costs.units[0].bytes_in
    rows.fill_(torch.inf)  # what is no stage
    for begin in range(size):
        for end in range(begin + 1, size + 1):
            stage = costs.range_of(begin, end)
            rows[begin, end] = _seconds_of_rows(stage)
            update[begin, end] = stage.update
            gradients[begin, end] = _gradients(stage)
    rows[0, size] = torch.inf  # all in one stage is data parallelism
    alike = len(set(machines)) == 1
    known: dict[Any, Tensor] = {}

    def seconds(begin: int, end: int) -> Tensor:
        key = end - begin if alike else (begin, end)
        if key not in known:
            own = machines[begin:end]
            found = _shared_seconds(measured, rows, update, gradients, inputs, own)
            # Of two shares-out that are as fast, the one with fewer replicas sends less.
            known[key] = found * (1 + REPLICA * (end - begin - 1))
        return known[key]

    # Of the first so many machines in so many groups (0: in any number): the slowest group's time,
    # by the units that they have together; and with that the last group's first machine and unit.
    start = torch.full((size + 1,), torch.inf, dtype=torch.float64)
    start[0] = 0.0
    slowest = {(0, 0): start}
    last: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for group in range(1, wanted + 1) if wanted else [0]:
        before = group - 1 if wanted else 0
        for end in range(1, count + 1):
            ways = [
                (begin, torch.maximum(slowest[before, begin].unsqueeze(1), seconds(begin, end)))
                for begin in range(max(0, end - measured.rows), end)  # a row for each replica
                if (before, begin) in slowest
            ]
            if not ways:
                continue
            each = torch.stack([way for _, way in ways])  # way, first unit, end
            best = each.flatten(0, 1).min(0)
            slowest[group, end] = best.values
            begins = torch.tensor([begin for begin, _ in ways])
            last[group, end] = begins[best.indices // (size + 1)], best.indices % (size + 1)
    group = wanted or 0
    ends = [end for number, end in slowest if number == group and end > 0]
    end, unit = min(ends, key=lambda end: slowest[group, end][size].item()), size
    found: list[tuple[int, int, Sequence[Machine]]] = []
    while end > 0:
        begin, first = (int(each[unit]) for each in last[group, end])
        found.append((first, unit, machines[begin:end]))
        group, end, unit = group - bool(wanted), begin, first
    return found[::-1]


def micro_batched(
    measured: Measured, machines: Sequence[Machine], method: str, counts: Sequence[int] = ()
) -> Forecast:
    """Backpropagation along a line of stages, at the number of micro-batches that is fastest.

    Args:
        measured: What the network costs.
        machines: In the order of the line.
        method: Which schedule.
        counts: Numbers of micro-batches to try; default: all that can be.
    """
    full = measured.whole[measured.rows]
    machines = machines[: len(full.units)]
    plan = full.plan(len(machines), len(machines), [machine.speed for machine in machines])
    best: Forecast | None = None
    for count in counts or _micro_batches(measured, method, len(machines)):
        own = measured.at(measured.rows / count).joined(plan.cuts).units
        parts = [_part(stage, rank, len(own)) for rank, stage in enumerate(own)]
        outcome = schedule(machines, parts, SCHEDULES[method], count)
        memory = [
            _whole_memory(
                stage,
                in_flight(SCHEDULES[method](rank, len(own), count)),
                ends=rank == len(own) - 1,
            )
            for rank, stage in enumerate(own)
        ]
        found = _forecast(
            method, measured, machines, outcome, memory, plan.cuts, plan.stages_per_rank, count
        )
        if best is None or found.samples_per_second > best.samples_per_second:
            best = found
    if best is None:
        raise InputError(
            f"A mini-batch must have a row for each micro-batch that {method} needs",
            f"Got {measured.rows} rows for {len(machines)} machines",
            "Plan for fewer machines, or a larger --batch-size",
        )
    return best


def _micro_batches(measured: Measured, method: str, num_ranks: int) -> list[int]:
    """The numbers of equal micro-batches that torch's schedule takes."""
    from scpl.engine.trainers.schedule import fits  # torch's pipelining takes a second to import

    kind = METHODS[method]
    assert issubclass(kind, MicroBatched), "schedules are those of methods with micro-batches"
    most = min(measured.rows, max(SMALLEST_SHARE, 4 * num_ranks))
    return [
        count
        for count in range(1, most + 1)
        if measured.rows % count == 0 and fits(kind.schedule, count, num_ranks)
    ]


def _part(stage: Unit, rank: int, num_ranks: int) -> Part:
    ends = rank == num_ranks - 1  # where the loss is; elsewhere gradients come from the next one
    backward = stage.backward_first if rank == 0 else stage.backward
    extra = stage.objective if ends else 0.0
    return Part(
        forward=stage.forward_first if rank == 0 else stage.forward,
        backward=backward + extra,
        # Nobody waits for the first one's.
        inputs=0.0 if rank == 0 else min(stage.inputs, backward) + extra,
        update=stage.update,
        sends=0.0 if ends else stage.bytes_out,
    )


def _whole_memory(stage: Unit, batches: int, *, ends: bool) -> Memory:
    """Gradients of all layers are held until the update."""
    held = stage.held + stage.objective_held if ends else stage.held
    return Memory(
        parameters=held.parameters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=batches * (held.activations + stage.bytes_in),
    )


def replicated(
    measured: Measured, machines: Sequence[Machine], compression: float = 1.0
) -> Forecast:
    """Data parallelism: every machine has the whole network, and a share of each mini-batch.

    Args:
        measured: What the network costs.
        machines: Which there are.
        compression: Gradients are sent in so many times fewer bytes.
    """
    machines = machines[: measured.rows]
    costs = measured.at(measured.rows / len(machines))
    first, *others = costs.units
    end = costs.units[-1]
    layers = [
        Layers(first.forward_first, first.backward_first, first.held.gradients),
        *(Layers(unit.forward, unit.backward, unit.held.gradients) for unit in others),
        Layers(0.0, end.objective, end.objective_held.gradients),
    ]
    whole = costs.range_of(0, len(costs.units))
    outcome = replicas(machines, layers, whole.update, whole.bytes_in, compression)
    memory = [_whole_memory(whole, 1, ends=True)] * len(machines)
    return _forecast("ddp", measured, machines, outcome, memory)


def alone(measured: Measured, machines: Sequence[Machine]) -> Forecast:
    """Plain backpropagation on the fastest of the machines."""
    machines = [max(machines, key=lambda machine: machine.speed)]
    costs = measured.whole[measured.rows]
    whole = costs.range_of(0, len(costs.units))
    outcome = schedule(machines, [_part(whole, 0, 1)], SCHEDULES["gpipe"], 1)
    return _forecast("bp", measured, machines, outcome, [_whole_memory(whole, 1, ends=True)])


def _forecast(
    method: str,
    measured: Measured,
    machines: Sequence[Machine],
    outcome: Outcome,
    memory: Sequence[Memory],
    cuts: Sequence[str] = (),
    stages_per_machine: Sequence[int] = (),
    micro_batches: int = 1,
) -> Forecast:
    return Forecast(
        method=method,
        num_machines=len(machines),
        micro_batches=micro_batches,
        cuts=tuple(cuts),
        stages_per_machine=tuple(stages_per_machine),
        samples_per_second=measured.local.num_samples / outcome.seconds,
        wait_shares=outcome.wait_shares,
        memory=tuple(memory),
        bytes_sent=outcome.sent,
        outcome=outcome,
    )


@dataclass(frozen=True)
class Limit:
    """How many machines help a local method, and why not more.

    Attributes:
        num_machines: The least number that is as fast as any, but for 2 %.
        samples_per_second: By number of machines, from 1 on.
        reason: Why more do not help, to follow "because"; empty: all that were tried help.
    """

    num_machines: int
    samples_per_second: tuple[float, ...]
    reason: str


def most_helpful(measured: Measured, machines: Sequence[Machine]) -> Limit:
    """Find how many machines help the local method.

    Args:
        measured: What the network costs.
        machines: Those that there are; if they are all alike, more of them are tried, too.
    """
    most = measured.num_stages or len(measured.local.units)
    if len(set(machines)) == 1:
        machines = [machines[0]] * most
    tried = [local(measured, machines[: n + 1]) for n in range(min(most, len(machines)))]
    speeds = tuple(each.samples_per_second for each in tried)
    count = next(n for n, speed in enumerate(speeds, 1) if speed * GAIN >= max(speeds))
    reason = "" if count == len(machines) < most else _why(measured, tried[count - 1], most)
    return Limit(count, speeds, reason)


def _why(measured: Measured, best: Forecast, most: int) -> str:
    """What limits a local method that more machines do not make faster."""
    outcome, costs = best.outcome, measured.local
    sending, sender = max((load, i) for i, load in enumerate(outcome.sending))
    working, worker = max((load, i) for i, load in enumerate(outcome.work))
    if sending > working:
        megabytes = best.bytes_sent[sender] / 1e6
        return (
            f"machine {sender} sends {megabytes:.2f} MB per mini-batch, which takes longer than "
            "any computing"
        )
    if measured.num_stages is not None and best.num_machines == most:
        return f"the network is cut into {most} stages"
    # Where the number of stages is given, machines share out these; else any units.
    shared = costs if measured.num_stages is None else costs.joined(best.cuts)
    places = shared.places(best.cuts)
    begin = places[sum(best.stages_per_machine[:worker])]
    end = places[sum(best.stages_per_machine[: worker + 1])]
    own, dearest = shared.range_of(begin, end), max(shared.units[begin:end], key=_seconds)
    if own.objective >= NEARLY * _seconds(own):
        return f"machine {worker} spends almost all its time on a head"
    if _seconds(dearest) >= NEARLY * _seconds(own):
        names = " .. ".join(dict.fromkeys((dearest.layers[0], dearest.layers[-1])))
        return f"what machine {worker} has ({names}) cannot be cut further"
    what = "head and messages" if measured.messages != MessageCosts() else "head"
    return f"a further stage would cost as much for its {what} as it takes off the others"
