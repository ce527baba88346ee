"""What the objective of a stage reads of the values that the stage hands on.

A stage may hand on several tensors: hidden vectors, a mask, a value that skips over the next
stages. Heads and local classifiers want one tensor with a row per sample. The rule:

- the **main value** is the one that the stage computed last;
- vectors ``[N, C]`` and maps ``[N, C, H, W]`` are read as they are;
- of a sequence ``[N, L, C]`` the mean over the tokens is read, ``[N, C]``; what the network's mask
  calls padding does not count;
- anything larger is averaged over all but the first two dimensions.

``scpl.split(..., features=)`` replaces the last three points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor, nn

from scpl.partition.values import Tree, tensors_of

__all__ = ["Features", "ReadThen", "Reading", "first_token", "mean_of_tokens", "summarized"]

Features: TypeAlias = Callable[[Tensor, "Tensor | None"], Tensor]
"""From the main value ``[N, ...]`` and the mask ``[N, L]`` (True: a token; None: there is no mask)
to what an objective reads, ``[N, ...]`` with sizes that do not depend on the batch."""


def mean_of_tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """Average a sequence ``[N, L, C]`` over its tokens, without padding: ``[N, C]``."""
    if mask is None:
        return value.mean(dim=1)
    kept = mask.unsqueeze(2)
    count = kept.sum(dim=1).clamp(min=1)
    return value.masked_fill(~kept, 0.0).sum(dim=1) / count.to(value.dtype)


def first_token(value: Tensor, mask: Tensor | None) -> Tensor:
    """Take the first token of a sequence ``[N, L, C]``, the class token of many networks.

    What is no sequence is read by the rule above.
    """
    return value[:, 0] if value.ndim == 3 else summarized(value, mask)


def summarized(value: Tensor, mask: Tensor | None) -> Tensor:
    """Read a value by the rule above."""
    if value.ndim == 3:
        return mean_of_tokens(value, mask)
    return value.flatten(2).mean(dim=2) if value.ndim > 4 else value


@dataclass(frozen=True)
class Reading:
    """Reads what a stage hands on: the main value, its mask if there is one, and other values.

    Attributes:
        features: How it is read.
        batch: Which dimension of the main value is the batch.
        has_mask: Whether a mask ``[N, L]`` comes second.
        marks_padding: Whether the mask is True (or not zero) where padding is.
    """

    features: Features = summarized
    batch: int = 0
    has_mask: bool = False
    marks_padding: bool = False

    def __call__(self, values: Tree) -> Tensor:
        """Read ``[N, ...]``."""
        main, *others = tensors_of(values)
        mask = others[0] != 0 if self.has_mask else None
        if mask is not None and self.marks_padding:
            mask = ~mask
        return self.features(main.movedim(self.batch, 0), mask)


@final
class ReadThen(nn.Module):
    """Reads what a stage hands on, and gives it to a module.

    Args:
        reading: From what a stage hands on to one tensor ``[N, ...]``.
        module: Takes that.
    """

    def __init__(self, reading: Callable[[Tree], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.reading = reading
        self.module = module

    def forward(self, values: Tree) -> Tensor:
        """Compute what the module makes of the values."""
        result: Tensor = self.module(self.reading(values))
        return result
