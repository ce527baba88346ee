"""The configuration of a run: the one source of flags, recipe keys, defaults and help.

A setting is a field of one of the parts below; its name is a flag of the command line and a key of
a recipe. What else is known of it (which values it takes, which data it is for, what depends on it)
stands at the field, see `setting`. The options of a method come from its class.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_type_hints

import tomli_w

from scpl import models
from scpl.app.settings import (
    BATCH,
    LAYERS,
    MOST_OPTION,
    NOT_NEGATIVE,
    PASSES,
    PIXELS,
    POSITIVE,
    PROCESSES,
    PROPER_SHARE,
    SEED,
    SHARE,
    THREADS,
    TOKENS,
    TWO_OR_MORE,
    WEEK,
    WIDTH,
    WORDS,
    Decides,
    Samples,
    converted,
    read_toml,
    setting,
)
from scpl.engine.mesh import group_sizes
from scpl.errors import InputError, unknown_name
from scpl.files import as_utf8
from scpl.methods import METHODS
from scpl.methods.options import Option, constant_of, options_of
from scpl.models.own import read_arguments
from scpl.outside import shown
from scpl.runs.metrics import WATCHED

__all__ = [
    "FREE_IN_A_COMPARISON",
    "FREE_ON_RESUME",
    "MAIN",
    "PARTS",
    "Chosen",
    "DataConfig",
    "MethodConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "changed_settings",
    "flag",
    "in_flags",
    "method_options",
    "write_toml",
]

OptimizerName: TypeAlias = Literal["adam", "adamw", "sgd"]
ScheduleName: TypeAlias = Literal["cosine", "linear"]
MAIN = "main"
"""What --keep-best means by no name: the main metric of what is learnt."""


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, in which mini-batches."""

    data: str = "digits"
    """A known data set (digits, mnist, fashion-mnist, cifar10, cifar100, tiny-imagenet; ag_news,
    dbpedia_14, imdb, sst2), a folder of images with one folder per class, a table (CSV, TSV, JSON
    lines, parquet, Arrow) of texts or of names of images, a folder with tables train and test, or a
    folder that datasets saved."""
    data_dir: Path | None = setting(None, decides="nothing")
    """Where data sets lie; default: the environment variable SCPL_DATA."""
    limit_train: int | None = setting(None, POSITIVE)
    """Use only this many training samples (before the validation split), equally per class."""
    validation: float = setting(0.1, SHARE)
    """Share of the training samples held out to validate on, where none are given for that."""
    batch_size: int | None = setting(None, BATCH)
    """Samples per mini-batch; default: 64, and 32 for hf:..."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the losses of classifiers weigh rare classes (or rare labels that are there) more,
    as much more as they are rarer. Contrast has no weights."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: an epoch holds every sample once; balanced: it draws equally often from each class,
    from rare ones several times. For labels a class is the rarest label of a sample."""
    label_smoothing: float = setting(0.0, SHARE)
    """Share of the target that the losses of all classifiers spread evenly over classes; of labels,
    over there and not there. What validation and test measure stays as it is."""
    image_size: int | None = setting(None, PIXELS, samples="images")
    """images: resize them to this many pixels."""
    skip_unreadable: bool = setting(False, samples="images")
    """images: leave out those that cannot be read, and count them; else one is an error."""
    augmentation: Literal["none", "basic", "strong"] = setting("none", samples="images")
    """images: none; basic: random crop and flip; strong: basic with colour jitter and random
    grey."""
    views: Literal[1, 2] = setting(1, samples="images")
    """images: with 2, every mini-batch holds a weakly and a strongly augmented view of each."""
    in_memory: Literal["auto", "yes", "no"] = setting("auto", decides="speed")
    """yes: hold all samples in memory; no: decode images, and read the tokens of texts from a file,
    whenever a mini-batch needs them; auto: in memory if they take at most a quarter of what is
    free."""
    workers: int = setting(2, THREADS, samples="images", decides="speed")
    """images: so many threads decode what is not held in memory."""
    text: tuple[str, ...] = setting((), samples="texts")
    """texts: columns that make a text; default: text, sentence or content."""
    task: Literal["classes", "multi-label", "regression"] = setting("classes", samples="texts")
    """texts: what is learnt: one of several classes; any number of labels; or numbers."""
    image: str | None = setting(None, samples="images")
    """images: column of a table that names the files: paths from its folder or a folder in it, with
    their ending or without; default: the first column that does."""
    label: tuple[str, ...] = ()
    """tables: column of the class; default: label. multi-label: one column that lists labels (a
    JSON list, or separated by ; or |), or one of 0 and 1 for each label; regression: one or several
    of numbers."""
    test_data: Path | None = None
    """tables: another one to test on; default: the data set's own test split, or a share of it."""
    test_share: float = setting(0.2, PROPER_SHARE, samples="texts")
    """texts: share that is tested on, where there is no test split; the same in every run."""
    limit_test: int | None = setting(None, POSITIVE, samples="texts")
    """texts: test on only this many, equally per class; the same in every run."""
    tokens: Literal["words", "paper-words", "subwords"] = setting("words", samples="texts")
    """texts: words; words cut as the paper's code does; or byte-pair encoding. A network of
    transformers has its own tokenizer."""
    vocab_size: int = setting(30_000, WORDS, samples="texts")
    """texts: at most so many tokens are known, the most common ones of the training texts."""
    max_tokens: int | None = setting(None, TOKENS, samples="texts")
    """texts: so many tokens of a text are read; default: 350; for hf:... what its files say, and at
    most 512."""
    vectors: Path | None = setting(None, samples="texts", ours=True)
    """texts: file of word vectors to begin with, in the text format of GloVe or fastText."""


