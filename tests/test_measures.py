"""Formulas of metrics against values by hand."""

import math

import pytest
import torch

from scpl.measures import (
    NUM_BINS,
    bins_of,
    calibration,
    largest,
    precision_recall_f1,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [
        (0.9, 100, 0.825634, 0.944771),  # (0.9 + 0.019207 -+ 0.061856) / 1.038415
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (1.0, 10, 0.722467, 1.0),
        (1.0, 1, 0.206549, 1.0),
    ],
)
def test_how_sure_a_share_is_by_hand(share, count, low, high):
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-6)


def test_of_many_test_sets_the_interval_holds_the_true_share_in_95_of_100():
    """Added up over all outcomes of 50 samples with a true share of 0.8: no draw, no luck."""
    covered = 0.0
    for right in range(51):
        low, high = wilson_interval(right / 50, 50)
        if low <= 0.8 <= high:
            covered += math.comb(50, right) * 0.8**right * 0.2 ** (50 - right)
    assert covered == pytest.approx(0.95, abs=0.02)


def test_precision_recall_and_f1_by_hand():
    assert precision_recall_f1(3, 4, 6) == (3 / 4, 3 / 6, pytest.approx(2 / (4 / 3 + 2)))
    assert precision_recall_f1(0, 0, 5) == (None, 0, 0)  # never found
    assert precision_recall_f1(0, 5, 0) == (0, None, 0)  # never there
    assert precision_recall_f1(0, 0, 0) == (None, None, None)


def test_calibration_by_hand():
    """Two bins: two predictions of 0.9 and 0.92, one right; and one of 0.5, right."""
    chances, happened = torch.tensor([0.9, 0.92, 0.5]), torch.tensor([True, False, True])
    bins = bins_of(chances[:1], happened[:1]) + bins_of(chances[1:], happened[1:])
    found = calibration(bins)
    # |0.91 - 0.5| * 2/3 + |0.5 - 1| * 1/3
    expected = (2 * 0.41 + 0.5) / 3
    assert found["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)
    full = [row for row in found["bins"] if row["count"]]
    assert [row["count"] for row in full] == [1, 2]
    assert full[1]["probability"] == pytest.approx(0.91)
    assert (full[0]["share"], full[1]["share"]) == (1.0, 0.5)
    assert (full[1]["from"], full[1]["to"]) == (13 / NUM_BINS, 14 / NUM_BINS)
    empty = found["bins"][0]
    assert (empty["count"], empty["probability"], empty["share"]) == (0, None, None)
    edges = bins_of(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert edges[[0, -1], 0].tolist() == [1, 1]


def test_the_largest_rows_stay_and_of_equal_ones_the_first():
    rows = torch.tensor([[1.0, place] for place in range(20)] + [[2.0, 20]])
    assert largest(rows)[:, 1].tolist() == [20, *range(9)]
