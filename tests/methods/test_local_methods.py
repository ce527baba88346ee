"""What holds for every method whose stages learn on their own, and each method by hand."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam

from networks import (
    NUM_CLASSES,
    UNEVEN_CUTS,
    assert_same_state,
    cnn,
    images,
    mlp,
    rows,
    seeded_layers,
    states,
)
from scpl import (
    DASCPL,
    DGL,
    SCPL,
    AssociatedLearning,
    DeInfoReg,
    EarlyExit,
    Method,
    Pipeline,
    PredSim,
    split,
)
from scpl.data.images import load
from scpl.engine.export import has_exits
from scpl.errors import InputError
from scpl.heads import Linear, PooledMLP
from scpl.methods import METHODS
from scpl.methods.base import Objective
from scpl.methods.predsim import local_classifier, similarity_head
from scpl.seeding import derive_seed

SEED, CLIP, EPOCHS = 5, 0.5, 3
PAPER = {"cross_entropy": 0.0, "standardise": False, "classifier_gradient": False}
LOCAL = {
    "al": AssociatedLearning(label_features=12),
    "predsim": PredSim(),
    "deinforeg": DeInfoReg(head=Linear(16)),
    "dascpl": DASCPL(head=Linear(16), hidden_features=8, standardise=False),
    "dgl": DGL(),
    "dgl-cnn": DGL(auxiliary="cnn"),
    "early-exit": EarlyExit(hidden_features=8),
}
EACH = pytest.mark.parametrize("name", LOCAL)


def adam(parameters):
    return Adam(parameters, lr=3e-3)


def build(method, model=None, *, before=UNEVEN_CUTS, optimizer=adam, **options):
    parts = split(model or cnn(), before=before, example=images()[0][0][:2])
    return Pipeline(parts, method, optimizer, **{"seed": SEED, **options})


def train(pipeline, batches=None, epochs=1):
    batches = batches or images()
    return [report.values() for _ in range(epochs) for report in pipeline.steps(batches)]


@pytest.fixture(scope="module")
def trained():
    """A pipeline of each method after two epochs; tests must not train it further."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = build(LOCAL[name])
            train(known[name], epochs=2)
        return known[name]

    return get


