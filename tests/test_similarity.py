import torch
from torch import nn
from torch.nn import functional as F

from scpl.functional import covariance_loss, similarity_matching_loss, variance_loss
from scpl.similarity import InformationRegularization, SimilarityMatching

TARGET = torch.tensor([0, 1, 0, 2])


def test_similarity_matching_is_the_weighted_loss_of_the_projection():
    head, x = nn.Linear(5, 4), torch.randn(4, 5)
    terms = SimilarityMatching(head, 3, weight=0.25)(x, TARGET, None)
    assert terms.keys() == {"similarity"}
    assert torch.equal(terms["similarity"], 0.25 * similarity_matching_loss(head(x), TARGET, 3))
    assert SimilarityMatching(head, 3).predict(x) is None
    assert SimilarityMatching(head, 3).reader([]) is None


def test_regularisation_of_one_projection_with_a_classifier_on_it():
    head, classifier = nn.Linear(5, 4), nn.Linear(4, 3)
    x = torch.randn(4, 5, requires_grad=True)
    objective = InformationRegularization(head, 3, classifier, weight=0.5)
    terms, z = objective(x, TARGET, None), head(x)
    assert torch.equal(terms["variance"], variance_loss(z))
    assert torch.equal(terms["invariance"], similarity_matching_loss(z, TARGET, 3))
    assert torch.equal(terms["covariance"], covariance_loss(z))
    assert torch.equal(terms["cross_entropy"], 0.5 * F.cross_entropy(classifier(z), TARGET))
    terms["cross_entropy"].backward()
    assert x.grad.any()  # the classifier's gradient reaches the layers
    assert torch.equal(objective.predict(x), classifier(z))
    assert torch.equal(objective.reader([])(x), classifier(z))


def test_without_a_classifier_it_cannot_predict():
    objective, x = InformationRegularization(nn.Linear(5, 4), 3), torch.randn(4, 5)
    assert objective(x, TARGET, None).keys() == {"variance", "invariance", "covariance"}
    assert objective.predict(x) is None
    assert objective.reader([]) is None


def test_losses_are_float32_whatever_the_compute_type():
    x = torch.randn(4, 5)
    objective = InformationRegularization(nn.Linear(5, 4), 3, nn.Linear(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        terms = {
            **objective(x, TARGET, None),
            **SimilarityMatching(nn.Linear(5, 4), 3)(x, TARGET, None),
        }
    assert {term.dtype for term in terms.values()} == {torch.float32}
