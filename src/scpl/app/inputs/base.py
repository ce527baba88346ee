"""The data of a run as mini-batches, whatever it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from scpl import models

__all__ = ["DataSummary", "ImageInputs", "Inputs", "Loader", "Loaders", "TextInputs", "inputs_of"]


class Loader(Protocol):
    """Mini-batches of one split, in an order that depends on seed and epoch alone."""

    def __len__(self) -> int:
        """Batches per epoch."""

    @property
    def num_samples(self) -> int:
        """Inputs per epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterators made from now on."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over ``(inputs, target)``."""

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate, beginning with batch number ``start``."""


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
    train: Loader
    valid: Loader | None
    test: Loader
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    initial: Callable[[], dict[str, Any]] = dict


class Inputs(Protocol):
    """What goes into a network."""

    @property
    def modality(self) -> str:
        """What one input is, in the singular: image, text."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the run folder that a prediction needs, beside network and weights."""

    def build(self, model: str, num_classes: int, **initial: Any) -> nn.Sequential:
        """Build a network that takes such inputs.

        Raises:
            InputError: for an unknown network, or one that takes others.
        """

    def example(self) -> Tensor:
        """Return two inputs of the right shape and type."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` random inputs of the largest size there is."""

    def describe(self) -> dict[str, Any]:
        """Return JSON values, for `inputs_of`."""


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
        return cls(
            values["vocab_size"],
            values["max_tokens"],
            tuple(values["text_columns"]),
            values["label_column"],
            values["fingerprint"],
            dict(values["sizes"]),
        )


def inputs_of(description: Mapping[str, Any]) -> Inputs:
    """Rebuild from `Inputs.describe`, which names no kind for images.

    Raises:
        KeyError, TypeError, ValueError: if the description is damaged.
    """
    found = TextInputs if description.get("kind") == "text" else ImageInputs
    return found.of(description)


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

    def describe_model(self, model: str) -> dict[str, Any]:
        """What is needed to use a trained network without its data set."""
        return {
            "model": model,
            "num_classes": self.num_classes,
            **self.inputs.describe(),
            "classes": list(self.classes),
        }
