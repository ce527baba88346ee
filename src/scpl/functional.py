"""Loss formulas: pure functions of tensors that know nothing of stages, heads or devices."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl.errors import InputError, unknown_name

__all__ = ["observed_contrastive_loss", "supervised_contrastive_loss"]

# Shape suffixes: N = mini-batch, D = projected features.

_TOO_EQUAL = 1e-5  # added to variances, as by batch norm
_NO_DIRECTION = 1e-12  # a row whose largest entry is not above this counts as zero


def supervised_contrastive_loss(
    projections: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    normalization: Literal["paper", "supcon"] = "paper",
    standardise: bool = False,
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
        standardise: Give every column of the projections mean 0 and deviation 1 over the
            mini-batch before its rows are scaled. Projections have much in common with each other
            (here, more than nine tenths of their length), and what is common tells no class.

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
    _check(projections, target, temperature, normalization)
    if standardise:
        projections = _standardised(projections)
    return _contrast(projections, target, temperature, normalization)[0]


def observed_contrastive_loss(
    projections: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.1,
    normalization: Literal["paper", "supcon"] = "paper",
    standardise: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The same loss, with what tells why a stage does or does not learn.

    If all projections were equal, every anchor with positives would have the loss
    :math:`|P(a)| / d_a \cdot \log(N - 1)`: the *chance level* of a batch is the mean of that,

    .. math::
        \log(N - 1) \cdot \tfrac{1}{N} \sum_a \tfrac{|P(a)|}{|P(a)| + 1}
        \text{ (paper)}, \qquad \log(N - 1) \text{ (supcon)},

    and zero for a batch without a single positive pair. Nothing waits for the device.

    Args:
        projections: As for :func:`supervised_contrastive_loss`; so are the other arguments.
        target: Class of each row, ``[N]``.
        temperature: T.
        normalization: Divisor of an anchor's loss.
        standardise: Standardise the columns first; the spread is that of the projections before.

    Returns:
        The loss, and detached scalars: ``above_chance`` (loss minus chance level: zero for a stage
        that knows nothing, the more negative the better), ``positives`` (mean number per anchor),
        ``without_positives`` (share of the anchors) and ``spread``, the standard deviation of
        unit projections relative to :math:`1 / \sqrt D`, which is
        :math:`\sqrt{1 - |\bar z|^2}`: 1 if they point in all directions, 0 if they have
        collapsed to one.
    """
    _check(projections, target, temperature, normalization)
    compared = _standardised(projections) if standardise else projections
    loss, positives_N, unit_ND = _contrast(compared, target, temperature, normalization)
    with torch.no_grad():
        if standardise:
            unit_ND = _unit_rows(projections)
        num_positives_N = positives_N.to(loss.dtype)
        num_rows = len(num_positives_N)
        without = (positives_N == 0).to(loss.dtype).mean()
        if normalization == "paper":
            weight = (num_positives_N / (num_positives_N + 1)).mean()
        else:
            weight = (without < 1).to(loss.dtype)
        return loss, {
            "above_chance": loss.detach() - math.log(max(num_rows - 1, 1)) * weight,
            "positives": num_positives_N.mean(),
            "without_positives": without,
            "spread": (1 - unit_ND.mean(dim=0).square().sum()).clamp(min=0).sqrt(),
        }


def _contrast(
    projections: Tensor, target: Tensor, temperature: float, normalization: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss; return the positives of each anchor and the unit rows as well."""
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
            return (loss_N / (num_positives_N + 1)).mean(), num_positives_N, unit_ND
        num_anchors = (num_positives_N > 0).sum().clamp(min=1)
        loss = (loss_N / num_positives_N.clamp(min=1)).sum() / num_anchors
        return loss, num_positives_N, unit_ND


def _standardised(projections_ND: Tensor) -> Tensor:
    """Give every column mean 0 and deviation 1, in at least float32; constant columns become 0."""
    with torch.autocast(projections_ND.device.type, enabled=False):
        projections_ND = projections_ND.to(torch.promote_types(projections_ND.dtype, torch.float32))
        variance_D, mean_D = torch.var_mean(projections_ND, dim=0, correction=0)
        return (projections_ND - mean_D) * (variance_D + _TOO_EQUAL).rsqrt()


def _unit_rows(rows_ND: Tensor) -> Tensor:
    """Scale rows to unit length, in at least float32; rows without a direction become zero."""
    rows_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
    # Dividing by the largest entry keeps the squares in range. The direction does not depend on the
    # divisor, so it is a constant to autograd; an infinite one also stops the gradient.
    largest_N1 = rows_ND.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(rows_ND / largest_N1.masked_fill(largest_N1 <= _NO_DIRECTION, math.inf))


def _check(projections: Tensor, target: Tensor, temperature: float, normalization: str) -> None:
    """Raise for arguments the loss is not defined for; looks at shapes and types, not at values."""
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
