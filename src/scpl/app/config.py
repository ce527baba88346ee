"""The configuration of a run: the one source of flags, recipe keys, defaults and help.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from scpl.errors import InputError, unknown_name

__all__ = [
    "RUNTIME_FIELDS",
    "BenchConfig",
    "CompareConfig",
    "DoctorConfig",
    "EvalConfig",
    "ExportConfig",
    "PredictConfig",
    "TrainConfig",
    "convert",
    "flag",
    "given",
    "names",
    "read_toml",
    "write_toml",
]

TEXT_MODELS = ("lstm", "transformer")


@dataclass(frozen=True)
class TrainConfig:
    """Train one network."""

    data: str = "digits"
    """A known data set (digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet; ag_news,
    dbpedia_14, imdb, sst2), a folder of images with one folder per class, a table of texts (CSV,
    TSV, JSON lines, parquet), or a folder with tables train and test."""
    data_dir: Path | None = None
    """Where data sets lie; default: the environment variable SCPL_DATA."""
    limit_train: int | None = None
    """Use only this many training samples (before the validation split), equally per class."""
    image_size: int | None = None
    """Resize images to this many pixels."""
    validation: float = 0.1
    """Share of the training samples that is held out to validate on."""
    augmentation: Literal["none", "basic", "strong"] = "none"
    """none; basic: random crop and flip; strong: basic with colour jitter and random grey."""
    views: Literal[1, 2] = 1
    """2: every batch holds a weakly and a `augmentation`-augmented view of each image."""
    text: tuple[str, ...] = ()
    """texts: columns that make a text; default: text, sentence or content."""
    label: str | None = None
    """texts: column of the class; default: label."""
    test_data: Path | None = None
    """texts: a table to test on; default: the data set's own test split, or a share of it."""
    test_share: float = 0.2
    """texts: share that is tested on, where there is no test split; the same in every run."""
    tokens: Literal["words", "paper-words", "subwords"] = "words"
    """texts: words; words cut as the paper's code does; or byte-pair encoding."""
    vocab_size: int = 30_000
    """texts: at most so many tokens are known, the most common ones of the training texts."""
    max_tokens: int = 350
    """texts: so many tokens of a text are read."""
    vectors: Path | None = None
    """texts: file of word vectors to begin with, in the text format of GloVe or fastText."""

    model: str = "small-cnn"
    """small-cnn, mlp, vgg8, resnet18, resnet34, resnet50, resnet18-3x3, ...; texts: lstm,
    transformer."""
    width: float = 1.0
    """images: factor on the channels of the network (hidden features of mlp)."""
    hidden: int | None = None
    """texts: width of the layers; default: 300."""
    layers: int | None = None
    """texts: layers between embedding and classifier; default: 3."""
    dropout: float | None = None
    """texts: share of the features that is dropped; default: 0 (lstm), 0.1 (transformer)."""
    heads: int | None = None
    """transformer: attention heads, which share the width equally; default: the most of up to 6."""
    hand_over: bool = False
    """lstm: begin each layer in the final state of the one before, as the paper does."""
    stages: int | None = None
    """How many stages the network is cut into; default: 4; texts: as many as --layers."""
    cuts: tuple[str, ...] = ()
    """Layers that the second and later stages begin with; default: stages of about equal cost."""

    method: str = "scpl"
    """Local learning: scpl, early-exit, al, predsim, deinforeg, dascpl, dgl. End to end: bp (one
    process), bp-wide (one process with the cores of all), bp-cut, gpipe, 1f1b, zero-bubble (stages
    on several processes), ddp (replicas)."""
    temperature: float = 0.1
    """scpl, dascpl: temperature of the contrastive loss."""
    normalization: Literal["paper", "supcon"] = "paper"
    """scpl, dascpl: divide an anchor's loss by its positives + 1 (paper) or by its positives
    (supcon)."""
    head: Literal["conv", "pooled-mlp", "mlp", "linear", "identity"] = "conv"
    """scpl, dascpl: projection head; conv: strided convolutions, then pooled-mlp; mlp is the
    paper's, on flattened feature maps."""
    head_depth: int = 1
    """scpl, dascpl: convolutions of the conv head."""
    head_width: float = 1.0
    """scpl, dascpl: channels of the conv head, as a factor on those of the features."""
    cross_entropy: float = 0.8
    """scpl: share of cross-entropy, beside contrast, in a stage's loss: 0 (the paper's) to
    1 (no contrast)."""
    standardise: bool = True
    """scpl, dascpl: standardise projections over the mini-batch before they are contrasted."""
    label_smoothing: float = 0.0
    """scpl: share of the target that cross-entropies spread over all classes."""
    classifier_gradient: bool = True
    """scpl: let the network's own classifier teach the last stage's layers."""
    label_features: int = 128
    """al: length of a label's code."""
    similarity_weight: float = 0.99
    """predsim: weight of the similarities; the rest goes to the local classifier."""
    auxiliary: Literal["mlp", "mlp-sr", "cnn"] = "mlp"
    """dgl: network between a stage and its loss, on feature maps."""
    micro_batches: int = 4
    """gpipe, 1f1b, zero-bubble: equal slices of a mini-batch."""

    epochs: int = 10
    """Passes over the training samples."""
    batch_size: int = 128
    """Samples per mini-batch."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Each stage has its own; sgd has momentum 0.9."""
    lr: float = 1e-3
    """Learning rate at the start."""
    end_lr: float = 1e-5
    """Learning rate at the end, reached along a cosine."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer."""
    clip_norm: float | None = None
    """Clip the gradient norm of each stage to this."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward pass; losses are always computed in float32."""
    seed: int = 0
    """Seed of everything that is drawn: weights, order, augmentation, dropout."""

    processes: int = 1
    """Processes that share the stages; started here, or by torchrun on several machines."""
    spread: tuple[int, ...] = ()
    """Stages on each process, e.g. 3 1; default: of about equal cost."""
    depth: int = 2
    """Mini-batches in flight between two processes."""
    max_restarts: int = 0
    """Restart all processes this many times from the newest checkpoint if one fails."""
    timeout: float = 30.0
    """Seconds after which a process that shows no sign of life counts as lost."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads per process; default: all cores, divided by the processes."""
    out: Path | None = None
    """Run folder; default: runs/<data>-<model>-<method>, numbered if it exists."""
    force: bool = False
    """Overwrite an existing run folder."""
    resume: Path | None = None
    """Continue an interrupted run folder, bit for bit."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: one at the end of each epoch."""
    keep: int = 2
    """Checkpoints to keep."""
    trace: bool = False
    """Write trace.json for Perfetto or chrome://tracing: what each process did when."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    json: bool = False
    """Print one JSON object on stdout; messages go to stderr."""
    quiet: bool = False
    """Print nothing but warnings and errors."""
    dry_run: bool = False
    """Check everything, train one step, print the stages, write nothing."""

    @property
    def num_stages(self) -> int:
        """How many stages the network is cut into."""
        if self.cuts:
            return len(self.cuts) + 1
        # A stage of nothing but an embedding could only learn from bags of words.
        default = (self.layers or 3) if self.model in TEXT_MODELS else 4
        return default if self.stages is None else self.stages

    def check(self) -> None:
        """Check the ranges of all values.

        Raises:
            InputError: naming the flag, its value and what is allowed.
        """
        positive = ("epochs", "batch_size", "processes", "micro_batches", "keep", "lr",
                    "width", "head_width", "temperature", "label_features", "timeout",
                    "vocab_size", "max_tokens")  # fmt: skip
        optional = ("limit_train", "image_size", "threads", "checkpoint_every", "clip_norm",
                    "stages", "hidden", "layers", "heads")  # fmt: skip
        for name in positive + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not 0 < value < math.inf:
                raise InputError(f"{flag(name)} must be more than 0", f"Got {value}")
        for name in ("weight_decay", "end_lr", "max_restarts", "head_depth"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{flag(name)} must not be negative", f"Got {getattr(self, name)}")
        for name in ("similarity_weight", "cross_entropy"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{flag(name)} must lie in 0 .. 1", f"Got {getattr(self, name)}")
        for name in ("validation", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(
                    f"{flag(name)} must be a share, from 0 to below 1", f"Got {getattr(self, name)}"
                )
        if not 0.0 < self.test_share < 1.0:
            raise InputError(
                "--test-share must be a share, above 0 and below 1", f"Got {self.test_share}"
            )
        if self.cuts and self.stages not in (len(self.cuts) + 1, None):
            raise InputError(
                "--cuts must name one layer fewer than there are stages",
                f"Got {len(self.cuts)} cuts and --stages {self.stages}",
            )
        if not 0 <= self.seed < 2**63:
            raise InputError("--seed must lie in 0 .. 2**63 - 1", f"Got {self.seed}")
        self._check_spread()

    def _check_spread(self) -> None:
        """Check what needs no network; ranks under torchrun check the rest."""
        if self.depth < 2:
            raise InputError(
                "--depth must be at least 2: one mini-batch is worked on while the next travels",
                f"Got {self.depth}",
            )
        stages = self.num_stages
        if self.processes > stages and self.method != "ddp":  # whose replicas hold all stages
            raise InputError(
                "--processes must not exceed the number of stages",
                f"Got {self.processes} processes for {stages} stages",
                f"Use at most {stages}, or cut the network into more with --stages",
            )
        if self.spread and (min(self.spread) < 1 or sum(self.spread) != stages):
            raise InputError(
                f"--spread must give every process at least one of the {stages} stages",
                f"Got {' '.join(map(str, self.spread))}",
            )
        if self.spread and self.processes not in (1, len(self.spread)):
            raise InputError(
                "--spread must have one number per process",
                f"Got {len(self.spread)} numbers for {self.processes} processes",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> TrainConfig:
        """Build a configuration from the keys of a recipe.

        Args:
            values: Keys as in the class, hyphens allowed.
            origin: The file, for messages.

        Raises:
            InputError: for an unknown key or a value of the wrong type.
        """
        known = {f.name for f in fields(cls)}
        hints = get_type_hints(cls)
        accepted: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise unknown_name(f"A key of {origin}", key, known)
            accepted[name] = convert(value, hints[name], f"{key!r} in {origin}")
        return cls(**accepted)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a recipe that gives this configuration; absent means None."""
        plain = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in plain.items()
            if value is not None
        }


