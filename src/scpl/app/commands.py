"""The settings of the commands beside `scpl train`: each is a class whose fields are its flags.

Where a command trains, it holds the configuration of a run (`scpl.app.config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import tyro

from scpl.app.config import TrainConfig, flag
from scpl.app.settings import LAYERS, PASSES, POSITIVE, converted, read_toml
from scpl.errors import InputError, unknown_name
from scpl.methods import METHODS
from scpl.methods.options import constant_of

__all__ = [
    "BenchConfig",
    "CompareConfig",
    "DoctorConfig",
    "EvalConfig",
    "ExportConfig",
    "PlanConfig",
    "PredictConfig",
    "method_names",
    "names",
]

_SHARED = tyro.conf.arg(name="")  # its flags have no prefix


@dataclass(frozen=True)
class CompareConfig:
    """Train the same network with several methods and compare them.

    Every combination of method and seed is a run of its own process; methods alternate, so that
    a machine that gets slower hits all of them. Finished runs are kept: the same command goes on
    where it was interrupted.
    """

    train: Annotated[TrainConfig, _SHARED] = field(default_factory=TrainConfig)
    methods: str = "scpl,early-exit,bp"
    """Methods, separated by commas; or all."""
    seeds: str = "0"
    """Seeds, separated by commas."""
    equal: Literal["epochs", "time"] = "epochs"
    """What every method gets as much of; time: as many epochs as fit into the time that bp takes
    for --epochs, by samples/s measured in turns before the first run."""
    target: float | None = None
    """Validation accuracy to measure the time to, e.g. 0.85 (of labels: macro F1; of numbers: R2);
    default: 0.99 of the lowest that a run of bp ends with."""
    probe: bool = False
    """Also fit a linear classifier to the features after every stage of every run, and draw how
    accurate each is beside those of the other methods."""

    @classmethod
    def from_recipe(cls, path: Path | None) -> CompareConfig:
        """Read defaults from a recipe, which may also hold the flags of this command alone."""
        if path is None:
            return cls()
        values, types = read_toml(path), get_type_hints(cls)
        own = {
            key: converted(values.pop(key), types[key], f"{key!r} in {path}")
            for key in types
            if key in values and key != "train"
        }
        return cls(TrainConfig.from_dict(values, str(path)), **own)

    @classmethod
    def one_run(cls, path: Path, method: str | None) -> TrainConfig:
        """Read from a recipe what one run takes of it.

        Args:
            path: If it says which methods to compare, it may hold options of each of them; the
                run takes those of its own.
            method: The method of the run; None: that of the recipe.
        """
        recipe = cls.from_recipe(path)
        if "methods" not in read_toml(path):
            return recipe.train
        chosen = method or recipe.train.method.method
        recipe.train.method.check([*method_names(recipe.methods), chosen])
        return replace(recipe.train, method=recipe.train.method.for_method(chosen))


@dataclass(frozen=True)
class BenchConfig:
    """Measure how fast several methods train the same network, in turns on this machine.

    Every method's processes are started once and sleep; one method at a time trains a block of
    steps, forth and back through the list, so that a machine that gets slower hits all of them.
    Nothing is written: flags that concern a run folder have no effect.
    """

    train: Annotated[TrainConfig, _SHARED] = field(default_factory=TrainConfig)
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
            if not PASSES.holds(getattr(self, name)):
                raise InputError(f"--{name} {PASSES.rule}", f"Got {getattr(self, name)}")
        accumulation = self.train.method.options.get("accumulation", 1)
        if accumulation > 0 and self.steps % accumulation:  # else the method says what is wrong
            raise InputError(
                "--steps must be a multiple of --accumulation, or blocks would have unequal work",
                f"Got {self.steps} and {accumulation}",
            )
        for name in ("resume", "dry_run"):
            if getattr(self.train.run, name):
                raise InputError("A benchmark trains anew and writes nothing", f"Got {flag(name)}")


@dataclass(frozen=True)
class PlanConfig:
    """Measure what the parts of a network cost on this machine, and plan a run by it.

    Prints a table of stages: their layers, what each part of a step takes, what is handed on, and
    how long each process is expected to wait for the slowest one. It takes the flags of scpl train;
    with --cuts it says what these cost. Nothing is written.

    With --machines it simulates, from what was measured here, how fast the method, GPipe, 1F1B,
    zero-bubble, DDP and one machine alone would train on so many machines like this one, what each
    of them holds and sends, and how many of them help. Give them the --threads of one machine.
    """

    train: Annotated[TrainConfig, _SHARED] = field(default_factory=TrainConfig)
    machines: tuple[int, ...] = ()
    """Simulate training on so many machines; several numbers: on each. Without --stages the method
    has one stage on each machine."""
    link: tuple[str, ...] = ("loopback",)
    """How each machine is connected, both ways at once: a rate such as 200mbit or 10gbit, with a
    latency if it is not 0.1ms (1gbit,2ms); or loopback: 8 Gbit/s and 0.05 ms. One for all machines,
    or one for each."""

    def check(self) -> None:
        """Check all values.

        Raises:
            InputError: naming the flag, its value and what is allowed.
        """
        self.train.changed(balance="operations", speeds=()).check()
        for name in ("resume", "dry_run"):
            if getattr(self.train.run, name):
                raise InputError("A plan is made anew and writes nothing", f"Got {flag(name)}")
        if constant_of(self.train.method.method, "layout") != "stages":
            raise InputError(
                "A plan is for methods that train stages",
                f"Got {self.train.method.method}, which trains the whole network",
                "Choose another --method",
            )
        self._check_machines()

    def _check_machines(self) -> None:
        run, most = self.train.run, max(self.machines, default=0)
        if not self.machines:
            if self.link != ("loopback",):
                raise InputError(
                    "--link must go with --machines, on which training is simulated",
                    f"Got --link {' '.join(self.link)} without it",
                )
            return
        if not all(map(LAYERS.holds, self.machines)):
            raise InputError(
                f"--machines {LAYERS.rule}", f"Got {' '.join(map(str, self.machines))}"
            )
        if run.processes > 1 or run.stages_per_process:
            raise InputError(
                "--machines says for how many, and shares out the stages",
                "Got --processes, too" if run.processes > 1 else "Got --stages-per-process, too",
                "Leave one of them out",
            )
        if not constant_of(self.train.method.method, "cuts_gradients"):
            raise InputError(
                "--machines compares a local method with the others",
                f"Got --method {self.train.method.method}",
                "Choose for instance scpl",
            )
        for name, given in (("speeds", run.speeds), ("link", self.link[1:] and self.link)):
            if given and len(given) != most:
                raise InputError(
                    f"--{name} must say it for each of the {most} machines",
                    f"Got {' '.join(map(str, given))}",
                )
        if not all(map(POSITIVE.holds, run.speeds)):
            raise InputError(
                "--speeds must be above 0", f"Got {' '.join(f'{speed:g}' for speed in run.speeds)}"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Test a trained run."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    data: str | None = None
    """Another data set, or a table of labelled texts or images, or a folder of images by class, all
    of which are tested; classes are matched by name; default: what the run was tested on."""
    data_dir: Path | None = None
    """Where data sets lie; default: the environment variable SCPL_DATA."""
    batch_size: int | None = None
    """Samples per mini-batch; default: as in training."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and count them; default: as in training."""
    probe: bool = False
    """Also fit a linear classifier to the features after every stage, on the run's own data."""
    exit_threshold: float | None = None
    """Let a sample leave at the first stage that gives a class this probability, above 0 to 1 (of
    labels: that is so sure of each, there or not); for runs whose stages all predict."""
    exit_thresholds: tuple[float, ...] = ()
    """Also what several of these would come to: accuracy, and how many stages a sample goes through
    on average; with the accuracy of every exit by itself."""
    picture: Path | None = None
    """A PNG file to draw that into: accuracy against stages per sample."""
    model: str | None = None
    """The network as in training; needed if code of your own makes it (package.module:function),
    which is never run because a run folder says so."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class PredictConfig:
    """Predict of images or texts with a trained run; prints CSV, one line for each.

    A class is printed with its probability, of labels those above 0.5 with theirs, and numbers in
    the units of the training data. In CSV a text that a spreadsheet would take for a formula (it
    begins with = + - @, a tab or the end of a line, and is no number) has an apostrophe in front;
    JSON lines and Parquet hold every text as it is.
    """

    run: tyro.conf.Positional[Path]
    """Run folder."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files, or folders of them; texts in quotes; tables of texts or of names of images (CSV,
    TSV, JSON lines, parquet); - for standard input: one path, or one text, per line."""
    out: Path | None = None
    """Write a file instead of printing: .csv, .jsonl or .parquet. It is there when all is done, or
    not at all."""
    force: bool = False
    """Overwrite what is there."""
    text: tuple[str, ...] = ()
    """Text columns of tables; default: those of the training data."""
    image: str | None = None
    """Column of tables that names images; default: the first column that does."""
    keep: tuple[str, ...] = ()
    """Columns of tables that are written before the prediction, as text: an id, for instance."""
    stdin: Literal["lines", "csv", "tsv", "jsonl", "parquet"] = "lines"
    """texts: what - holds: a text per line, or a table, which is copied to a temporary file."""
    top: int = 1
    """classes: how many to print for each."""
    exit_threshold: float | None = None
    """Let an input leave at the first stage that gives a class this probability, above 0 to 1, and
    print how many stages it went through; for runs whose stages all predict."""
    model: str | None = None
    """The network as in training; needed if code of your own makes it (package.module:function),
    which is never run because a run folder says so."""
    batch_size: int = 256
    """Images or texts per mini-batch; each is written when it is done, so 1 answers at once."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    json: bool = False
    """Print one JSON object per line instead of CSV."""


@dataclass(frozen=True)
class ExportConfig:
    """Write the trained network for others to load.

    As safetensors it has its own state_dict keys; one of transformers becomes a folder that
    from_pretrained loads. Any format is compared with the network before it is kept.
    """

    run: tyro.conf.Positional[Path]
    """Run folder."""
    to: Path
    """File to write; for a network of transformers, as safetensors: folder."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """safetensors: weights; torch-export: a program for torch.export.load; onnx: needs the packages
    onnx and onnxscript. Programs take batches of any size, and texts of any length."""
    force: bool = False
    """Overwrite what is there."""
    model: str | None = None
    """The network as in training; needed if code of your own makes it (package.module:function),
    which is never run because a run folder says so."""
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


def method_names(text: str) -> list[str]:
    """Read ``--methods``: names separated by commas, or ``all``.

    Raises:
        InputError: if one is not known or stands there twice.
    """
    if text.strip() == "all":
        return list(METHODS)
    methods = names(text, "--methods")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("--methods", method, [*METHODS, "all"])
    return methods
