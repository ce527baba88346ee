"""Beside the stream: how ranks find each other, share facts, and end together.

Everything here goes through the key-value store that the launcher provides, or through a process
group of its own, so it never gets in the way of the batches.

Failures: the rank that fails writes the cause into the store, first one wins. A watchdog thread on
every rank looks there, and shows a sign of life there. When it finds a failure, or misses another
rank's sign of life for too long, it gives its own rank a moment to end by itself and then ends it.
So nothing hangs, whatever the main thread is blocked in.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scpl.errors import InputError, LinkError, RemoteError
from scpl.mesh import Mesh

__all__ = ["Control", "LocalControl", "RankControl", "connect"]

PERIOD = 0.25
GRACE = 2.0
"""Seconds a rank has to end by itself once a failure is known."""
BLAME = 3.0
"""Seconds to wait for a better explanation than 'the link broke'."""


class Control(Protocol):
    """What ranks need of each other besides messages."""

    mesh: Mesh

    @property
    def headers(self) -> dist.ProcessGroup:
        """The process group on the CPU that headers of messages use."""

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Share a JSON value and learn those of all ranks."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` (on the CPU) with the owner's values, on all ranks."""

    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""

    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it."""

    def wait_for_all(self, name: str) -> None:
        """Return when every rank has got here."""

    def check(self) -> None:
        """Raise if another rank has failed."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends; False if another one was first."""

    def close(self) -> None:
        """Part from the others after a good end."""


class LocalControl:
    """The control of the only rank."""

    def __init__(self) -> None:
        self.mesh = Mesh()
        self._values: dict[str, Any] = {}

    @property
    def headers(self) -> dist.ProcessGroup:
        """There are no messages."""
        raise LinkError("Only several ranks have links", "Got one rank")

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Return the only value."""
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Do nothing: the values are here."""

    def share(self, key: str, value: Any) -> None:
        """Remember a value."""
        self._values[key] = value

    def fetch(self, key: str) -> Any:
        """Recall a value."""
        return self._values[key]

    def wait_for_all(self, name: str) -> None:
        """Do nothing: all are here."""

    def check(self) -> None:
        """Do nothing: nobody else can fail."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Do nothing: nobody else must know."""
        return True

    def close(self) -> None:
        """Do nothing."""


