"""Kill a rank at a random moment, again and again: is anything ever lost?

Each trial trains a small network with several processes, sends SIGKILL to one of them at a moment
drawn at random, lets the launcher restart the run from its newest checkpoint, and compares the
final weights with those of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = [
    "--data", "digits", "--model", "small-cnn", "--stages", "4", "--epochs", "12",
    "--batch-size", "64", "--threads", "1", "--checkpoint-every", "7", "--keep", "3", "--quiet",
]  # fmt: skip


def start(out: Path, processes: int, restarts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scpl", "train", *OPTIONS, "--out", str(out)]
    command += ["--processes", str(processes), "--max-restarts", str(restarts)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ranks_of(launcher: int) -> dict[int, int]:
    """Process of each rank below a launcher."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = path.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError, ValueError):
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if parent == launcher and rank:
            found[int(rank[0].partition(b"=")[2])] = int(path.name)
    return found


def trial(
    out: Path, processes: int, moment: float, victim: int, timeout: float
) -> dict[str, object]:
    """Kill one rank `moment` seconds after the first step was logged."""
    child = start(out, processes, restarts=3)
    steps = out / "steps.jsonl"
    deadline = time.monotonic() + timeout
    while child.poll() is None and not steps.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(moment)
    pid = ranks_of(child.pid).get(victim)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    try:
        _, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        return {"status": "hung", "killed": pid is not None}
    return {
        "status": child.returncode,
        "killed": pid is not None,
        "seconds_after": round(time.monotonic() - killed, 1),
        "errors": errors.strip().splitlines()[-2:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a trial may take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        undisturbed = start(root / "undisturbed", 1, 0)
        _, errors = undisturbed.communicate(timeout=options.timeout)
        if undisturbed.returncode:
            sys.exit(f"The undisturbed run failed: {errors}")
        expected = (root / "undisturbed" / "model.safetensors").read_bytes()
        for number in range(options.trials):
            moment, victim = draw.uniform(0.0, 4.0), draw.randrange(options.processes)
            out = root / f"trial-{number}"
            result = trial(out, options.processes, moment, victim, options.timeout)
            weights = out / "model.safetensors"
            result["same_bits"] = weights.exists() and weights.read_bytes() == expected
            results.append({"trial": number, "moment": round(moment, 2), "rank": victim, **result})
            if not options.json:
                print(results[-1], flush=True)
    killed = [r for r in results if r["killed"]]
    verdict = {
        "trials": len(results),
        "killed": len(killed),
        "same_bits": sum(bool(r["same_bits"]) for r in results),
        "results": results,
    }
    print(json.dumps(verdict if options.json else {**verdict, "results": "above"}))
    sys.exit(0 if verdict["same_bits"] == len(results) else 1)


if __name__ == "__main__":
    main()
