"""A thread on every rank that sees to it that all ranks end when one does.

The rank that fails writes the cause into the launcher's store; the first one wins. The watchdog
looks there, and shows a sign of life there. When it finds a failure, or misses another rank's sign
of life for too long, it gives its own rank a moment to end by itself and then ends it. So nothing
hangs, whatever the main thread is blocked in.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore  # type: ignore[attr-defined]

__all__ = ["GRACE", "HURRIED_SILENCE", "Watchdog"]

PERIOD = 0.25
HURRIED_SILENCE = 4.0
GRACE = 4.0
"""Seconds a rank has to end by itself once a failure is known."""


class Watchdog:
    """Watches over one rank.

    Args:
        rank: This rank.
        num_ranks: How many there are.
        store: A connection of its own to the launcher's store.
        silence: Seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, rank: int, num_ranks: int, store: PrefixStore, silence: float) -> None:
        self.failure: dict[str, Any] | None = None
        self.failed = threading.Event()
        self._rank, self._num_ranks = rank, num_ranks
        self._store, self._silence = store, silence
        # A link that is cut answers nothing, not even that it is cut.
        self._store.set_timeout(timedelta(seconds=silence))
        self._closing = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def claim(self, store: PrefixStore, text: str, silent: int | None = None) -> bool:
        """Name a cause; returns whether it is the first one.

        Args:
            store: The caller's own connection.
            text: The verdict for people.
            silent: The rank that shows no sign of life, if that is the cause.
        """
        record = json.dumps({"rank": self._rank, "text": text, "silent": silent})
        try:
            winner = store.compare_set("failure", "", record).decode()
        except (RuntimeError, DistError):  # the store is gone: nobody to tell
            return not self.failed.is_set()
        self._know(json.loads(winner))
        return bool(winner == record)

    def hurry(self) -> None:
        """Wait less long for a sign of life from now on."""
        self._silence = min(self._silence, HURRIED_SILENCE)

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while not self._closing.wait(PERIOD):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                if self._store.check(["failure"]):
                    self._know(json.loads(self._store.get("failure")))
                    break
                silent = self._silent_rank()
                if silent is not None:
                    self._blame(silent)
                    break
            except (RuntimeError, DistError) as error:
                if self._closing.is_set():
                    return
                self._lost_store(error)
                break
        if self.failed.is_set():
            self._end_silent_neighbour()
        if self.failed.is_set() and not self._closing.wait(GRACE):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)

    def _know(self, failure: dict[str, Any]) -> None:
        self.failure = failure
        self.failed.set()

    def _silent_rank(self) -> int | None:
        now = time.monotonic()
        for rank in range(self._num_ranks):
            if rank == self._rank:
                continue
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b"none yet"
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
            elif now - self._seen[rank][1] > self._silence:
                return rank
        return None

    def _blame(self, rank: int) -> None:
        known = self._store.check([f"host/{rank}"])
        host, process = json.loads(self._store.get(f"host/{rank}")) if known else ("?", "?")
        text = (
            f"Every rank must show a sign of life within {self._silence:g} s. "
            f"Rank {rank} (process {process} on {host}) did not. Check its machine and its link, "
            "then continue from the newest checkpoint."
        )
        if self.claim(self._store, text, silent=rank):
            sys.stderr.write(f"scpl: {text}\n")

    def _end_silent_neighbour(self) -> None:
        """A process that hears nothing cannot end itself; one of the same machine can end it."""
        silent = (self.failure or {}).get("silent")
        if silent is None:
            return
        with suppress(RuntimeError, DistError, OSError):
            if not self._store.check([f"host/{silent}"]):
                return
            host, process = json.loads(self._store.get(f"host/{silent}"))
            if host == socket.gethostname():
                os.kill(process, signal.SIGKILL)

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
