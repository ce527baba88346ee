"""Several ranks: how they find each other, share facts, and end together.

Everything here goes through the key-value store that the launcher provides, or through a process
group of its own, so it never gets in the way of the batches.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from scpl.engine.mesh import Mesh
from scpl.engine.watchdog import HURRIED_SILENCE, Watchdog
from scpl.errors import InputError, LinkError, RemoteError

__all__ = ["Control", "LocalControl", "RankControl", "connect"]

NEVER = timedelta(days=30)
BLAME = 3.0
"""Seconds to wait for a better explanation than 'the link broke'."""


class RankControl:
    """The control of one of several ranks.

    Args:
        mesh: The ranks.
        store: Connects to the launcher's store. The watchdog gets a connection of its own,
            because a connection serves one caller at a time.
        silence: Seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, mesh: Mesh, store: Callable[[], PrefixStore], silence: float) -> None:
        self.mesh = mesh
        self._store = store()
        self._exchanges = 0
        self._closed = False
        self._store.set(f"host/{mesh.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self._watchdog = Watchdog(mesh.rank, mesh.num_ranks, store(), silence)
        # A slow stage is no failure: who waits too long is for the watchdog to say.
        self._headers: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)
        self._data = self.new_group()
        self._collectives: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)

    @property
    def headers(self) -> dist.ProcessGroup:
        """The process group on the CPU that headers of messages use."""
        return self._headers

    @property
    def data(self) -> dist.ProcessGroup:
        """The process group that features use."""
        return self._data

    def new_group(self) -> dist.ProcessGroup:
        """Make a process group of all ranks for one purpose; all ranks must call it."""
        group: dist.ProcessGroup = dist.new_group(timeout=NEVER)
        return group

    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""
        self._store.set(f"value/{key}", json.dumps(value))

    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """
        while not self._store.check([f"value/{key}"]):
            self.check()
            time.sleep(0.02)
        return json.loads(self._store.get(f"value/{key}"))

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

    def check(self) -> None:
        """Raise if another rank has failed.

        Raises:
            RemoteError: naming the first cause.
        """
        if self._watchdog.failed.is_set() and self._watchdog.failure is not None:
            raise RemoteError(self._watchdog.failure["text"])

    def hurry(self) -> None:
        """Something may have died: notice a silent rank sooner.

        A launcher that loses a rank tells the others by SIGTERM. Who waits for a fact at that
        moment has no link that would break.
        """
        self._watchdog.hurry()

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
        if isinstance(error, LinkError):
            if error.peer is None:  # some rank is gone; whose sign of life is missing?
                self.hurry()
            patience = BLAME if error.peer is not None else BLAME + HURRIED_SILENCE
            if self._watchdog.failed.wait(patience):
                return False
            if error.peer is not None:
                # What the error says is told to people as well, so it must carry the verdict.
                error.args = (self._gone(error.peer),)
                text = error.args[0]
        return self._watchdog.claim(self._store, text)

    def _gone(self, rank: int) -> str:
        host, process = json.loads(self._store.get(f"host/{rank}"))
        return (
            "Every rank must stay until the end. "
            f"Rank {rank} (process {process} on {host}) left without a word: it was "
            "killed, ran out of memory, or its machine or link failed. Look at its log, then "
            "continue from the newest checkpoint with --resume."
        )

    def close(self) -> None:
        """Part from the others after a good end.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """
        if self._closed:
            return
        self._closed = True
        self.exchange("end", True)
        self._watchdog.close()
        self._store.add("left", 1)
        # Whoever hosts the store leaves last, or the others would see it vanish.
        deadline = time.monotonic() + 5.0
        while self.mesh.is_first and time.monotonic() < deadline:
            if self._store.add("left", 0) >= self.mesh.num_ranks:
                break
            time.sleep(0.02)
        dist.destroy_process_group()

    def end_process(self, error: BaseException) -> None:
        """Tell the cause if it is the first, and end at once.

        An error cannot simply go its way here: threads of this process are blocked in receives
        that nobody will answer, and would turn the end of the interpreter into an abort.
        """
        status = error.code if isinstance(error, SystemExit) else 1
        if self.fail(error, f"Rank {self.mesh.rank}: {error}"):
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


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
    patience = timedelta(seconds=max(2 * silence, 10.0))
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A restarted run meets at the same store as the attempt that failed: its keys must differ.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher

    def store(*, is_master: bool = False) -> PrefixStore:
        client = TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=patience)
        return PrefixStore(f"scpl/{attempt}", client)

    try:
        dist.init_process_group(
            backend,
            store=store(is_master=mesh.is_first and not hosted),
            rank=mesh.rank,
            world_size=mesh.num_ranks,
            timeout=patience,
        )
        return RankControl(mesh, store, silence)
    except (RuntimeError, DistError) as error:
        raise InputError(
            f"All {mesh.num_ranks} ranks must meet at {host}:{port}",
            f"Got: {str(error).splitlines()[0]}",
            "Check the address, the port and the firewall (scpl doctor)",
        ) from error


class Control(Protocol):
    """What ranks need of each other besides messages."""

    mesh: Mesh

    @property
    def headers(self) -> dist.ProcessGroup:
        """The process group on the CPU that headers of messages use."""

    @property
    def data(self) -> dist.ProcessGroup:
        """The process group that features use."""

    def new_group(self) -> dist.ProcessGroup:
        """Make a process group of all ranks for one purpose; all ranks must call it."""

    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""

    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it."""

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Share a JSON value and learn those of all ranks."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` (on the CPU) with the owner's values, on all ranks."""

    def check(self) -> None:
        """Raise if another rank has failed."""

    def hurry(self) -> None:
        """Something may have died: notice a silent rank sooner."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends; False if another one was first."""

    def close(self) -> None:
        """Part from the others after a good end."""

    def end_process(self, error: BaseException) -> None:
        """End this process because of an error, if others depend on it."""


class LocalControl:
    """The control of the only rank."""

    def __init__(self) -> None:
        self.mesh = Mesh()
        self._values: dict[str, Any] = {}

    @property
    def headers(self) -> dist.ProcessGroup:
        """There are no messages."""
        raise LinkError("Only several ranks have links", "Got one rank")

    @property
    def data(self) -> dist.ProcessGroup:
        """There are no messages."""
        raise LinkError("Only several ranks have links", "Got one rank")

    def new_group(self) -> dist.ProcessGroup:
        """There is nobody to talk to."""
        raise LinkError("Only several ranks have links", "Got one rank")

    def share(self, key: str, value: Any) -> None:
        """Remember a value."""
        self._values[key] = value

    def fetch(self, key: str) -> Any:
        """Recall a value."""
        return self._values[key]

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Return the only value."""
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Do nothing: the values are here."""

    def check(self) -> None:
        """Do nothing: nobody else can fail."""

    def hurry(self) -> None:
        """Do nothing: nobody else can be silent."""

    def fail(self, error: BaseException, text: str) -> bool:
        """Do nothing: nobody else must know."""
        return True

    def close(self) -> None:
        """Do nothing."""

    def end_process(self, error: BaseException) -> None:
        """Do nothing: the error goes its way."""
