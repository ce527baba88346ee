"""The kinds of data a run can be on. A kind is a module; this is all that others ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from scpl.app.config import EvalConfig, PredictConfig, TrainConfig
from scpl.app.kinds import images, texts
from scpl.app.kinds.base import Loader, Loaders
from scpl.data.text import is_text
from scpl.runs import RunFolder

__all__ = ["Kind", "kind_named", "kind_of"]


class Kind(Protocol):
    """What commands ask of a kind of data."""

    COLUMNS: tuple[str, ...]
    """What names an input in the output of `scpl predict`."""

    def loaders(self, config: TrainConfig) -> Loaders:
        """Load a data set and make its loaders."""

    def test_loader(
        self,
        config: EvalConfig,
        trained: TrainConfig,
        folder: RunFolder,
        description: Mapping[str, Any],
    ) -> Loader:
        """Load what a trained network is to be tested on."""

    def pending(
        self, config: PredictConfig, folder: RunFolder, description: Mapping[str, Any]
    ) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
        """Read what is to be classified: names of the inputs, and a batch of them."""


_KINDS: Mapping[str, Kind] = {"image": images, "text": texts}


def kind_of(config: TrainConfig) -> Kind:
    """Find the kind of a run's data."""
    return _KINDS["text" if config.text or is_text(config.data) else "image"]


def kind_named(description: Mapping[str, Any]) -> Kind:
    """Find the kind that a network's description names; images name none."""
    return _KINDS[description.get("kind", "image")]
