"""The data of a run as mini-batches, whatever it is of."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from scpl import models
from scpl.app.config import DataConfig, TrainConfig
from scpl.data.identity import Identities, changes, identities_of, identities_to_json
from scpl.data.images.dataset import check_normalisation
from scpl.data.images.decode import EIGHT_BITS, WhiteLevels
from scpl.data.known import EMBEDDED, IMAGE_SETS, TEXT_SETS
from scpl.data.loader import EpochLoader
from scpl.data.loader import Inputs as Batch
from scpl.data.text import WITH_ZEROS, Padding
from scpl.engine.scores import Evaluation
from scpl.errors import DataError
from scpl.runs.columns import PICTURE, SAMPLE, TEXT
from scpl.tasks import Classes, Task, task_of

__all__ = [
    "DataSummary",
    "ImageInputs",
    "Inputs",
    "Loaders",
    "TextInputs",
    "balanced_notes",
    "changed_data",
    "check_tested_on",
    "check_there",
    "drawn_from",
    "inputs_of",
    "measured",
    "shown_samples",
    "with_samples",
]


@dataclass(frozen=True)
class Loaders:
    """The data of a run.

    Attributes:
        name: The data set.
        classes: Names of the classes, or of labels or numbers: one for each output.
        inputs: What goes into the network.
        train: Shuffled and augmented mini-batches.
        valid: The held-out share of the training samples, or None.
        test: The test samples; used once, at the end.
        notes: What the user should know of the data.
        files: Texts of the files that ``inputs`` names, by name.
        initial: Makes what the network begins with instead of drawn weights, if the data has it.
        task: What is learnt.
        identities: What the splits of the data set are, by name.
    """

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    train: EpochLoader
    valid: EpochLoader | None
    test: EpochLoader
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    initial: Callable[[], dict[str, Any]] = dict
    task: Task = field(default_factory=Classes)
    identities: Identities = field(default_factory=dict)


@dataclass(frozen=True)
class ImageInputs:
    """Square images.

    Attributes:
        channels: Channels of an image.
        image_size: Its height and width.
        mean: What is subtracted from each channel.
        std: What each channel is divided by.
        width: Factor on the channels of the network.
        files: Files of the run folder that a prediction needs besides.
        white: What values of more than 8 bits are scaled by.
    """

    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: float = 1.0
    files: tuple[str, ...] = ()
    white: WhiteLevels = EIGHT_BITS
    modality: ClassVar[str] = "image"

    @property
    def offers(self) -> dict[str, Any]:
        """What a network that is not ours may ask for by name."""
        return {"in_channels": self.channels, "image_size": self.image_size}

    def build(self, model: str, num_classes: int, **initial: Any) -> nn.Sequential:
        """Build one of our networks for images."""
        return models.build(
            model,
            num_classes=num_classes,
            in_channels=self.channels,
            image_size=self.image_size,
            width=self.width,
            **initial,
        )

    def example(self) -> Tensor:
        """Return two black images ``[2, C, H, W]``."""
        return torch.zeros(2, self.channels, self.image_size, self.image_size)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw normalised images ``float32 [count, C, H, W]``."""
        shape = (count, self.channels, self.image_size, self.image_size)
        return torch.randn(*shape, generator=generator)

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "in_channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "width": self.width,
            "files": list(self.files),
            "white": list(self.white),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ImageInputs:
        """Rebuild from `describe`."""
        mean, std = tuple(values["mean"]), tuple(values["std"])
        check_normalisation(mean, std, values["in_channels"], "a network")
        width = values.get("width", 1.0)  # earlier versions had none
        files = tuple(values.get("files", ()))  # nor this
        white = WhiteLevels.of(values.get("white", EIGHT_BITS))  # nor this
        return cls(values["in_channels"], values["image_size"], mean, std, width, files, white)