@dataclass(frozen=True)
class NetworkConfig:
    """Which network is trained, and where it is cut."""

    model: str = "small-cnn"
    """small-cnn, mlp, vgg8, resnet18, resnet34, resnet50, resnet18-3x3; texts: lstm,
    transformer. Or your own, package.module:function; of transformers, hf:FOLDER_OR_NAME; of timm,
    timm:NAME."""
    model_args: tuple[str, ...] = ()
    """For a network of your own: what the function gets besides num_classes and, if it asks for
    them, in_channels, image_size or vocab_size, e.g. width=32; hf: settings of its config."""
    width: float = setting(1.0, LAYERS, samples="images", ours=True)
    """images: factor on the channels of the network (hidden features of mlp)."""
    hidden: int | None = setting(None, WIDTH, samples="texts", ours=True)
    """texts: width of the layers; default: 300."""
    layers: int | None = setting(None, LAYERS, samples="texts", ours=True)
    """texts: layers between embedding and classifier; default: 3."""
    dropout: float | None = setting(None, SHARE, samples="texts", ours=True)
    """texts: share of the features that is dropped; default: 0 (lstm), 0.1 (transformer)."""
    heads: int | None = setting(None, WIDTH, samples="texts", model="transformer")
    """transformer: attention heads, which share the width equally; default: the most of up to 6."""
    hand_over: bool = setting(False, samples="texts", model="lstm")
    """lstm: begin each layer in the final state of the one before, as the paper does."""
    stages: int | None = setting(None, LAYERS)
    """How many stages the network is cut into; default: 4, for hf:... 2; lstm, transformer: as
    --layers."""
    cuts: tuple[str, ...] = ()
    """Layers that the second and later stages begin with, by their names in the network;
    default: stages of about equal cost."""
    balance: Literal["operations", "measured"] = "operations"
    """operations: stages with equal numbers of operations in their layers, the same cuts everywhere
    and every time; measured: layers, heads and updates are timed before the run (see scpl plan)."""
    freeze: tuple[str, ...] = ()
    """Layers or weights that keep the values they begin with, by dotted name; embeddings: those of
    any hf:... network. A stage of nothing else learns nothing and only passes on."""

    @property
    def num_stages(self) -> int:
        """How many stages the network is cut into."""
        if self.cuts:
            return len(self.cuts) + 1
        # A stage of nothing but an embedding could only learn from bags of words.
        if self.model in models.known_text():
            default = self.layers or 3
        else:
            default = 2 if models.origin_of(self.model) == "hf" else 4
        return default if self.stages is None else self.stages


