"""`scpl compare`: the same network, data and settings under several methods."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from scpl.errors import InputError, Interrupted
from scpl.report import comparison_table, write_comparison_report
from scpl.run.config import TrainConfig, read_toml, write_toml
from scpl.run.fairness import config_for, method_names
from scpl.run.folder import RunFolder
from scpl.run.resume import changed_settings
from scpl.run.settings import CompareConfig, names

__all__ = ["compare"]


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train every method with every seed, and write one report.

    Each run is a process of its own, so that its memory is its own and a failure ends nothing
    else. For each seed all methods run before the next seed begins.

    Args:
        config: Methods, seeds and what the runs have in common.

    Returns:
        ``{"results": [summary of each run], "failures": {...}, "report": [...]}``.

    Raises:
        InputError: for bad settings, or if no run succeeded.
        Interrupted: after Ctrl-C; the same command continues.
    """
    base = config.train
    base.check()
    methods = method_names(config.methods)
    seeds = [_seed(text) for text in names(config.seeds, "--seeds")]
    out = base.out or Path("runs/compare")
    jobs = [
        (out / f"{method}-seed{seed}", replace(config_for(base, method), seed=seed))
        for seed in seeds
        for method in methods
    ]
    RunFolder(out).ensure()
    failures: dict[str, str] = {}
    for number, (folder, job) in enumerate(jobs, 1):
        if not base.quiet:
            sys.stderr.write(f"[{number}/{len(jobs)}] {folder.name}\n")
        problem = _complete(folder, job, out)
        if problem:
            failures[folder.name] = problem
            sys.stderr.write(f"{folder.name} failed: {problem}\n")
    done = [RunFolder(folder) for folder, _ in jobs if folder.name not in failures]
    if not done:
        raise InputError("A comparison needs at least one run that ends", f"Got {failures}")
    summaries = [folder.read_json(folder.summary) for folder in done]
    title = f"{base.model} on {base.data}: {', '.join(methods)}"
    written = write_comparison_report(out, [folder.path for folder in done], title)
    sys.stderr.write(f"\n{comparison_table(summaries)}\n\n{', '.join(map(str, written))}\n")
    environment = done[0].read_json(done[0].environment)
    return {
        "results": summaries,
        "failures": failures,
        "report": [str(path) for path in written],
        "environment": environment,
    }


def _complete(folder: Path, job: TrainConfig, out: Path) -> str:
    """Make sure that a run is finished; return why it is not."""
    run = RunFolder(folder)
    if run.config.is_file() and not job.force:
        _check_same(run, job)
        if run.summary.is_file():
            return ""
        arguments = ["--resume", str(folder), *(["--quiet"] if job.quiet else [])]
    else:
        recipe = out / f".{folder.name}.toml"
        plain = replace(job, out=folder, resume=None, json=True, dry_run=False, force=False)
        recipe.write_text(write_toml(plain), encoding="utf-8")
        arguments = [str(recipe), *(["--force"] if folder.exists() else [])]
    problem = _run_child([sys.executable, "-m", "scpl", "train", *arguments])
    if arguments[0] != "--resume":
        recipe.unlink(missing_ok=True)
    return problem


def _run_child(command: list[str]) -> str:
    """Run one training process; return the last line it said if it failed.

    Raises:
        Interrupted: if it was, or if a signal came that was passed on to it.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as child:
        assert child.stderr is not None
        last = ""
        with _pass_on(child) as received:
            for line in child.stderr:
                last = line.strip() or last
                sys.stderr.write(f"    {line}")
            status = child.wait()
    if received or status in (130, 143):
        error = Interrupted(
            "The comparison was interrupted; everything is saved",
            fix="The same command continues it",
        )
        error.signal = received[0] if received else status - 128
        raise error
    if status < 0:
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    return f"exit status {status}: {last}" if status else ""


@contextmanager
def _pass_on(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to a child, which saves and ends by itself.

    Yields:
        The signals that came.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with suppress(OSError):
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_same(run: RunFolder, job: TrainConfig) -> None:
    """A kept run must be of the same configuration: two settings never share a table."""
    before = TrainConfig.from_dict(read_toml(run.config), str(run.config))
    changed = changed_settings(before, job)
    if changed:
        raise InputError(
            "All runs of a comparison must have the same settings",
            f"{run.path} was trained with others: {', '.join(changed)}",
            "Choose another folder with --out, or train it again with --force",
        )


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError("--seeds must be whole numbers", f"Got {text!r}") from error
