"""Train for many small steps on two processes: does anything grow, or slow down?

    python benchmarks/faults/soak.py --steps 20000

Resident memory, file handles and threads of both processes, and the keys in the store where they
meet, are read while the run evaluates and saves. The speed is that of the run's own log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the store is gone when the run is over

from torch.distributed import TCPStore

STEPS_PER_EPOCH = 41
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def ranks_of(launcher: int) -> dict[int, tuple[int, int]]:
    """Process of each rank below a launcher, and the port of its store."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_text().split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            if "RANK" in variables:
                found[int(variables["RANK"])] = int(pid), int(variables["MASTER_PORT"])
    return found


def look(pid: int) -> dict[str, float]:
    """Read what a process holds now, and the processor seconds that it has used."""
    root = Path(f"/proc/{pid}")
    stat = (root / "stat").read_text().rsplit(")", 1)[1].split()
    return {
        "memory": int((root / "statm").read_text().split()[1]) * PAGE / 2**20,
        "handles": len(list((root / "fd").iterdir())),
        "threads": int(stat[17]),
        "processor": (int(stat[11]) + int(stat[12])) / TICKS,
    }


def steps_done(out: Path) -> int:
    """Count the steps that the run has logged."""
    with suppress(OSError), (out / "steps.jsonl").open("rb") as file:
        return sum(1 for _ in file)
    return 0


def watch(process: subprocess.Popen[str], out: Path, every: float) -> list[dict[str, float]]:
    """Read everything now and then until the run ends; a row per look, with the step."""
    rows: list[dict[str, float]] = []
    store = None
    while process.poll() is None:
        time.sleep(every)
        step = steps_done(out)
        if not step:
            continue
        with suppress(OSError, KeyError, RuntimeError):  # the run is about to end
            places = ranks_of(process.pid)
            if store is None:
                store = TCPStore(
                    "127.0.0.1", places[0][1], wait_for_workers=False, timeout=timedelta(seconds=5)
                )
            row: dict[str, float] = {"step": step}
            for rank in (0, 1):
                row |= {f"{name} {rank}": value for name, value in look(places[rank][0]).items()}
            rows.append({**row, "keys in the store": store.num_keys()})
            if sys.stderr.isatty():
                sys.stderr.write(f"\rstep {step}")
    return rows


def part(rows: list[dict[str, float]], name: str, low: float, high: float, steps: int) -> float:
    """Return the median over the looks in a part of the run."""
    values = [row[name] for row in rows if low * steps <= row["step"] <= high * steps]
    return median(values) if values else float("nan")


def speed(seconds: list[float], low: float, high: float) -> float:
    """Steps per second in a part of the run, without the pauses between epochs."""
    inside = seconds[int(low * len(seconds)) : int(high * len(seconds))]
    return 1 / median(b - a for a, b in pairwise(inside))


def work(rows: list[dict[str, float]], low: float, high: float, steps: int) -> float:
    """Processor milliseconds of both processes per step, in a part of the run."""
    inside = [row for row in rows if low * steps <= row["step"] <= high * steps]
    first, last = inside[0], inside[-1]
    used = sum(last[f"processor {rank}"] - first[f"processor {rank}"] for rank in (0, 1))
    return 1e3 * used / (last["step"] - first["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--out", type=Path, help="a file for the looks, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        process = subprocess.Popen(
            [
                sys.executable, "-m", "scpl", "train", "--data", "digits", "--model", "mlp",
                "--width", "0.1", "--batch-size", "32", "--epochs",
                str(-(-options.steps // STEPS_PER_EPOCH)), "--processes", "2", "--threads", "1",
                "--device", "cpu", "--checkpoint-every", "50", "--quiet", "--out", str(out),
            ],
            text=True,
        )  # fmt: skip
        rows = watch(process, out, options.every)
        if process.returncode:
            sys.exit(process.returncode)
        logged = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    if options.out:
        options.out.write_text(json.dumps(rows))
    steps = len(logged)
    print(f"{steps} steps, {len(rows)} looks\n")
    print("| | second tenth | last tenth |\n|---|---:|---:|")
    for name in [key for key in rows[0] if key != "step" and not key.startswith("processor")]:
        unit = " (MiB)" if name.startswith("memory") else ""
        early, late = part(rows, name, 0.1, 0.2, steps), part(rows, name, 0.9, 1.0, steps)
        print(f"| {name}{unit} | {early:.1f} | {late:.1f} |")
    seconds = [row["seconds"] for row in logged]
    print(f"| steps/s | {speed(seconds, 0.1, 0.2):.1f} | {speed(seconds, 0.9, 1.0):.1f} |")
    print(
        f"| processor ms per step | {work(rows, 0.1, 0.2, steps):.2f} "
        f"| {work(rows, 0.9, 1.0, steps):.2f} |"
    )


if __name__ == "__main__":
    main()