def test_methods_are_known_by_name():
    assert {method.name for method in LOCAL.values()} <= METHODS.keys()
    parts = split(cnn(), before=UNEVEN_CUTS, example=images()[0][0][:2])
    exits = {name for name, method in METHODS.items() if has_exits(parts, method())}
    assert exits >= {"al", "predsim", "deinforeg", "dascpl", "dgl", "early-exit", "scpl"}
    assert not exits & {"bp", "bp-wide", "bp-cut", "gpipe", "1f1b", "zero-bubble", "ddp"}
    assert [name for name, method in METHODS.items() if method.replaces_readout] == ["al"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: AssociatedLearning(label_features=0), "`label_features` must be at least 1"),
        (lambda: PredSim(similarity_weight=1.5), "`similarity_weight` must lie in 0 .. 1"),
        (lambda: DeInfoReg(classifier_weight=0.0), "`classifier_weight` must be more than 0"),
        (lambda: DGL(auxiliary="resnet"), "auxiliary must be one of.*Got 'resnet'"),
        (lambda: DASCPL(temperature=0.0), "`temperature` must be more than 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(method, message):
    with pytest.raises(InputError, match=message):
        method()


# Each method against a loop written by hand. It shares with the library the modules of the heads,
# and how seeds are named; losses are computed from their definitions, on rows one by one where
# they are about pairs.


class HandStage:
    """Layers and the modules of a local objective, drawn as the library draws them."""

    def __init__(self, index, layers, draw):
        torch.manual_seed(derive_seed(SEED, "objective", index))
        self.layers, self.extra = layers, draw()
        self.random = torch.Generator().manual_seed(derive_seed(SEED, "stage", index)).get_state()
        modules = [*layers, *self.extra]
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = adam(self.parameters)
        for module in modules:
            module.train()

    def step(self, inputs, loss_of):
        outer = torch.get_rng_state()
        torch.set_rng_state(self.random)
        output = inputs
        for layer in self.layers:
            output = layer(output)
        terms, onward = loss_of(output)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.random = torch.get_rng_state()
        torch.set_rng_state(outer)
        return output.detach(), onward, {name: term.item() for name, term in terms.items()}


def layers_of(model):
    layers = dict(model.named_children())
    names = list(layers)[:-1]
    starts = [0, *(names.index(cut) for cut in UNEVEN_CUTS), len(names)]
    return [[layers[n] for n in names[a:b]] for a, b in pairwise(starts)]


SHAPES = [(4, 8, 8), (4, 8, 8), (8, 2, 2), (10,)]
WIDTH = 12  # of a code


def hand_written_associated_learning(model, batches):
    def draw(index):
        bridge = nn.Sequential(PooledMLP(out_features=WIDTH)(SHAPES[index]), nn.Tanh())
        encoder = nn.Linear(WIDTH if index else NUM_CLASSES, WIDTH)
        if index:
            nn.init.xavier_normal_(encoder.weight, 5 / 3)
        else:
            nn.init.normal_(encoder.weight)
        decoder = nn.Linear(WIDTH, WIDTH if index else NUM_CLASSES)
        if index:
            nn.init.xavier_normal_(decoder.weight, 5 / 3)
        return bridge, encoder, decoder

    stages = [HandStage(k, mine, lambda k=k: draw(k)) for k, mine in enumerate(layers_of(model))]
    losses = []
    for _ in range(EPOCHS):
        for inputs, target in batches:
            code, step = None, []
            for index, stage in enumerate(stages):

                def loss_of(features, stage=stage, index=index, code=code, target=target):
                    bridge, encoder, decoder = stage.extra
                    if index == 0:
                        new = encoder(torch.eye(NUM_CLASSES)[target]).tanh()
                        rebuilt = F.cross_entropy(decoder(new), target)
                    else:
                        new = encoder(code).tanh()
                        rebuilt = F.mse_loss(decoder(new).tanh(), code)
                    near = F.mse_loss(bridge(features), new.detach())
                    return {"association": near, "reconstruction": rebuilt}, new.detach()

                inputs, code, terms = stage.step(inputs, loss_of)
                step.append(terms)
            losses.append(step)
    return stages, losses


def test_associated_learning_equals_a_loop_written_by_hand():
    """21 steps with dropout, BatchNorm, clipping and a partial batch, bit for bit."""
    by_hand, batches = cnn(), images()
    pipeline = build(LOCAL["al"], clip_norm=CLIP)
    stages, expected = hand_written_associated_learning(by_hand, batches)
    assert train(pipeline, epochs=EPOCHS) == expected
    assert len(expected) == 21
    assert expected[-1] != expected[0]
    for stage, hand in zip(pipeline.stages, stages, strict=True):
        assert_same_state(stage.optimizer.state_dict(), hand.optimizer.state_dict())
        assert torch.equal(stage.state_dict()["random"]["cpu"], hand.random)
        assert len(stage.parameters) == len(hand.parameters)
        for found, wanted in zip(stage.parameters, hand.parameters, strict=True):
            assert torch.equal(found, wanted)


def test_associated_learning_predicts_through_all_decoders():
    """Each stage by its shortcut, against the path written out with the hand-written modules."""
    by_hand, batches = cnn(), images(seed=3)
    pipeline = build(LOCAL["al"], clip_norm=CLIP)
    stages, _ = hand_written_associated_learning(by_hand, images())
    train(pipeline, epochs=EPOCHS)
    found = pipeline.evaluate(batches).result()
    by_hand.eval()
    correct = [0] * 4
    for inputs, target in batches:
        features = inputs
        with torch.no_grad():
            for index, stage in enumerate(stages):
                for layer in stage.layers:
                    features = layer(features)
                code = stage.extra[0](features)
                for earlier in range(index, -1, -1):
                    code = stages[earlier].extra[2](code)
                    code = code.tanh() if earlier else code
                correct[index] += int((code.argmax(1) == target).sum())
        assert torch.equal(pipeline.predict(inputs), code)
    assert found.stage_accuracy == tuple(n / found.num_samples for n in correct)
    assert found.accuracy == found.stage_accuracy[-1]


def similarities(rows):
    """Cosine of every two rows, each centred over its own entries; pair by pair, in float64."""
    rows = [row - row.mean() for row in rows.double()]
    return torch.tensor([[float(a @ b / (a.norm() * b.norm())) for b in rows] for a in rows])


@torch.no_grad()
def first_terms(name, inputs, target):
    """The losses of stage 0 on a first mini-batch, from the paper's formulas, in float64."""
    model = cnn(dropout=0.0)
    features = model.conv1(inputs)  # stage 0 is this layer alone
    torch.manual_seed(derive_seed(SEED, "objective", 0))
    labels = similarities(torch.eye(NUM_CLASSES)[target])
    if name == "predsim":
        head, local = similarity_head((4, 8, 8)), local_classifier((4, 8, 8), NUM_CLASSES)
        spread = head[0](features).flatten(2).std(2)
        similarity = (similarities(spread) - labels).square().mean()
        entropy = F.cross_entropy(local(features), target)
        return {"similarity": 0.99 * similarity, "cross_entropy": 0.01 * entropy}
    head = LOCAL[name].head((4, 8, 8))
    local = nn.Sequential(nn.ReLU(), nn.Linear(16, NUM_CLASSES))
    projections = head(features).double()
    unit = projections / projections.norm(dim=1, keepdim=True)
    n, d = unit.shape
    centred = unit - unit.mean(0)
    covariance = sum(
        float((centred[:, i] @ centred[:, j] / n) ** 2)
        for i in range(d)
        for j in range(d)
        if i != j
    )
    spread = (centred.square().mean(0) + 1e-7).sqrt()
    entropy = F.cross_entropy(local(projections.float()), target)
    return {
        "variance": (1 - spread).clamp(min=0).mean() / n,
        "invariance": (similarities(unit) - labels).square().mean(),
        "covariance": covariance / d,
        "cross_entropy": 0.001 * entropy,
    }


@pytest.mark.parametrize("name", ["predsim", "deinforeg"])
def test_the_losses_of_a_stage_are_those_of_the_paper(name):
    inputs, target = images()[0]
    pipeline = build(LOCAL[name], cnn(dropout=0.0))
    found = next(pipeline.steps([(inputs, target)])).values()[0]
    expected = first_terms(name, inputs, target)
    assert found.keys() == expected.keys()
    for term, value in expected.items():
        assert found[term] == pytest.approx(float(value), rel=2e-5), term


def test_dascpl_trains_the_layers_exactly_as_scpl_does():
    """The local classifiers see detached features: the trajectories are the same bits."""
    plain = build(SCPL(head=Linear(16), **PAPER))
    with_exits = build(LOCAL["dascpl"])
    for one, other in zip(train(plain, epochs=2), train(with_exits, epochs=2), strict=True):
        assert [t["contrastive"] for t in one] == [t["contrastive"] for t in other]
    for one, other in zip(states(plain), states(with_exits), strict=True):
        assert_same_state(one["body"], other["body"])


@pytest.mark.parametrize("name", ["dgl", "early-exit"])
def test_cross_entropy_reaches_the_layers(name):
    pipeline = build(LOCAL[name], optimizer=lambda p: SGD(p, lr=0.1))
    before = pipeline.stages[0].body.layers[0].weight.detach().clone()
    train(pipeline, images()[:1])
    assert not torch.equal(before, pipeline.stages[0].body.layers[0].weight)


# Isolation


class Scaled(Objective):
    """An objective whose losses are a thousand times larger."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features, target, carry):
        return {name: 1e3 * loss for name, loss in self.inner(features, target, carry).items()}

    def hand_on(self, target, carry):
        return self.inner.hand_on(target, carry)

    def share(self, received):
        return self.inner.share(received)

    def predict(self, features):
        return self.inner.predict(features)


@dataclass(frozen=True)
class Sabotaged(Method):
    inner: Method = None
    stage: int = 0

    def objective(self, site):
        objective = self.inner.objective(site)
        return Scaled(objective) if site.index == self.stage else objective


@EACH
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_loss_of_one_stage_leaves_the_others_alone(name, stage):
    sgd = lambda parameters: SGD(parameters, lr=1e-3)  # noqa: E731
    normal = build(LOCAL[name], optimizer=sgd)
    sabotaged = build(Sabotaged(LOCAL[name], stage), optimizer=sgd)
    train(normal, images()[:1])
    train(sabotaged, images()[:1])
    pairs = list(zip(normal.stages, sabotaged.stages, strict=True))
    for index, (one, other) in enumerate(pairs):
        same = [torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True)]
        assert all(same) == (index != stage)
    train(normal)
    train(sabotaged)
    for one, other in pairs[:stage]:  # earlier stages never notice
        assert_same_state(dict(one.body.state_dict()), dict(other.body.state_dict()))


@EACH
def test_no_gradient_crosses_a_cut(name):
    pipeline = build(LOCAL[name])
    inputs, target = images()[0]
    first, second = pipeline.stages[:2]
    features, carry = first.forward(inputs), first.hand_on(target, None)
    assert not features.requires_grad
    assert carry is None or not carry.requires_grad
    second.forward(features)
    second.learn(target, carry, 1)
    assert all(p.grad is None for p in first.parameters)


# Reading out


@EACH
def test_every_stage_predicts(name, trained):
    scores = trained(name).evaluate(images(seed=4)).result()
    assert None not in scores.stage_accuracy
    assert scores.stage_accuracy[-1] == scores.accuracy


@EACH
def test_evaluating_changes_nothing(name):
    watched, alone, losses = build(LOCAL[name]), build(LOCAL[name]), []
    for _ in range(2):
        for report in watched.steps(images()):
            losses.append(report.values())
            if report.step % 3 == 1:
                watched.evaluate(images(seed=2)).result()
                watched.export_exits()
    assert losses == train(alone, epochs=2)
    assert_same_state(states(watched), states(alone))


@EACH
def test_a_restored_run_equals_an_uninterrupted_one(name, tmp_path):
    whole = build(LOCAL[name])
    expected = train(whole, epochs=2)
    with build(LOCAL[name], checkpoints=tmp_path) as first:
        for report in first.steps(images()):
            if report.step == 5:
                first.checkpoint()
                break
    again = build(LOCAL[name], checkpoints=tmp_path)
    assert again.restore()["step"] == 5
    losses = train(again) + train(again)
    assert losses[: len(expected) - 5] == expected[5:]


def test_a_batch_of_one_row_and_one_class_is_learnt():
    """An epoch's last mini-batch may be that small; no method may break on it."""
    batches = [*rows(sizes=(8, 1)), (torch.randn(4, 5), torch.ones(4, dtype=torch.int64))]
    for method in LOCAL.values():
        parts = split(mlp(), before=["linear1", "linear2"], example=batches[0][0])
        for step in train(Pipeline(parts, method, adam), batches):
            assert all(value == value for terms in step for value in terms.values())


@pytest.mark.parametrize("shape", [(7, 4), (3, 1, 1)], ids=["sequence", "one pixel"])
def test_every_shape_of_features_is_learnt(shape):
    class Mean(nn.Module):
        def forward(self, features):
            return features.flatten(1) if shape[1:] == (1, 1) else features.mean(1)

    first = nn.Linear(4, 6) if len(shape) == 2 else nn.Conv2d(3, 6, 1)
    second = nn.Linear(6, 6) if len(shape) == 2 else nn.Conv2d(6, 6, 1)
    inputs, target = torch.randn(5, *shape), torch.tensor([0, 1, 2, 0, 1])
    for method in LOCAL.values():
        model = nn.Sequential(first, second, Mean(), nn.Linear(6, NUM_CLASSES))
        pipeline = Pipeline(split(model, before=["1"], example=inputs), method, adam)
        train(pipeline, [(inputs, target)])
        assert None not in pipeline.evaluate([(inputs, target)]).result().stage_accuracy


@EACH
def test_mixed_precision_is_learnt_with_losses_in_float32(name):
    pipeline = build(LOCAL[name], precision=torch.bfloat16)
    for report in pipeline.steps(images()[:2]):
        terms = [term for part in report.losses for term in part.values()]
        assert {term.dtype for term in terms} == {torch.float32}
    assert pipeline.evaluate(images()[:1]).result().num_samples == 9


# Learning something real


@pytest.fixture(scope="module")
def digits():
    """600 images to learn from, in mini-batches, and all to test on."""
    source = load("digits")
    pairs = [(part.images.float() / 128 - 1, part.labels) for part in (source.train, source.test)]
    (images, target), test = pairs
    batches = list(zip(images[:600].split(30), target[:600].split(30), strict=True))
    return batches, [test]


@pytest.mark.parametrize(
    "method",
    [
        AssociatedLearning(label_features=64, bridge=Linear(64)),
        PredSim(),
        DeInfoReg(head=Linear(64)),
        DASCPL(head=Linear(64), hidden_features=64),
        DGL(),
    ],
    ids=lambda method: method.name,
)
def test_it_learns_handwritten_digits(method, digits):
    """120 steps of a small perceptron in three stages; guessing gets a tenth."""
    learn, test = digits
    layers = [nn.Flatten(), *(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU()))]
    model = seeded_layers(nn.Sequential(*layers, nn.Linear(64, 10)))
    parts = split(model, before=["3", "5"], example=test[0][0][:2])
    pipeline = Pipeline(parts, method, adam)
    train(pipeline, learn, epochs=6)
    assert pipeline.evaluate(test).result().accuracy > 0.8
