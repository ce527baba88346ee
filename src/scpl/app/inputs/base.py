"""The data of a run as mini-batches, whatever it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from scpl import models
from scpl.app.config import DataConfig
from scpl.data.images.dataset import check_normalisation
from scpl.data.loader import EpochLoader
from scpl.data.loader import Inputs as Batch
from scpl.data.text import WITH_ZEROS, Padding
from scpl.tasks import Classes, Task, task_of

__all__ = [
    "DataSummary",
    "ImageInputs",
    "Inputs",
    "Loaders",
    "TextInputs",
    "balanced_notes",
    "drawn_from",
    "inputs_of",
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
    """

    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: float = 1.0
    files: tuple[str, ...] = ()
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
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ImageInputs:
        """Rebuild from `describe`."""
        mean, std = tuple(values["mean"]), tuple(values["std"])
        check_normalisation(mean, std, values["in_channels"], "a network")
        width = values.get("width", 1.0)  # earlier versions had none
        files = tuple(values.get("files", ()))  # nor this
        return cls(values["in_channels"], values["image_size"], mean, std, width, files)


@dataclass(frozen=True)
class TextInputs:
    """Texts as numbers.

    Attributes:
        vocab_size: How many numbers there are, with padding and unknown.
        max_tokens: So many tokens of a text are read.
        text_columns: Columns of a table that make a text.
        label_columns: Columns of what is learnt.
        fingerprint: Digest of the content of the files that were learnt from.
        sizes: Sizes of the network other than its own defaults.
        padding: How texts become a batch.
        files: Files of the run folder that a prediction needs besides.
    """

    vocab_size: int
    max_tokens: int
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    fingerprint: str
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
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataSummary:
        """Rebuild from `to_json`."""
        classes, notes = tuple(values["classes"]), tuple(values["notes"])
        inputs, task = inputs_of(values["inputs"]), task_of(values["task"])
        made = {"classes": classes, "notes": notes, "inputs": inputs, "task": task}
        return cls(**{**values, **made})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "inputs": self.inputs.describe(), "task": self.task.to_json()}

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or numbers: outputs of the network."""
        return len(self.classes)

    @property
    def noun(self) -> str:
        """What the samples are, in the plural."""
        return f"{self.inputs.modality}s"


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
