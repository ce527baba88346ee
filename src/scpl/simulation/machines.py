"""Machines that compute one thing at a time, and send one message at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Link", "Machine", "Machines", "MessageCosts"]


@dataclass(frozen=True)
class Link:
    """The way from a machine into the network, and back; both at full rate at once.

    Attributes:
        rate: Bytes per second.
        latency: Seconds that a message takes besides.
    """

    rate: float = float("inf")
    latency: float = 0.0


@dataclass(frozen=True)
class MessageCosts:
    """What messages take of the time in which a machine could compute, in seconds.

    Nothing where another core has time for them.

    Attributes:
        message: Each, on either side.
        byte: Each, on either side.
        added: Each byte that is sent while gradients are added up in a ring: it is also received,
            and added.
    """

    message: float = 0.0
    byte: float = 0.0
    added: float = 0.0

    def of(self, num_bytes: float, messages: int = 1) -> float:
        """Seconds on either side."""
        return messages * self.message + num_bytes * self.byte


@dataclass(frozen=True)
class Machine:
    """One of several machines.

    Attributes:
        speed: Beside the machine on which work was measured.
        link: To the others.
        costs: Of messages, on the machine on which work was measured.
    """

    speed: float = 1.0
    link: Link = Link()
    costs: MessageCosts = MessageCosts()


class Machines:
    """Runs work in the order in which it is given: each starts as soon as it can.

    What a machine has to compute, and what it has to send, is done in that order, one at a time.
    So a moment is known as soon as the work before it is, and a faster machine or link never makes
    anything later. Receiving is not limited: every message was sent at the pace of a link already.

    Args:
        machines: In the order of the line.

    Attributes:
        work: Seconds that each machine has computed.
        sending: Seconds that each machine has sent.
        sent: Bytes that each machine has sent.
    """

    def __init__(self, machines: Sequence[Machine]) -> None:
        self.machines = tuple(machines)
        self.work = [0.0] * len(machines)
        self.sending = [0.0] * len(machines)
        self.sent = [0.0] * len(machines)
        self._free: dict[Hashable, float] = {}

    def compute(self, machine: int, seconds: float, *after: float) -> float:
        """Compute for so many seconds of the machine that measured.

        Args:
            machine: Its number.
            seconds: At speed 1.
            after: Moments that must have passed.

        Returns:
            The moment at which it is done.
        """
        own = seconds / self.machines[machine].speed
        self.work[machine] += own
        return self._occupy([("processor", machine)], own, after)

    def send(self, sender: int, receiver: int, num_bytes: float, *after: float) -> float:
        """Send a message.

        Returns:
            The moment at which it has left; it arrives `latency` later.
        """
        ends = [self.machines[sender].link, self.machines[receiver].link]
        seconds = num_bytes / min(end.rate for end in ends)
        self.sending[sender] += seconds
        self.sent[sender] += num_bytes
        return self._occupy([("port", sender)], seconds, after)

    def handle(self, machine: int, num_bytes: float, *after: float, messages: int = 1) -> float:
        """Do with the processor what a message takes there, on its way out or in.

        Returns:
            The moment at which it is done.
        """
        return self.compute(machine, self.machines[machine].costs.of(num_bytes, messages), *after)

    def latency(self, sender: int, receiver: int) -> float:
        """Seconds from when a message has left until it is there."""
        return max(self.machines[sender].link.latency, self.machines[receiver].link.latency)

    def add_up(self, num_bytes: float, *after: float, compression: float = 1.0) -> float:
        """Add up as many bytes of every machine, so that each has the sum, in a ring.

        The bytes go around twice, in as many pieces as there are machines, at the pace of the
        slowest link. The processors do their part of it before whatever they compute next.

        Args:
            num_bytes: Of all gradients.
            after: Moments that must have passed.
            compression: So many times fewer bytes are sent; there are as many numbers to add.

        Returns:
            The moment at which all have the sum.
        """
        count = len(self.machines)
        rounds, piece = 2 * (count - 1), num_bytes / count
        sent = piece / compression
        slowest = min(machine.link.rate for machine in self.machines)
        latency = max(machine.link.latency for machine in self.machines)
        done = 0.0
        for number, machine in enumerate(self.machines):
            self.sending[number] += rounds * sent / slowest
            self.sent[number] += rounds * sent
            own = rounds * (2 * machine.costs.message + piece * machine.costs.added)
            done = max(done, self.compute(number, own))
        ports = [("port", number) for number in range(count)]
        return max(done, self._occupy(ports, rounds * (sent / slowest + latency), after))

    def _occupy(
        self, resources: Sequence[Hashable], seconds: float, after: Iterable[float]
    ) -> float:
        free = [self._free.get(resource, 0.0) for resource in resources]
        end = max(*free, *after, 0.0) + seconds
        for resource in resources:
            self._free[resource] = end
        return end
