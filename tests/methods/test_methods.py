from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from networks import NUM_CLASSES, mlp, rows, seeded_layers
from scpl import SCPL, Backpropagation, EarlyExit, Method, Pipeline, split
from scpl.errors import InputError
from scpl.heads import Linear
from scpl.methods import METHODS, Site
from scpl.methods.base import CrossEntropy, Objective, Sum
from scpl.methods.scpl import ClassifiedContrast, Contrastive
from scpl.tasks import Classes

READOUT = nn.Linear(6, NUM_CLASSES)
INNER = Site(0, 2, NUM_CLASSES, (6,), None)
LAST = Site(1, 2, NUM_CLASSES, (6,), READOUT)


def test_methods_are_known_by_name():
    known = {"scpl": SCPL, "early-exit": EarlyExit, "bp": Backpropagation}
    assert known.items() <= METHODS.items()
    assert [method.cuts_gradients for method in known.values()] == [True, True, False]
    assert {name for name, method in METHODS.items() if method.layout != "stages"} == {
        "bp", "bp-wide", "ddp",
    }  # fmt: skip


def test_a_site_knows_whether_it_is_last():
    assert (INNER.is_last, LAST.is_last) == (False, True)


def test_scpl_contrasts_everywhere_and_classifies_at_the_end():
    method = SCPL(
        temperature=0.3,
        normalization="supcon",
        head=Linear(7),
        cross_entropy=0.0,
        classifier_gradient=False,
    )
    inner, last = method.objective(INNER), method.objective(LAST)
    assert type(inner) is Contrastive
    assert (inner.temperature, inner.normalization) == (0.3, "supcon")
    assert inner.head(torch.zeros(2, 6)).shape == (2, 7)
    assert type(last) is Sum
    contrastive, classifier = last.parts
    assert contrastive.temperature == 0.3
    assert classifier.classifier is READOUT
    assert classifier.detach
    assert not replace(method, classifier_gradient=True).objective(LAST).parts[1].detach


def test_every_stage_gets_a_head_of_its_own():
    method = SCPL()
    first, second = (method.objective(INNER).contrastive.head for _ in range(2))
    assert first is not second


def test_scpl_mixes_in_cross_entropy_through_the_same_head():
    method = SCPL(
        head=Linear(7),
        cross_entropy=0.25,
        classifier_gradient=False,
    )
    inner, last = method.objective(INNER), method.objective(LAST)
    assert type(inner) is ClassifiedContrast
    assert inner.contrastive.weight == 0.75
    assert (inner.classifier.in_features, inner.classifier.out_features) == (7, NUM_CLASSES)
    assert [type(part) for part in last.parts] == [ClassifiedContrast, CrossEntropy]
    assert last.parts[1].detach


def test_the_networks_own_classifier_takes_the_place_of_the_last_local_one():
    method = SCPL(cross_entropy=0.25, classifier_gradient=True)
    contrast, classifier = method.objective(LAST).parts
    assert (type(contrast), contrast.weight) == (Contrastive, 0.75)
    assert classifier.classifier is READOUT
    assert not classifier.detach
    alone = replace(method, cross_entropy=1.0)
    assert type(alone.objective(LAST)) is CrossEntropy
    assert alone.objective(INNER).contrastive.weight == 0


@pytest.mark.parametrize(("name", "bad"), [("cross_entropy", -0.1), ("cross_entropy", 1.1)])
def test_scpl_refuses_what_is_no_share(name, bad):
    with pytest.raises(InputError, match=f"`{name}` must be a share.*Got {bad}"):
        SCPL(**{name: bad})


@pytest.mark.parametrize("name", METHODS)
def test_label_smoothing_is_for_the_classifiers_of_every_method(name):
    features, target = torch.randn(12, 6), torch.arange(12) % NUM_CLASSES

    def terms(task):
        torch.manual_seed(0)
        found, carry = {}, None
        for site in (INNER, LAST):
            objective = METHODS[name]().objective(replace(site, task=task))
            for term, value in objective(features, target, carry).items():
                found[site.index, term] = value.item()
            carry = objective.hand_on(target, carry)
        return found

    plain, smooth = terms(Classes()), terms(Classes(label_smoothing=0.3))
    changed = {key for key in plain if plain[key] != smooth[key]}
    classified = {key for key in plain if "cross_entropy" in key[1]}
    # Only the decoder of the first stage gives classes; others give codes.
    assert changed == ({(0, "reconstruction")} if name == "al" else classified)


