"""Loss formulas of the other local methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl.errors import InputError
from scpl.losses.projections import check, describe, precise, unit_length

__all__ = ["covariance_loss", "similarity_matching_loss", "squared_error", "variance_loss"]

# Shape suffixes: N = mini-batch, D = projected features.


def similarity_matching_loss(projections: Tensor, target: Tensor, num_classes: int) -> Tensor:
    r"""Bring the similarity of every two projections to that of their classes.

    With projections centred over their own entries and scaled to unit length, :math:`z_a`,
    similarities are :math:`s_{ab} = z_a \cdot z_b`. One-hot labels of C classes, treated alike,
    have :math:`t_{ab} = 1` within a class and :math:`t_{ab} = -1 / (C - 1)` between two. The loss
    is

    .. math::
        L = \frac{1}{N^2} \sum_{a, b} (s_{ab} - t_{ab})^2.

    A projection whose entries are all equal has no direction: its similarity to all others is 0,
    and it receives no gradient. Arithmetic is float32 (float64 for float64 input) whatever the
    input type and under autocast, and nothing waits for the device.

    Args:
        projections: ``[N, D]``, floating point.
        target: Class of each sample, ``[N]``, an integer type.
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
    check(projections, target)
    if num_classes < 2:
        raise InputError("num_classes must be at least 2", f"Got {num_classes}")
    with torch.autocast(projections.device.type, enabled=False):
        precise_ND = precise(projections)
        unit_ND = unit_length(precise_ND - precise_ND.mean(dim=1, keepdim=True))
        same_NN = (target[:, None] == target).to(unit_ND.dtype)
        apart = 1 / (num_classes - 1)
        return F.mse_loss(unit_ND @ unit_ND.T, same_NN * (1 + apart) - apart)


def variance_loss(projections: Tensor) -> Tensor:
    r"""Penalise entries of unit projections that vary too little over the mini-batch.

    .. math::
        L = \frac{1}{N D} \sum_d \max\big(0,\; 1 - \sqrt{\operatorname{Var}_d + 10^{-7}}\big),

    where :math:`\operatorname{Var}_d` is the population variance of entry d of the projections,
    scaled to unit length. (Their variances add up to at most 1, so the hinge is always active, and
    the loss is near 1 / N: the published method has it so.)

    Args:
        projections: ``[N, D]``, floating point.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        InputError: A shape or type other than described.

    Source:
        DeInfoReg (arXiv 2506.18193), variance term of the published code.
    """
    check(projections)
    with torch.autocast(projections.device.type, enabled=False):
        variance_D = unit_length(projections).var(dim=0, correction=0)
        return F.relu(1 - (variance_D + 1e-7).sqrt()).mean() / len(projections)


def covariance_loss(projections: Tensor) -> Tensor:
    r"""Penalise entries of unit projections that vary together over the mini-batch.

    .. math::
        L = \frac{1}{D} \sum_{i \ne j} C_{ij}^2, \qquad C = \frac{1}{N} Z^\top Z,

    with projections of unit length, centred over the mini-batch, :math:`Z`.

    Args:
        projections: ``[N, D]``, floating point.

    Returns:
        The loss, a scalar of at least 0.

    Raises:
        InputError: A shape or type other than described.

    Source:
        DeInfoReg (arXiv 2506.18193), covariance term of the published code.
    """
    check(projections)
    with torch.autocast(projections.device.type, enabled=False):
        unit_ND = unit_length(projections)
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
            f"Got {describe(found)} and {describe(wanted)}",
        )
    with torch.autocast(found.device.type, enabled=False):
        return F.mse_loss(precise(found), precise(wanted.detach()))
