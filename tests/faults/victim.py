"""A network of the user that writes down what it is given, and breaks where it is told to.

Each stage keeps a ledger among its buffers: a fingerprint of every row that it was trained on, step
by step. Checkpoints hold it and `model.safetensors` does, so the ledger of a run that was
interrupted tells whether a step was trained twice, was skipped or got other rows.

The environment variable `FAULT` (JSON, see `Fault`) names what breaks, in which stage and at which
step. A fault happens once: `once` is a file that is made when it does.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import scpl.report
from scpl.data.loader import EpochLoader
from scpl.engine import checkpoint

VARIABLE = "FAULT"
STAGES = 4
BATCH = 32
EPOCHS = 3
NUM_STEPS = 8  # of an epoch
TRAIN_SAMPLES = 284  # of which a tenth validates
PAUSE = 1.0  # seconds that something takes its time without being broken


@dataclass(frozen=True)
class Fault:
    """What breaks, where and when.

    Attributes:
        kind: One of `KINDS`.
        stage: In the process of this stage.
        step: When this stage begins to train this step, counted from 0.
        delay: Seconds after that, for signals.
        once: A file that is made when it happens.
        folder: What checkpoints are written below, for those of disks.
    """

    kind: str
    stage: int
    step: int
    delay: float
    once: str
    folder: str = ""

    def variables(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def _signal(number: signal.Signals, fault: Fault, pid: int) -> None:
    """Send it a moment later, so that it comes anywhere in a step, a send or a checkpoint."""
    threading.Timer(fault.delay, os.kill, (pid, number)).start()


def _to_rank(number: signal.Signals) -> Callable[[Fault], None]:
    return lambda fault: _signal(number, fault, os.getpid())


def _to_launcher(number: signal.Signals) -> Callable[[Fault], None]:
    return lambda fault: _signal(number, fault, os.getppid())


def _pause(fault: Fault) -> None:
    subprocess.Popen(["sh", "-c", f"sleep {PAUSE}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_interpreter(seconds: int) -> Callable[[Fault], None]:
    """Native code that keeps the lock of the interpreter: no thread of ours runs meanwhile."""
    return lambda fault: ctypes.PyDLL(None).sleep(seconds) and None


def _segmentation_fault(fault: Fault) -> None:
    ctypes.string_at(0)


def _raise(fault: Fault) -> None:
    raise ValueError("broken on purpose")


def _too_large(fault: Fault) -> None:
    torch.empty(1 << 50)


def _out_of_memory(fault: Fault) -> None:
    """Nothing more can be allocated, by nobody in this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    kept = [torch.ones(1 << 20) for _ in range(1 << 20)]
    del kept


def _in_loss(fault: Fault) -> None:
    functional.cross_entropy = lambda *_, **__: _raise(fault)


def _in_loader(fault: Fault) -> None:
    def batches(self, start=0):
        raise OSError(errno.EIO, "broken on purpose")
        yield

    EpochLoader.batches = batches


def _next_part(act: Callable[[Path], object]) -> Callable[[Fault], None]:
    """Something happens when the next part of a checkpoint is written; the next ones are."""

    def install(fault: Fault) -> None:
        save = checkpoint._save

        def broken(state, path):
            checkpoint._save = save
            save(state, path)
            act(path)

        checkpoint._save = broken

    return install


