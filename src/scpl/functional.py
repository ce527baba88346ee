"""Loss formulas: pure functions of tensors that know nothing of stages, heads or devices."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl.errors import InputError, unknown_name

__all__ = [
    "covariance_loss",
    "similarity_matching_loss",
    "squared_error",
    "supervised_contrastive_loss",
    "variance_loss",
]

# Shape suffixes: N = mini-batch, D = projected features.

_NO_DIRECTION = 1e-12  # a row whose largest entry is not above this counts as zero


def supervised_contrastive_loss(
    projections: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    normalization: Literal["paper", "supcon"] = "paper",
) -> Tensor:
    r"""Pull rows of the same class together on the unit sphere, push all others apart.

    With unit rows :math:`z_a`, similarities :math:`s_{ab} = z_a \cdot z_b / T` and the positives
    :math:`P(a) = \{b \ne a : y_b = y_a\}` of anchor :math:`a`, the loss of one anchor is

    .. math::
        L_a = \frac{1}{d_a} \sum_{p \in P(a)} \Big( \log \sum_{c \ne a} e^{s_{ac}} - s_{ap} \Big).

    =============  =======================  ==============================================
    normalization  divisor :math:`d_a`      mean over
    =============  =======================  ==============================================
    ``"paper"``    :math:`|P(a)| + 1`       all N anchors; without a positive :math:`L_a = 0`
    ``"supcon"``   :math:`|P(a)|`           the anchors that have a positive
    =============  =======================  ==============================================

    So where every anchor has P positives, ``"paper"`` is P / (P + 1) times ``"supcon"``. A batch
    without a single positive pair gives zero, and zero gradients. An all-zero row has no direction:
    its similarity to every row is 0, and it receives no gradient.

    The rows are scaled to unit length here, and all arithmetic is float32 (float64 for float64
    input) whatever the input type and under autocast. Nothing waits for the device.

    Args:
        projections: Output of a projection head, ``[N, D]``, floating point, any row length.
        target: Class of each row, ``[N]``, an integer type.
        temperature: T, without unit; above zero. Smaller values weigh near rows more.
        normalization: Divisor of an anchor's loss, see the table.

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
    _check_projections(projections)
    _check_target(projections, target)
    _check_options(temperature, normalization)
    with torch.autocast(projections.device.type, enabled=False):
        unit_ND = _unit_rows(projections)
        similarity_NN = (unit_ND / temperature) @ unit_ND.T
        positive_NN = (target[:, None] == target).fill_diagonal_(False)
        num_positives_N = positive_NN.sum(dim=1)
        positive_sum_N = similarity_NN.masked_fill(~positive_NN, 0).sum(dim=1)
        # The least finite number, not -inf: a row of nothing else (N = 1) keeps finite gradients.
        similarity_NN.fill_diagonal_(torch.finfo(similarity_NN.dtype).min)
        loss_N = num_positives_N * similarity_NN.logsumexp(dim=1) - positive_sum_N
        if normalization == "paper":
            return (loss_N / (num_positives_N + 1)).mean()
        num_anchors = (num_positives_N > 0).sum().clamp(min=1)
        return (loss_N / num_positives_N.clamp(min=1)).sum() / num_anchors


def similarity_matching_loss(projections: Tensor, target: Tensor, num_classes: int) -> Tensor:
    r"""Bring the similarity of every two rows to that of their classes.

    With rows centred over their own entries and scaled to unit length, :math:`z_a`, similarities
    are :math:`s_{ab} = z_a \cdot z_b`. The one-hot rows of C classes, treated alike, have
    :math:`t_{ab} = 1` within a class and :math:`t_{ab} = -1 / (C - 1)` between two. The loss is

    .. math::
        L = \frac{1}{N^2} \sum_{a, b} (s_{ab} - t_{ab})^2.

    A row whose entries are all equal has no direction: its similarity to every row is 0, and it
    receives no gradient. Arithmetic as in `supervised_contrastive_loss`.

    Args:
        projections: ``[N, D]``, floating point.
        target: Class of each row, ``[N]``, an integer type.
        num_classes: C, at least 2.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        InputError: A shape, type or value other than described.

    Source:
        Nokland & Eidnes 2019, "Training Neural Networks with Local Error Signals", equation 2;
        DeInfoReg (arXiv 2506.18193), invariance term. Both clamp similarities to -1 .. 1, which
        only undoes rounding.
    """
    _check_projections(projections)
    _check_target(projections, target)
    if num_classes < 2:
        raise InputError("num_classes must be at least 2", f"Got {num_classes}")
    with torch.autocast(projections.device.type, enabled=False):
        rows_ND = _precise(projections)
        unit_ND = _unit_rows(rows_ND - rows_ND.mean(dim=1, keepdim=True))
        same_NN = (target[:, None] == target).to(unit_ND.dtype)
        apart = 1 / (num_classes - 1)
        return F.mse_loss(unit_ND @ unit_ND.T, same_NN * (1 + apart) - apart)


