"""Trials: a run in which something breaks, is resumed until it ends, and is looked at closely.

A trial is drawn from a seed. Its run is a small one of the command line, with the network of
`victim.py`. What breaks is in there, or is done from here: files of checkpoints are damaged between
two attempts, the run is started twice, its cable fails. After all that the run must be the one that
nothing happened to: the same bits in its weights, and the same ledger of what was trained.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from safetensors.torch import load_file

import victim
from processes import Forked, environment
from scpl.engine.checkpoint import _checksum
from scpl.engine.local import local_ranks

HERE = Path(__file__).parent
SILENCE = 4.0
"""Seconds without a sign of life after which a rank counts as lost (--timeout)."""
TO_END = 8.0
"""Seconds that ranks get to end by themselves after another one has."""
LIMIT = 120.0
"""Seconds after which an attempt hangs."""
DISK = "16m"
"""Size of the small disks: room for seven checkpoints of the run, of which it keeps three."""
OPTIONS = [
    "--data", "digits", "--stages", str(victim.STAGES), "--cuts", "1", "2", "3",
    "--limit-train", str(victim.TRAIN_SAMPLES), "--batch-size", str(victim.BATCH),
    "--epochs", str(victim.EPOCHS), "--threads", "1", "--device", "cpu",
    "--checkpoint-every", "2", "--keep", "3", "--quiet",
]  # fmt: skip
MODEL = ["--model", "victim:network"]  # a resumed run must name code of the user, too
ALL_STEPS = list(range(1, victim.EPOCHS * victim.NUM_STEPS + 1))

HARMLESS = (
    "SIGSTOP for a while", "interpreter held for a while", "checkpoint takes long",
    "cable drops all for a while", "cable flaps", "cable is slow",
)  # fmt: skip
"""A run gets over these by itself."""
NEED_NEIGHBOURS = ("SIGSTOP for ever", "interpreter held for ever", "ends with status 0")
"""Nobody notices these where there is a single rank."""
IN_USERS_CODE = (
    "raises in forward", "raises in backward", "raises in loss", "allocation refused",
    "out of memory",
)  # fmt: skip
"""These are shown with the traceback."""


@dataclass
class Attempt:
    """How one start of the run ended.

    Attributes:
        status: 0, or that of the first process that failed; None if it hung.
        seconds: From the fault to its end.
        told: The last line of scpl's on stderr.
        err: All that was written there.
    """

    status: int | None
    seconds: float
    told: str
    err: str


@dataclass
class Trial:
    """One trial and what came of it.

    Attributes:
        ranks: How many there were in each attempt; 0 for a launcher with two.
        faults: What broke, in order; only what happened.
        attempts: How the starts of the run ended.
        wrong: What was not as it must be; empty if all was.
    """

    number: int
    ranks: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------- how a run is started


def forked(num_ranks: int, arguments: list[str], fault: victim.Fault | None) -> Attempt:
    """Start ranks as torchrun would, and end those that are left after one has failed."""
    with local_ranks(num_ranks) as places:
        return ranks(places if num_ranks > 1 else [{}], ["-m", "scpl", *arguments], fault)


def ranks(places: list[dict[str, str]], words: list[str], fault: victim.Fault | None) -> Attempt:
    """Start ``python WORDS`` in a forked process for each of these environments."""
    more = fault.variables() if fault else {}
    processes = [Forked(words, environment(**place, **more)) for place in places]
    status: int | None = 0
    running = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + LIMIT
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), 0.5):
            code = running.pop(sentinel).poll()
            if code and not status:
                status, deadline = code, min(deadline, time.monotonic() + TO_END)
    if running and not status:
        status = None
    for process in processes:
        process.end()
    return _ended(status, fault, "".join(process.written()[1] for process in processes))


def launched(arguments: list[str], fault: victim.Fault | None) -> Attempt:
    """Start two ranks as a user does, and wait until the last of them is gone."""
    more = fault.variables() if fault else {}
    mark = f"TRIAL={os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "scpl", *arguments, "--processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment(**more, **dict([mark.split("=")])),
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=LIMIT)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        status = None
    deadline = time.monotonic() + 4 * SILENCE
    while (left := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        status = None
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return _ended(status, fault, err)


def _processes(mark: str) -> list[int]:
    """Those that have this variable."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"\0{mark}\0".encode() in b"\0" + path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _ended(status: int | None, fault: victim.Fault | None, err: str) -> Attempt:
    happened = fault is not None and Path(fault.once).exists()
    since = time.time() - Path(fault.once).stat().st_mtime if happened else 0.0
    told = [line for line in err.splitlines() if line.startswith("scpl: ")]
    return Attempt(status, round(since, 1), told[-1] if told else "", err)


# --------------------------------------------------------------- what is done to files of a run


def _newest(out: Path) -> Path | None:
    """The folder of the newest checkpoint, if it and one before it are complete."""
    folders = sorted((out / "checkpoints").glob("step-*"))
    whole = [f for f in folders if len(list(f.glob("stage-?.pt"))) == victim.STAGES]
    return whole[-1] if len(whole) > 1 and whole[-1] == folders[-1] else None


