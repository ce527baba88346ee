"""Break a run in every way we know of, again and again: is anything ever lost?

Each trial trains a small network, lets one thing break or several, resumes the run until it ends,
on other numbers of processes, and compares it with a run that nothing happened to. See README.md
beside this file.

    python benchmarks/faults/main.py --faults 200
    python benchmarks/faults/main.py --only launcher --trials 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "faults"))

import torch

import victim
from links import UNSHAPED, Cable, refusal
from scpl.engine.local import variables
from trials import SILENCE, Attempt, Trial, Trials, kinds, ranks

CABLED = Path(__file__).with_name("cabled.py")
PORT = 29_500  # of rank 0 in a namespace of its own, where every port is free
ALL = ("tbf", "rate", "1kbit", "burst", "10b", "limit", "10b")
"""A queue that is too short for any packet: all are dropped, and no connection is closed."""


def drop_for_ever(cable: Cable) -> None:
    for end in cable.ends:
        end.run("tc", "qdisc", "replace", "dev", end.device, "root", *ALL)


def drop_for(seconds: float) -> Callable[[Cable], None]:
    def act(cable: Cable) -> None:
        drop_for_ever(cable)
        time.sleep(seconds)
        cable.shape(UNSHAPED)

    return act


def flap(cable: Cable) -> None:
    for _ in range(8):
        drop_for(0.1)(cable)
        time.sleep(0.2)


CABLE: dict[str, Callable[[Cable], None]] = {
    "cable drops all for ever": drop_for_ever,
    "cable drops all for a while": drop_for(1.0),
    "cable flaps": flap,
    "cable is slow": lambda cable: cable.shape("500kbit"),
}


class OverCable(Trials):
    """Trials with a cable between two network namespaces, for the faults of cables."""

    cable: Cable | None = None

    def _attempt(
        self, trial: Trial, arguments: list[str], fault: victim.Fault | None, draw: random.Random
    ) -> Attempt:
        if self.cable is None or fault is None or fault.kind not in victim.OF_CABLE:
            return super()._attempt(trial, arguments, fault, draw)
        over = threading.Event()
        act = threading.Thread(target=self._break, args=(self.cable, fault, over))
        act.start()
        words = [str(CABLED), *arguments, "--timeout", str(SILENCE)]
        attempt = ranks(variables(2, PORT), words, fault)
        over.set()
        act.join()
        self.cable.shape(UNSHAPED)
        trial.ranks.append(2)
        trial.attempts.append(attempt)
        if Path(fault.once).exists():
            trial.faults.append(fault.kind)
        return attempt

    def _break(self, cable: Cable, fault: victim.Fault, over: threading.Event) -> None:
        while not over.wait(0.01):
            if Path(fault.once).exists():
                CABLE[fault.kind](cable)
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="go on until so many happened")
    parser.add_argument("--trials", type=int, default=10_000, help="at most")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--launcher", type=float, default=0.15, help="share of starts by scpl train --processes"
    )
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    root, no_cable = os.geteuid() == 0, refusal()
    if not root:
        print("Not root: disks are not broken.")
    if no_cable:
        print(f"{no_cable}: cables are not broken.")
    wanted = [*kinds(root=root), *([] if no_cable else CABLE)]
    wanted = [kind for kind in wanted if options.only in kind]
    done: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder, nullcontext() if no_cable else Cable() as cable:
        all_trials = OverCable(Path(folder), options.seed, options.launcher)
        all_trials.cable = cable
        while sum(len(trial.faults) for trial in done) < options.faults:
            number = len(done)
            if number == options.trials:
                break
            begin = time.monotonic()
            trial = all_trials.trial(number, wanted[number % len(wanted)])
            done.append(trial)
            told = "; ".join(trial.wrong) or "the same bits"
            broken = " + ".join(trial.faults) or f"({wanted[number % len(wanted)]}: too late)"
            print(
                f"{number}: {broken}, on {trial.ranks} ranks: {told} "
                f"({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps([asdict(one) for one in done]))
    print(summary(done))
    sys.exit(any(trial.wrong for trial in done))


def summary(done: list[Trial]) -> str:
    """A table of kinds, how often each broke, and what came of it."""
    happened = Counter(fault for trial in done for fault in trial.faults)
    failed = Counter(fault for trial in done if trial.wrong for fault in trial.faults)
    lines = ["| what broke | times | in trials that went wrong |", "|---|---:|---:|"]
    lines += [f"| {kind} | {count} | {failed[kind]} |" for kind, count in sorted(happened.items())]
    wrong = sum(bool(trial.wrong) for trial in done)
    waits = sorted(one.seconds for trial in done for one in trial.attempts if one.seconds)
    lines.append(
        f"\n{sum(happened.values())} faults in {len(done)} trials; {wrong} trials went wrong. "
        "From a fault to the end of the attempt: median "
        f"{waits[len(waits) // 2] if waits else 0} s, "
        f"longest {waits[-1] if waits else 0} s."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
