"""The ranks of a run: how they find each other, what they tell each other, how they end together.

Everything here goes through the key-value store that the launcher provides, or through a process
group of its own, so it never gets in the way of the batches.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from scpl.engine.mesh import Mesh
from scpl.engine.watchdog import HURRIED_SILENCE, Watchdog
from scpl.errors import InputError, LinkError, RemoteError

__all__ = ["ManyRanks", "OneRank", "Ranks", "connect"]

NEVER = timedelta(days=30)
BLAME = 3.0
"""Seconds to wait for a better explanation than 'the link broke'."""


class Ranks(ABC):
    """This rank's tie to the others.

    Attributes:
        mesh: Which rank this is, and of how many.
        device: Where it computes.
        depth: Messages in flight on each channel.
    """

    def __init__(self, mesh: Mesh, device: torch.device, depth: int) -> None:
        if depth < 2:
            raise InputError(
                "`depth` must be at least 2: one message is worked on while the next one travels",
                f"Got {depth}",
            )
        self.mesh, self.device, self.depth = mesh, device, depth

    @abstractmethod
    def share(self, key: str, value: Any) -> None:
        """Tell all ranks a JSON value."""

    @abstractmethod
    def fetch(self, key: str) -> Any:
        """Learn what a rank shared; waits for it.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """

    @abstractmethod
    def exchange(self, key: str, value: Any) -> list[Any]:
        """Share a JSON value and learn those of all ranks, in their order; all must call it.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill ``tensor`` (on the CPU) with the owner's values; all ranks must call it.

        Raises:
            LinkError: if a rank is gone.
        """

    @abstractmethod
    def hurry(self) -> None:
        """Something may have died: notice a silent rank sooner."""

    @abstractmethod
    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends.

        Args:
            error: What happened here.
            text: The verdict for people.

        Returns:
            Whether this rank's cause is the first one.
        """

    @abstractmethod
    def close(self) -> None:
        """Part from the others after a good end.

        Raises:
            RemoteError: if a rank fails meanwhile.
        """

    @abstractmethod
    def end_process(self, error: BaseException) -> None:
        """Tell the cause if it is the first, and end this process if others depend on it."""


@final
class OneRank(Ranks):
    """The only rank: there is nobody to talk to.

    Args:
        device: Where it computes.
        mesh: If it was read already.
    """

    def __init__(self, device: torch.device | str = "cpu", mesh: Mesh | None = None) -> None:
        super().__init__(mesh or Mesh(), torch.device(device), depth=2)
        self._values: dict[str, Any] = {}

    def share(self, key: str, value: Any) -> None:  # noqa: D102
        self._values[key] = value

    def fetch(self, key: str) -> Any:  # noqa: D102
        return self._values[key]

    def exchange(self, key: str, value: Any) -> list[Any]:  # noqa: D102
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Do nothing: the values are here."""

    def hurry(self) -> None:
        """Do nothing: nobody else can be silent."""

    def fail(self, error: BaseException, text: str) -> bool:  # noqa: D102
        return True

    def close(self) -> None:
        """Do nothing."""

    def end_process(self, error: BaseException) -> None:
        """Do nothing: the error goes its way."""


@final
class ManyRanks(Ranks):
    """One of several ranks.

    Args:
        mesh: Which rank this is, and of how many.
        device: Where it computes.
        depth: Messages in flight on each channel, at least 2.
        store: Connects to the launcher's store. The watchdog gets a connection of its own,
            because a connection serves one caller at a time.
        timeout: Seconds without a sign of life after which a rank counts as lost.

    Attributes:
        headers: The process group on the CPU that headers of messages use.
        data: The process group that tensors of messages use.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        depth: int,
        store: Callable[[], PrefixStore],
        timeout: float,
    ) -> None:
        super().__init__(mesh, device, depth)
        self._store = store()
        self._exchanges = 0
        self._closed = False
        self._store.set(f"host/{mesh.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self._watchdog = Watchdog(mesh.rank, mesh.num_ranks, store(), timeout)
        # A slow stage is no failure: who waits too long is for the watchdog to say.
        self.headers: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)
        self.data = self.new_group()
        self._collectives: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)

    def new_group(self) -> dist.ProcessGroup:
        """Make a process group of all ranks for one purpose; all ranks must call it."""
        group: dist.ProcessGroup = dist.new_group(timeout=NEVER)
        return group

    def share(self, key: str, value: Any) -> None:  # noqa: D102
        self._store.set(f"value/{key}", json.dumps(value))

    def fetch(self, key: str) -> Any:  # noqa: D102
        while not self._store.check([f"value/{key}"]):
            self.check()
            time.sleep(0.02)
        return json.loads(self._store.get(f"value/{key}"))

    def exchange(self, key: str, value: Any) -> list[Any]:  # noqa: D102
        self._exchanges += 1
        name = f"{key}/{self._exchanges}"
        self.share(f"{name}/{self.mesh.rank}", value)
        return [self.fetch(f"{name}/{rank}") for rank in range(self.mesh.num_ranks)]

    def broadcast(self, tensor: Tensor, owner: int) -> None:  # noqa: D102
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
        """Tell all ranks why this one ends; False if another one was first.

        A broken link is only a symptom: wait a moment for the rank behind it to say more.
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
            "continue from the newest checkpoint."
        )

    def close(self) -> None:  # noqa: D102
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


def connect(
    device: torch.device | str = "cpu",
    *,
    stages_per_rank: Sequence[int] | None = None,
    depth: int = 2,
    timeout: float = 30.0,
) -> Ranks:
    """Join the other ranks, if ``torchrun`` has started several; else this is the only one.

    Args:
        device: Where this rank computes; decides the backend (gloo, NCCL).
        stages_per_rank: How many consecutive stages each rank hosts; default: stages of about equal
            cost.
        depth: Messages in flight on each channel, at least 2.
        timeout: Seconds without a sign of life after which a rank counts as lost.

    Raises:
        InputError: if the launcher's variables are missing or nobody answers.
    """
    mesh, device = Mesh.from_env(stages_per_rank), torch.device(device)
    if mesh.num_ranks == 1:
        return OneRank(device, mesh)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            "Several ranks must be started by torchrun",
            f"{' and '.join(missing)} not set",
            "Start the script with torchrun",
        )
    patience = timedelta(seconds=max(2 * timeout, 10.0))
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
        return ManyRanks(mesh, device, depth, store, timeout)
    except (RuntimeError, DistError) as error:
        raise InputError(
            f"All {mesh.num_ranks} ranks must meet at {host}:{port}",
            f"Got: {str(error).splitlines()[0]}",
            "Check the address, the port and the firewall (scpl doctor)",
        ) from error
