"""Emulated machines: cgroups, each with its quota of a core.

A quota gives processes so much time in each period, and nothing of what an idle neighbour leaves:
so waiting costs what it costs on a machine of their own. Needs root and cgroups with the controller
``cpu``, version 1 or 2, on Linux.

The cgroups lie in a folder of their own, named after the process that made them, and are removed at
the end. After ``kill -9`` empty folders are left; whoever makes machines next removes them.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = [
    "MOST",
    "TOLERANCE",
    "Controller",
    "Machines",
    "check_shares",
    "cores_of",
    "fullest",
    "join",
    "period_and_quota",
    "refusal",
]

TOLERANCE = 0.02
"""How far what a busy loop gets may be from its share."""
MOST = 0.95
"""Share of this machine's cores that all emulated ones may have: the rest is the kernel's."""
LEAST = 0.01

_PERIOD, _LEAST_QUOTA = 10_000, 1_000  # microseconds; Linux takes no smaller quota
_PREFIX = "scpl-machines-"
_SECONDS_TO_EMPTY = 5.0
_WARM = 0.3
_BUSY = """
import sys, time
with open(sys.argv[1], "w") as file:
    file.write("0")
print("there", flush=True)
sys.stdin.readline()
begin = time.perf_counter()
while time.perf_counter() < begin + float(sys.argv[2]):
    pass
begin, used = time.perf_counter(), time.process_time()
while time.perf_counter() < begin + float(sys.argv[3]):
    pass
