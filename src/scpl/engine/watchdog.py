"""A thread on every rank that sees to it that all ranks end when one does.

The rank that fails writes the cause into the launcher's store; the first one wins. The watchdog
looks there, and shows a sign of life there. When it finds a failure, or misses another rank's sign
of life for too long, it gives its own rank a moment to end by itself and then ends it. So nothing
hangs, whatever the main thread is blocked in. A rank that hears nothing, because it was stopped, is
ended by who started it.

Each rank watches the next two, in a ring: so one that is left misses whoever is lost, even if
another one is stopped meanwhile, and what a rank asks of the store does not grow with their number.
One that is in a hurry, because a signal came or a link broke, watches all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from torch.distributed import DistError

from scpl.engine.notes import NOTHING, Notes

__all__ = ["GRACE", "HURRIED_SILENCE", "Watchdog", "whereabouts"]

PERIOD = 0.25
HURRIED_SILENCE = 4.0
WATCHED = 2
GRACE = 4.0
"""Seconds a rank has to end by itself once a failure is known."""


class Watchdog:
    """Watches over one rank.

    Args:
        rank: This rank.
        num_ranks: How many there are.
        notes: Notes of the run, by a connection of its own.
        silence: Seconds without a sign of life after which a rank counts as lost.

    Attributes:
        failure: The first cause, once it is known.
        failed: Set as soon as it is.
        asked_to_stop: On the first rank: the number of a signal that another one was sent.
    """

    def __init__(self, rank: int, num_ranks: int, notes: Notes, silence: float) -> None:
        self.failure: dict[str, Any] | None = None
        self.failed = threading.Event()
        self.asked_to_stop: int | None = None
        self._rank = rank
        self._others = [(rank + far) % num_ranks for far in range(1, num_ranks)]
        self._watched = self._others[:WATCHED]
        self._notes, self._silence = notes, silence
        self._notes.limit(silence)
        self._received: int | None = None
        self._closing = threading.Event()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def claim(self, notes: Notes, text: str) -> bool:
        """Name a cause; returns whether it is the first one.

        Args:
            notes: By the caller's own connection.
            text: The verdict for people.
        """
        record = {"rank": self._rank, "text": text}
        try:
            winner = notes.claim("failure", record)
        except (RuntimeError, DistError):  # the store is gone: nobody to tell
            return not self.failed.is_set()
        self._know(winner)
        return bool(winner == record)

    def ask_to_stop(self, number: int) -> None:
        """Tell the first rank, soon, that a signal asked this one to end the run."""
        self._received = number

    def hurry(self) -> None:
        """Watch all others, and wait less long for a sign of life from now on."""
        self._silence = min(self._silence, HURRIED_SILENCE)
        self._watched = self._others

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while not self._closing.wait(PERIOD):
            count += 1
            try:
                self._notes.write(f"beat/{self._rank}", count)
                if (failure := self._notes.read("failure")) is not NOTHING:
                    self._know(failure)
                    break
                self._pass_on_signals()
                silent = self._silent_rank()
                if silent is not None:
                    self._blame(silent)
                    break
            except (RuntimeError, DistError) as error:
                if self._closing.is_set():
                    return
                self._lost_store(error)
                break
        if self.failed.is_set() and not self._closing.wait(GRACE):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)

    def _know(self, failure: dict[str, Any]) -> None:
        self.failure = failure
        self.failed.set()

    def _pass_on_signals(self) -> None:
        if self._received is not None:
            self._notes.claim("stop", self._received)
            self._received = None
        if self._rank == 0 and (asked := self._notes.read("stop")) is not NOTHING:
            self.asked_to_stop = int(asked)

    def _silent_rank(self) -> int | None:
        now = time.monotonic()
        for rank in self._watched:
            beat = self._notes.read(f"beat/{rank}")
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
            elif now - self._seen[rank][1] > self._silence:
                return rank
        return None

    def _blame(self, rank: int) -> None:
        text = (
            f"Every rank must show a sign of life within {self._silence:g} s. "
            f"Rank {rank} ({whereabouts(self._notes, rank)}) did not. "
            "Check its machine and its link, then continue from the newest checkpoint."
        )
        if self.claim(self._notes, text):
            sys.stderr.write(f"scpl: {text}\n")

    def _lost_store(self, error: Exception) -> None:
        """The store is gone, and with it the rank or launcher that hosts it."""
        first = str(error).splitlines()[0]
        text = (
            "The launcher's store must stay reachable. It is gone, and with it the first machine "
            f"or the link to it ({first})."
        )
        if not self.failed.is_set():  # nobody else can have told the cause here
            sys.stderr.write(f"scpl: {text} Continue from the newest checkpoint.\n")
        self._know({"rank": self._rank, "text": text})


def whereabouts(notes: Notes, rank: int) -> str:
    """Say which process a rank is, and on which machine, as it told the others."""
    known = notes.read(f"host/{rank}")
    host, process = ("?", "?") if known is NOTHING else known
    return f"process {process} on {host}"