def _io_error(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _die_with_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_rename(after: int) -> Callable[[Fault], None]:
    """Killed between two renames of a checkpoint: the manifest's, and that of its part."""

    def install(fault: Fault) -> None:
        replace, left = os.replace, [after]

        def broken(source, target, **options):
            if ".tmp" in str(source) and "step-" in str(source):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return replace(source, target, **options)

        os.replace = broken

    return install


def _fill_disk(fault: Fault) -> None:
    with open(Path(fault.folder) / "filled", "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def _read_only(fault: Fault) -> None:
    subprocess.run(["mount", "-o", "remount,ro", fault.folder], check=False)


INSIDE: dict[str, Callable[[Fault], None]] = {
    "SIGKILL to a rank": _to_rank(signal.SIGKILL),
    "SIGSTOP for ever": _to_rank(signal.SIGSTOP),
    "SIGSTOP for a while": _pause,
    "SIGTERM to a rank": _to_rank(signal.SIGTERM),
    "SIGINT to a rank": _to_rank(signal.SIGINT),
    "SIGHUP to a rank": _to_rank(signal.SIGHUP),
    "SIGABRT to a rank": _to_rank(signal.SIGABRT),
    "interpreter held for ever": _hold_interpreter(3600),
    "interpreter held for a while": _hold_interpreter(1),
    "segmentation fault": _segmentation_fault,
    "ends with status 0": lambda fault: os._exit(0),
    "raises in forward": _raise,
    "raises in backward": _raise,  # see `Recorded`
    "raises in loss": _in_loss,
    "raises in loader": _in_loader,
    "raises in checkpoint writer": _next_part(_io_error),
    "killed with half a part": _next_part(_die_with_half),
    "killed before the manifest": _die_at_rename(0),
    "killed after the manifest": _die_at_rename(1),
    "checkpoint takes long": _next_part(lambda path: time.sleep(PAUSE)),
    "allocation refused": _too_large,
    "out of memory": _out_of_memory,
}
OF_LAUNCHER = {
    "SIGKILL to the launcher": _to_launcher(signal.SIGKILL),
    "SIGTERM to the launcher": _to_launcher(signal.SIGTERM),
    "SIGINT to the launcher": _to_launcher(signal.SIGINT),
    "SIGHUP to the launcher": _to_launcher(signal.SIGHUP),
}
OF_DISK = {"full disk": _fill_disk, "read-only disk": _read_only}
"""Those of a small file system that is mounted at `Fault.folder`."""
OF_CABLE = dict.fromkeys(
    ("cable drops all for ever", "cable drops all for a while", "cable flaps", "cable is slow"),
    lambda fault: None,
)
"""Those of the cable between two machines: who made it sees the moment, and does it."""
KINDS = INSIDE | OF_LAUNCHER | OF_DISK | OF_CABLE


def _planned() -> Fault | None:
    return Fault(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None


def _is_due(fault: Fault | None, stage: int, step: int) -> bool:
    if fault is None or fault.stage != stage or step < fault.step:
        return False
    try:
        os.close(os.open(fault.once, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Recorded(nn.Module):
    """Layers of a stage, with the ledger of what they were trained on.

    Attributes:
        ledger: A fingerprint of each row of each step, ``float64 [steps, rows]``.
        count: How many steps there were, ``int64 []``.
    """

    def __init__(self, stage: int, layers: nn.Module) -> None:
        super().__init__()
        self.stage, self.layers = stage, layers
        self.register_buffer("ledger", torch.zeros(EPOCHS * NUM_STEPS, BATCH, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, rows):
        due = self.training and _is_due(_planned(), self.stage, int(self.count))
        if due and (fault := _planned()).kind != "raises in backward":
            KINDS[fault.kind](fault)
        if self.training:
            values = rows.detach().flatten(1).double()
            weights = torch.arange(1, values.shape[1] + 1, dtype=torch.float64).sqrt()
            self.ledger[self.count, : len(rows)] = values @ weights
            self.count += 1
        features = self.layers(rows)
        if due and fault.kind == "raises in backward":
            features.register_hook(lambda gradient: _raise(fault))
        return features


def network(num_classes, in_channels, image_size):
    scpl.report.write_run_report = lambda folder: ()  # to draw it takes longer than to train here
    width = 24
    sizes = [in_channels * image_size**2, *[width] * STAGES]
    stages = [
        Recorded(stage, nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()))
        for stage, inputs in enumerate(sizes[:-1])
    ]
    return nn.Sequential(*stages, nn.Linear(width, num_classes))
