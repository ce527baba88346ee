"""The data of a run as mini-batches, whatever it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from scpl import models
from scpl.data.loader import EpochLoader

__all__ = ["DataSummary", "ImageInputs", "Inputs", "Loaders", "TextInputs", "inputs_of"]


@dataclass(frozen=True)
class Loaders:
    """The data of a run.

    Attributes:
        name: The data set.
        classes: Names of the classes.
        inputs: What goes into the network.
        train: Shuffled and augmented mini-batches.
        valid: The held-out share of the training samples, or None.
        test: The test samples; used once, at the end.
        notes: What the user should know of the data.
        files: Texts of the files that ``inputs`` names.
        initial: Makes what the network begins with instead of drawn weights, if the data has it.
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


@dataclass(frozen=True)
class ImageInputs:
    """Square images.

    Attributes:
        channels: Channels of an image.
        image_size: Its height and width.
        mean: What is subtracted from each channel.
        std: What each channel is divided by.
        width: Factor on the channels of the network.
    """

    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: float = 1.0
    modality: ClassVar[str] = "image"
    files: ClassVar[tuple[str, ...]] = ()

    def build(self, model: str, num_classes: int, **initial: Any) -> nn.Sequential:
        """Build a network for images."""
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
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ImageInputs:
        """Rebuild from `describe`."""
        mean, std = tuple(values["mean"]), tuple(values["std"])
        if not len(mean) == len(std) == values["in_channels"]:
            raise ValueError(f"mean and std have {len(mean)} and {len(std)} entries")
        width = values.get("width", 1.0)  # earlier versions had none
        return cls(values["in_channels"], values["image_size"], mean, std, width)


@dataclass(frozen=True)
class TextInputs:
    """Texts as numbers.

    Attributes:
        vocab_size: How many numbers there are, with padding and unknown.
        max_tokens: So many tokens of a text are read.
        text_columns: Columns of a table that make a text.
        label_column: Column of the class.
        fingerprint: Digest of the content of the files that were learnt from.
        sizes: Sizes of the network other than its own defaults.
    """

    vocab_size: int
    max_tokens: int
    text_columns: tuple[str, ...]
    label_column: str
    fingerprint: str
    sizes: Mapping[str, Any]
    modality: ClassVar[str] = "text"
    files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)

    def build(self, model: str, num_classes: int, **initial: Any) -> nn.Sequential:
        """Build a network for texts."""
        return models.build_text(
            model, num_classes=num_classes, vocab_size=self.vocab_size, **self.sizes, **initial
        )

    def example(self) -> Tensor:
        """Return two texts ``[2, 8]``, one of them padded."""
        tokens = torch.ones(2, 8, dtype=torch.int64)
        tokens[1, 5:] = 0
        return tokens

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw texts of full length ``int64 [count, max_tokens]``."""
        return torch.randint(1, self.vocab_size, (count, self.max_tokens), generator=generator)

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        return {"kind": self.modality, **values, "text_columns": list(self.text_columns)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TextInputs:
        """Rebuild from `describe`."""
        own = {each.name: values[each.name] for each in fields(cls)}
        return cls(**{**own, "text_columns": tuple(values["text_columns"])})


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
        classes: Names of the classes.
        inputs: What goes into the network.
        train_samples: Samples per epoch.
        valid_samples: Samples held out.
        test_samples: Samples tested on at the end.
        steps: Mini-batches per epoch.
        notes: What the user should know of the data.
    """

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    train_samples: int
    valid_samples: int
    test_samples: int
    steps: int
    notes: tuple[str, ...] = ()

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
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataSummary:
        """Rebuild from `to_json`."""
        classes, notes = tuple(values["classes"]), tuple(values["notes"])
        inputs = inputs_of(values["inputs"])
        return cls(**{**values, "classes": classes, "notes": notes, "inputs": inputs})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "inputs": self.inputs.describe()}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def noun(self) -> str:
        """What the samples are, in the plural."""
        return f"{self.inputs.modality}s"
