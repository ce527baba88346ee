"""The data of a run: images or texts. What else differs between them is asked of these two modules.

May import: config, and what app may import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from scpl.app.commands import EvalConfig, PredictConfig
from scpl.app.config import DataConfig, TrainConfig
from scpl.app.inputs import images, texts
from scpl.app.inputs.base import Loaders
from scpl.app.inputs.pending import Pending
from scpl.app.settings import Samples
from scpl.data.images import names_images
from scpl.data.loader import EpochLoader
from scpl.data.text import is_text
from scpl.runs import RunFolder

__all__ = ["Modality", "modality_named", "modality_of"]


class Modality(Protocol):
    """What commands ask of images or texts; each is a module."""

    SAMPLES: Samples
    """What the samples are."""
    COLUMNS: Mapping[str, Any]
    """What names an input in the output of `scpl predict`, with an example of each."""

    def loaders(self, config: TrainConfig) -> Loaders:
        """Load a data set and make its loaders."""

    def test_loader(
        self,
        config: EvalConfig,
        trained: TrainConfig,
        folder: RunFolder,
        description: Mapping[str, Any],
    ) -> EpochLoader:
        """Load what a trained network is to be tested on."""

    def pending(
        self, config: PredictConfig, folder: RunFolder, description: Mapping[str, Any]
    ) -> Pending:
        """Find what is to be predicted of."""


_MODALITIES: Mapping[str, Modality] = {"image": images, "text": texts}


def modality_of(config: DataConfig) -> Modality:
    """Find out whether a run's data are images or texts; of a table, whether it names images."""
    image = not is_text(config.data) or names_images(config.data)
    return _MODALITIES["image" if config.image or (image and not config.text) else "text"]


def modality_named(description: Mapping[str, Any]) -> Modality:
    """Find out what a network's description says; that of images says nothing."""
    return _MODALITIES[description.get("kind", "image")]