def test_measuring_a_head_leaves_it_as_it_was():
    def head(shape):
        return nn.Sequential(nn.BatchNorm1d(*shape), nn.Dropout(0.5), nn.Linear(*shape, 3))

    made = SCPL(head=head, cross_entropy=0.5).objective(INNER).contrastive.head
    assert made.training
    assert made[0].training
    assert made[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    "head", [lambda shape: nn.Linear(99, 3), lambda shape: nn.Unflatten(1, (2, 3))]
)
def test_a_head_that_cannot_be_measured_is_explained(head):
    with pytest.raises(
        InputError, match=r"\[N, D\].*On zeros of the shape \[1, 6\].*`cross_entropy` 0"
    ):
        SCPL(head=head, cross_entropy=0.5).objective(INNER)
    SCPL(head=head, cross_entropy=0.0).objective(INNER)


def test_early_exit_classifies_everywhere():
    method = EarlyExit(hidden_features=9)
    inner, last = method.objective(INNER), method.objective(LAST)
    assert type(inner) is type(last) is CrossEntropy
    assert inner.classifier(torch.zeros(2, 6)).shape == (2, NUM_CLASSES)
    assert inner.classifier[0].out_features == 9
    assert last.classifier is READOUT
    assert not last.detach


def test_early_exit_takes_the_users_classifier():
    seen = []

    def classifier(shape, num_classes):
        seen.append((shape, num_classes))
        return nn.Linear(*shape, num_classes)

    EarlyExit(classifier=classifier).objective(INNER)
    assert seen == [((6,), NUM_CLASSES)]


def test_backpropagation_learns_at_the_end_only():
    assert type(Backpropagation().objective(Site(0, 1, NUM_CLASSES, (6,), READOUT))) is CrossEntropy
    assert Backpropagation().objective(INNER)(torch.zeros(2, 6), None, None) == {}


def test_a_method_is_a_value():
    assert SCPL() == SCPL()
    assert SCPL() != SCPL(temperature=0.2)
    with pytest.raises(FrozenInstanceError):
        SCPL().temperature = 1.0


class Similarity(Objective):
    """A made-up local method with everything a later one may need: a carry, and a readout."""

    def __init__(self, num_classes, width, readout):
        super().__init__()
        self.embed = nn.Embedding(num_classes, width)
        self.readout = readout

    def forward(self, features, target, carry):
        wanted = self.embed(target)
        terms = {"distance": (features - wanted).square().mean()}
        if carry is not None:
            terms["carried"] = (carry["depth"] - wanted.sum(1)).abs().mean() * 0.1
        if self.readout is not None:
            terms["cross_entropy"] = nn.functional.cross_entropy(self.readout(features), target)
        return terms

    def hand_on(self, target, carry):
        depth = 0.0 if carry is None else carry["depth"]
        return {"depth": depth + self.embed(target).sum(1)}

    def predict(self, features):
        return None if self.readout is None else self.readout(features)


@dataclass(frozen=True)
class Made(Method):
    name: ClassVar[str] = "made"

    def objective(self, site):
        return Similarity(site.num_classes, *site.feature_shape, site.readout)


def test_a_method_of_the_users_own_fits_in_with_a_carry():
    batches = rows()
    parts = split(mlp(), before=["linear1", "linear2"], example=batches[0][0])
    pipeline = Pipeline(parts, Made(), torch.optim.Adam)
    reports = [report.values() for report in pipeline.steps(batches)]
    assert [list(terms) for terms in reports[0]] == [
        ["distance"],
        ["distance", "carried"],
        ["distance", "carried", "cross_entropy"],
    ]
    scores = pipeline.evaluate(batches).result()
    assert scores.stage_accuracy[:2] == (None, None)


def test_the_carry_is_that_of_the_same_batch_before_the_update():
    batches = rows()
    parts = split(seeded_layers(mlp()), before=["linear1"], example=batches[0][0])
    pipeline = Pipeline(parts, Made(), torch.optim.Adam)
    first, second = (stage.objective for stage in pipeline.stages)
    target = batches[0][1]
    carried = (first.embed(target).sum(1) - second.embed(target).sum(1)).abs().mean() * 0.1
    report = next(pipeline.steps(batches))
    assert report.values()[1]["carried"] == carried.item()


def test_a_local_and_the_networks_own_classifier_can_learn_side_by_side():
    method = SCPL(cross_entropy=0.5, classifier_gradient=False)
    objective = method.objective(LAST)
    terms = objective(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]), None)
    assert list(terms) == ["contrastive", "local_cross_entropy", "cross_entropy"]