@dataclass(frozen=True)
class MethodConfig:
    """How the stages learn; the options are those of the method's class.

    Attributes:
        method: Its name.
        options: The options that were given, by flag; for the others the method's default applies.
    """

    method: str = "scpl"
    options: Mapping[str, Any] = field(default_factory=dict)

    def for_method(self, method: str) -> MethodConfig:
        """The options that one method of several has."""
        known = {option.name for option in _options_of(method)}
        return MethodConfig(method, {k: v for k, v in self.options.items() if k in known})

    def resolved(self) -> MethodConfig:
        """Every option of the method, with its default where none was given."""
        own = {option.name: option.default for option in _options_of(self.method)}
        return MethodConfig(self.method, own | dict(self.options))

    def arguments(self) -> dict[str, Any]:
        """The options that were given, as the arguments of the method's class."""
        field_of = {option.name: option.field for option in _options_of(self.method)}
        return {field_of[name]: value for name, value in self.options.items()}

    def check(self, methods: Iterable[str]) -> None:
        """Check that each option is one of at least one of these methods.

        Raises:
            InputError: for an unknown method, or an option that none of them has.
        """
        methods = list(methods)
        usable = {option.name for method in methods for option in _options_of(method)}
        for name, value in self.options.items():
            if name not in usable:
                owners = ", ".join(method for method, _ in method_options()[name])
                raise InputError(
                    f"{flag(name)} is an option of: {owners}",
                    f"Got {flag(name)} {value} for {', '.join(methods)}",
                    "Leave it out, or choose one of these methods",
                )


def _options_of(method: str) -> tuple[Option, ...]:
    if method not in METHODS:
        raise unknown_name("--method", method, METHODS)
    return options_of(method)


def method_options() -> dict[str, list[tuple[str, Option]]]:
    """The options of all methods by flag, with the methods that have each."""
    found: dict[str, list[tuple[str, Option]]] = {}
    for method in METHODS:
        for option in options_of(method):
            found.setdefault(option.name, []).append((method, option))
    return found


@dataclass(frozen=True)
class OptimizerConfig:
    """How long and how fast it learns."""

    epochs: int | None = setting(None, PASSES)
    """Passes over the training samples; default: 10, and 3 for hf:..."""
    keep_best: str | None = None
    """The network of the run is that of the epoch with the best validation, and the last one lies
    in RUN/last: best by the main metric, or by another one that is named here; loss: the least."""
    patience: int | None = setting(None, PASSES)
    """Stop early: after so many epochs without a better validation; keeps the best, too."""
    optimizer: OptimizerName | None = None
    """Each stage has its own; sgd has momentum 0.9. Default: adam, and adamw for hf:..."""
    lr: float | None = setting(None, POSITIVE)
    """Highest learning rate; default: 0.005 for small-cnn, 0.003 for our other networks on images,
    0.001 for those on texts and for yours, 0.0001 for hf:...; 0.05 with sgd."""
    head_lr: float | None = setting(None, POSITIVE)
    """Highest learning rate of heads and classifiers, which start from nothing; default: as --lr,
    and at least 0.001 for hf:..., whose layers are trained already (not with sgd)."""
    schedule: ScheduleName | None = None
    """How the learning rate falls, after it has risen; default: cosine, and linear for hf:..."""
    warmup: float | None = setting(None, SHARE)
    """Share of the steps in which the learning rate rises to --lr; default: 0.05, and 0.1 for
    hf:..."""
    end_lr: float | None = setting(None, NOT_NEGATIVE)
    """Learning rate at the end; default: 0.00001, and 0 for hf:..."""
    lr_factors: tuple[float, ...] = ()
    """Factors on --lr and --end-lr, one for each stage, e.g. 0.1 0.3 1; default: 1 for all."""
    weight_decay: float | None = setting(None, NOT_NEGATIVE)
    """Weight decay of the optimizer; default: 0, and 0.01 for hf:... with adamw."""
    exempt_norms: bool | None = None
    """Keep weight decay off norms and biases: it is for what has two dimensions or more; default:
    so for hf:..., not for others."""
    clip_norm: float | None = setting(None, NOT_NEGATIVE)
    """Clip the gradient norm of each stage to this; 0: do not. Default: 0, and 1 for hf:..."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the forward pass; losses are always computed in float32, and scaled for float16."""
    send_as: Literal["unchanged", "bfloat16", "float16", "int8"] = "unchanged"
    """Type in which features go on from stage to stage in training; bfloat16 halves the traffic,
    int8 (each row by its largest value) quarters it. Schedules send gradients like that, too."""
    compile: bool = False
    """Compile each stage with torch.compile."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record the work of each stage on a CUDA device once, and replay it: for short steps, which
    take longer to launch than to compute. auto: for images and one process, where the network is
    not code of yours."""


