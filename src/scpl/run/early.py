"""`scpl eval --exit-threshold`: predict with early exits, and count who left where."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scpl.exits import ExitNetwork

__all__ = ["Exits"]


class Exits:
    """A network whose samples leave at a threshold, and a count of where they left.

    Args:
        network: Without a threshold any; else one with exits.
        threshold: Probability that is sure enough; None runs the whole network.
    """

    def __init__(self, network: nn.Module, threshold: float | None) -> None:
        self._network, self._threshold = network, threshold
        self._left: list[int] = []

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return logits ``[N, C]``."""
        if self._threshold is None:
            logits: Tensor = self._network(inputs)
            return logits
        assert isinstance(self._network, ExitNetwork)
        found = self._network.leave_early(inputs, self._threshold)
        counts = found.stages.bincount(minlength=self._network.num_stages).tolist()
        self._left = [a + b for a, b in zip(self._left or [0] * len(counts), counts, strict=True)]
        return found.logits

    def result(self, count: int) -> dict[str, Any]:
        """Return what early exits came to for so many samples; nothing without a threshold."""
        if self._threshold is None:
            return {}
        run = sum(left * (stage + 1) for stage, left in enumerate(self._left)) / count
        return {
            "exit_threshold": self._threshold,
            "exit_share": [left / count for left in self._left],
            "stages_per_sample": run,
            "stages_saved": 1 - run / len(self._left),
        }