def _cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _zero(path: Path, draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _of_an_older_step(path: Path, draw: random.Random) -> None:
    older = sorted(path.parent.parent.glob("step-*"))[-2]
    for suffix in (".pt", ".json"):
        shutil.copy(older / path.with_suffix(suffix).name, path.with_suffix(suffix))


def _of_another_stage(path: Path, draw: random.Random) -> None:
    other = next(p for p in sorted(path.parent.glob("stage-?.pt")) if p.stem != path.stem)
    for suffix in (".pt", ".json"):
        shutil.copy(other.with_suffix(suffix), path.with_suffix(suffix))


def _of_another_run(path: Path, draw: random.Random) -> None:
    manifest = json.loads(path.with_suffix(".json").read_text())
    _seal(path, manifest | {"run": "another"})


def _of_another_version(path: Path, draw: random.Random) -> None:
    for part in path.parent.glob("stage-?.pt"):
        manifest = json.loads(part.with_suffix(".json").read_text())
        _seal(part, manifest | {"versions": {"scpl": "0.0.1", "torch": "1.0"}})


def _seal(path: Path, manifest: dict) -> None:
    manifest["sha256"] = _checksum(manifest, path)
    path.with_suffix(".json").write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "part cut short": (".pt", _cut),
    "part of zeros": (".pt", _zero),
    "bit flipped in a part": (".pt", _flip),
    "part gone": (".pt", _remove),
    "manifest cut short": (".json", _cut),
    "bit flipped in a manifest": (".json", _flip),
    "manifest gone": (".json", _remove),
    "part of an older step": (".pt", _of_an_older_step),
    "part of another stage": (".pt", _of_another_stage),
    "part of another run": (".pt", _of_another_run),
    "checkpoint of another version": (".pt", _of_another_version),
}
BETWEEN = (*DAMAGE, "started twice")


def damage(out: Path, kind: str, draw: random.Random) -> bool:
    """Damage the newest checkpoint; whether there was one, with another to fall back on."""
    folder = _newest(out)
    if folder is None:
        return False
    suffix, act = DAMAGE[kind]
    act(folder / f"stage-{draw.randrange(victim.STAGES)}{suffix}", draw)
    return True


# ------------------------------------------------------------------------------------- a trial


