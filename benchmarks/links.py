"""Two network namespaces joined by a cable of a known speed; for benchmarks of slow networks.

Needs root, ``ip`` and ``tc`` (iproute2), ``unshare`` and ``nsenter`` (util-linux), on Linux. The
namespaces have no name: each lives as long as a process is in it, and the first one of each ends
when this process does, however that happens. So nothing is left behind, even by ``kill -9``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

__all__ = [
    "LOOPBACK",
    "UNSHAPED",
    "Cable",
    "End",
    "bits_per_second",
    "go_to_cable",
    "go_to_loopback",
    "refusal",
]

LOOPBACK = "loopback"
UNSHAPED = "none"
TOLERANCE = 0.05
"""How far the measured speed of the cable may be from the one that was asked for."""

ATTEMPTS = 3

_TOOLS = ("ip", "tc", "unshare", "nsenter")
_VARIABLE = "SCPL_CABLE"  # the process in each namespace, for the ranks
_CLONE_NEWNET = 0x40000000  # of <sched.h>; os.setns needs Python 3.12
_PROBE_PORT = 45_671
_PROBE_SECONDS = 1.0
_PAYLOAD = 1448 / 1514
"""What of a full Ethernet frame is the stream's own; the rest is headers, which a limit counts."""
_FACTORS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SPAWN = multiprocessing.get_context("spawn")


def refusal() -> str:
    """Say why no cable can be made here; nothing if one can."""
    if os.geteuid() != 0:
        return "Network namespaces are made by root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"A cable needs {' and '.join(missing)} (packages iproute2 and util-linux)"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"Network namespaces are refused: {made.stderr.strip()}" if made.returncode else ""


def bits_per_second(rate: str) -> float:
    """Read a rate such as ``200mbit``.

    Raises:
        ValueError: if it is none.
    """
    if not (match := re.fullmatch(r"(\d+)([kmg])bit", rate)):
        raise ValueError(f"A rate must look like 200mbit, 1gbit or {UNSHAPED}; got {rate!r}.")
    return int(match[1]) * _FACTORS[match[2]]


@dataclass(frozen=True)
class End:
    """One end of the cable.

    Attributes:
        process: A process in its network namespace.
        device: Its network device.
        address: Its address in a private network.
    """

    process: int
    device: str
    address: str

    def enter(self) -> None:
        """Bring this thread, and those that it starts, to this end."""
        with open(f"/proc/{self.process}/ns/net") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"{self.device} cannot be entered")

    def run(self, *command: str) -> None:
        """Run a command at this end.

        Raises:
            subprocess.CalledProcessError: if it fails.
        """
        _run("nsenter", f"--net=/proc/{self.process}/ns/net", *command)

    def sent_bytes(self) -> int:
        """Bytes that left here so far."""
        with open(f"/proc/{self.process}/net/dev") as file:
            line = next(line for line in file if line.strip().startswith(f"{self.device}:"))
        return int(line.partition(":")[2].split()[8])


