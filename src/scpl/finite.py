"""A loss that is not finite ends the run before it spoils the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scpl.errors import NonFiniteError
from scpl.message import Tree, tensors_of

__all__ = ["BROKEN_FEATURES", "LossGuard"]

BROKEN_FEATURES = "its features already were not finite; "
LOOK_EVERY = 64
"""Steps between two looks at the losses of an accelerator: a look waits for the device."""


class LossGuard:
    """Looks at the losses of one stage.

    Args:
        stage: Its index, for messages.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._unchecked: list[tuple[int, Tensor]] = []

    def check(self, loss: Tensor, output: Tree, step: int) -> None:
        """Look at a loss: at once where that is free (CPU), elsewhere later, many at a time.

        Args:
            loss: A scalar.
            output: The features it was computed from, to tell which broke first.
            step: The training step, for messages.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        if loss.device.type != "cpu":
            self._unchecked.append((step, loss.detach()))
            if len(self._unchecked) >= LOOK_EVERY:
                self.look()
        elif not math.isfinite(loss.item()):
            broken = any(
                not t.isfinite().all() for t in tensors_of(output) if t.is_floating_point()
            )
            raise self._error(loss, step, BROKEN_FEATURES if broken else "")

    def look(self) -> None:
        """Look at the losses that were not looked at yet (one sync).

        Raises:
            NonFiniteError: naming the first step whose loss was NaN or infinite.
        """
        waiting, self._unchecked = self._unchecked, []
        if not waiting:
            return
        finite = torch.stack([loss for _, loss in waiting]).isfinite().tolist()
        for (step, loss), good in zip(waiting, finite, strict=True):
            if not good:
                raise self._error(loss, step, "")

    def _error(self, loss: Tensor, step: int, detail: str) -> NonFiniteError:
        return NonFiniteError(
            "The loss of every stage must be finite",
            f"Stage {self._stage} got {loss.item()} at step {step} ({detail}"
            "earlier checkpoints are kept)",
            "Check the data for NaN, lower the learning rate, or clip gradients",
        )
