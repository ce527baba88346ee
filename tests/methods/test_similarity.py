import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scpl.errors import InputError
from scpl.losses.similarity import covariance_loss, similarity_matching_loss, variance_loss
from scpl.methods.deinforeg import InformationRegularisation
from scpl.methods.predsim import (
    DeviationOverPositions,
    SimilarityMatching,
    local_classifier,
    similarity_head,
)

SHAPES = [(7,), (5, 7), (3, 8, 8), (3, 7, 9), (3, 2, 2), (3, 1, 5)]
TARGET = torch.tensor([0, 1, 0, 2])


def test_similarity_matching_is_the_weighted_loss_of_the_projection():
    head, x = nn.Linear(5, 4), torch.randn(4, 5)
    terms = SimilarityMatching(head, 3, weight=0.25)(x, TARGET, None)
    assert terms.keys() == {"similarity"}
    assert torch.equal(terms["similarity"], 0.25 * similarity_matching_loss(head(x), TARGET, 3))
    assert SimilarityMatching(head, 3).predict(x) is None
    assert SimilarityMatching(head, 3).exit_module([]) is None


def test_regularisation_of_one_projection_with_a_classifier_on_it():
    head, classifier = nn.Linear(5, 4), nn.Linear(4, 3)
    x = torch.randn(4, 5, requires_grad=True)
    objective = InformationRegularisation(head, 3, classifier, weight=0.5)
    terms, z = objective(x, TARGET, None), head(x)
    assert torch.equal(terms["variance"], variance_loss(z))
    assert torch.equal(terms["invariance"], similarity_matching_loss(z, TARGET, 3))
    assert torch.equal(terms["covariance"], covariance_loss(z))
    assert torch.equal(terms["cross_entropy"], 0.5 * F.cross_entropy(classifier(z), TARGET))
    terms["cross_entropy"].backward()
    assert x.grad.any()  # the classifier's gradient reaches the layers
    assert torch.equal(objective.predict(x), classifier(z))
    assert torch.equal(objective.exit_module([])(x), classifier(z))


def test_without_a_classifier_it_cannot_predict():
    objective, x = InformationRegularisation(nn.Linear(5, 4), 3), torch.randn(4, 5)
    assert objective(x, TARGET, None).keys() == {"variance", "invariance", "covariance"}
    assert objective.predict(x) is None
    assert objective.exit_module([]) is None


def test_losses_are_float32_whatever_the_compute_type():
    x = torch.randn(4, 5)
    objective = InformationRegularisation(nn.Linear(5, 4), 3, nn.Linear(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        terms = {
            **objective(x, TARGET, None),
            **SimilarityMatching(nn.Linear(5, 4), 3)(x, TARGET, None),
        }
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_local_classifier_begins_with_zeros(shape):
    head, features = local_classifier(shape, 6), torch.randn(4, *shape, requires_grad=True)
    assert not head[-1].weight.any()
    assert torch.equal(head(features), head[-1].bias.expand(4, 6))
    head(features).sum().backward()
    assert head[-1].weight.grad.any()
    assert not features.grad.any()


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((256, 16, 16), (4, 4)), ((512, 8, 8), (4, 2)), ((9, 7, 7), (7, 7)), ((9000, 3, 3), (1, 1))],
    ids=str,
)
def test_a_local_classifier_sees_4096_entries_at_most(shape, kept):
    head, features = local_classifier(shape, 6), torch.randn(2, *shape)
    expected = nn.functional.adaptive_avg_pool2d(features, sorted(kept)).flatten(1)
    assert head[-1].in_features == expected.shape[1]
    torch.testing.assert_close(head[:-1](features), expected)


@pytest.mark.parametrize("shape", [*SHAPES[:3], (3, 1, 1)], ids=str)
def test_what_is_compared_has_no_bias(shape):
    head, features = similarity_head(shape), torch.randn(4, *shape, requires_grad=True)
    found = head(features)
    if shape == (3, 8, 8):
        maps = nn.functional.conv2d(features, head[0].weight, padding=1)
        torch.testing.assert_close(found, maps.flatten(2).std(2))
    else:
        rows = features.mean(1) if len(shape) == 2 else features.flatten(1)
        torch.testing.assert_close(found, rows @ head[-1].weight.T)
    assert [name for name, _ in head.named_parameters() if "bias" in name] == []
    head(torch.zeros_like(features).requires_grad_()).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_the_spread_over_positions_is_computed_in_float32():
    spread = DeviationOverPositions()
    features = torch.randn(4, 3, 8, 8).bfloat16()
    assert spread(features).dtype == torch.float32
    assert spread(features.double()).dtype == torch.float64
    torch.testing.assert_close(spread(features), features.float().flatten(2).std(2))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4), (3, 4, 4, 4)], ids=str)
def test_a_shape_of_another_kind_is_refused(shape):
    for build in (similarity_head, lambda shape: local_classifier(shape, 3)):
        with pytest.raises(InputError):
            build(shape)
