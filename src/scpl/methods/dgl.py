"""DGL: every stage learns from cross-entropy through a small auxiliary network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from scpl.errors import unknown_name
from scpl.heads import auxiliary
from scpl.heads.auxiliary import Auxiliary
from scpl.methods.base import CrossEntropy, Method, Objective, Site

__all__ = ["DGL"]


@dataclass(frozen=True)
class DGL(Method):
    """Decoupled greedy learning (Belilovsky et al. 2020), without its replay buffer.

    The last stage learns through the network's own read-out.
    """

    name: ClassVar[str] = "dgl"

    auxiliary: Literal["mlp", "mlp-sr", "cnn"] = "mlp"
    """Auxiliary network on feature maps, see `scpl.heads.auxiliary.build`."""

    def __post_init__(self) -> None:
        if self.auxiliary not in get_args(Auxiliary):
            raise unknown_name("auxiliary", self.auxiliary, get_args(Auxiliary))

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is not None:
            return CrossEntropy(site.readout)
        return CrossEntropy(auxiliary.build(self.auxiliary, site.feature_shape, site.num_classes))
