"""Flags of the commands that use or compare trained runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from scpl.errors import InputError
from scpl.run.config import TrainConfig, read_toml

__all__ = ["CompareConfig", "DoctorConfig", "EvalConfig", "ExportConfig", "PredictConfig"]


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
    """Methods, separated by commas."""
    seeds: str = "0"
    """Seeds, separated by commas."""

    @classmethod
    def from_recipe(cls, path: Path | None) -> CompareConfig:
        """Read defaults from a recipe; ``methods`` and ``seeds`` may be keys of it."""
        if path is None:
            return cls()
        values = read_toml(path)
        own = {key: values.pop(key) for key in ("methods", "seeds") if key in values}
        for key, value in own.items():
            if not isinstance(value, str):
                raise InputError(
                    f"{key!r} in {path} must be names separated by commas", f"Got {value!r}"
                )
        return cls(TrainConfig.from_dict(values, str(path)), **own)


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
