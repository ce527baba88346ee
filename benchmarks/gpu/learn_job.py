"""What a job of learn.py is, where it runs, and what came of it.

Without torch, which takes seconds to import.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scpl.errors import InputError

PAPER = {
    "head": "mlp",
    "temperature": 0.1,
    "cross_entropy": 0.0,
    "standardise": False,
    "classifier_gradient": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "bp": {"method": "bp"},
    "scpl": {"method": "scpl"},
    "early-exit": {"method": "early-exit"},
    "predsim": {"method": "predsim"},
    "scpl-imitate": {"method": "scpl"},
    "scpl-paper": {"method": "scpl", **PAPER},
}
"""Settings by the names they have here, in the order in which they decide most."""


@dataclass(frozen=True)
class Job:
    """What is trained; everything that decides the numbers.

    Attributes:
        dataset: Its name.
        network: Its name.
        method: One of METHODS.
        seed: Of everything that is drawn.
        epochs: Passes over all training images.
        stages: Into how many the network is cut.
        batch_size: Images per mini-batch.
        image_size: Rows and columns; images of other sizes are resized.
        width: Factor on the channels.
        lr: The highest learning rate; None: the library's default.
        precision: Of the forward pass.
        every: Epochs between two tests.
    """

    dataset: str
    network: str
    method: str
    seed: int
    epochs: int
    stages: int = 4
    batch_size: int = 128
    image_size: int = 32
    width: float = 1.0
    lr: float | None = None
    precision: str = "bfloat16"
    every: int = 5

    @property
    def case(self) -> str:
        """What it has in common with the same job of other seeds."""
        return f"{self.dataset}-{self.network}-{self.method}"

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.case}-{self.seed}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """Read its result, of this or another machine; None if there is none.

        Raises:
            InputError: if the one that is there was made with other settings.
        """
        path = out / f"{self.name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        mine = asdict(self)
        other = [
            f"{key} {found['job'].get(key)} instead of {mine[key]}"
            for key in mine
            if found["job"].get(key) != mine[key]
        ]
        if other:
            raise InputError(
                "Results in one folder must be of the same settings",
                f"Got {path} with {', '.join(other)}",
                "Give the same flags, or another --out",
            )
        return found


@dataclass(frozen=True)
class Place:
    """Where and how a job runs; nothing of it decides what is learnt, but for rounding.

    Attributes:
        data: The file that `prepare` made.
        out: Folder of the results.
        checkpoints: Folder to go on from in a later call; None: a job that is cut short begins
            anew.
        device: Where to compute.
        graphs: Whether to replay captured CUDA graphs, where the library can.
        channels_last: Whether the weights of convolutions are laid out so.
        beside: How many other jobs may run on the device at the same time.
        until: When it must have ended, in seconds since 1970; None: no limit.
    """

    data: str
    out: str
    checkpoints: str | None
    device: str
    graphs: bool
    channels_last: bool = False
    beside: int = 0
    until: float | None = None

    def folder_of(self, job: Job) -> Path | None:
        """Where checkpoints of a job go; None if there are none."""
        return None if self.checkpoints is None else Path(self.checkpoints) / job.name
