"""The supervised contrastive loss, and what is observed beside it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from scpl.errors import InputError, unknown_name
from scpl.losses.projections import check, standardised, unit_length

__all__ = [
    "Compared",
    "Normalization",
    "compare",
    "contrastive_loss",
    "observe_contrast",
    "supervised_contrastive_loss",
]

# Shape suffixes: N = mini-batch, D = projected features.

Normalization: TypeAlias = Literal["paper", "supcon"]


def supervised_contrastive_loss(
    projections: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    normalization: Normalization = "paper",
    standardise: bool = False,
) -> Tensor:
    r"""Pull projections of the same class together on the unit sphere, push all others apart.

    With projections of unit length :math:`z_a`, similarities :math:`s_{ab} = z_a \cdot z_b / T`
    and the positives :math:`P(a) = \{b \ne a : y_b = y_a\}` of anchor :math:`a`, the loss of one
    anchor is

    .. math::
        L_a = \frac{1}{d_a} \sum_{p \in P(a)} \Big( \log \sum_{c \ne a} e^{s_{ac}} - s_{ap} \Big).

    =============  =======================  ==============================================
    normalization  divisor :math:`d_a`      mean over
    =============  =======================  ==============================================
    ``"paper"``    :math:`|P(a)| + 1`       all N anchors; without a positive :math:`L_a = 0`
    ``"supcon"``   :math:`|P(a)|`           the anchors that have a positive
    =============  =======================  ==============================================

    Where two samples belong together more or less, :math:`w_{ap}` from 0 to 1 instead of all or
    nothing, the sum is weighted by it, and :math:`|P(a)|` is the sum of the weights.

    So where every anchor has P positives, ``"paper"`` is P / (P + 1) times ``"supcon"``. A batch
    without a single positive pair gives zero, and zero gradients. A projection of zeros has no
    direction: its similarity to all others is 0, and it receives no gradient.

    Projections are scaled to unit length here, and all arithmetic is float32 (float64 for float64
    input) whatever the input type and under autocast. Nothing waits for the device.

    Args:
        projections: Output of a projection head, ``[N, D]``, floating point, of any length.
        target: Class of each sample, ``[N]``, an integer type; or how much each two samples belong
            together, ``[N, N]``, floating point, from 0 to 1, of which the diagonal is left out.
        temperature: T, without unit; above zero. Smaller values weigh near samples more.
        normalization: Divisor of an anchor's loss, see the table.
        standardise: Give every column mean 0 and deviation 1 over the mini-batch before projections
            are scaled: what all of them have in common tells no class.

    Returns:
        The loss, a scalar; at least zero up to rounding.

    Raises:
        InputError: A shape, type or value other than described.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> supervised_contrastive_loss(z, torch.tensor([0, 0, 1, 1]), temperature=1.0)
        tensor(0.2757)

    Source:
        ``"supcon"``: Khosla et al. 2020, "Supervised Contrastive Learning", equation 2
        (:math:`L_{out}`). ``"paper"``: the divisor of the published SCPL code, whose mask of
        positives contains the anchor itself.
    """
    if normalization not in get_args(Normalization):
        raise unknown_name("normalization", normalization, get_args(Normalization))
    compared = compare(projections, target, temperature=temperature, standardise=standardise)
    return contrastive_loss(compared, normalization)


class Compared(NamedTuple):
    """The samples of a mini-batch compared with each other, in at least float32.

    Attributes:
        similarity: Of each pair of samples, divided by the temperature, ``[N, N]``.
        num_positives: For each sample, how many others are of its class, ``[N]``; or the sum of
            how much others belong to it.
        positive_sum: For each sample, the sum of its similarities to those, weighted likewise,
            ``[N]``.
    """

    similarity: Tensor
    num_positives: Tensor
    positive_sum: Tensor


def compare(
    projections: Tensor, target: Tensor, *, temperature: float = 0.1, standardise: bool = False
) -> Compared:
    """Compare all samples, for the loss and for what is observed of it.

    Args and raises: as `supervised_contrastive_loss`.
    """
    check(projections, target, pairs=True)
    if not 0 < temperature < math.inf:
        raise InputError(
            "The temperature must be a finite number above zero",
            f"Got {temperature}",
            "Values from 0.05 to 0.5 are usual; 0.1 is the paper's",
        )
    with torch.autocast(projections.device.type, enabled=False):
        unit_ND = unit_length(standardised(projections) if standardise else projections)
        similarity_NN = (unit_ND / temperature) @ unit_ND.T
        if target.ndim == 1:
            positive_NN = (target[:, None] == target).fill_diagonal_(False)
            positive_sum_N = similarity_NN.masked_fill(~positive_NN, 0).sum(dim=1)
        else:
            positive_NN = target.detach().to(similarity_NN.dtype, copy=True).fill_diagonal_(0)
            positive_sum_N = (similarity_NN * positive_NN).sum(dim=1)
        num_positives_N = positive_NN.sum(dim=1)
    return Compared(similarity_NN, num_positives_N, positive_sum_N)


def contrastive_loss(compared: Compared, normalization: Normalization) -> Tensor:
    """Compute the loss of samples that were compared; see `supervised_contrastive_loss`.

    It uses up the similarities: the diagonal is overwritten.
    """
    num_positives_N, similarity_NN = compared.num_positives, compared.similarity
    with torch.autocast(similarity_NN.device.type, enabled=False):
        # The least finite number, not -inf: a row of nothing else (N = 1) keeps finite gradients.
        similarity_NN.fill_diagonal_(torch.finfo(similarity_NN.dtype).min)
        loss_N = num_positives_N * similarity_NN.logsumexp(dim=1) - compared.positive_sum
        return _mean_over_anchors(loss_N, num_positives_N, normalization)


def _mean_over_anchors(
    sum_N: Tensor, num_positives_N: Tensor, normalization: Normalization
) -> Tensor:
    """Divide each anchor's sum over its positives, and average over the anchors that count."""
    if normalization == "paper":
        return (sum_N / (num_positives_N + 1)).mean()
    num_anchors = (num_positives_N > 0).sum().clamp(min=1)
    divisor_N = num_positives_N.masked_fill(num_positives_N == 0, 1)
    return (sum_N / divisor_N).sum() / num_anchors