@dataclass(frozen=True)
class Chosen:
    """The settings whose default depends on the network: what a run takes (`TrainConfig.chosen`).

    Attributes:
        epochs: Passes over the training samples.
        batch_size: Samples per mini-batch.
        max_tokens: So many tokens of a text are read, where the network has room for them.
        optimizer: Its name.
        lr: Highest learning rate of layers.
        head_lr: That of what objectives add, and of the classifier.
        schedule: How the rate falls.
        warmup: Share of the steps in which it rises before.
        end_lr: The rate of layers at the end.
        weight_decay: Of the optimizer.
        exempt_norms: Whether that is kept off norms and biases.
        clip_norm: What the norm of a stage's gradient is clipped to; 0: it is not.
    """

    epochs: int
    batch_size: int
    max_tokens: int
    optimizer: OptimizerName
    lr: float
    head_lr: float
    schedule: ScheduleName
    warmup: float
    end_lr: float
    weight_decay: float
    exempt_norms: bool
    clip_norm: float


FROM_SCRATCH = Chosen(
    epochs=10,
    batch_size=64,
    max_tokens=350,
    optimizer="adam",
    lr=1e-3,  # of networks for texts and of the user's own; those for images: see _usual
    head_lr=0.0,  # at least; and as the layers
    schedule="cosine",
    warmup=0.05,
    end_lr=1e-5,
    weight_decay=0.0,
    exempt_norms=False,
    clip_norm=0.0,
)
"""The defaults, chosen on validation data (docs/guide.md, "Defaults")."""

FINE_TUNING = Chosen(
    epochs=3,
    batch_size=32,
    max_tokens=512,  # at most; its files may say less
    optimizer="adamw",
    lr=1e-4,
    head_lr=1e-3,
    schedule="linear",
    warmup=0.1,
    end_lr=0.0,
    weight_decay=0.01,
    exempt_norms=True,
    clip_norm=1.0,
)
"""The defaults where layers are trained already, networks of ``transformers``."""

FINE_TUNING_OPTIONS: Mapping[str, Any] = {"head": "next", "cross_entropy": 1.0}
"""Options of methods there: without contrast, which slows the first hundred steps down."""

SGD_RATE = 0.05


def _usual(model: str, optimizer: OptimizerName | None) -> Chosen:
    """The defaults for a network, and an optimizer if the user names one."""
    origin = models.origin_of(model)
    usual = FINE_TUNING if origin == "hf" else FROM_SCRATCH
    if origin == "ours" and model not in models.known_text():
        usual = replace(usual, lr=5e-3 if model == "small-cnn" else 3e-3)
    if optimizer == "sgd":
        usual = replace(usual, lr=SGD_RATE, head_lr=0.0)
    if optimizer in ("adam", "sgd"):  # there it would be another thing, part of the gradient
        usual = replace(usual, weight_decay=0.0)
    return usual


