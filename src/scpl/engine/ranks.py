"""The ranks of a run: how they find each other, what they tell each other, how they end together.

Everything here goes by notes in the key-value store that the launcher provides, or through a
process group of its own, so it never gets in the way of the batches.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, TypeAlias, final, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from scpl.engine.local import host_store
from scpl.engine.meeting import agree_on_name
from scpl.engine.mesh import Mesh
from scpl.engine.notes import Notes, believed
from scpl.engine.transfer import use_device
from scpl.engine.watchdog import HURRIED_SILENCE, Watchdog, whereabouts
from scpl.errors import InputError, LinkError, RemoteError, ScplError, unknown_name

__all__ = ["Backend", "ManyRanks", "OneRank", "Ranks", "connect", "local_cuda"]

Backend: TypeAlias = Literal["gloo", "nccl"]
"""What moves tensors between ranks."""
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
    def take(self, key: str) -> Any:
        """Learn what a rank shared with this one alone, once; otherwise as `fetch`."""

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

    @property
    @abstractmethod
    def asked_to_stop(self) -> int | None:
        """On the first rank: the number of a signal by which another one was asked to end."""

    @abstractmethod
    def ask_to_stop(self, number: int) -> None:
        """Let the first rank end the run, as if it had received this signal itself."""

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

    def take(self, key: str) -> Any:  # noqa: D102
        return self._values.pop(key)

    def exchange(self, key: str, value: Any) -> list[Any]:  # noqa: D102
        return [value]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Do nothing: the values are here."""

    def hurry(self) -> None:
        """Do nothing: nobody else can be silent."""

    @property
    def asked_to_stop(self) -> int | None:
        """None: there is no other rank."""
        return None

    def ask_to_stop(self, number: int) -> None:
        """Do nothing: this is the first rank."""

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
        backend: What moves tensors.
        hosts_store: Whether the store goes when this process ends, or its launcher after it.

    Attributes:
        headers: The process group on the CPU that headers of messages use.
        siblings: The process group of the ranks that host the same stages, if there are several.
        staged: Whether tensors travel by way of the host's memory: gloo moves no others.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        depth: int,
        store: Callable[[], PrefixStore],
        timeout: float,
        backend: Backend = "gloo",
        *,
        hosts_store: bool = False,
    ) -> None:
        super().__init__(mesh, device, depth)
        self._hosts_store = hosts_store
        self.staged = device.type == "cuda" and backend == "gloo"
        self._notes = Notes(store())
        self._exchanges, self._last_exchange = 0, ""
        self._closed = False
        self._notes.write(f"host/{mesh.rank}", [socket.gethostname(), os.getpid()])
        self._watchdog = Watchdog(mesh.rank, mesh.num_ranks, Notes(store()), timeout)
        # A slow stage is no failure: who waits too long is for the watchdog to say.
        self.headers: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)
        self._links = self.new_group(), self.new_group()
        several = {group: self.new_group(group) for group in mesh.groups if len(group) > 1}
        self.siblings = several.get(mesh.siblings)
        self._collectives: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NEVER)

    def new_group(self, ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
        """Make a process group for one purpose; all ranks must call it.

        Args:
            ranks: Who is in it; None: all.
        """
        members = None if ranks is None else list(ranks)
        group: dist.ProcessGroup = dist.new_group(ranks=members, timeout=NEVER)
        return group

    def link(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The process group that tensors use from one rank to another.

        A rank receives in another thread than it sends, and an object of NCCL serves one thread; so
        links from even and from odd groups have different ones. The siblings of the first rank
        receive from it what others receive from the group before.
        """
        group = self.mesh.group_of(sender)
        return self._links[(group - (group == self.mesh.group_of(receiver))) % 2]

    @contextmanager
    def _reaching_store(self) -> Iterator[None]:
        """Take a store that is gone for the end of who hosts it, and tell the cause if it is known.

        Raises:
            RemoteError: with the cause.
            LinkError: if nobody knows more.
        """
        try:
            yield
        except ScplError:
            raise
        except (RuntimeError, DistError) as error:
            self._watchdog.failed.wait(BLAME)
            self.check()
            raise LinkError(
                "The store where the ranks meet must stay until the end",
                f"It is gone: {str(error).splitlines()[0]}",
                "Look at the log of the first rank, or of its launcher",
            ) from error

    def share(self, key: str, value: Any) -> None:  # noqa: D102
        with self._reaching_store():
            self._notes.write(f"value/{key}", value)

    def fetch(self, key: str) -> Any:  # noqa: D102
        with self._reaching_store():
            while not self._notes.exists(f"value/{key}"):
                self.check()
                time.sleep(0.02)
            return believed(self._notes, f"value/{key}")

    def take(self, key: str) -> Any:  # noqa: D102
        value = self.fetch(key)
        with self._reaching_store():
            self._notes.remove(f"value/{key}")
        return value

    def exchange(self, key: str, value: Any) -> list[Any]:  # noqa: D102
        self._exchanges += 1
        name, before = f"{key}/{self._exchanges}", self._last_exchange
        self.share(f"{name}/{self.mesh.rank}", value)
        values = [self.fetch(f"{name}/{rank}") for rank in range(self.mesh.num_ranks)]
        # Who has shared its value now has read those of the time before: nobody needs them.
        if before:
            with self._reaching_store():
                self._notes.remove(f"value/{before}/{self.mesh.rank}")
        self._last_exchange = name
        return values

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

    @property
    def asked_to_stop(self) -> int | None:  # noqa: D102
        return self._watchdog.asked_to_stop

    def ask_to_stop(self, number: int) -> None:  # noqa: D102
        self._watchdog.ask_to_stop(number)

    def fail(self, error: BaseException, text: str) -> bool:
        """Tell all ranks why this one ends; False if another one was first.

        A broken link is only a symptom: wait a moment for the rank behind it to say more.
        """
        first = self._claim(error, text)
        with suppress(RuntimeError, DistError):
            self._leave(BLAME, wait=self._hosts_store)
        return first

    def _claim(self, error: BaseException, text: str) -> bool:
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
        return self._watchdog.claim(self._notes, text)

    def _gone(self, rank: int) -> str:
        return (
            "Every rank must stay until the end. "
            f"Rank {rank} ({whereabouts(self._notes, rank)}) left without a word: it was "
            "killed, ran out of memory, or its machine or link failed. Look at its log, then "
            "continue from the newest checkpoint."
        )

    def close(self) -> None:  # noqa: D102
        if self._closed:
            return
        self._closed = True
        self.exchange("end", True)
        self._watchdog.close()
        self._leave(5.0, wait=self.mesh.is_first)
        dist.destroy_process_group()

    def _leave(self, patience: float, *, wait: bool) -> None:
        """Let the first rank know that this one has done with the store.

        Whoever hosts it leaves last, or the others would see it vanish, and not learn the cause.
        """
        self._notes.write(f"left/{self.mesh.rank}", True)
        everyone = [f"left/{rank}" for rank in range(self.mesh.num_ranks)]
        deadline = time.monotonic() + patience
        while wait and time.monotonic() < deadline:
            if all(map(self._notes.exists, everyone)):
                break
            time.sleep(0.02)

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


def local_cuda() -> torch.device:
    """The CUDA device of this process: the ranks of one machine take its devices in turn.

    Raises:
        InputError: if there is none.
    """
    count = torch.cuda.device_count()
    if not count:
        raise InputError("CUDA needs a device that torch can use", "Found none", "Use the CPU")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank) % count)


def connect(
    device: torch.device | str = "cpu",
    *,
    stages_per_rank: Sequence[int] | None = None,
    replicas: int | Sequence[int] | None = None,
    depth: int = 2,
    timeout: float = 30.0,
    backend: Backend | None = None,
) -> Ranks:
    """Join the other ranks, if ``torchrun`` has started several; else this is the only one.

    Args:
        device: Where this rank computes. ``"cuda"`` gives the processes of a machine its devices in
            turn.
        stages_per_rank: How many consecutive stages each rank, or group of replicas, hosts;
            default: stages of about equal cost.
        replicas: How many ranks host the same stages, each with its share of every mini-batch: of
            all groups, or of each (``(1, 2)``: the second stages are hosted by ranks 1 and 2).
        depth: Messages in flight on each channel, at least 2.
        timeout: Seconds without a sign of life after which a rank counts as lost.
        backend: What moves tensors: NCCL between CUDA devices, gloo through the memory of the host.
            Default: NCCL where every rank has a CUDA device to itself, else gloo.

    Raises:
        InputError: if the launcher's variables are missing, nobody answers, or the ranks'
            devices do not fit the backend.
    """
    mesh, device = Mesh.from_env(stages_per_rank, replicas), torch.device(device)
    if backend is not None and backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    if str(device) == "cuda":  # no particular one
        device = local_cuda()
    if mesh.num_ranks == 1:
        return OneRank(device, mesh)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            "Several ranks must be started by torchrun",
            f"{' and '.join(missing)} not set",
            "Start the script with torchrun",
        )
    use_device(device)
    patience = timedelta(seconds=max(2 * timeout, 10.0))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher

    def client() -> TCPStore:
        return TCPStore(host, port, wait_for_workers=False, timeout=patience)

    try:
        server = mesh.is_first and not hosted
        torchrun = "GROUP_RANK" in os.environ  # which hosts it on the machine of the first rank
        entrance = host_store(host, port, patience) if server else client()
        greetings = Notes(PrefixStore("scpl", entrance))
        start = agree_on_name(greetings, mesh, patience.total_seconds())

        def store() -> PrefixStore:
            return PrefixStore(f"scpl/{start}", client())

        meeting = PrefixStore(f"scpl/{start}", entrance)
        notes = Notes(meeting)
        notes.write(f"device/{mesh.rank}", _identity(device))
        names = [f"device/{rank}" for rank in range(mesh.num_ranks)]
        meeting.wait(names)
        devices = [believed(notes, name) for name in names]
        chosen = choose_backend(devices, backend)
        # Without a `device_id`: with one all ranks share a communicator of NCCL, where what is
        # received and what is sent wait for each other. So every two neighbours make their own.
        dist.init_process_group(
            "gloo" if chosen == "gloo" else "cpu:gloo,cuda:nccl",
            store=meeting,
            rank=mesh.rank,
            world_size=mesh.num_ranks,
            timeout=patience,
        )
        return ManyRanks(
            mesh,
            device,
            depth,
            store,
            timeout,
            chosen,
            hosts_store=server or (mesh.is_first and torchrun),
        )
    except (RuntimeError, DistError, OSError) as error:
        raise InputError(
            f"All {mesh.num_ranks} ranks must meet at {host}:{port}",
            f"Got: {str(error).splitlines()[0]}",
            "Check the address, the port and the firewall (scpl doctor)",
        ) from error


def _identity(device: torch.device) -> list[str]:
    """Name a device so that two ranks can tell whether they share it: type, machine, number.

    An index would not do: each process may be shown other devices of its machine.
    """
    number = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return [device.type, socket.gethostname(), number]


def choose_backend(devices: Sequence[Sequence[str]], wanted: Backend | None) -> Backend:
    """Decide what moves tensors, on every rank alike.

    Args:
        devices: Of each rank the type of its device, its machine and the device's number there.
        wanted: What the caller asked for, if anything.

    Raises:
        InputError: if NCCL is asked for and cannot link these ranks.
    """
    elsewhere = [rank for rank, (kind, *_) in enumerate(devices) if kind != "cuda"]
    owners: dict[tuple[str, ...], list[int]] = {}
    for rank, device in enumerate(devices):
        owners.setdefault(tuple(device), []).append(rank)
    shared = next((ranks for ranks in owners.values() if len(ranks) > 1), [])
    if wanted != "nccl":
        fits = not elsewhere and not shared and dist.is_nccl_available()
        return "nccl" if fits and wanted is None else "gloo"
    if elsewhere:
        got, fix = f"Rank {elsewhere[0]} computes on {devices[elsewhere[0]][0]}", "Use gloo"
    elif shared:
        got = f"Ranks {' and '.join(map(str, shared))} share a device"
        fix = "Start as many processes as there are devices, or use gloo"
    elif not dist.is_nccl_available():
        got, fix = "This build of torch has no NCCL", "Use gloo, or install an official build"
    else:
        return "nccl"
    raise InputError("NCCL links ranks that each have a CUDA device to themselves", got, fix)
