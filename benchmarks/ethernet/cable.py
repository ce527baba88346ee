"""A network cable between two network namespaces of this machine, as slow as one wants.

usage: cable.py receive | ADDRESS      one side of a test of its speed
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

UNSHAPED = "none"
PROBE_PORT = 45_671


@dataclass(frozen=True)
class End:
    """One end of the cable.

    Attributes:
        space: Its network namespace.
        device: Its network device.
        address: Its address in a private network.
    """

    space: str
    device: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with that is to run here."""
        return ("ip", "netns", "exec", self.space)

    def sent_bytes(self) -> int:
        """Bytes that left here so far."""
        path = f"/sys/class/net/{self.device}/statistics/tx_bytes"
        return int(_run(*self.prefix, "cat", path))


class Cable:
    """Two network namespaces joined by a virtual cable; leaving the block removes both."""

    def __init__(self) -> None:
        self.ends = (
            End("scpl-bench-0", "scpl0", "10.77.0.1"),
            End("scpl-bench-1", "scpl1", "10.77.0.2"),
        )

    def __enter__(self) -> Cable:
        self._remove()  # what a killed run left behind
        try:
            here, there = self.ends
            for end in self.ends:
                _run("ip", "netns", "add", end.space)
            _run(
                *("ip", "link", "add", here.device, "netns", here.space, "type", "veth"),
                *("peer", "name", there.device, "netns", there.space),
            )
            for end in self.ends:
                inside = ("ip", "-n", end.space)
                _run(*inside, "address", "add", f"{end.address}/24", "dev", end.device)
                _run(*inside, "link", "set", end.device, "up")
                _run(*inside, "link", "set", "lo", "up")
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
            queue = ("tc", "-n", end.space, "qdisc")
            with suppress(subprocess.CalledProcessError):  # there is none yet
                _run(*queue, "delete", "dev", end.device, "root")
            if rate != UNSHAPED:
                limit = ("rate", rate, "burst", "128kb", "latency", "50ms")
                _run(*queue, "add", "dev", end.device, "root", "tbf", *limit)

    def carried_bytes(self) -> int:
        """Bytes that went over it so far, both ways."""
        return sum(end.sent_bytes() for end in self.ends)

    def speed(self) -> float:
        """Send some bytes through plain sockets; return bits per second."""
        here, there = self.ends
        command = [sys.executable, __file__]
        with subprocess.Popen([*there.prefix, *command, "receive"]) as receiver:
            try:
                return float(_run(*here.prefix, *command, there.address))
            finally:
                receiver.kill()

    def _remove(self) -> None:
        for end in self.ends:
            if Path("/run/netns", end.space).exists():
                with suppress(subprocess.CalledProcessError):
                    _run("ip", "netns", "delete", end.space)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def probe(peer: str) -> None:
    """Be one side of a test of the cable: send 16 MB and wait until all of it has arrived."""
    size = 16_000_000
    if peer == "receive":
        with socket.create_server(("0.0.0.0", PROBE_PORT)) as server:
            connection, _ = server.accept()
            left = size
            while left > 0:
                left -= len(connection.recv(1 << 20))
            connection.sendall(b".")
            connection.close()
        return
    while True:
        try:
            connection = socket.create_connection((peer, PROBE_PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    begin = time.perf_counter()
    connection.sendall(bytes(size))
    connection.recv(1)
    print(8 * size / (time.perf_counter() - begin))


if __name__ == "__main__":
    probe(sys.argv[1])