@dataclass(frozen=True)
class RunConfig:
    """Where it runs, and what it leaves behind."""

    seed: int = setting(0, SEED)
    """Seed of everything that is drawn: weights, order, augmentation, dropout."""
    processes: int = setting(1, PROCESSES, decides="speed")
    """Processes that share the stages; started here, or by torchrun on several machines."""
    stages_per_process: tuple[int, ...] = setting((), decides="speed")
    """Stages on each process, or group of --replicas, e.g. 3 1; default: of about equal cost."""
    replicas: tuple[int, ...] = setting((), together=True)
    """How many processes host the same stages, each with its share of every mini-batch: 2, or for
    each group of stages its own number, e.g. 1 2 1; default: 1."""
    speeds: tuple[float, ...] = setting((), decides="speed")
    """How fast each process is beside the first, e.g. 1 0.5, for --balance measured, which cuts by
    it, and scpl plan; default: they are timed before the run; scpl plan: all are as fast."""
    depth: int = setting(2, TWO_OR_MORE, decides="speed")
    """Mini-batches in flight between two processes."""
    threads: int | None = setting(None, THREADS)
    """CPU threads per process; default: all cores, divided by the processes."""
    device: str = setting("auto", decides="speed")
    """auto, cpu, cuda, cuda:1, ...; on cuda processes of one machine take its GPUs in turn."""
    backend: Literal["auto", "gloo", "nccl"] = setting("auto", decides="speed", together=True)
    """What moves tensors between processes; auto: nccl where each has a GPU to itself, else gloo,
    which goes through the memory of the host."""
    timeout: float = setting(30.0, WEEK, decides="nothing", together=True)
    """Seconds after which a process that shows no sign of life counts as lost."""
    max_restarts: int = setting(0, NOT_NEGATIVE, decides="nothing", together=True)
    """Restart all processes this many times from the newest checkpoint if one fails."""
    out: Path | None = setting(None, decides="nothing")
    """Run folder; default: runs/<data>-<model>-<method>, numbered if it exists."""
    force: bool = setting(False, decides="nothing")
    """Overwrite an existing run folder."""
    resume: Path | None = setting(None, decides="nothing")
    """Continue an interrupted run folder, bit for bit."""
    checkpoint_every: int | None = setting(None, POSITIVE, decides="speed")
    """Steps between checkpoints; default: one at the end of each epoch."""
    keep: int = setting(2, POSITIVE, decides="nothing")
    """Checkpoints to keep."""
    trace: bool = setting(False, decides="nothing")
    """Write trace.json for Perfetto or chrome://tracing: what each process did when."""
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = setting((), decides="speed")
    """Log live for these tools, into the run folder: tensorboard; mlflow; wandb, offline. Each is a
    package of its own."""
    json: bool = setting(False, decides="nothing")
    """Print one JSON object on stdout; messages go to stderr."""
    quiet: bool = setting(False, decides="nothing")
    """Print nothing but warnings and errors."""
    dry_run: bool = setting(False, decides="nothing")
    """Check everything, train one step, print the stages, write nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """Train one network."""

    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """Build a configuration from settings by name; the others have their defaults."""
        return cls().changed(**settings)

    def changed(self, **settings: Any) -> TrainConfig:
        """Change settings by name, whichever part they belong to.

        Raises:
            InputError: for a name that is no setting.
        """
        parts: dict[str, dict[str, Any]] = {}
        options = {name: value for name, value in settings.items() if name not in _HOME}
        for name, value in settings.items():
            if name in _HOME:
                parts.setdefault(_HOME[name], {})[name] = value
            elif name not in method_options():
                raise unknown_name("A setting", name, [*_HOME, *method_options()])
        if options:
            parts.setdefault("method", {})["options"] = {**self.method.options, **options}
        return replace(self, **{k: replace(getattr(self, k), **own) for k, own in parts.items()})

    def settings(self) -> dict[str, Any]:
        """Every setting by name, and the options of the method that were given."""
        found: dict[str, Any] = {}
        for part, each in self._fields():
            found[each.name] = getattr(part, each.name)
            if part is self.method:
                found |= part.options
        return found

    def _fields(self) -> Iterator[tuple[Any, Field[Any]]]:
        """Every field that is a setting, with the part that holds it."""
        for name, part in PARTS.items():
            yield from ((getattr(self, name), each) for each in _settings_in(part))

    @property
    def rows(self) -> int:
        """Rows of a mini-batch: samples times views."""
        return self.chosen.batch_size * self.data.views

    @property
    def run_name(self) -> str:
        """What the folder of the run is called by default."""
        prefix, colon, inside = self.network.model.partition(":")
        model = Path(inside).name if colon else prefix
        return f"{Path(self.data.data).name}-{model}-{self.method.method}"

    def resolved(self) -> TrainConfig:
        """The same with what depends on the network, and all options of the method, written out.

        But for `max_tokens`, which is for texts alone, and which the files of a network may lower.
        """
        written = asdict(self.chosen) | {"max_tokens": self.data.max_tokens}
        return replace(self.changed(**written), method=self.suited.resolved())

    @property
    def suited(self) -> MethodConfig:
        """The method, with the options that suit the network where the user gives none."""
        method = self.method
        if models.origin_of(self.network.model) != "hf":
            return method
        known = {option.name for option in _options_of(method.method)}
        usual = {k: v for k, v in FINE_TUNING_OPTIONS.items() if k in known}
        # Who asks for a depth or a width asks for the head that has one.
        if {"head_depth", "head_width"} & method.options.keys():
            usual.pop("head", None)
        return replace(method, options={**usual, **method.options})

    @cached_property
    def chosen(self) -> Chosen:
        """What depends on the network: as the user says, else as suits it; for any method alike."""
        usual, values = _usual(self.network.model, self.optimizer.optimizer), self.settings()
        given = {
            each.name: values[each.name] for each in fields(Chosen) if values[each.name] is not None
        }
        decay = given.get("weight_decay", usual.weight_decay)
        follows = {
            "head_lr": max(given.get("lr", usual.lr), usual.head_lr),
            "exempt_norms": usual.exempt_norms and decay > 0,
        }
        return replace(usual, **{**follows, **given})

    def check(self, methods: Iterable[str] | None = None) -> None:
        """Check all values; ``methods`` are those that share them in a comparison.

        Raises:
            InputError: naming the flag, its value and what is allowed.
        """
        self._check_ranges()
        for part, each in self._fields():
            value, model = getattr(part, each.name), each.metadata.get("model")
            if value != each.default and model not in (None, self.network.model):
                raise InputError(
                    f"{flag(each.name)} must go with --model {model}",
                    f"Got --model {self.network.model}",
                    "Leave it out, or choose that network",
                )
        self._check_origin()
        alone, methods = methods is None, [self.method.method] if methods is None else list(methods)
        self.method.check(methods)
        self._check_stages()
        if self.network.balance == "measured":
            self._check_measured(alone=alone)
        elif self.run.speeds:
            raise InputError(
                "--speeds must go with --balance measured, which cuts by them",
                f"Got --speeds {' '.join(f'{speed:g}' for speed in self.run.speeds)} for --balance "
                "operations",
                "Leave it out, or measure",
            )
        self._check_balanced()
        if self.optimizer.keep_best not in (None, MAIN, *WATCHED):
            raise unknown_name("--keep-best", str(self.optimizer.keep_best), [MAIN, *WATCHED])
        self._check_learning(methods)
        if self.run.resume is None:  # what the run was started with may be for more processes
            self.check_together(TrainConfig())

    def _check_ranges(self) -> None:
        """Check each value alone."""
        for name, value in self.settings().items():
            texts = value if isinstance(value, tuple) else (value,)
            for text in texts:
                if isinstance(text, (str, Path)) and as_utf8(str(text)).decode() != str(text):
                    raise InputError(
                        f"{flag(name)} must be text in UTF-8, which config.toml can hold",
                        f"Got {shown(text)}",
                        "Rename the file or folder",
                    )
        for part, each in self._fields():
            value, takes = getattr(part, each.name), each.metadata.get("takes")
            if takes is not None and value is not None and not takes.holds(value):
                raise InputError(f"{flag(each.name)} {takes.rule}", f"Got {value}")
        for name, value in self.method.options.items():
            if isinstance(value, (int, float)) and not abs(value) <= MOST_OPTION:
                raise InputError(
                    f"{flag(name)} must be a number of at most {MOST_OPTION:,}", f"Got {value}"
                )

    def _check_measured(self, *, alone: bool) -> None:
        if not alone:
            raise InputError(
                "Methods that are compared must have the same cuts",
                "Got --balance measured, which may cut for each one elsewhere",
                "Find cuts with scpl plan, and give all of them these with --cuts",
            )
        if self.network.cuts or self.run.stages_per_process:
            raise InputError(
                "--balance measured chooses cuts, and the stages of each process",
                "Got " + ("--cuts" if self.network.cuts else "--stages-per-process"),
                "Leave one of them out; scpl plan says what given cuts cost",
            )
        if constant_of(self.method.method, "layout") != "stages":
            raise InputError(
                "--balance measured is for methods that train stages",
                f"Got {self.method.method}, which trains the whole network",
                "Leave it out",
            )

    def _check_balanced(self) -> None:
        chosen = self.data
        given = {"class_weights": chosen.class_weights, "sampling": chosen.sampling}
        wanted = [name for name, value in given.items() if value == "balanced"]
        for name in [*wanted, *(["label_smoothing"] if chosen.label_smoothing else [])]:
            if chosen.task == "regression":
                raise InputError(
                    f"{flag(name)} {getattr(chosen, name)} is for classes and labels",
                    "Got --task regression",
                    "Leave it out",
                )
        if len(wanted) > 1:
            raise InputError(
                "What is rare must be made up for once: by weights or by sampling",
                "Got --class-weights balanced and --sampling balanced",
                "Leave one of them out",
            )

    def _check_origin(self) -> None:
        """Check that nothing is set that the network, wherever it comes from, cannot use."""
        origin = models.origin_of(self.network.model)
        read_arguments(self.network.model_args)
        if origin == "ours" and self.network.model_args:
            raise InputError(
                "--model-args must go with a network of your own, of transformers or of timm",
                f"Got --model {self.network.model}",
                "Leave it out",
            )
        own_tokenizer = ("tokens", "vocab_size") if origin == "hf" else ()
        for part, each in self._fields():
            only_ours = origin != "ours" and each.metadata.get("ours")
            wrong = only_ours or each.name in own_tokenizer
            if wrong and getattr(part, each.name) != each.default:
                raise InputError(
                    f"{flag(each.name)} must go with a network that comes with scpl",
                    f"Got --model {self.network.model}",
                    "Leave it out; a network of your own gets its sizes by --model-args",
                )

    def check_together(self, before: TrainConfig) -> None:
        """Check that nothing which is for several processes is set now for a single one.

        Args:
            before: What was set before.

        Raises:
            InputError: naming the flags.
        """
        if self.run.processes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return
        changed = {
            name: value
            for name in _FOR_SEVERAL
            if (value := getattr(self.run, name)) != getattr(before.run, name)
        }
        wrong = [
            f"{flag(name)} {value:g}" if isinstance(value, float) else f"{flag(name)} {value}"
            for name, value in changed.items()
        ]
        if wrong:
            raise InputError(
                "Flags for several processes must go with --processes 2 or more, or torchrun",
                f"Got {' and '.join(wrong)} for one process",
                "Leave it out, or start several",
            )

    def alone(self) -> TrainConfig:
        """The same for one process: without what is for several."""
        return self.changed(processes=1, stages_per_process=(), **_FOR_SEVERAL)

    def _check_learning(self, methods: list[str]) -> None:
        """Check what depends on several settings of the optimizer, or on stages and methods."""
        chosen, stages = self.optimizer, self.network.num_stages
        if chosen.exempt_norms and self.chosen.weight_decay == 0:
            raise InputError(
                "--exempt-norms must go with a --weight-decay above 0",
                "Got no weight decay",
                "Leave it out, or set --weight-decay",
            )
        if chosen.send_as != "unchanged" and not any(
            constant_of(method, "layout") == "stages"
            and (constant_of(method, "cuts_gradients") or chosen.send_as != "int8")
            for method in methods
        ):
            raise InputError(
                "--send-as must go with a method whose stages learn from objectives of their own, "
                "or, in 16 bits, with a schedule",
                f"Got --send-as {chosen.send_as} for {', '.join(methods)}",
                "Leave it out, or use such a method, for instance scpl",
            )
        if not chosen.lr_factors:
            return
        if len(chosen.lr_factors) != stages or not all(map(POSITIVE.holds, chosen.lr_factors)):
            raise InputError(
                f"--lr-factors must give every one of the {stages} stages a number above 0",
                f"Got {' '.join(f'{factor:g}' for factor in chosen.lr_factors)}",
            )
        joined = [method for method in methods if constant_of(method, "layout") != "stages"]
        if joined:
            raise InputError(
                "--lr-factors must go with methods that keep the stages apart",
                f"Got {', '.join(joined)}, which train the network as one",
                "Leave it out, or use other methods, for instance bp-cut for bp",
            )

    def _check_stages(self) -> None:
        """Check what needs no network; ranks under torchrun check the rest."""
        cuts, stages = self.network.cuts, self.network.num_stages
        if cuts and self.network.stages not in (stages, None):
            raise InputError(
                "--cuts must name one layer fewer than there are stages",
                f"Got {len(cuts)} cuts and --stages {self.network.stages}",
            )
        groups, wanted = self._num_groups(), self.run.stages_per_process
        each = "groups of processes" if self.run.replicas else "processes"
        whole = constant_of(self.method.method, "layout") == "replicas"  # all hold all stages
        if groups > stages and not whole:
            raise InputError(
                "--processes must not exceed the number of stages"
                + (" times that of --replicas" if self.run.replicas else ""),
                f"Got {groups} {each} for {stages} stages",
                f"Use at most {stages}, or cut the network into more with --stages",
            )
        if wanted and (min(wanted) < 1 or sum(wanted) != stages):
            raise InputError(
                f"--stages-per-process must give every process at least one of the {stages} stages",
                f"Got {' '.join(map(str, wanted))}",
            )
        if wanted and groups not in (1, len(wanted)):
            raise InputError(
                "--stages-per-process must have one number per process, or group of --replicas",
                f"Got {len(wanted)} numbers for {groups} {each}",
            )

    def _num_groups(self) -> int:
        """How many groups of processes host the same stages; without --replicas each by itself."""
        processes, replicas = self.run.processes, self.run.replicas
        if processes == 1 or not replicas:  # torchrun knows how many there are
            return processes
        if not constant_of(self.method.method, "cuts_gradients"):
            raise InputError(
                "--replicas need a method whose stages learn from objectives of their own",
                f"Got {self.method.method}",
                "Leave it out; ddp has replicas of the whole network",
            )
        return len(group_sizes(replicas, processes))

    def check_samples(self, samples: Samples) -> None:
        """Check that data of this kind can use all that was set.

        Raises:
            InputError: naming the flags that are for other data.
        """
        wrong = [
            flag(each.name)
            for part, each in self._fields()
            if each.metadata.get("samples") not in (None, samples)
            and getattr(part, each.name) != each.default
        ]
        if wrong:
            other = "texts" if samples == "images" else "images"
            raise InputError(
                f"{', '.join(wrong)} must go with a data set of {other}",
                f"Got {self.data.data}, which holds {samples}",
                "Leave it out, or choose other data",
            )

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read the configuration of a run, or a recipe of one.

        Raises:
            InputError: if it cannot be read, or a key or value is not known.
        """
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str) -> TrainConfig:
        """Build a configuration from the keys of a recipe; ``origin`` is its file.

        Raises:
            InputError: for an unknown key, or a value of the wrong type or out of its range.
        """
        types = {name: each[0][1].type for name, each in method_options().items()}
        for part in PARTS.values():
            types |= {each.name: get_type_hints(part)[each.name] for each in _settings_in(part)}
        accepted: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in types:
                raise unknown_name(f"A key of {origin}", key, types)
            if name == "label" and isinstance(value, str):  # earlier versions had only one
                value = (value,)
            accepted[name] = converted(value, types[name], f"{key!r} in {origin}")
        config = cls().changed(**accepted)
        config._check_ranges()  # a run folder's is used as it is
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a recipe that gives this configuration; absent means None."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.settings().items()
            if value is not None
        }


