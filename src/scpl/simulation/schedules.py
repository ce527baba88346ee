"""What machines do in which order, under each kind of training, and how long a mini-batch takes.

All times are seconds of a machine of speed 1, and all bytes those of a mini-batch, or of a
micro-batch where there are some. Data is there when the first machine needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scpl.simulation.machines import Machine, Machines

__all__ = [
    "SCHEDULES",
    "Action",
    "Layers",
    "Order",
    "Outcome",
    "Part",
    "gpipe",
    "in_flight",
    "one_forward_one_backward",
    "replicas",
    "schedule",
    "stream",
    "zero_bubble",
]

MESSAGES = 3
"""For what goes on along a channel (`engine.channel`): a header, small tensors, and large ones."""
STEPS = 12
"""Mini-batches after the line has filled, over which is measured how long each takes."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Gradients are added up as soon as there are so many bytes of them, as torch does by default."""

Action: TypeAlias = tuple[Literal["forward", "backward", "inputs", "weights"], int]
"""What is done with which micro-batch; inputs and weights are the two halves of backward."""
Order: TypeAlias = Callable[[int, int, int], list[Action]]
"""The actions of a rank; of the rank, the number of ranks and that of micro-batches."""


@dataclass(frozen=True)
class Part:
    """What one machine of a line has to do with a mini-batch, or a micro-batch.

    Attributes:
        forward: Seconds until it has what it sends on.
        backward: Seconds after that: gradients; and, in a stream, the update.
        inputs: Seconds of `backward` after which the gradient of what came in is there, if it is
            computed by itself.
        update: Seconds, once per mini-batch; in a stream it is part of `backward`.
        sends: Bytes to the next machine; gradients of as many come back.
    """

    forward: float
    backward: float
    inputs: float = 0.0
    update: float = 0.0
    sends: float = 0.0


@dataclass(frozen=True)
class Layers:
    """Some layers of a network that every machine has: what they take of its share.

    Attributes:
        forward: Seconds.
        backward: Seconds.
        gradients: Bytes.
    """

    forward: float
    backward: float
    gradients: float


@dataclass(frozen=True)
class Outcome:
    """How long a mini-batch takes, once the line is full.

    Attributes:
        seconds: Per mini-batch.
        work: Seconds that each machine computes per mini-batch, with what messages take of it.
        sending: Seconds that each machine sends per mini-batch.
        sent: Bytes that each machine sends per mini-batch.
    """

    seconds: float
    work: tuple[float, ...]
    sending: tuple[float, ...]
    sent: tuple[float, ...]

    @property
    def wait_shares(self) -> tuple[float, ...]:
        """The share of time in which each machine computes nothing, 0 .. 1."""
        return tuple(max(0.0, 1 - work / self.seconds) for work in self.work)


def stream(machines: Sequence[Machine], parts: Sequence[Part], depth: int = 2) -> Outcome:
    """Stages that learn by themselves: forward, send on, learn (`engine.trainers.stream`).

    A machine waits until the message before has left before it lets the next one go, and a message
    begins to travel when there is room for it: `depth` on each channel, one of them on its way. Its
    header goes ahead, and the receiver answers, before the tensors do.

    Args:
        machines: In the order of the line.
        parts: What each has to do with a mini-batch.
        depth: Messages on each channel.
    """
    run, last = Machines(machines), len(machines) - 1
    taken: list[list[float]] = [[] for _ in machines]
    left = [0.0] * len(machines)
    ends: list[float] = []
    filled = len(machines) * depth
    for step in range(filled + STEPS):
        arrived = 0.0
        for rank, part in enumerate(parts):
            taken[rank].append(run.compute(rank, 0.0, arrived))
            if rank > 0:
                run.handle(rank, parts[rank - 1].sends, messages=MESSAGES)
            run.compute(rank, part.forward)
            if rank < last:
                posted = run.handle(rank, part.sends, left[rank], messages=MESSAGES)
                latency = run.latency(rank, rank + 1)
                room = taken[rank + 1][step - depth + 1] if step >= depth - 1 else 0.0
                begin = max(posted + latency, room) + latency
                left[rank] = run.send(rank, rank + 1, part.sends, begin)
                arrived = left[rank] + latency
            end = run.compute(rank, part.backward)
        ends.append(end)
    return _outcome(run, ends, filled)