RUNTIME_FIELDS = frozenset(
    {"data_dir", "processes", "spread", "depth", "device", "timeout", "max_restarts",
     "out", "force", "resume", "checkpoint_every", "keep", "trace", "tensorboard", "json",
     "quiet", "dry_run"}
)  # fmt: skip
"""What may differ when a run is resumed: it does not change the numbers on a CPU."""


def given(config: TrainConfig, names: Iterable[str]) -> list[str]:
    """List the flags among these that are not at their default."""
    default = TrainConfig()
    return [flag(name) for name in names if getattr(config, name) != getattr(default, name)]


def flag(name: str) -> str:
    """Write a field as the flag a user types."""
    return f"--{name.replace('_', '-')}"


def write_toml(config: TrainConfig) -> str:
    """Write a configuration as a recipe."""
    return tomli_w.dumps(
        {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()}
    )


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


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: if it is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "A recipe must be an existing TOML file", f"Got {path}", "See `scpl recipes ls`"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("A recipe must be readable TOML", f"{path}: {error}") from error


def convert(value: Any, hint: Any, what: str) -> Any:
    """Check a recipe's value against the type of its field.

    Args:
        value: As it stands in the recipe.
        hint: The type of the field.
        what: Key and file, for messages.

    Raises:
        InputError: if the value is of another type.
    """
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options or isinstance(value, bool):
            raise InputError(
                f"{what} must be one of {', '.join(map(str, options))}", f"Got {value!r}"
            )
        return value
    if type(None) in options:
        return convert(value, next(o for o in options if o is not type(None)), what)
    if get_origin(hint) is tuple:
        kind = options[0]
        if not isinstance(value, (list, tuple)) or not all(type(v) is kind for v in value):
            raise InputError(f"{what} must be a list of {kind.__name__}", f"Got {value!r}")
        return tuple(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise InputError(f"{what} must be of type {getattr(hint, '__name__', hint)}", f"Got {value!r}")