class RankControl:
    """The control of one of several ranks.

    Args:
        mesh: The ranks.
        store: Connects to the launcher's store. The watchdog gets a connection of its own,
            because a connection serves one caller at a time.
        silence: Seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, mesh: Mesh, store: Callable[[], dist.Store], silence: float) -> None:
        self.mesh = mesh
        self.failure: dict[str, Any] | None = None
        self._store = store()
        self._watch_store = store()
        self._silence = silence
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._headers: dist.ProcessGroup = dist.new_group(backend="gloo")
        self._collectives: dist.ProcessGroup = dist.new_group(backend="gloo")
        self._exchanges = 0
        self._store.set(f"host/{mesh.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    @property
    def headers(self) -> dist.ProcessGroup:
        """The process group on the CPU that headers of messages use."""
        return self._headers

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Share a JSON value and learn those of all ranks, in their order.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """
        self._exchanges += 1
        name = f"{key}/{self._exchanges}"
        self.share(f"{name}/{self.mesh.rank}", value)
        return [self.fetch(f"{name}/{rank}") for rank in range(self.mesh.num_ranks)]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` (on the CPU) with the owner's values; all ranks must call it.

        Raises:
            LinkError: if a rank is gone.
        """
        try:
            dist.broadcast(tensor, owner, group=self._collectives)
        except RuntimeError as error:
            raise LinkError(
                "All ranks must stay connected", f"Rank {owner} could not be reached: {error}"
            ) from error

    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""
        self._store.set(f"value/{key}", json.dumps(value))

    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """
        while True:
            self.check()
            if self._store.check([f"value/{key}"]):
                return json.loads(self._store.get(f"value/{key}"))
            time.sleep(0.02)

    def wait_for_all(self, name: str) -> None:
        """Return when every rank has got here.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """
        self._store.add(f"arrived/{name}", 1)
        while self._store.add(f"arrived/{name}", 0) < self.mesh.num_ranks:
            self.check()
            time.sleep(0.02)

    def check(self) -> None:
        """Raise if another rank has failed.

        Raises:
            RemoteError: naming the first cause.
        """
        if self._failed.is_set() and self.failure is not None:
            raise RemoteError(self.failure["text"])

    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends.

        A broken link is only a symptom: wait a moment for the rank behind it to say more.

        Args:
            error: What happened here.
            text: The verdict for people.

        Returns:
            Whether this rank's cause is the first one.
        """
        if isinstance(error, RemoteError):
            return False
        if isinstance(error, LinkError) and self._failed.wait(BLAME):
            return False
        return self._claim(text)

    def close(self) -> None:
        """Part from the others after a good end."""
        self.wait_for_all("end")
        self._closing.set()
        self._watchdog.join()
        self._store.add("left", 1)
        # Whoever hosts the store leaves last, or the others would see it vanish.
        deadline = time.monotonic() + 5.0
        while self.mesh.is_first and time.monotonic() < deadline:
            if self._store.add("left", 0) >= self.mesh.num_ranks:
                break
            time.sleep(0.02)
        dist.destroy_process_group()

    def _claim(self, text: str) -> bool:
        record = json.dumps({"rank": self.mesh.rank, "text": text})
        try:
            winner = self._store.compare_set("failure", "", record).decode()
        except (RuntimeError, dist.DistError):  # the store is gone: nobody to tell
            return not self._failed.is_set()
        self.failure = json.loads(winner)
        self._failed.set()
        return winner == record

    def _watch(self) -> None:
        """Show a sign of life, look for others' and for failures."""
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self._closing.wait(PERIOD):
            count += 1
            try:
                self._watch_store.set(f"beat/{self.mesh.rank}", str(count))
                if self._watch_store.check(["failure"]):
                    self._end_with(json.loads(self._watch_store.get("failure")))
                    return
                silent = self._silent_rank(seen)
            except (RuntimeError, dist.DistError) as error:
                if not self._closing.is_set():
                    self._end_alone(error)
                return
            if silent is not None:
                self._claim_silence(silent)
                return

    def _silent_rank(self, seen: dict[int, tuple[bytes, float]]) -> int | None:
        now = time.monotonic()
        for rank in range(self.mesh.num_ranks):
            key = f"beat/{rank}"
            if rank == self.mesh.rank or not self._watch_store.check([key]):
                continue
            beat = self._watch_store.get(key)
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
            elif now - seen[rank][1] > self._silence:
                return rank
        return None

    def _claim_silence(self, rank: int) -> None:
        host = self._watch_store.get(f"host/{rank}").decode()
        text = (
            f"Every rank must show a sign of life within {self._silence:g} s. "
            f"Rank {rank} ({host}) did not. Check its machine and its link"
        )
        record = json.dumps({"rank": self.mesh.rank, "text": text})
        winner = self._watch_store.compare_set("failure", "", record).decode()
        if winner == record:
            _tell(f"scpl: {text}.")
        self._end_with(json.loads(winner))

    def _end_alone(self, error: Exception) -> None:
        """The store is gone, and with it the rank or launcher that hosts it."""
        text = f"The launcher's store must stay reachable. It is gone: {str(error).splitlines()[0]}"
        self._end_with({"rank": self.mesh.rank, "text": text})

    def _end_with(self, failure: dict[str, Any]) -> None:
        """Give the main thread a moment to end by itself, then end this rank."""
        self.failure = failure
        self._failed.set()
        if not self._closing.wait(GRACE + BLAME):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)


def connect(mesh: Mesh, device: torch.device, silence: float = 30.0) -> Control:
    """Join the other ranks; under torchrun, or alone.

    Args:
        mesh: This rank's place.
        device: Where this rank computes; decides the backend (gloo, NCCL).
        silence: Seconds without a sign of life after which a rank counts as lost.

    Raises:
        InputError: if the launcher's variables are missing or nobody answers.
    """
    if mesh.num_ranks == 1:
        return LocalControl()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            "Several ranks must be started by torchrun",
            f"{' and '.join(missing)} not set",
            "Start with torchrun --nproc-per-node N, or scpl train --processes N",
        )
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, rank=mesh.rank, world_size=mesh.num_ranks)
    except (RuntimeError, dist.DistError) as error:
        raise InputError(
            f"All {mesh.num_ranks} ranks must meet at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            f"Got: {str(error).splitlines()[0]}",
            "Check the address, the port and the firewall (scpl doctor)",
        ) from error
    # Keys of a restarted run must not meet those of the attempt that failed.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def store() -> dist.Store:
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=silence),
        )
        return dist.PrefixStore(f"scpl/{attempt}", client)

    return RankControl(mesh, store, silence)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
