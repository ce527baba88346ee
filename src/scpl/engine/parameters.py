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
        objective: Those of them that belong to the stage's objective.

    Attributes:
        stage: The stage, from 0; for another learning rate, say.
        names: For each parameter its name in the user's network; those of heads, which are no part
            of it, begin with ``objective.``.
        in_objective: For each parameter whether it belongs to the stage's objective: to a head, or
            on the last stage to the network's own classifier. Copies of the network's layers in a
            head do not count: they learn like the layers.
    """

    def __init__(
        self,
        stage: int,
        named: Iterable[tuple[str, nn.Parameter]],
        objective: Iterable[nn.Parameter] = (),
    ) -> None:
        pairs, heads = list(named), set(map(id, objective))
        super().__init__(parameter for _, parameter in pairs)
        self.stage = stage
        self.names = tuple(name for name, _ in pairs)
        self.in_objective = tuple(id(parameter) in heads for parameter in self)

    def groups(
        self, weight_decay: float, *, exempt_norms: bool = True, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Make parameter groups: without weight decay of norms and biases, with a rate of heads.

        Args:
            weight_decay: Of what has at least two dimensions: matrices, kernels, embeddings.
            exempt_norms: False: weight decay is for everything.
            head_lr: Learning rate of what belongs to the objective and may start from nothing,
                where the layers are trained already. Default: that of the optimizer.

        Returns:
            Up to four groups for an optimizer, layers first. Each holds ``"stage"`` as well, which
            a scheduler finds in ``optimizer.param_groups``.
        """
        apart = head_lr is not None
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {
            (head, exempt): [] for head in (False, True) for exempt in (False, True)
        }
        for parameter, head in zip(self, self.in_objective, strict=True):
            found[apart and head, exempt_norms and parameter.ndim <= 1].append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": 0.0 if exempt else weight_decay,
                "stage": self.stage,
                **({"lr": head_lr} if head else {}),
            }
            for (head, exempt), parameters in found.items()
            if parameters
        ]
