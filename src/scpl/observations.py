"""What tells why a stage does or does not learn from contrast, beside the loss itself."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["observe_accuracy", "observe_contrast"]

# Shape suffixes: N = mini-batch, D = projected features.


@torch.no_grad()
def observe_contrast(
    loss: Tensor,
    projections: Tensor,
    target: Tensor,
    normalization: Literal["paper", "supcon"],
) -> dict[str, Tensor]:
    r"""Judge a supervised contrastive loss; nothing waits for the device.

    If all projections were equal, every anchor with positives would have the loss
    :math:`|P(a)| / d_a \cdot \log(N - 1)`: the *chance level* of a batch is the mean of that,

    .. math::
        \log(N - 1) \cdot \tfrac{1}{N} \sum_a \tfrac{|P(a)|}{|P(a)| + 1}
        \text{ (paper)}, \qquad \log(N - 1) \text{ (supcon)},

    and zero for a batch without a single positive pair.

    Args:
        loss: What `scpl.functional.supervised_contrastive_loss` gave.
        projections: ``[N, D]``, as the head made them.
        target: Class of each row, ``[N]``.
        normalization: As for the loss.

    Returns:
        Scalars: ``above_chance`` (loss minus chance level: zero for a stage that knows nothing, the
        more negative the better), ``positives`` (mean number per anchor), ``without_positives``
        (share of the anchors) and ``spread``, the standard deviation of unit projections relative
        to :math:`1 / \sqrt D`, which is :math:`\sqrt{1 - |\bar z|^2}`: 1 if they point in all
        directions, 0 if they have collapsed to one.
    """
    loss = loss.detach()
    positives_N = (target[:, None] == target).sum(dim=1).to(loss.dtype) - 1
    without = (positives_N == 0).to(loss.dtype).mean()
    if normalization == "paper":
        weight = (positives_N / (positives_N + 1)).mean()
    else:
        weight = (without < 1).to(loss.dtype)
    with torch.autocast(loss.device.type, enabled=False):
        mean_D = functional.normalize(projections.detach().to(loss.dtype)).mean(dim=0)
    return {
        "above_chance": loss - math.log(max(len(target) - 1, 1)) * weight,
        "positives": positives_N.mean(),
        "without_positives": without,
        "spread": (1 - mean_D.square().sum()).clamp(min=0).sqrt(),
    }


@torch.no_grad()
def observe_accuracy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Say which share of a mini-batch logits ``[N, C]`` classify right: ``accuracy``."""
    return {"accuracy": (logits.argmax(dim=1) == target).float().mean()}
