"""Tiny runs of the command line, in this process or in a forked one."""

import contextlib
import csv
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from processes import Forked, environment
from scpl.app.cli import run

TINY = [
    "--model", "mlp", "--limit-train", "200", "--batch-size", "20", "--epochs", "1",
    "--threads", "1", "--device", "cpu",
]  # fmt: skip
NUM_STEPS = 9  # per epoch: 200 images, of which a tenth validates
TIMES = {"seconds", "train_seconds", "samples_per_second"}
KEYS = {
    "method", "data", "model", "stages", "processes", "epochs", "seed", "test_accuracy",
    "valid_accuracy", "samples_per_second", "wall_seconds", "peak_memory_bytes", "wait_share",
    "run",
}  # fmt: skip
COMPLETE = {
    "config.toml", "env.json", "metrics.csv", "steps.jsonl", "log.txt", "summary.json",
    "model.safetensors", "model.json", "results.png", "report.html", "checkpoints",
}  # fmt: skip


@dataclass
class Outcome:
    status: int
    out: str
    err: str


def scpl(*arguments):
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run([str(argument) for argument in arguments])
        except SystemExit as end:  # how tyro ends on --help and on flags it cannot read
            status = end.code
    return Outcome(status, out.getvalue(), err.getvalue())


def train(*arguments):
    return scpl("train", *TINY, *arguments)


def command(*arguments):
    return [sys.executable, "-m", "scpl", *map(str, arguments)]


def fork(*arguments):
    """Start a command in a process of its own that need not import torch."""
    return Forked(["-m", "scpl", *arguments], environment())


def finish(process, timeout=60):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Its ranks would outlive a launcher that is killed.
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}") from None
    return Outcome(process.returncode, out, err)


def wait_for_steps(folder, count, process, timeout=60):
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + timeout
    while len(steps(folder)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.01)


def rank_of(launcher, rank):
    """The process of a rank that a launcher started; it starts them in order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[rank])


def steps(folder):
    path = folder / "steps.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def result(folder):
    """All that a run comes down to but its times."""
    with (folder / "metrics.csv").open(newline="") as file:
        table = [
            {name: cell for name, cell in row.items() if name not in TIMES}
            for row in csv.DictReader(file)
        ]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights": (folder / "model.safetensors").read_bytes(),
        "metrics": table,
        "steps": [{k: v for k, v in row.items() if k != "seconds"} for row in steps(folder)],
        "summary": {k: summary[k] for k in ("test_accuracy", "test_loss", "valid_accuracy")},
    }


def tree(folder):
    """Every file below a folder with its content."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(outcome, *words, status=2):
    """The command failed with one clear sentence that holds all these words."""
    assert outcome.status == status, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    last = outcome.err.strip().rpartition("scpl: ")[2]
    for word in words:
        assert word in last, outcome.err
    return last