PARTS: dict[str, type[Any]] = {
    "data": DataConfig,
    "network": NetworkConfig,
    "method": MethodConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}


def _settings_in(part: type[Any]) -> list[Field[Any]]:
    return [each for each in fields(part) if each.name != "options"]


_HOME = {each.name: name for name, part in PARTS.items() for each in _settings_in(part)}
"""The part that holds each setting."""


_FOR_SEVERAL = {
    each.name: each.default for each in _settings_in(RunConfig) if each.metadata.get("together")
}
"""What is for several processes, with its defaults."""


def _free(*decides: Decides) -> frozenset[str]:
    return frozenset(
        each.name
        for part in PARTS.values()
        for each in _settings_in(part)
        if each.metadata.get("decides", "numbers") in decides
    )


FREE_ON_RESUME = _free("speed", "nothing")
"""What may differ when a run is resumed: it does not change the numbers on a CPU."""
FREE_IN_A_COMPARISON = _free("nothing")
"""What may differ between runs of one table: neither numbers nor speed depend on it."""


def changed_settings(
    before: TrainConfig, now: TrainConfig, ignored: Set[str] = FREE_ON_RESUME
) -> list[str]:
    """List the settings that differ; by default those that decide the numbers of a run."""
    old, new = before.resolved().to_dict(), now.resolved().to_dict()
    return [
        f"{flag(name)} {new.get(name)} (was {old.get(name)})"
        for name in sorted(new.keys() | old.keys())
        if name not in ignored
        and new.get(name) != old.get(name)
        # Without a wish for a number of threads or of tokens, that of the run is as good as any.
        and not (name in ("threads", "max_tokens") and name not in new)
    ]


def flag(name: str) -> str:
    """Write a setting as the flag a user types."""
    return f"--{name.removeprefix('num_').replace('_', '-')}"


def in_flags(message: str) -> str:
    """Write the arguments that a message of the library names in backticks as flags."""
    known = {*_HOME, *method_options()}

    def written(found: re.Match[str]) -> str:
        name = found[1].removeprefix("num_")
        return flag(name) if name in known else found[0]

    return re.sub(r"`(\w+)`", written, message)


def write_toml(config: TrainConfig) -> str:
    """Write a configuration as a recipe."""
    return tomli_w.dumps(
        {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()}
    )
