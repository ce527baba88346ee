"""What a method is: which objective each stage gets, and how predictions are read out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from torch import nn

from scpl.errors import InputError
from scpl.objectives import Objective

__all__ = ["Layout", "Method", "Site"]

Layout: TypeAlias = Literal["stages", "one", "replicas"]
"""Who holds the network: each rank some of its stages, one rank all of it, or every rank all."""


@dataclass(frozen=True)
class Site:
    """Where an objective is wanted.

    Attributes:
        index: The stage, from 0.
        num_stages: How many stages there are.
        feature_shape: Shape of one sample of the stage's features, without the batch.
        readout: The network's own classifier; only the last stage has it.
    """

    index: int
    num_stages: int
    feature_shape: tuple[int, ...]
    readout: nn.Module | None

    @property
    def is_last(self) -> bool:
        """Whether this is the stage that predicts."""
        return self.readout is not None


@dataclass(frozen=True)
class Method(ABC):
    """A way to train the stages.

    Attributes:
        num_classes: Number of classes; targets lie in ``0 .. num_classes - 1``.
    """

    name: ClassVar[str]
    cuts_gradients: ClassVar[bool] = True
    """False: the network is trained end to end (backpropagation)."""
    layout: ClassVar[Layout] = "stages"
    """Who holds the network when there are several ranks."""
    replaces_readout: ClassVar[bool] = False
    """Whether the last stage's `reader` predicts instead of the network's own read-out."""

    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise InputError("num_classes must be at least 2", f"Got {self.num_classes}")

    @property
    def has_exits(self) -> bool:
        """Whether every stage can predict: its objective has a `reader`."""
        return False

    @abstractmethod
    def objective(self, site: Site) -> Objective:
        """Build the objective of one stage; called once per stage."""
