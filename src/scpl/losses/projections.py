"""Projections as the losses take them: checked, precise, standardised, of unit length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl.errors import InputError

__all__ = ["check", "describe", "precise", "standardised", "unit_length"]

# Shape suffixes: N = mini-batch, D = projected features.

_TOO_EQUAL = 1e-5  # added to variances, as by batch norm
_NO_DIRECTION = 1e-12  # a projection whose largest entry is not above this counts as zero


def precise(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def standardised(projections_ND: Tensor) -> Tensor:
    """Give every column mean 0 and deviation 1, in at least float32; constant ones become 0."""
    precise_ND = precise(projections_ND)
    variance_D, mean_D = torch.var_mean(precise_ND, dim=0, correction=0)
    return (precise_ND - mean_D) * (variance_D + _TOO_EQUAL).rsqrt()


def unit_length(projections_ND: Tensor) -> Tensor:
    """Scale projections to length 1, in at least float32; those without a direction become zero."""
    precise_ND = precise(projections_ND)
    # Dividing by the largest entry keeps the squares in range. The direction does not depend on the
    # divisor, so it is a constant to autograd; an infinite one also stops the gradient.
    largest_N1 = precise_ND.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(precise_ND / largest_N1.masked_fill(largest_N1 <= _NO_DIRECTION, math.inf))


def check(projections: Tensor, target: Tensor | None = None, *, pairs: bool = False) -> None:
    """Raise for what no loss is defined for; looks at shapes and types, as values would wait.

    With ``pairs`` the target may also say of each two rows how much they belong together.
    """
    if projections.ndim != 2 or 0 in projections.shape:
        raise InputError(
            "Projections must have the shape [N, D] with at least one row and one column",
            f"Got {describe(projections)}",
            "Flatten the features of each sample, for instance with a head of scpl.heads",
        )
    if not projections.is_floating_point():
        raise InputError(
            "Projections must be floating point",
            f"Got {describe(projections)}",
            "Convert them with .float()",
        )
    if target is None:
        return
    rows = projections.shape[0]
    if pairs and target.ndim == 2 and target.is_floating_point():
        if target.shape != (rows, rows):
            raise InputError(
                "A target of pairs must say of each two rows how much they belong together",
                f"Got the target {describe(target)} for the projections {describe(projections)}",
                f"Pass a target of the shape [{rows}, {rows}]",
            )
        return
    if target.shape != (rows,):
        raise InputError(
            "The target must have one class per row of the projections",
            f"Got the target {describe(target)} for the projections {describe(projections)}",
            f"Pass a target of the shape [{rows}]",
        )
    if target.is_floating_point() or target.is_complex():
        raise InputError(
            "The target must hold integer classes",
            f"Got {describe(target)}",
            "Convert class numbers with .long(), one-hot rows with .argmax(dim=1)",
        )


def describe(tensor: Tensor) -> str:
    """Write shape and type for a message."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
