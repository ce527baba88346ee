"""The data of a run as mini-batches, whatever it is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from scpl.run.inputs import Inputs

__all__ = ["Loader", "Loaders"]


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
