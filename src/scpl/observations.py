"""What tells why a stage does or does not learn, beside the loss itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scpl.functional import Compared
from scpl.rows import unit_rows

__all__ = ["observe_accuracy", "observe_contrast"]

# Shape suffixes: N = mini-batch, D = projected features.


@torch.no_grad()
def observe_contrast(
    compared: Compared, projections: Tensor, normalization: Literal["paper", "supcon"] = "paper"
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
        compared: What `scpl.functional.compare` made of the projections; not yet used by the loss.
        projections: ``[N, D]``, as the head made them.
        normalization: Divisor of an anchor's loss.

    Returns:
        Scalars: ``above_chance`` (loss minus chance level: zero for a stage that knows nothing, the
        more negative the better), ``positives`` (mean number per anchor), ``without_positives``
        (share of the anchors) and ``spread``, the standard deviation of unit projections (before
        they are standardised) relative to :math:`1 / \sqrt D`, which is
        :math:`\sqrt{1 - |\bar z|^2}`: 1 if they point in all directions, 0 if they have
        collapsed to one.
    """
    similarity_NN, positives_N = compared.similarity.detach(), compared.num_positives
    with torch.autocast(projections.device.type, enabled=False):
        other_N = similarity_NN.sum(dim=1) - similarity_NN.diagonal()
        chance_N = other_N * positives_N / max(len(positives_N) - 1, 1)
        excess_N = chance_N - compared.positive_sum.detach()
        if normalization == "paper":
            above = (excess_N / (positives_N + 1)).mean()
        else:
            anchors = (positives_N > 0).sum().clamp(min=1)
            above = (excess_N / positives_N.clamp(min=1)).sum() / anchors
        mean_D = unit_rows(projections.detach()).mean(dim=0)
        return {
            "above_chance": above,
            "positives": positives_N.mean(dtype=above.dtype),
            "without_positives": (positives_N == 0).mean(dtype=above.dtype),
            "spread": (1 - mean_D.square().sum()).clamp(min=0).sqrt(),
        }


@torch.no_grad()
def observe_accuracy(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Say which share of a mini-batch logits ``[N, C]`` classify right: ``accuracy``."""
    return {"accuracy": (logits.argmax(dim=1) == target).float().mean()}