@dataclass(frozen=True)
class TextInputs:
    """Texts as numbers.

    Attributes:
        vocab_size: How many numbers there are, with padding and unknown.
        max_tokens: So many tokens of a text are read.
        text_columns: Columns of a table that make a text.
        label_columns: Columns of what is learnt.
        sizes: Sizes of the network other than its own defaults.
        padding: How texts become a batch.
        files: Files of the run folder that a prediction needs besides.
    """

    vocab_size: int
    max_tokens: int
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    sizes: Mapping[str, Any]
    padding: Padding = WITH_ZEROS
    files: tuple[str, ...] = ("tokenizer.json",)
    modality: ClassVar[str] = "text"

    @property
    def offers(self) -> dict[str, Any]:
        """What a network that is not ours may ask for by name."""
        return {"vocab_size": self.vocab_size}

    def build(self, model: str, num_classes: int, **initial: Any) -> nn.Sequential:
        """Build one of our networks for texts."""
        return models.build_text(
            model, num_classes=num_classes, vocab_size=self.vocab_size, **self.sizes, **initial
        )

    def example(self) -> Batch:
        """Return two texts of up to 8 tokens, one of them padded."""
        length = min(8, self.max_tokens)
        return self.padding.rows([[1] * length, [1] * max(1, length - 3)])

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw texts of full length, ``max_tokens``."""
        shape = (count, self.max_tokens)
        return self.padding.rows(
            torch.randint(1, self.vocab_size, shape, generator=generator).tolist()
        )

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        padding = {**values["padding"], "parts": list(self.padding.parts)}
        names = ("text_columns", "label_columns", "files")
        lists = {name: list(getattr(self, name)) for name in names}
        return {"kind": self.modality, **values, **lists, "padding": padding}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TextInputs:
        """Rebuild from `describe`."""
        own = {
            each.name: values[each.name]
            for each in fields(cls)
            if each.name in values or each.default is MISSING  # earlier versions had fewer
        }
        for name in ("text_columns", "label_columns", "files"):
            if name in own:
                own[name] = tuple(own[name])
        if "padding" in own:
            padding = own["padding"]
            own["padding"] = Padding(padding["number"], padding["left"], tuple(padding["parts"]))
        return cls(**own)


Inputs: TypeAlias = ImageInputs | TextInputs
"""What goes into a network; ``files`` of the run folder are what a prediction needs besides."""


def inputs_of(description: Mapping[str, Any]) -> Inputs:
    """Rebuild what goes into a network from its description, which names no kind for images.

    Raises:
        KeyError, TypeError, ValueError: if the description is damaged.
    """
    text = description.get("kind") == "text"
    return TextInputs.of(description) if text else ImageInputs.of(description)


@dataclass(frozen=True)
class DataSummary:
    """The data in numbers.

    Attributes:
        name: The data set.
        classes: Names of the classes, or of labels or numbers: one for each output.
        inputs: What goes into the network.
        train_samples: Samples per epoch.
        valid_samples: Samples held out.
        test_samples: Samples tested on at the end.
        steps: Mini-batches per epoch.
        notes: What the user should know of the data.
        task: What is learnt.
        identities: What the splits of the data set are, by name.
    """

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    train_samples: int
    valid_samples: int
    test_samples: int
    steps: int
    notes: tuple[str, ...] = ()
    task: Task = field(default_factory=Classes)
    identities: Identities = field(default_factory=dict)

    @classmethod
    def of(cls, loaders: Loaders) -> DataSummary:
        """Read them off the data."""
        return cls(
            loaders.name,
            loaders.classes,
            loaders.inputs,
            loaders.train.num_samples,
            loaders.valid.num_samples if loaders.valid else 0,
            loaders.test.num_samples,
            len(loaders.train),
            loaders.notes,
            loaders.task,
            loaders.identities,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataSummary:
        """Rebuild from `to_json`."""
        classes, notes = tuple(values["classes"]), tuple(values["notes"])
        inputs, task = inputs_of(values["inputs"]), task_of(values["task"])
        made = {"classes": classes, "notes": notes, "inputs": inputs, "task": task}
        return cls(**{**values, **made, "identities": identities_of(values["identities"])})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        made = {"inputs": self.inputs.describe(), "task": self.task.to_json()}
        return {**values, **made, "identities": identities_to_json(self.identities)}

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or numbers: outputs of the network."""
        return len(self.classes)

    @property
    def noun(self) -> str:
        """What the samples are, in the plural."""
        return f"{self.inputs.modality}s"


