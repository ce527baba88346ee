import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from scpl.losses.contrastive import (
    compare,
    observe_contrast,
    supervised_contrastive_loss,
)
from scpl.tasks import Classes


def observed_contrastive_loss(rows, target, normalization="paper", **options):
    loss = supervised_contrastive_loss(rows, target, normalization=normalization, **options)
    return loss, observe_contrast(compare(rows, target, **options), rows, normalization)


@pytest.mark.parametrize("normalization", ["paper", "supcon"])
@pytest.mark.parametrize("classes", [[0, 0, 1, 1, 1, 2], [0, 1, 2], [0, 0]], ids=str)
def test_equal_projections_are_at_chance_level_and_collapsed(normalization, classes):
    target = torch.tensor(classes)
    loss, observed = observed_contrastive_loss(
        torch.ones(len(target), 5), target, normalization=normalization
    )
    assert observed["above_chance"].item() == pytest.approx(0, abs=1e-5)
    assert observed["spread"].item() == pytest.approx(0, abs=1e-3)
    if len(set(classes)) == len(classes):
        assert loss == 0


def test_positives_are_counted_and_anchors_without_any():
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    _, observed = observed_contrastive_loss(torch.randn(6, 4), target)
    assert observed["positives"].item() == pytest.approx((3 * 2 + 2 * 1) / 6)
    assert observed["without_positives"].item() == pytest.approx(1 / 6)


@pytest.mark.parametrize("normalization", ["paper", "supcon"])
@pytest.mark.parametrize("standardise", [False, True])
def test_chance_is_the_mean_loss_over_all_ways_to_deal_out_the_classes(normalization, standardise):
    options = {"normalization": normalization, "standardise": standardise, "temperature": 0.3}
    rows = torch.randn(6, 4, dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, observed = observed_contrastive_loss(rows, target, **options)
    dealt = [
        supervised_contrastive_loss(rows, target[list(order)], **options)
        for order in permutations(range(6))
    ]
    expected = loss - torch.stack(dealt).mean()
    torch.testing.assert_close(observed["above_chance"], expected)


def test_separated_classes_are_far_below_chance_and_spread_out():
    rows, target = torch.eye(4).repeat(8, 1), torch.arange(32) % 4
    _, observed = observed_contrastive_loss(rows, target, "supcon")
    assert observed["above_chance"].item() == pytest.approx(10 * (7 / 31 - 1))
    assert observed["spread"].item() == pytest.approx(math.sqrt(1 - 1 / 4))


def test_the_spread_is_the_deviation_relative_to_that_of_all_directions():
    rows = F.normalize(torch.randn(50, 6, dtype=torch.float64))
    _, observed = observed_contrastive_loss(rows, torch.arange(50) % 3)
    deviation = rows.var(dim=0, unbiased=False).mean().sqrt()
    assert observed["spread"].item() == pytest.approx((deviation * math.sqrt(6)).item())


def test_nothing_that_is_observed_has_a_gradient():
    rows = torch.randn(6, 4, requires_grad=True)
    _, observed = observed_contrastive_loss(rows, torch.arange(6) % 2)
    observed |= Classes().observe(rows, torch.zeros(6).long())
    assert not any(value.requires_grad or value.ndim for value in observed.values())