def variance_loss(projections: Tensor) -> Tensor:
    r"""Penalise entries of unit rows that vary too little over the mini-batch.

    .. math::
        L = \frac{1}{N D} \sum_d \max\big(0,\; 1 - \sqrt{\operatorname{Var}_d + 10^{-7}}\big),

    where :math:`\operatorname{Var}_d` is the population variance of entry d of the unit rows. (Unit
    rows have variances that add up to at most 1, so the hinge is always active, and the loss is
    near 1 / N: the published method has it so.)

    Args:
        projections: ``[N, D]``, floating point.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        InputError: A shape or type other than described.

    Source:
        DeInfoReg (arXiv 2506.18193), variance term of the published code.
    """
    _check_projections(projections)
    with torch.autocast(projections.device.type, enabled=False):
        variance_D = _unit_rows(projections).var(dim=0, correction=0)
        return F.relu(1 - (variance_D + 1e-7).sqrt()).mean() / len(projections)


def covariance_loss(projections: Tensor) -> Tensor:
    r"""Penalise entries of unit rows that vary together over the mini-batch.

    .. math::
        L = \frac{1}{D} \sum_{i \ne j} C_{ij}^2, \qquad C = \frac{1}{N} Z^\top Z,

    with unit rows centred over the mini-batch, :math:`Z`.

    Args:
        projections: ``[N, D]``, floating point.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        InputError: A shape or type other than described.

    Source:
        DeInfoReg (arXiv 2506.18193), covariance term of the published code.
    """
    _check_projections(projections)
    with torch.autocast(projections.device.type, enabled=False):
        unit_ND = _unit_rows(projections)
        centred_ND = unit_ND - unit_ND.mean(dim=0)
        covariance_DD = centred_ND.T @ centred_ND / len(centred_ND)
        squares_DD = covariance_DD.square()
        return (squares_DD.sum() - squares_DD.diagonal().sum()) / len(squares_DD)


def squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    r"""Mean of :math:`(f - w)^2` over all entries; the gradient reaches ``found`` alone.

    Args:
        found: ``[N, D]``, floating point.
        wanted: ``[N, D]``, a constant.

    Returns:
        The loss, a scalar, computed in float32 (float64 for float64 input).

    Raises:
        InputError: if the shapes differ.

    Source:
        The association and reconstruction losses of Associated Learning (Kao & Chen 2021).
    """
    if found.shape != wanted.shape:
        raise InputError(
            "A squared error needs two tensors of one shape",
            f"Got {_describe(found)} and {_describe(wanted)}",
        )
    with torch.autocast(found.device.type, enabled=False):
        return F.mse_loss(_precise(found), _precise(wanted.detach()))


def _precise(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit_rows(rows_ND: Tensor) -> Tensor:
    """Scale rows to unit length, in at least float32; rows without a direction become zero."""
    rows_ND = _precise(rows_ND)
    # Dividing by the largest entry keeps the squares in range. The direction does not depend on the
    # divisor, so it is a constant to autograd; an infinite one also stops the gradient.
    largest_N1 = rows_ND.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(rows_ND / largest_N1.masked_fill(largest_N1 <= _NO_DIRECTION, math.inf))


def _check_projections(projections: Tensor) -> None:
    """Raise for projections that no loss is defined for; looks at shape and type, not at values."""
    if projections.ndim != 2 or 0 in projections.shape:
        raise InputError(
            "Projections must have the shape [N, D] with at least one row and one column",
            f"Got {_describe(projections)}",
            "Flatten the features of each sample, for instance with a head of scpl.heads",
        )
    if not projections.is_floating_point():
        raise InputError(
            "Projections must be floating point",
            f"Got {_describe(projections)}",
            "Convert them with .float()",
        )


def _check_target(projections: Tensor, target: Tensor) -> None:
    """Raise for targets that do not fit; values are not looked at, as that would wait."""
    if target.shape != projections.shape[:1]:
        raise InputError(
            "The target must have one class per row of the projections",
            f"Got the target {_describe(target)} for the projections {_describe(projections)}",
            f"Pass a target of the shape [{projections.shape[0]}]",
        )
    if target.is_floating_point() or target.is_complex():
        raise InputError(
            "The target must hold integer classes",
            f"Got {_describe(target)}",
            "Convert class numbers with .long(), one-hot rows with .argmax(dim=1)",
        )


def _check_options(temperature: float, normalization: str) -> None:
    if not 0 < temperature < math.inf:
        raise InputError(
            "The temperature must be a finite number above zero",
            f"Got {temperature}",
            "Values from 0.05 to 0.5 are usual; 0.1 is the paper's",
        )
    if normalization not in ("paper", "supcon"):
        raise unknown_name("normalization", normalization, ("paper", "supcon"))


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