def check_there(trained: TrainConfig) -> None:
    """Check that the data of a run is where it was in training.

    Raises:
        DataError: It is not.
    """
    learnt = trained.data.data
    path = Path(learnt).expanduser()
    if learnt not in (EMBEDDED, *IMAGE_SETS, *TEXT_SETS) and not path.exists():
        raise DataError(
            "The run's own data must be where it was in training",
            f"Looked for {learnt} and found nothing at {path.absolute()}",
            "Call scpl in the folder that it was called in then, or say where it is: --data",
        )


def check_tested_on(
    description: Mapping[str, Any],
    identities: Identities,
    classes: Sequence[str],
    name: str,
    noun: str,
) -> None:
    """Check that the data of a run are what it was tested on, so that the number is the same one.

    Args:
        description: Of the run, in ``model.json``.
        identities: What its data are now.
        classes: Their classes now.
        name: Of the data.
        noun: What the samples are, in the plural.

    Raises:
        DataError: They are not.
    """
    tested_on = {"test": identities["test"]}
    found = changed_data(description, {"data": identities_to_json(tested_on)}, noun, ("test",))
    before = description["classes"]
    for word, odd in (("new", set(classes) - set(before)), ("gone", set(before) - set(classes))):
        if odd:
            found.append(f"classes that are {word}: {', '.join(sorted(odd))}")
    if found:
        raise DataError(
            "What a run is tested on must be as it was in training",
            f"{name} has changed since: {'; '.join(found)}",
            f"Put the old data back, or test on what there is now: --data {name}",
        )


def changed_data(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    noun: str,
    splits: Sequence[str] = ("train", "valid", "test"),
) -> list[str]:
    """Say which data of a run are not what they were, and in what.

    Args:
        before: A description of the run, as in ``model.json``.
        now: Another one.
        noun: What the samples are, in the plural.
        splits: Which splits count.

    Returns:
        A phrase for each split that has changed; nothing of descriptions that say nothing of data.
    """
    if "data" not in before or "data" not in now:
        return []
    old, new = (
        {name: each for name, each in identities_of(one["data"]).items() if name in splits}
        for one in (before, now)
    )
    return changes(old, new, noun)


def fitted(kind: type[Task], config: DataConfig, targets: Tensor, num_outputs: int) -> Task:
    """Make the task of training targets, as configured."""
    return kind.fitted(
        targets,
        num_outputs,
        balanced=config.class_weights == "balanced",
        label_smoothing=config.label_smoothing,
    )


def balanced_notes(config: DataConfig, task: Task, names: Sequence[str]) -> tuple[str, ...]:
    """Say what is done for rare classes."""
    weights = task.told(names)
    told: tuple[str, ...] = (weights,) if weights else ()
    if config.sampling == "balanced":
        told += (f"Every epoch draws equally often from each {task.noun}",)
    return told


def drawn_from(config: DataConfig, task: Task, targets: Tensor) -> Tensor | None:
    """Return the classes that an epoch draws equally often from; None: it is just shuffled."""
    return task.strata(targets.cpu()) if config.sampling == "balanced" else None


def measured(test: Evaluation) -> dict[str, Any]:
    """Return what a test found, by the keys of ``summary.json``."""
    return {
        **{f"test_{name}": value for name, value in test.metrics.items()},
        **{f"test_{name}_interval": list(bounds) for name, bounds in test.intervals.items()},
        "test_loss": test.loss,
    }


_LONGEST = 600
"""Characters of a text that are shown."""


def shown_samples(loader: EpochLoader, places: Iterable[int]) -> list[dict[str, str]]:
    """Show the samples at some places of a loader's epoch: ``sample``, its name, and what it is.

    That is a ``text``, or a ``picture`` (PNG in base64).
    """
    found = []
    for name, text, picture in map(loader.show, places):
        # Names of files may be made of any bytes.
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        row = {SAMPLE: name}
        if text is not None:
            row[TEXT] = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        if picture is not None:
            row[PICTURE] = base64.b64encode(picture).decode()
        found.append(row)
    return found


def with_samples(
    details: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Name the samples of the mistakes in an account of predictions (`Task.details`)."""
    pairs = zip(details["mistakes"], samples, strict=True)
    return {**details, "mistakes": [{**mistake, **sample} for mistake, sample in pairs]}
