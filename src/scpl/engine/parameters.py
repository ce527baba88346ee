"""The parameters of one stage, as its optimizer gets them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["StageParameters"]


class StageParameters(list[nn.Parameter]):
    """The parameters that one stage trains: a list that also knows where they belong.

    Args:
        stage: The stage, from 0.
        named: The parameters by name.

    Attributes:
        stage: The stage, from 0; for another learning rate, say.
        names: For each parameter its name in the user's network; those of heads, which are no part
            of it, begin with ``objective.``.
    """

    def __init__(self, stage: int, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        pairs = list(named)
        super().__init__(parameter for _, parameter in pairs)
        self.stage = stage
        self.names = tuple(name for name, _ in pairs)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Make parameter groups that keep weight decay off norms and biases.

        Args:
            weight_decay: Of what has at least two dimensions: matrices, kernels, embeddings.

        Returns:
            One or two groups for an optimizer. Each holds ``"stage"`` as well, which a scheduler
            finds in ``optimizer.param_groups``.
        """
        decayed = [parameter for parameter in self if parameter.ndim > 1]
        others = [parameter for parameter in self if parameter.ndim <= 1]
        return [
            {"params": parameters, "weight_decay": decay, "stage": self.stage}
            for parameters, decay in ((decayed, weight_decay), (others, 0.0))
            if parameters
        ]