print((time.process_time() - used) / (time.perf_counter() - begin), flush=True)
"""


@dataclass(frozen=True)
class Controller:
    """Where quotas are set.

    Attributes:
        version: Of the cgroups.
        root: The folder of the first one.
    """

    version: int
    root: Path

    @classmethod
    def find(cls, mounts: str) -> Controller | None:
        """Find it in the text of ``/proc/mounts``; None where there is none."""
        lines = [line.split() for line in mounts.splitlines()]
        for _, place, kind, options, *_ in lines:
            if kind == "cgroup" and "cpu" in options.split(","):
                return cls(1, Path(place))
        for _, place, kind, *_ in lines:
            names = Path(place, "cgroup.controllers")
            if kind == "cgroup2" and names.is_file() and "cpu" in names.read_text().split():
                return cls(2, Path(place))
        return None

    def prepare(self, folder: Path) -> None:
        """Let the cgroups below this one have quotas: version 2 asks for that at each level."""
        if self.version == 2:
            for each in (self.root, folder):
                (each / "cgroup.subtree_control").write_text("+cpu")

    def limit(self, folder: Path, share: float) -> None:
        """Give a cgroup a share of a core."""
        period, quota = period_and_quota(share)
        if self.version == 2:
            (folder / "cpu.max").write_text(f"{quota} {period}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(period))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))


def period_and_quota(share: float) -> tuple[int, int]:
    """Microseconds of a period, and those of it that are a share of a core."""
    period = max(_PERIOD, math.ceil(_LEAST_QUOTA / share))
    return period, round(period * share)


def check_shares(shares: Sequence[float], cores: int) -> None:
    """Check that this machine can be that many emulated ones.

    Raises:
        ValueError: if it cannot.
    """
    if not all(LEAST <= share <= 1 for share in shares):
        told = " ".join(f"{share:.3g}" for share in shares)
        raise ValueError(
            f"An emulated machine must have from {LEAST} to 1 core: its rank computes with one "
            f"thread. Got {told}. Choose another --quota or other --speeds."
        )
    most = fullest(shares, cores)
    if most > MOST:
        raise ValueError(
            f"The emulated machines on one core must have at most {MOST} of it together, or none "
            f"gets its share. Got {most:.3g} for {len(shares)} on {cores} cores. Choose a --quota "
            f"of at most {MOST / most:.2f} of that."
        )


def cores_of(shares: Sequence[float], cores: int) -> list[int]:
    """The core of each machine: the largest first, each where least is taken.

    A machine that moves from core to core takes longer, here those that are named first by up to a
    half.
    """
    taken, found = [0.0] * cores, [0] * len(shares)
    for number in sorted(range(len(shares)), key=lambda number: -shares[number]):
        found[number] = min(range(cores), key=taken.__getitem__)
        taken[found[number]] += shares[number]
    return found


def fullest(shares: Sequence[float], cores: int) -> float:
    """What all machines on one core take of it, where that is most."""
    found = cores_of(shares, cores)
    return max(
        sum(share for share, own in zip(shares, found, strict=True) if own == core)
        for core in range(cores)
    )


def refusal() -> str:
    """Say why no machines can be emulated here; nothing if they can."""
    if os.geteuid() != 0:
        return "Cgroups with quotas are made by root"
    try:
        controller = Controller.find(Path("/proc/mounts").read_text())
    except OSError:
        return "Cgroups are of Linux"
    if controller is None:
        return "There are no cgroups with the controller cpu"
    if not os.access(controller.root, os.W_OK):
        return f"No cgroup can be made in {controller.root}"
    return ""


def join(machine: Path) -> None:
    """Bring this process, and those that it starts, to a machine, or away from it."""
    (machine / "cgroup.procs").write_text(str(os.getpid()))


class Machines:
    """Emulated machines; all are gone after the block.

    Args:
        shares: Of a core, for each.

    Attributes:
        controller: Where quotas are set.
        folders: The cgroup of each, for `join`.
        idle: A cgroup without a quota, for whoever does nothing that is measured: on a machine it
            would take of its share, however little it did.
    """

    folders: tuple[Path, ...] = ()
    idle: Path

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = tuple(shares)
        found = Controller.find(Path("/proc/mounts").read_text())
        assert found is not None, "`refusal` says so before"
        self.controller = found
        self._parent = found.root / f"{_PREFIX}{os.getpid()}"

    def __enter__(self) -> Machines:
        for left in _left_behind(self.controller.root):
            _remove(left)
        self._parent.mkdir(exist_ok=True)
        try:
            self.controller.prepare(self._parent)
            self.idle = self._parent / "idle"
            self.folders = tuple(self._parent / str(n) for n in range(len(self.shares)))
            for folder in (self.idle, *self.folders):
                folder.mkdir(exist_ok=True)
            for folder, share in zip(self.folders, self.shares, strict=True):
                self.controller.limit(folder, share)
        except BaseException:
            _remove(self._parent)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        _remove(self._parent)

    def measured_shares(self, seconds: float, numbers: Sequence[int]) -> list[float]:
        """What a busy loop gets on some of them, on all at the same time.

        Raises:
            OSError: if one cannot run.
        """
        loops = [
            subprocess.Popen(
                [
                    *(sys.executable, "-S", "-c", _BUSY),
                    *(str(self.folders[number] / "cgroup.procs"), str(_WARM), str(seconds)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process
            )
            for number in numbers
        ]
        try:
            for loop in loops:
                if _line(loop) != "there":
                    raise OSError("A busy loop could not be brought to its machine")
            for loop in loops:
                assert loop.stdin is not None
                loop.stdin.write("\n")
                loop.stdin.flush()
            return [float(_line(loop)) for loop in loops]
        finally:
            for loop in loops:
                loop.kill()
                loop.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _left_behind(root: Path) -> Iterator[Path]:
    """Folders whose maker was killed."""
    for folder in root.glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            yield folder


def _remove(parent: Path) -> None:
    """Remove a folder of cgroups, as soon as the processes in them have ended.

    One that is still in use after some seconds stays, for whoever comes next.
    """
    deadline = time.monotonic() + _SECONDS_TO_EMPTY
    for folder in (*parent.glob("*/"), parent):
        while folder.exists():
            with suppress(OSError):
                folder.rmdir()
                break
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
