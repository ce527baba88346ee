"""What every rank must know of the data; only the first one loads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scpl.run.build import Loaders

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """The data in numbers.

    Attributes:
        name: The data set.
        classes: Names of the classes.
        channels: Channels of an image.
        image_size: Its height and width.
        mean: What is subtracted from each channel.
        std: What each channel is divided by.
        train_images: Images per epoch.
        valid_images: Images held out.
        test_images: Images tested on at the end.
        steps: Mini-batches per epoch.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_images: int
    valid_images: int
    test_images: int
    steps: int

    @classmethod
    def of(cls, loaders: Loaders) -> Facts:
        """Read the facts off the data."""
        source = loaders.source
        return cls(
            source.name,
            tuple(source.classes),
            source.channels,
            source.image_size,
            tuple(source.mean),
            tuple(source.std),
            loaders.train.num_samples,
            loaders.valid.num_samples if loaders.valid else 0,
            loaders.test.num_samples,
            len(loaders.train),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        """Rebuild from `to_json`."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def describe_model(self, model: str, width: float) -> dict[str, Any]:
        """What is needed to use a trained network without its data set."""
        return {
            "model": model,
            "width": width,
            "num_classes": self.num_classes,
            "in_channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": list(self.classes),
        }
