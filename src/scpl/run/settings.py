"""Flags of the commands that use or compare trained runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import tyro

from scpl.errors import InputError
from scpl.run.config import TrainConfig, read_toml
from scpl.run.values import convert

__all__ = [
    "BenchConfig",
    "CompareConfig",
    "DoctorConfig",
    "EvalConfig",
    "ExportConfig",
    "PredictConfig",
    "names",
]


@dataclass(frozen=True)
class CompareConfig:
    """Train the same network with several methods and compare them.

    Every combination of method and seed is a run of its own process; methods alternate, so that
    a machine that gets slower hits all of them. Finished runs are kept: the same command goes on
    where it was interrupted.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """What every run has in common."""
    methods: str = "scpl,early-exit,bp"
    """Methods, separated by commas; or all."""
    seeds: str = "0"
    """Seeds, separated by commas."""
    equal: Literal["epochs", "time"] = "epochs"
    """What every method gets as much of; time: as many epochs as fit into the time that bp takes
    for --epochs, by samples/s measured in turns before the first run."""
    target: float | None = None
    """Validation accuracy to measure the time to, e.g. 0.85; default: 0.99 of the lowest that a
    run of bp ends with."""
    probe: bool = False
    """Also fit a linear read-out to the features after every stage of every run, and draw how
    accurate each is beside those of the other methods."""

    @classmethod
    def from_recipe(cls, path: Path | None) -> CompareConfig:
        """Read defaults from a recipe, which may also hold the flags of this command alone."""
        if path is None:
            return cls()
        values, hints = read_toml(path), get_type_hints(cls)
        own = {
            key: convert(values.pop(key), hints[key], f"{key!r} in {path}")
            for key in hints
            if key in values and key != "train"
        }
        return cls(TrainConfig.from_dict(values, str(path)), **own)


@dataclass(frozen=True)
class BenchConfig:
    """Measure how fast several methods train the same network, in turns on this machine.

    Every method's processes are started once and sleep; one method at a time trains a block of
    steps, forth and back through the list, so that a machine that gets slower hits all of them.
    Nothing is written: flags that concern a run folder have no effect.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """What every method trains."""
    methods: str | None = None
    """Methods, separated by commas; default: scpl,early-exit,bp, and with --processes above 1
    also bp-wide,bp-cut,gpipe,1f1b,ddp."""
    repeats: int = 7
    """Blocks of each method."""
    steps: int = 10
    """Timed steps of a block; more of them where a step takes only milliseconds."""
    synthetic: bool = False
    """Train on random images of the data set's shape: no files, no loading, no augmentation. Also
    done, and said, if the data set is not on this machine."""

    @classmethod
    def from_recipe(cls, path: Path | None) -> BenchConfig:
        """Read defaults from a recipe; what it says of `scpl compare` is not for a benchmark."""
        return cls(CompareConfig.from_recipe(path).train)

    def check(self) -> None:
        """Check the ranges of this command's own values.

        Raises:
            InputError: naming the flag, its value and what is allowed.
        """
        for name in ("repeats", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1", f"Got {getattr(self, name)}")
        for name in ("resume", "dry_run"):
            if getattr(self.train, name):
                given = f"--{name.replace('_', '-')}"
                raise InputError("A benchmark trains anew and writes nothing", f"Got {given}")


@dataclass(frozen=True)
class EvalConfig:
    """Test a trained run."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    data: str | None = None
    """Another data set of the same shape, or a table of labelled texts, all of which are tested;
    default: what the run was tested on."""
    data_dir: Path | None = None
    """Where data sets lie; default: the environment variable SCPL_DATA."""
    batch_size: int | None = None
    """Samples per mini-batch; default: as in training."""
    probe: bool = False
    """Also fit a linear read-out to the features after every stage, on the run's own images."""
    exit_threshold: float | None = None
    """Let a sample leave at the first stage that gives a class this probability, above 0 to 1;
    for runs whose stages all predict."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class PredictConfig:
    """Classify images or texts with a trained run; prints CSV, one line for each."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files, or folders of them; texts in quotes, or tables of them (CSV, TSV, JSON lines,
    parquet)."""
    text: tuple[str, ...] = ()
    """Text columns of tables; default: those of the training data."""
    top: int = 1
    """How many classes to print for each."""
    batch_size: int = 256
    """Images or texts per mini-batch."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object per line instead of CSV."""


@dataclass(frozen=True)
class ExportConfig:
    """Write the trained network, under its own state_dict keys, as safetensors."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    to: Path
    """File to write."""
    force: bool = False
    """Overwrite the file."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class DoctorConfig:
    """Show versions and devices, and what is wrong."""

    data_dir: Path | None = None
    """Where data sets lie; default: the environment variable SCPL_DATA."""
    json: bool = False
    """Print one JSON object on stdout."""


def names(text: str, what: str) -> list[str]:
    """Read a flag whose value is names separated by commas.

    Raises:
        InputError: if there is none, or one stands there twice.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or len(set(found)) != len(found):
        raise InputError(f"{what} must be different names separated by commas", f"Got {text!r}")
    return found
