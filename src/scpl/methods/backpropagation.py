"""Backpropagation: the network as one stage, trained end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scpl.errors import InputError
from scpl.methods.base import Method, Site
from scpl.objectives import CrossEntropy, Objective

__all__ = ["Backpropagation"]


@dataclass(frozen=True)
class Backpropagation(Method):
    """Plain end-to-end training on one device, with the same loop around it.

    All stages are joined to one, so that the loop is exactly forward, cross-entropy, backward,
    step: the reference every other method is measured against.
    """

    name: ClassVar[str] = "bp"
    cuts_gradients: ClassVar[bool] = False

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is None:
            raise InputError(
                "Backpropagation must train the whole network as one stage",
                f"Got stage {site.index} of {site.num_stages} alone",
            )
        return CrossEntropy(site.readout)