@torch.no_grad()
def observe_contrast(
    compared: Compared, projections: Tensor, normalization: Normalization = "paper"
) -> dict[str, Tensor]:
    r"""Observe what a supervised contrastive loss compares; nothing waits for the device.

    The *chance level* is the loss that the same projections have on average if the positives of
    each anchor are drawn at random, as many as it has: they are then as similar to it as all other
    samples are. With :math:`P(a)`, :math:`d_a` and :math:`s_{ab}` as for the loss, it is the mean
    of

    .. math::
        \frac{|P(a)|}{d_a} \Big( \log \sum_{c \ne a} e^{s_{ac}}
        - \frac{1}{N - 1} \sum_{b \ne a} s_{ab} \Big)

    over the same anchors as the loss; for projections that are all equal this is
    :math:`\log(N - 1)` times the mean of :math:`|P(a)| / d_a`. So the loss minus its chance level
    says how much more similar an anchor is to its positives than to others.

    Args:
        compared: What `compare` made of the projections; not yet used by the loss.
        projections: ``[N, D]``, as the head made them.
        normalization: Divisor of an anchor's loss.

    Returns:
        Scalars: ``above_chance`` (loss minus chance level: zero for a stage that knows nothing, the
        more negative the better), ``positives`` (mean number per anchor), ``without_positives``
        (share of the anchors) and ``spread``, the standard deviation of projections of unit length
        (before they are standardised) relative to :math:`1 / \sqrt D`, which is
        :math:`\sqrt{1 - |\bar z|^2}`: 1 if they point in all directions, 0 if they have
        collapsed to one.
    """
    similarity_NN, positives_N = compared.similarity.detach(), compared.num_positives
    with torch.autocast(projections.device.type, enabled=False):
        other_N = similarity_NN.sum(dim=1) - similarity_NN.diagonal()
        chance_N = other_N * positives_N / max(len(positives_N) - 1, 1)
        excess_N = chance_N - compared.positive_sum.detach()
        above = _mean_over_anchors(excess_N, positives_N, normalization)
        mean_D = unit_length(projections.detach()).mean(dim=0)
        return {
            "above_chance": above,
            "positives": positives_N.mean(dtype=above.dtype),
            "without_positives": (positives_N == 0).mean(dtype=above.dtype),
            "spread": (1 - mean_D.square().sum()).clamp(min=0).sqrt(),
        }