def go_to_loopback() -> None:
    """Have this rank meet the others on this machine."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def go_to_cable() -> None:
    """Bring this rank, a process that was started while there is a cable, to its end of it."""
    ends = _ends(os.environ[_VARIABLE])
    end = ends[int(os.environ["RANK"])]
    end.enter()
    os.environ |= {"GLOO_SOCKET_IFNAME": end.device, "MASTER_ADDR": ends[0].address}


def _ends(processes: str) -> tuple[End, ...]:
    return tuple(
        End(int(process), f"scpl{number}", f"10.77.0.{number + 1}")
        for number, process in enumerate(processes.split())
    )


class Cable:
    """Two network namespaces joined by a virtual cable; both are gone after the block.

    Attributes:
        ends: Its two ends.
    """

    ends: tuple[End, ...] = ()

    def __enter__(self) -> Cable:
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(2):
                self._holders.append(_new_namespace())
            os.environ[_VARIABLE] = " ".join(str(holder.pid) for holder in self._holders)
            self.ends = here, there = _ends(os.environ[_VARIABLE])
            _run(
                *("ip", "link", "add", here.device, "netns", str(here.process), "type", "veth"),
                *("peer", "name", there.device, "netns", str(there.process)),
            )
            for end in self.ends:
                end.run("ip", "address", "add", f"{end.address}/24", "dev", end.device)
                end.run("ip", "link", "set", end.device, "up")
                end.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._remove()

    def shape(self, rate: str) -> None:
        """Limit both directions, like a network card of that speed."""
        for end in self.ends:
            queue = ("tc", "qdisc")
            with suppress(subprocess.CalledProcessError):  # there is none yet
                end.run(*queue, "delete", "dev", end.device, "root")
            if rate != UNSHAPED:
                limit = ("rate", rate, "burst", "128kb", "latency", "50ms")
                end.run(*queue, "add", "dev", end.device, "root", "tbf", *limit)

    def carried_bytes(self) -> int:
        """Bytes that went over it so far, both ways."""
        return sum(end.sent_bytes() for end in self.ends)

    def speed(self) -> float:
        """Fill it with a stream of plain sockets for a second.

        Returns:
            Bits per second, without headers.
        """
        sides = [
            _SPAWN.Process(target=side, args=(self.ends,), daemon=True)
            for side in (_receive, _send)
        ]
        for side in sides:
            side.start()
        sender = self.ends[1]
        try:
            idle = sender.sent_bytes()
            while sender.sent_bytes() < idle + 4_000_000:  # it has begun, and is in full swing
                if not all(side.is_alive() for side in sides):
                    raise OSError("The stream that measures the cable's speed broke off")
                time.sleep(0.01)
            before, begin = sender.sent_bytes(), time.perf_counter()
            time.sleep(_PROBE_SECONDS)
            return 8 * (sender.sent_bytes() - before) / (time.perf_counter() - begin)
        finally:
            for side in sides:
                side.kill()
                side.join()

    def checked_speed(self, rate: str) -> float:
        """Set a rate, and measure it, again if something else had the processor meanwhile.

        Raises:
            RuntimeError: if it is off by more than `TOLERANCE`.
        """
        self.shape(rate)
        for _ in range(ATTEMPTS):
            measured = self.speed()
            wanted = measured if rate == UNSHAPED else _PAYLOAD * bits_per_second(rate)
            if abs(measured / wanted - 1) <= TOLERANCE:
                return measured
        raise RuntimeError(
            f"A cable of {rate} must carry {wanted / 1e6:.0f} Mbit/s without headers, within "
            f"{100 * TOLERANCE:.0f} %. Got {measured / 1e6:.0f} Mbit/s. Is the machine busy?"
        )

    def _remove(self) -> None:
        os.environ.pop(_VARIABLE, None)
        for holder in self._holders:
            holder.kill()
            holder.communicate()


def _new_namespace() -> subprocess.Popen[bytes]:
    """Start a process in a network namespace of its own, which ends with this one."""
    holder = subprocess.Popen(
        ["unshare", "--net", "cat"],
        stdin=subprocess.PIPE,  # closed when this process ends, in whatever way: so cat ends, too
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    if holder.stdout.read(1) != b"\n":  # what comes back says that it is there
        raise OSError("A network namespace could not be made")
    return holder


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _receive(ends: tuple[End, ...]) -> None:
    """Be the side of the test of the cable's speed that receives."""
    ends[0].enter()
    with socket.create_server((ends[0].address, _PROBE_PORT)) as server:
        peer, _ = server.accept()
        while peer.recv(1 << 20):
            pass


def _send(ends: tuple[End, ...]) -> None:
    """Be the other side."""
    ends[1].enter()
    while True:
        try:
            peer = socket.create_connection((ends[0].address, _PROBE_PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    content = bytes(1 << 20)
    with suppress(ConnectionError):
        while True:
            peer.sendall(content)