class Trials:
    """Trials below a folder.

    Args:
        root: Where runs go.
        seed: They are drawn from it.
        launcher: The share of attempts that `scpl train --processes 2` starts itself, as a user
            does. It takes several times as long as to fork ranks that have imported torch.
    """

    def __init__(self, root: Path, seed: int = 0, launcher: float = 0.25) -> None:
        self.root, self.seed, self.launcher = root, seed, launcher
        os.chdir(HERE)  # where the network is found
        whole = root / "undisturbed"
        done = forked(1, ["train", *OPTIONS, *MODEL, "--out", str(whole)], None)
        if done.status != 0:
            raise RuntimeError(f"The undisturbed run failed: {done.told}")
        self.expected = (whole / "model.safetensors").read_bytes()
        self.steps = _logged(whole)
        fault = ledger_fault(whole)
        if fault:
            raise RuntimeError(f"The ledger of the undisturbed run is wrong: {fault}")

    def trial(self, number: int, kind: str) -> Trial:
        """Let one thing break, and perhaps another one after it, then resume to the end."""
        draw = random.Random(f"{self.seed}/{number}")
        trial = Trial(number)
        with self._place(kind, number) as place:
            out = place / "run"
            arguments = ["train", *OPTIONS, *MODEL, "--out", str(out)]
            after = kind if kind in BETWEEN else draw.choice(["", "", draw.choice(list(DAMAGE))])
            first = draw.choice(["SIGKILL to a rank", "SIGTERM to a rank"])
            wanted = [first if kind in BETWEEN else kind]
            if draw.random() < 0.3:
                wanted.append(draw.choice([k for k in victim.INSIDE if k not in NEED_NEIGHBOURS]))
            for turn, each in enumerate([*wanted, ""]):
                fault = self._fault(each, place, turn, draw) if each else None
                attempt = self._attempt(trial, arguments, fault, draw)
                self._judge(trial, attempt, each)
                if attempt.status == 0 or attempt.status is None:
                    break
                if kind in victim.OF_DISK:
                    self._repair(place)
                if turn == 0 and after:
                    if after == "started twice":
                        self._start_twice(trial, out, draw)
                    elif damage(out, after, draw):
                        trial.faults.append(after)
                if (out / "config.toml").exists():
                    arguments = ["train", "--resume", str(out), *MODEL, "--quiet"]
            self._inspect(trial, out)
        return trial

    @contextmanager
    def _place(self, kind: str, number: int) -> Iterator[Path]:
        place = self.root / f"trial-{number}"
        place.mkdir()
        on_disk = kind in victim.OF_DISK
        if on_disk:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=True
            )
        try:
            yield place
        finally:
            if on_disk:
                subprocess.run(["umount", "--lazy", str(place)], check=True)
            shutil.rmtree(place, ignore_errors=True)

    def _repair(self, place: Path) -> None:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        (place / "filled").unlink(missing_ok=True)

    def _fault(self, kind: str, place: Path, turn: int, draw: random.Random) -> victim.Fault:
        # On a small disk the file that is made once must lie elsewhere.
        once = self.root / f"{place.name}-once-{turn}"
        stage, step = draw.randrange(victim.STAGES), draw.randrange(len(ALL_STEPS))
        if kind == "raises in loader":  # only the first rank has one
            stage = 0
        return victim.Fault(kind, stage, step, draw.uniform(0, 0.05), str(once), str(place))

    def _attempt(
        self, trial: Trial, arguments: list[str], fault: victim.Fault | None, draw: random.Random
    ) -> Attempt:
        kind = fault.kind if fault else ""
        if kind in victim.OF_LAUNCHER or draw.random() < self.launcher:
            ranks = 0
            restarts = draw.choice([[], ["--max-restarts", "2"]])
            attempt = launched([*arguments, "--timeout", str(SILENCE), *restarts], fault)
        else:
            ranks = draw.randint(2 if kind in NEED_NEIGHBOURS else 1, victim.STAGES)
            more = ["--timeout", str(SILENCE)] if ranks > 1 else ["--processes", "1"]
            attempt = forked(ranks, [*arguments, *more], fault)
        trial.ranks.append(ranks)
        trial.attempts.append(attempt)
        if fault and Path(fault.once).exists():
            trial.faults.append(fault.kind)
        return attempt

    def _judge(self, trial: Trial, attempt: Attempt, kind: str) -> None:
        if attempt.status is None:
            trial.wrong.append(f"hung after {kind or 'nothing'}")
        if "Traceback" in attempt.err and kind not in IN_USERS_CODE:
            trial.wrong.append(f"a traceback after {kind or 'nothing'}: {attempt.err[-3000:]}")
        if attempt.status and not attempt.err.strip():
            dead = attempt.status < 0 and len(trial.ranks) and trial.ranks[-1] == 1
            if not dead and trial.ranks[-1]:
                trial.wrong.append(f"ended without a word after {kind or 'nothing'}")
        if kind in ("", *HARMLESS) and attempt.status:
            trial.wrong.append(f"ended after {kind or 'nothing'}: {attempt.told}")

    def _start_twice(self, trial: Trial, out: Path, draw: random.Random) -> None:
        """Resume it twice at once: one of the two must be refused, and the other one not care.

        That the second comes too late to be refused is no fault: the run has ended then.
        """
        once = self.root / f"{out.parent.name}-once-twice"
        fault = victim.Fault("SIGSTOP for a while", 0, 0, 0.0, str(once))
        words = ["-m", "scpl", "train", "--resume", str(out), *MODEL, "--processes", "1"]
        first = Forked(words, environment(**fault.variables()))
        deadline = time.monotonic() + LIMIT
        while not once.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        second = Forked(words, environment())
        statuses = []
        for process in (first, second):
            try:
                process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                trial.wrong.append("hung when started twice")
            process.end()
            statuses.append(process.returncode)
        trial.faults.append("started twice")
        if statuses[0] != 0 or statuses[1] not in (0, 2):
            said = [process.written()[1][-400:] for process in (first, second)]
            trial.wrong.append(f"started twice: {statuses}, {said}")

    def _inspect(self, trial: Trial, out: Path) -> None:
        """Look at what the run came to."""
        weights = out / "model.safetensors"
        if not weights.exists():
            trial.wrong.append(f"no weights: {trial.attempts[-1].told}")
            return
        if weights.read_bytes() != self.expected:
            trial.wrong.append("other bits")
        if fault := ledger_fault(out):
            trial.wrong.append(fault)
        if _logged(out) != self.steps:
            trial.wrong.append("other steps in steps.jsonl")
        if left := list(out.rglob("*.tmp")):
            trial.wrong.append(f"left behind: {left[0].name}")


def _logged(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def ledger_fault(out: Path) -> str:
    """Say what is wrong with the ledger of a run that ended: nothing, if each of its stages was
    trained on every step once, and the first on every sample once an epoch."""
    found = load_file(out / "model.safetensors")
    for stage in range(victim.STAGES):
        if int(found[f"{stage}.count"]) != len(ALL_STEPS):
            return f"stage {stage} was trained {int(found[f'{stage}.count'])} steps"
    epochs = found["0.ledger"].view(victim.EPOCHS, -1)
    first = epochs[0].sort().values
    if len(first.unique()) != victim.NUM_STEPS * victim.BATCH:
        return "a sample was trained on twice in an epoch"
    if not all(epoch.sort().values.equal(first) for epoch in epochs):
        return "epochs were trained on different samples"
    return ""


def kinds(*, root: bool) -> list[str]:
    """All that can break here: as root also disks."""
    found = [*victim.INSIDE, *victim.OF_LAUNCHER, *BETWEEN]
    return [*found, *victim.OF_DISK] if root else found