def schedule(
    machines: Sequence[Machine], parts: Sequence[Part], order: Order, micro_batches: int
) -> Outcome:
    """Backpropagation along a line of machines, micro-batch by micro-batch, then one update.

    Nobody waits until what it sends has left.

    Args:
        machines: In the order of the line.
        parts: What each has to do with a micro-batch.
        order: The order of what it does.
        micro_batches: How many.
    """
    run, count = Machines(machines), len(machines)
    ends: list[float] = []
    for _ in range(STEPS // 4 + 1):
        waiting = [order(rank, count, micro_batches)[::-1] for rank in range(count)]
        down: list[dict[int, float]] = [{} for _ in machines]  # when features are there
        up: list[dict[int, float]] = [{} for _ in machines]  # when gradients are there
        down[0] = dict.fromkeys(range(micro_batches), 0.0)
        up[-1] = dict.fromkeys(range(micro_batches), 0.0)
        while any(waiting):
            for rank, (actions, part) in enumerate(zip(waiting, parts, strict=True)):
                while actions:
                    kind, batch = actions[-1]
                    needs = {"forward": down, "weights": None}.get(kind, up)
                    if needs is not None and batch not in needs[rank]:
                        break
                    actions.pop()
                    at = 0.0 if needs is None else needs[rank][batch]
                    if kind == "forward":
                        if rank > 0:
                            run.handle(rank, parts[rank - 1].sends, at)
                        done = run.compute(rank, part.forward, at)
                        if rank + 1 < count:
                            down[rank + 1][batch] = _message(run, rank, rank + 1, part.sends, done)
                    elif kind == "weights":
                        run.compute(rank, part.backward - part.inputs)
                    else:
                        own = part.backward if kind == "backward" else part.inputs
                        if rank + 1 < count:
                            run.handle(rank, part.sends, at)
                        done = run.compute(rank, own, at)
                        if rank > 0:
                            up[rank - 1][batch] = _message(
                                run, rank, rank - 1, parts[rank - 1].sends, done
                            )
        ends.append(max(run.compute(rank, part.update) for rank, part in enumerate(parts)))
    return _outcome(run, ends, 1)


def replicas(
    machines: Sequence[Machine],
    layers: Sequence[Layers],
    update: float,
    inputs: float,
    compression: float = 1.0,
) -> Outcome:
    """Data parallelism: gradients are added up in a ring while others are still computed.

    The first machine reads the mini-batch; each keeps its share and sends on the rest.

    Args:
        machines: In the order in which the mini-batch is shared out.
        layers: In their order.
        update: Seconds for all of them.
        inputs: Bytes of the share of one machine.
        compression: Gradients are sent in so many times fewer bytes.
    """
    run, count = Machines(machines), len(machines)
    ends: list[float] = []
    for _ in range(STEPS // 4 + 1):
        arrived, ready, forwarded = 0.0, 0.0, []
        for rank in range(count):
            begin = run.compute(rank, 0.0, arrived)
            if rank > 0:
                begin = run.handle(rank, (count - rank) * inputs, messages=MESSAGES)
            if rank + 1 < count:
                rest = (count - rank - 1) * inputs
                arrived = _message(run, rank, rank + 1, rest, begin, MESSAGES)
            forwarded.append(run.compute(rank, sum(own.forward for own in layers)))
        added, waiting, limit = 0.0, 0.0, FIRST_BUCKET
        for left, own in reversed(list(enumerate(layers))):
            ready = max(run.compute(rank, own.backward) for rank in range(count))
            waiting += own.gradients
            if waiting >= limit or left == 0:
                added = run.add_up(waiting, ready, compression=compression)
                waiting, limit = 0.0, BUCKET
        ends.append(max(run.compute(rank, update, added) for rank in range(count)))
    return _outcome(run, ends, 1)


def gpipe(rank: int, num_ranks: int, micro_batches: int) -> list[Action]:
    """All forward, then all backward."""
    forward: list[Action] = [("forward", batch) for batch in range(micro_batches)]
    return forward + [("backward", batch) for batch in range(micro_batches)]


def one_forward_one_backward(rank: int, num_ranks: int, micro_batches: int) -> list[Action]:
    """As few forward as keep the ranks behind at work, then backward and forward in turns."""
    ahead = min(micro_batches, num_ranks - 1 - rank)
    actions: list[Action] = [("forward", batch) for batch in range(ahead)]
    for batch in range(micro_batches):
        if ahead + batch < micro_batches:
            actions.append(("forward", ahead + batch))
        actions.append(("backward", batch))
    return actions


def zero_bubble(rank: int, num_ranks: int, micro_batches: int) -> list[Action]:
    """The same with backward in two halves; on rank r the second is r micro-batches late."""
    actions: list[Action] = []
    for kind, batch in one_forward_one_backward(rank, num_ranks, micro_batches):
        if kind == "forward":
            actions.append((kind, batch))
            continue
        actions.append(("inputs", batch))
        if batch >= rank:
            actions.append(("weights", batch - rank))
    late = range(max(0, micro_batches - rank), micro_batches)
    return actions + [("weights", batch) for batch in late]


SCHEDULES: dict[str, Order] = {
    "gpipe": gpipe, "1f1b": one_forward_one_backward, "zero-bubble": zero_bubble,
}  # fmt: skip
"""By the names of the methods."""


def in_flight(actions: Sequence[Action]) -> int:
    """The most micro-batches whose activations a rank holds at once."""
    held, most = 0, 0
    for kind, _ in actions:
        held += (kind == "forward") - (kind in ("backward", "weights"))
        most = max(most, held)
    return most


def _message(
    run: Machines, sender: int, receiver: int, num_bytes: float, begin: float, messages: int = 1
) -> float:
    """Send a message, or what counts as several; returns when it is there."""
    posted = run.handle(sender, num_bytes, begin, messages=messages)
    return run.send(sender, receiver, num_bytes, posted) + run.latency(sender, receiver)


def _outcome(run: Machines, ends: Sequence[float], filled: int) -> Outcome:
    """What the mini-batches took after those that filled the line."""
    steps = len(ends)
    return Outcome(
        seconds=(ends[-1] - ends[filled - 1]) / (steps - filled),
        work=tuple(each / steps for each in run.work),
        sending=tuple(each / steps for each in run.sending),
        sent=tuple(each / steps for each in run.sent),
    )
