"""Associated Learning: every stage brings its features near a code of the label."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from scpl import heads
from scpl.association import Association
from scpl.errors import InputError
from scpl.methods.base import Method, Site
from scpl.objectives import Objective

__all__ = ["AssociatedLearning"]


@dataclass(frozen=True)
class AssociatedLearning(Method):
    """Features and label meet half way (Kao & Chen 2021).

    The label is encoded stage by stage, and each stage's code travels down the line beside the
    features. The network's own read-out is not trained and not used: a prediction goes over the
    last stage's bridge and through all decoders, which `Pipeline.export` puts in its place.

    Attributes:
        num_classes: Number of classes.
        label_features: Length of a code.
        bridge: Builds a bridge from the shape of one sample's features to ``[N, label_features]``;
            a pooled two-layer network by default. Tanh follows, as in the encoders.
    """

    name: ClassVar[str] = "al"
    replaces_readout: ClassVar[bool] = True

    label_features: int = 128
    bridge: heads.Head | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_features < 1:
            raise InputError("label_features must be at least 1", f"Got {self.label_features}")

    @property
    def has_exits(self) -> bool:  # noqa: D102
        return True

    def objective(self, site: Site) -> Objective:  # noqa: D102
        build = self.bridge or heads.PooledMLP(out_features=self.label_features)
        bridge = nn.Sequential(build(site.feature_shape), nn.Tanh())
        encoder, decoder = self._encoder(site.index), self._decoder(site.index)
        earlier = [self._decoder(index) for index in range(site.index)]
        return Association(bridge, encoder, decoder, self.num_classes, earlier)

    def _encoder(self, index: int) -> nn.Module:
        """From the one-hot label, or the code of the stage before, to this stage's code."""
        first = index == 0
        linear = nn.Linear(self.num_classes if first else self.label_features, self.label_features)
        # Codes of different classes shall be as far apart on the last stage as on the first;
        # PyTorch's default weights bring them closer with each, and learning begins later.
        if first:
            nn.init.normal_(linear.weight)
        else:
            nn.init.xavier_normal_(linear.weight, nn.init.calculate_gain("tanh"))
        return nn.Sequential(linear, nn.Tanh())

    def _decoder(self, index: int) -> nn.Module:
        """From this stage's code to that of the stage before, or to logits."""
        if index == 0:
            return nn.Sequential(nn.Linear(self.label_features, self.num_classes))
        linear = nn.Linear(self.label_features, self.label_features)
        nn.init.xavier_normal_(linear.weight, nn.init.calculate_gain("tanh"))
        return nn.Sequential(linear, nn.Tanh())
