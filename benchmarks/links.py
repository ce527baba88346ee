"""Network namespaces joined by cables of a known speed; for benchmarks of slow networks.

Needs root, ``ip`` and ``tc`` (iproute2), ``unshare`` and ``nsenter`` (util-linux), on Linux. The
namespaces have no name: each lives as long as a process is in it, and the first one of each ends
when this process does, however that happens. So nothing is left behind, even by ``kill -9``.

Two ends are joined by one cable. More have one each to a switch, a bridge in a namespace of its
own; what a cable lets through is limited in both directions, as by two network cards.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = [
    "LOOPBACK",
    "TOLERANCE",
    "UNSHAPED",
    "Cable",
    "Device",
    "End",
    "bits_per_second",
    "go_to_cable",
    "go_to_loopback",
    "refusal",
    "without_headers",
]

LOOPBACK = "loopback"
UNSHAPED = "none"
TOLERANCE = 0.05
"""How far the measured speed of the cable may be from the one that was asked for."""

ATTEMPTS = 3

_TOOLS = ("ip", "tc", "unshare", "nsenter")
_VARIABLE = "SCPL_CABLE"  # the process in each namespace, for the ranks
_CLONE_NEWNET = 0x40000000  # of <sched.h>; os.setns needs Python 3.12
_PROBE_SECONDS = 1.0
_PAYLOAD = 1448 / 1514
"""What of a full Ethernet frame is the stream's own; the rest is headers, which a limit counts."""
_FACTORS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SWITCH = "switch"


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
class Device:
    """A network device in one of the namespaces.

    Attributes:
        process: A process in its network namespace.
        device: Its name.
    """

    process: int
    device: str

    def enter(self) -> None:
        """Bring this thread, and those that it starts, into its namespace."""
        with open(f"/proc/{self.process}/ns/net") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"{self.device} cannot be entered")

    def run(self, *command: str) -> None:
        """Run a command in its namespace.

        Raises:
            subprocess.CalledProcessError: if it fails.
        """
        _run("nsenter", f"--net=/proc/{self.process}/ns/net", *command)

    def sent_bytes(self) -> int:
        """Bytes that left here so far."""
        with open(f"/proc/{self.process}/net/dev") as file:
            line = next(line for line in file if line.strip().startswith(f"{self.device}:"))
        return int(line.partition(":")[2].split()[8])

    def limit(self, rate: str) -> None:
        """Send at most so much, like a network card of that speed."""
        queue = ("tc", "qdisc")
        with suppress(subprocess.CalledProcessError):  # there is none yet
            self.run(*queue, "delete", "dev", self.device, "root")
        if rate != UNSHAPED:
            limit = ("rate", rate, "burst", "128kb", "latency", "50ms")
            self.run(*queue, "add", "dev", self.device, "root", "tbf", *limit)


@dataclass(frozen=True)
class End(Device):
    """The device of one end.

    Attributes:
        address: Its address in a private network.
    """

    address: str

    def at_home(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in its namespace; a socket that is made there stays there."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self.enter).result()
            return thread.submit(make, *arguments).result()


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
    """Network namespaces joined by virtual cables; all are gone after the block.

    Args:
        num_ends: How many.

    Attributes:
        ends: The end in each.
    """

    ends: tuple[End, ...] = ()

    def __init__(self, num_ends: int = 2) -> None:
        self._num_ends = num_ends
        self._ports: list[Device] = []  # of the switch

    def __enter__(self) -> Cable:
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(self._num_ends):
                self._holders.append(_new_namespace())
            os.environ[_VARIABLE] = " ".join(str(holder.pid) for holder in self._holders)
            self.ends = _ends(os.environ[_VARIABLE])
            if self._num_ends == 2:
                _join(*self.ends)
            else:
                self._join_by_switch()
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

    def _join_by_switch(self) -> None:
        self._holders.append(_new_namespace())
        switch = Device(self._holders[-1].pid, _SWITCH)
        switch.run("ip", "link", "add", _SWITCH, "type", "bridge")
        switch.run("ip", "link", "set", _SWITCH, "up")
        for number, end in enumerate(self.ends):
            port = Device(switch.process, f"port{number}")
            _join(end, port)
            port.run("ip", "link", "set", port.device, "master", _SWITCH, "up")
            self._ports.append(port)

    def shape(self, rate: str) -> None:
        """Limit both directions of every cable, like network cards of that speed."""
        for device in (*self.ends, *self._ports):
            device.limit(rate)

    def carried_bytes(self) -> int:
        """Bytes that all ends sent so far."""
        return sum(end.sent_bytes() for end in self.ends)

    def speed(self, sender: int = 1, receiver: int = 0) -> float:
        """Fill the way from one end to another with a stream of plain sockets for a second.

        Returns:
            Bits per second, without headers.
        """
        here = self.ends[sender]
        with _stream(here, self.ends[receiver]) as is_alive:
            idle = here.sent_bytes()
            while here.sent_bytes() < idle + 4_000_000:  # it has begun, and is in full swing
                if not is_alive():
                    raise OSError("The stream that measures the cable's speed broke off")
                time.sleep(0.01)
            before, begin = here.sent_bytes(), time.perf_counter()
            time.sleep(_PROBE_SECONDS)
            return 8 * (here.sent_bytes() - before) / (time.perf_counter() - begin)

    def checked_speed(self, rate: str, sender: int = 1, receiver: int = 0) -> float:
        """Set a rate, and measure it, again if something else had the processor meanwhile.

        Raises:
            RuntimeError: if it is off by more than `TOLERANCE`.
        """
        self.shape(rate)
        for _ in range(ATTEMPTS):
            measured = self.speed(sender, receiver)
            wanted = measured if rate == UNSHAPED else without_headers(rate)
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


def without_headers(rate: str) -> float:
    """What a stream gets of a rate, in bits per second."""
    return _PAYLOAD * bits_per_second(rate)


def _join(here: Device, there: Device) -> None:
    """Lay a cable: make both devices, each in its namespace."""
    _run(
        *("ip", "link", "add", here.device, "netns", str(here.process), "type", "veth"),
        *("peer", "name", there.device, "netns", str(there.process)),
    )


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


@contextmanager
def _stream(sender: End, receiver: End) -> Iterator[Callable[[], bool]]:
    """Send as much as goes meanwhile; what it yields says whether that still goes on."""
    with ExitStack() as stack:
        server = stack.enter_context(receiver.at_home(socket.create_server, (receiver.address, 0)))
        source = stack.enter_context(sender.at_home(socket.create_connection, server.getsockname()))
        sink = stack.enter_context(server.accept()[0])
        threads = [
            threading.Thread(target=side, args=(peer,), daemon=True)
            for side, peer in ((_receive, sink), (_send, source))
        ]
        for thread in threads:
            thread.start()
        try:
            yield lambda: all(thread.is_alive() for thread in threads)
        finally:
            for peer in (source, sink):
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def _receive(peer: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with suppress(OSError):
        while peer.recv_into(buffer):
            pass


def _send(peer: socket.socket) -> None:
    content = bytes(1 << 20)
    with suppress(OSError):
        while True:
            peer.sendall(content)
