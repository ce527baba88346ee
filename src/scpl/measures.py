"""How good predictions are, as formulas: on counts, on sorted predictions, on the largest mistakes.

May import: nothing.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NUM_BINS",
    "NUM_WORST",
    "average_precision",
    "bins_of",
    "calibration",
    "largest",
    "precision_recall_f1",
    "spearman",
    "wilson_interval",
]

NUM_BINS = 15
"""Parts of equal width that probabilities are sorted into, as in the paper on calibration."""
NUM_WORST = 10
"""So many of the worst predictions are kept."""


def wilson_interval(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Say between what bounds a share probably lies that was measured on so many samples.

    With share p, n samples and the quantile z = 1.96 of the normal distribution for 95 %:
    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Unlike p -+ z times the
    standard error it stays between 0 and 1 and is right near both, too. It covers what the choice
    of test samples does to the share, not what another seed of the training would.

    Args:
        share: p, 0 .. 1.
        count: n, at least 1.
        level: How often, over many test sets, the true share lies between the bounds.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927), 209-212.

    Example:
        >>> low, high = wilson_interval(0.9, 100)
        >>> print(f"{low:.4f} {high:.4f}")
        0.8256 0.9448
    """
    square = NormalDist().inv_cdf((1 + level) / 2) ** 2 / count
    centre = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = ((centre + sign * reach) / (1 + square) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def precision_recall_f1(
    right: float, found: float, there: float
) -> tuple[float | None, float | None, float | None]:
    """Say how good predictions of one class or label are; None for what would be 0 / 0.

    Args:
        right: Samples of the class that were found.
        found: Samples that were taken for it.
        there: Samples of it.

    Returns:
        Precision right / found, recall right / there, and F1, their harmonic mean
        2 right / (found + there).
    """
    return tuple(  # type: ignore[return-value]
        top / bottom if bottom else None
        for top, bottom in ((right, found), (right, there), (2 * right, found + there))
    )


# Probabilities


def bins_of(chances: Tensor, happened: Tensor) -> Tensor:
    """Sort predicted probabilities into bins of equal width, without waiting for the device.

    Args:
        chances: ``[M]``, 0 .. 1.
        happened: Whether what was predicted was so, ``[M]``.

    Returns:
        Of each bin how many there are, the sum of their probabilities, and how often it was so:
        ``float64 [NUM_BINS, 3]``; those of two batches add up.
    """
    places = (chances * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    columns = [torch.ones_like(chances), chances, happened]
    values = torch.stack([column.double() for column in columns], dim=1)
    return values.new_zeros(NUM_BINS, 3).index_add(0, places, values)


def calibration(bins: Tensor) -> dict[str, Any]:
    """Compare predicted probabilities with how often it was so.

    Args:
        bins: Sums of `bins_of`.

    Returns:
        ``expected_calibration_error``: the mean over all predictions of the distance, in their
        bin, between the mean probability and the share that was so. ``bins``: of each its bounds,
        ``from`` and ``to``, the ``count``, the mean ``probability`` and the ``share`` that was so,
        None in an empty one.

    Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, On calibration of modern neural networks,
    ICML 2017.
    """
    total, away, rows = float(bins[:, 0].sum()), 0.0, []
    for place, (count, chances, happened) in enumerate(bins.tolist()):
        away += abs(chances - happened)
        rows.append(
            {
                "from": place / NUM_BINS,
                "to": (place + 1) / NUM_BINS,
                "count": int(count),
                "probability": chances / count if count else None,
                "share": happened / count if count else None,
            }
        )
    return {"expected_calibration_error": away / max(total, 1.0), "bins": rows}


# The worst predictions


def largest(rows: Tensor) -> Tensor:
    """Keep the rows ``[M, D]`` that begin with the largest numbers, of equal ones the first."""
    return rows[rows[:, 0].argsort(descending=True, stable=True)[:NUM_WORST]]


# All predictions


def average_precision(outputs: Tensor, there: Tensor) -> float:
    """Compute the area under precision against recall, as steps; equal outputs count as one.

    Args:
        outputs: ``[N]``, the higher, the surer that the label is there.
        there: Whether it is, ``bool [N]``, at least once.
    """
    order = outputs.argsort(descending=True, stable=True)
    ranked = there[order].double().cumsum(0)
    values = outputs[order]
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    right = ranked[last]
    precision = right / (last + 1)
    gained = right.diff(prepend=right.new_zeros(1))
    return float((precision * gained).sum() / right[-1])


def spearman(one: Tensor, other: Tensor) -> float:
    """Compute the correlation of the ranks of two series ``[N]``; 0 if one has only equal values.

    Equal values share the mean of their ranks.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    length = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / length) if length > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[places]
