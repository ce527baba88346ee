import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scpl.losses.contrastive import supervised_contrastive_loss
from scpl.methods.base import CrossEntropy, Objective, Sum
from scpl.methods.scpl import ClassifiedContrast, Contrastive
from scpl.tasks import Classes

TARGET = torch.tensor([0, 1, 0, 1])


def features():
    return torch.randn(4, 5, requires_grad=True)


def test_contrastive_is_the_loss_of_the_projection():
    head, x = nn.Linear(5, 3), features()
    terms = Contrastive(head, 0.2, "supcon")(x, TARGET, None)
    expected = supervised_contrastive_loss(head(x), TARGET, temperature=0.2, normalization="supcon")
    assert terms.keys() == {"contrastive"}
    assert torch.equal(terms["contrastive"], expected)


def test_a_weight_scales_the_contrast_and_not_what_is_observed():
    head, x = nn.Linear(5, 3), features()
    full, half = Contrastive(head), Contrastive(head, weight=0.5)
    assert torch.equal(
        half(x, TARGET, None)["contrastive"], full(x, TARGET, None)["contrastive"] / 2
    )
    assert half.observed == full.observed


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_contrast_and_classifier_look_through_one_head(share):
    x, head, classifier = features(), nn.Linear(5, 3), nn.Linear(3, 2)
    task = Classes(label_smoothing=0.1)
    contrastive = Contrastive(head, 0.2, "supcon", weight=1 - share, task=task)
    mixed = ClassifiedContrast(contrastive, classifier)
    terms = mixed(x, TARGET, None)
    contrast = supervised_contrastive_loss(head(x), TARGET, temperature=0.2, normalization="supcon")
    logits = classifier(head(x))
    entropy = F.cross_entropy(logits, TARGET, label_smoothing=0.1)
    assert torch.equal(terms.pop("local_cross_entropy"), share * entropy)
    assert terms == ({} if share == 1 else {"contrastive": (1 - share) * contrast})
    assert torch.equal(mixed.predict(x), logits)
    assert ("spread" in mixed.observed) == (share < 1)
    assert mixed.observed["accuracy"] == (logits.argmax(1) == TARGET).float().mean()
    entropy.backward()
    assert head.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_a_sum_observes_what_its_parts_do():
    x, objective = features(), Sum(Contrastive(nn.Linear(5, 3)), CrossEntropy(nn.Linear(5, 2)))
    assert objective.observed == {}
    objective(x, TARGET, None)
    names = ["above_chance", "positives", "without_positives", "spread", "accuracy"]
    assert list(objective.observed) == names
    assert not any(value.requires_grad or value.ndim for value in objective.observed.values())


@pytest.mark.parametrize("detach", [False, True])
def test_cross_entropy_keeps_its_gradient_to_itself_when_detached(detach):
    x, classifier = features(), nn.Linear(5, 2)
    loss = CrossEntropy(classifier, detach=detach)(x, TARGET, None)["cross_entropy"]
    assert torch.equal(loss, F.cross_entropy(classifier(x), TARGET))
    loss.backward()
    assert (x.grad is None) == detach
    assert classifier.weight.grad is not None


def test_losses_are_float32_whatever_the_compute_type():
    x = features()
    objectives = Sum(Contrastive(nn.Linear(5, 3)), CrossEntropy(nn.Linear(5, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        terms = objectives(x, TARGET, None)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    half = CrossEntropy(nn.Linear(5, 2).bfloat16())(x.bfloat16(), TARGET, None)
    assert half["cross_entropy"].dtype == torch.float32


def test_a_sum_predicts_with_the_last_part_that_can():
    x, one, two = features(), nn.Linear(5, 2), nn.Linear(5, 2)
    both = Sum(CrossEntropy(one), Contrastive(nn.Linear(5, 3)))
    assert torch.equal(both.predict(x), one(x))
    assert torch.equal(Sum(CrossEntropy(one), CrossEntropy(two)).predict(x), two(x))
    assert Sum(Contrastive(nn.Linear(5, 3))).predict(x) is None


def test_an_objective_must_say_what_it_minimises():
    with pytest.raises(TypeError, match="abstract"):
        Objective()


def test_by_default_nothing_is_handed_on():
    assert CrossEntropy(nn.Linear(5, 2)).hand_on(TARGET, None) is None


def test_a_weight_is_a_factor():
    x, classifier = features(), nn.Linear(5, 2)
    whole = CrossEntropy(classifier)(x, TARGET, None)["cross_entropy"]
    half = CrossEntropy(classifier, weight=0.5)(x, TARGET, None)["cross_entropy"]
    assert torch.equal(half, 0.5 * whole)


def test_the_reader_is_what_predicts():
    one, two = nn.Linear(5, 2), nn.Linear(5, 2)
    assert CrossEntropy(one).exit_module([]) is one
    assert Contrastive(nn.Linear(5, 3)).exit_module([]) is None
    assert Sum(CrossEntropy(one), CrossEntropy(two)).exit_module([]) is two
    assert Sum(CrossEntropy(one), Contrastive(nn.Linear(5, 3))).exit_module([]) is one
    assert Sum(Contrastive(nn.Linear(5, 3))).exit_module([]) is None


def test_by_default_what_is_shared_is_passed_on():
    received = {"x": torch.ones(1)}
    assert CrossEntropy(nn.Linear(5, 2)).share(received) is received
    assert Sum(CrossEntropy(nn.Linear(5, 2))).share(received) is received
    assert CrossEntropy(nn.Linear(5, 2)).share(None) is None
