"""Start several processes on this machine, and again if one is lost.

torch's elastic launcher is for several machines: it meets at a store that listens to everybody, and
looks up the name of this machine, which may take a minute.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from scpl.app.config import TrainConfig
from scpl.app.signals import LAUNCHER, end_signals
from scpl.engine.local import local_ranks
from scpl.engine.ranks import Ranks
from scpl.errors import InputError
from scpl.runs import RunFolder

__all__ = ["BAD_INPUT", "INTERRUPTED", "after_restart", "is_rank", "launch", "launcher", "to_go_on"]

BAD_INPUT = 2
INTERRUPTED = (129, 130, 143)
"""Statuses after SIGHUP, SIGINT and SIGTERM."""
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_END = 10.0
"""What a rank gets to end once another one has failed; they learn of that from each other."""


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], processes: int, max_restarts: int) -> int:
    """Run ``scpl`` with the same arguments as several ranks, and wait for them.

    If a rank is lost, all are started again, and `after_restart` finds where they go on. Bad input
    and interruptions are no reason to: they would only come again.

    Returns:
        Exit status: 0, or that of the first rank that failed.

    Raises:
        InputError: if there are too many for this machine.
    """
    available = os.cpu_count() or 1
    if processes > 64 * available:
        raise InputError(
            "--processes must fit this machine", f"Got {processes} on {available} cores"
        )
    run_id = uuid.uuid4().hex
    for attempt in range(max_restarts + 1):
        status, again = _run_ranks(arguments, processes, run_id)
        if not again or attempt == max_restarts:
            break
        sys.stderr.write(f"scpl: restarting all processes ({attempt + 1} of {max_restarts})\n")
        sys.stderr.flush()
    return status


def _run_ranks(arguments: list[str], processes: int, run_id: str) -> tuple[int, bool]:
    """Run all ranks once; returns the exit status, and whether another attempt may help."""
    command = [sys.executable, "-m", "scpl", *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[signal.Signals] = []

    def pass_on(number: signal.Signals) -> None:  # the ranks save and end by themselves
        received.append(number)
        for rank in ranks:
            rank.send_signal(number)

    with local_ranks(processes, run_id) as places, end_signals(pass_on):
        try:
            for place in places:
                environment = {**os.environ, **place, LAUNCHER: str(os.getpid())}
                ranks.append(subprocess.Popen(command, env=environment))
                if received:
                    ranks[-1].send_signal(received[0])
            codes = _first_codes(ranks)
        finally:
            _end(ranks)
    # Before it could hear signals, a rank may have been ended by one that was passed on.
    failed = [128 - code if -code in received else code for code in codes if code]
    if BAD_INPUT in failed:
        return BAD_INPUT, False
    if not failed:
        return 0, False
    interrupted = [code for code in failed if code in INTERRUPTED]
    if interrupted and (received or interrupted == failed):
        return interrupted[0], False
    return 1, not received


def _first_codes(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all ranks have ended, or one has failed; the exit codes that are known then."""
    while True:
        codes = [code for rank in ranks if (code := rank.poll()) is not None]
        if len(codes) == len(ranks) or any(code not in (0, *INTERRUPTED) for code in codes):
            return codes
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are left: those that do not end when they are asked to are killed."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def launcher() -> str:
    """What started this process, the same after each restart; empty without a launcher.

    On several machines each has one of its own.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name}/{socket.gethostname()}/{os.getppid()}" if name else ""


def to_go_on(run: Path) -> str:
    """Say how an interrupted run is continued: on several machines not by one command."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if is_rank() and here < int(os.environ["WORLD_SIZE"]):
        return f"Continue with the same command on every machine, with --resume {run} for --out"
    return f"Continue with: scpl train --resume {run}"


def after_restart(config: TrainConfig, ranks: Ranks, launchers: Sequence[str]) -> TrainConfig:
    """A run whose processes their launchers start again goes on where it was; every rank calls it.

    If one of them knows the run, all go on with it: of machines that come and go some began it, and
    others join it with ``--resume``, or without. It is known by any launcher that was there before,
    and by no rank in particular: the first one may be new.

    Args:
        config: As the user gave it.
        ranks: All of them.
        launchers: Of all ranks, `launcher`.

    Raises:
        InputError: if the run has no name to find it by.
    """
    own, out = config.run.resume, config.run.out
    if own is None and any(launchers):
        if out is not None and _began(out, launchers):
            own = out
        elif out is None and _is_restart():
            raise InputError("A run that may be restarted needs --out", "Got none")
    paths = ranks.exchange("resumed", None if own is None else str(own))
    known = next((Path(path) for path in paths if path is not None), None)
    return config if known is None else config.changed(resume=own or out or known)


def _is_restart() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _began(out: Path, launchers: Sequence[str]) -> bool:
    """Whether the run in a folder was begun by one of these launchers.

    What another run left in a folder that is to be overwritten is nothing to go on from.
    """
    folder = RunFolder(out)
    if not (folder.environment.exists() and folder.config.exists()):
        return False
    return not folder.launchers.isdisjoint(filter(None, launchers))
