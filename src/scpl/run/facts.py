"""What every rank must know of the data; only the first one loads it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from scpl.run.inputs import Inputs, inputs_of
from scpl.run.loaders import Loaders

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
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
    def of(cls, loaders: Loaders) -> Facts:
        """Read the facts off the data."""
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
    def from_json(cls, values: dict[str, Any]) -> Facts:
        """Rebuild from `to_json`."""
        classes, notes = tuple(values["classes"]), tuple(values["notes"])
        plain = {**values, "classes": classes, "notes": notes}
        return cls(**{**plain, "inputs": inputs_of(values["inputs"])})

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
        return f"{self.inputs.kind}s"

    def describe_model(self, model: str) -> dict[str, Any]:
        """What is needed to use a trained network without its data set."""
        return {
            "model": model,
            "num_classes": self.num_classes,
            **self.inputs.describe(),
            "classes": list(self.classes),
        }
