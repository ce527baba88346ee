"""What tells why a stage does or does not learn, beside the loss itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scpl.rows import standardised, unit_rows

__all__ = ["observe_accuracy", "observe_contrast"]

# Shape suffixes: N = mini-batch, D = projected features.


@torch.no_grad()
def observe_contrast(
    projections: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    normalization: Literal["paper", "supcon"] = "paper",
    standardise: bool = False,
) -> dict[str, Tensor]:
    r"""Observe what a supervised contrastive loss compares; nothing waits for the device.

    The *chance level* is the loss that the same projections have on average if the positives of
    each anchor are drawn at random, as many as it has: they are then as similar to it as all other
    rows are. With :math:`P(a)`, :math:`d_a` and :math:`s_{ab}` as for the loss, it is the mean of

    .. math::
        \frac{|P(a)|}{d_a} \Big( \log \sum_{c \ne a} e^{s_{ac}}
        - \frac{1}{N - 1} \sum_{b \ne a} s_{ab} \Big)

    over the same anchors as the loss; for projections that are all equal this is
    :math:`\log(N - 1)` times the mean of :math:`|P(a)| / d_a`. So the loss minus its chance level
    says how much more similar an anchor is to its positives than to others.

    Args:
        projections: ``[N, D]``, as the head made them.
        target: Class of each row, ``[N]``.
        temperature: As for the loss, and so are the other arguments.
        normalization: Divisor of an anchor's loss.
        standardise: Whether columns are standardised before rows are compared.

    Returns:
        Scalars: ``above_chance`` (loss minus chance level: zero for a stage that knows nothing, the
        more negative the better), ``positives`` (mean number per anchor), ``without_positives``
        (share of the anchors) and ``spread``, the standard deviation of unit projections (before
        they are standardised) relative to :math:`1 / \sqrt D`, which is
        :math:`\sqrt{1 - |\bar z|^2}`: 1 if they point in all directions, 0 if they have
        collapsed to one.
    """
    with torch.autocast(projections.device.type, enabled=False):
        unit_ND = unit_rows(standardised(projections) if standardise else projections)
        same_NN = (target[:, None] == target).to(unit_ND.dtype)
        positives_N = same_NN.sum(dim=1) - 1
        itself_N = unit_ND.square().sum(dim=1)
        positive_N = ((same_NN @ unit_ND) * unit_ND).sum(dim=1) - itself_N  # sums of z_a z_b
        other_N = unit_ND @ unit_ND.sum(dim=0) - itself_N
        chance_N = other_N * positives_N / max(len(target) - 1, 1)
        excess_N = (chance_N - positive_N) / temperature
        without = (positives_N == 0).to(unit_ND.dtype).mean()
        if normalization == "paper":
            above = (excess_N / (positives_N + 1)).mean()
        else:
            anchors = (positives_N > 0).sum().clamp(min=1)
            above = (excess_N / positives_N.clamp(min=1)).sum() / anchors
        mean_D = unit_rows(projections).mean(dim=0) if standardise else unit_ND.mean(dim=0)
        return {
            "above_chance": above,
            "positives": positives_N.mean(),
            "without_positives": without,
            "spread": (1 - mean_D.square().sum()).clamp(min=0).sqrt(),
        }


@torch.no_grad()
def observe_accuracy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Say which share of a mini-batch logits ``[N, C]`` classify right: ``accuracy``."""
    return {"accuracy": (logits.argmax(dim=1) == target).float().mean()}
