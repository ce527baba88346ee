"""The line over a slow network: two ranks in two network namespaces, joined by a shaped cable.

Needs root (``ip netns``, ``tc``) on Linux. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "throughput"))
from team import Job, Load, Team, Teams, environment, shown, spread

LOOPBACK, UNSHAPED = "loopback", "none"
TARGET = 0.95
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

    def speed(self) -> float:
        """Send some bytes through plain sockets; return bits per second."""
        here, there = self.ends
        command = [sys.executable, __file__, "--probe"]
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


def measure(job: Job, rates: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """One line over loopback and one over the cable, which changes its speed between blocks."""
    names = [LOOPBACK, *rates]
    results: dict[str, dict[str, Any]] = {
        name: {"rates": [], "others": [], "shares": [], "bytes": [], "bits_per_second": None}
        for name in names
    }
    with Cable() as cable, Teams() as teams:
        here = cable.ends[0]
        for rate in rates:
            cable.shape(rate)
            results[rate]["bits_per_second"] = cable.speed()
        print("starting", file=sys.stderr)
        teams.start(LOOPBACK, Team(job, environment={"GLOO_SOCKET_IFNAME": "lo"}))
        # The device of the other end has another name: gloo reads it from each rank's own
        # environment, set behind `ip netns exec`.
        prefixes = [(*end.prefix, "env", f"GLOO_SOCKET_IFNAME={end.device}") for end in cable.ends]
        teams.start("cable", Team(job, here.address, prefixes))
        steps = job.warm + job.steps + job.cool
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else names[::-1]:
                team, result = teams.of[LOOPBACK if name == LOOPBACK else "cable"], results[name]
                if name != LOOPBACK:
                    cable.shape(name)
                load, before = Load(team), here.sent_bytes()
                answers = team.train_block()
                result["bytes"].append((here.sent_bytes() - before) / steps)
                result["others"].append(load.cores()["others"])
                result["rates"].append(job.steps * job.batch_size / answers[-1]["seconds"])
                result["shares"].append([answer["shares"] for answer in answers])
            row = ", ".join(f"{name} {results[name]['rates'][-1]:.1f}" for name in names)
            print(f"{time.strftime('%H:%M:%S')} repeat {repeat + 1}: {row}", file=sys.stderr)
    return results


def summary(results: dict[str, dict[str, Any]], target: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base = results[LOOPBACK]["rates"]
    for name, result in results.items():
        waits = [
            sum(block[rank]["wait"] for block in result["shares"]) / len(result["shares"])
            for rank in (0, 1)
        ]
        found[name] = {
            "samples_per_second": spread(result["rates"]),
            "rates": result["rates"],
            "others": spread(result["others"]),
            "wait_share": waits,
            "receive_share": sum(block[1]["receive"] for block in result["shares"])
            / len(result["shares"]),
            "bytes_per_step": None if name == LOOPBACK else spread(result["bytes"]),
            "bits_per_second": result["bits_per_second"],
        }
        if name != LOOPBACK:
            ratio = spread([a / b for a, b in zip(result["rates"], base, strict=True)])
            found[name]["to_loopback"] = {**ratio, "target": target}
    return found


def table(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "| network | measured speed | samples/s: median (min .. max) | to loopback, paired "
        f"(target {TARGET}) | MB per step | rank 1 waits | other load, cores |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, row in found.items():
        speed = row["bits_per_second"]
        traffic = row["bytes_per_step"]
        cells = [
            "loopback" if name == LOOPBACK else f"cable, {name.replace(UNSHAPED, 'no limit')}",
            "" if speed is None else f"{speed / 1e6:.0f} Mbit/s",
            shown(row["samples_per_second"], 1),
            shown(row["to_loopback"]) if name != LOOPBACK else "",
            "" if traffic is None else f"{traffic['median'] / 1e6:.2f}",
            f"{100 * row['wait_share'][1]:.1f} %",
            shown(row["others"], 2),
        ]
        yield f"| {' | '.join(cells)} |"


def check_machine(rates: list[str]) -> None:
    """Refuse with one sentence what cannot work."""
    if os.geteuid() != 0:
        raise SystemExit("This benchmark makes network namespaces and so must run as root.")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"This benchmark needs {' and '.join(missing)} (package iproute2).")
    for rate in rates:
        if rate != UNSHAPED and not re.fullmatch(r"\d+(k|m|g)bit", rate):
            raise SystemExit(f"A rate must look like 200mbit, 1gbit or none; got {rate!r}.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", nargs="+", default=[UNSHAPED, "1gbit", "200mbit"])
    parser.add_argument("--work", choices=["transformer", "vgg8"], default="transformer")
    parser.add_argument("--method", choices=["scpl", "early-exit"], default="scpl")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each network")
    parser.add_argument("--quick", action="store_true", help="narrow network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe(arguments.probe)
        return
    check_machine(arguments.rate)
    signal.signal(signal.SIGTERM, _interrupt)
    margin = arguments.depth + 1
    job = Job(
        "line",
        work=arguments.work,
        method=arguments.method,
        processes=2,
        batch_size=arguments.batch_size,
        depth=arguments.depth,
        warm=margin,
        steps=arguments.steps,
        cool=margin,
        quick=arguments.quick,
    )
    load = os.getloadavg()
    try:
        found = summary(measure(job, arguments.rate, arguments.repeats), TARGET)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the network namespaces are removed") from None
    if arguments.json:
        extra = {"environment": environment(), "load_before": load, "arguments": vars(arguments)}
        print(json.dumps({"results": found, **extra}))
    else:
        print("\n".join(table(found)))


if __name__ == "__main__":
    main()
