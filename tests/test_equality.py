"""The master test: the library computes what a loop written by hand computes, bit for bit."""

import copy
import random
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from networks import (
    NUM_CLASSES,
    UNEVEN_CUTS,
    VOCABULARY,
    Indexed,
    assert_same_state,
    cnn,
    data,
    images,
    mlp,
    rows,
    seeded,
    seeded_layers,
    states,
    texts,
)
from scpl import SCPL, Backpropagation, EarlyExit, Pipeline, models, split
from scpl.heads import Convolutional, Identity, Linear, PooledMLP
from scpl.losses.contrastive import supervised_contrastive_loss
from scpl.methods.base import Objective
from scpl.partition.values import tree_map
from scpl.seeding import derive_seed

EPOCHS = 3
SEED = 5
CLIP = 0.5
SHARE = SCPL().cross_entropy
METHODS = {
    "scpl": SCPL(),
    "scpl-paper": SCPL(
        head=PooledMLP(),
        cross_entropy=0.0,
        standardise=False,
        classifier_gradient=False,
    ),
    "scpl-supcon-whole-gradient": SCPL(
        temperature=0.2,
        normalization="supcon",
        head=Linear(16),
        cross_entropy=0.0,
        standardise=False,
        classifier_gradient=True,
    ),
    "early-exit": EarlyExit(hidden_features=16),
    "bp": Backpropagation(),
}
EACH_METHOD = pytest.mark.parametrize("name", METHODS)


def adam(parameters):
    return Adam(parameters, lr=3e-3, weight_decay=1e-3)


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, EPOCHS * len(images()), 1e-5)


def build(model, method, before=UNEVEN_CUTS, **options):
    parts = split(model, before=before, example=images()[0][0][:2])
    options = {"scheduler": cosine, "clip_norm": CLIP, "seed": SEED, **options}
    return Pipeline(parts, method, options.pop("optimizer", adam), **options)


def train(pipeline, batches, epochs=1):
    return [report.values() for _ in range(epochs) for report in pipeline.steps(batches)]


# The loop written by hand. It shares with the library only the loss formula, the modules of the
# heads, and how seeds are named: stage k draws its head's weights after
# manual_seed(derive_seed(seed, "objective", k)), and everything random while it trains from a
# generator that starts at derive_seed(seed, "stage", k).


class HandStage:
    def __init__(self, layers, index, head, classifier, seed=SEED, optimizer=adam):
        self.layers, self.head, self.classifier = layers, head, classifier
        self.random = torch.Generator().manual_seed(derive_seed(seed, "stage", index)).get_state()
        modules = [*layers, *(module for module in (head, classifier) if module is not None)]
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = optimizer(self.parameters)
        self.schedule = cosine(self.optimizer)
        for module in modules:
            module.train()

    def step(self, inputs, loss_of):
        outer = torch.get_rng_state()
        torch.set_rng_state(self.random)
        output = inputs
        for layer in self.layers:
            output = layer(output)
        terms = loss_of(self, output)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.random = torch.get_rng_state()
        torch.set_rng_state(outer)
        onward = tree_map(lambda tensor: tensor.detach().contiguous(), output)
        return onward, {name: term.item() for name, term in terms.items()}


def drawn(index, make, shape):
    torch.manual_seed(derive_seed(SEED, "objective", index))
    return make(shape)


def classified(shape):
    """A head, and the local classifier of its projections."""
    return nn.Sequential(Convolutional()(shape), nn.Linear(128, NUM_CLASSES))


def hand_written_stages(name, model):
    layers = dict(model.named_children())
    names, classifier = list(layers)[:-1], model.classifier
    if name == "bp":
        return [HandStage([layers[n] for n in names], 0, None, classifier)]
    starts = [0, *(names.index(cut) for cut in UNEVEN_CUTS), len(names)]
    shapes = [(4, 8, 8), (4, 8, 8), (8, 2, 2), (10,)]
    stages = []
    for k, shape in enumerate(shapes):
        is_last = k == len(shapes) - 1
        if name == "scpl":
            head = drawn(k, Convolutional() if is_last else classified, shape)
        elif name == "scpl-paper":
            head = drawn(k, PooledMLP(), shape)
        elif name == "early-exit":
            head = None if is_last else drawn(k, PooledMLP(16, NUM_CLASSES), shape)
        else:
            head = drawn(k, Linear(16), shape)
        mine = [layers[n] for n in names[starts[k] : starts[k + 1]]]
        stages.append(HandStage(mine, k, head, classifier if is_last else None))
    return stages


def hand_written_loss(name, target):
    def loss_of(stage, output):
        if name == "bp":
            return {"cross_entropy": F.cross_entropy(stage.classifier(output), target)}
        if name == "early-exit":
            return {
                "cross_entropy": F.cross_entropy((stage.head or stage.classifier)(output), target)
            }
        if name == "scpl":
            local = stage.classifier is None
            projections = stage.head[0](output) if local else stage.head(output)
            contrast = supervised_contrastive_loss(projections, target, standardise=True)
            logits = stage.head[1](projections) if local else stage.classifier(output)
            entropy = F.cross_entropy(logits, target)
            return {
                "contrastive": (1 - SHARE) * contrast,
                **(
                    {"local_cross_entropy": SHARE * entropy}
                    if local
                    else {"cross_entropy": entropy}
                ),
            }
        supcon = name != "scpl-paper"
        terms = {
            "contrastive": supervised_contrastive_loss(
                stage.head(output),
                target,
                temperature=0.2 if supcon else 0.1,
                normalization="supcon" if supcon else "paper",
            )
        }
        if stage.classifier is not None:
            seen = output if supcon else output.detach()
            terms["cross_entropy"] = F.cross_entropy(stage.classifier(seen), target)
        return terms

    return loss_of


def hand_written_training(name, model, batches):
    stages, losses = hand_written_stages(name, model), []
    for _ in range(EPOCHS):
        for inputs, target in batches:
            step = []
            for stage in stages:
                inputs, terms = stage.step(inputs, hand_written_loss(name, target))
                step.append(terms)
            losses.append(step)
    return stages, losses


@EACH_METHOD
def test_training_equals_a_loop_written_by_hand(name):
    by_hand, batches = cnn(), images()
    pipeline = build(cnn(), METHODS[name])
    stages, expected = hand_written_training(name, by_hand, batches)
    losses = train(pipeline, batches, EPOCHS)

    assert pipeline.step == len(losses) == 21
    assert losses == expected
    assert_same_state(dict(pipeline.export().state_dict()), dict(by_hand.state_dict()))
    assert len(pipeline.stages) == len(stages)
    for stage, hand in zip(pipeline.stages, stages, strict=True):
        assert_same_state(stage.optimizer.state_dict(), hand.optimizer.state_dict())
        assert stage.scheduler.get_last_lr() == hand.schedule.get_last_lr()
        assert torch.equal(stage.state_dict()["random"]["cpu"], hand.random)
        for found, wanted in zip(stage.parameters, hand.parameters, strict=True):
            assert torch.equal(found, wanted)
    assert losses[-1] != losses[0]


TEXT_NETWORKS = {
    "lstm": {"width": 6, "dropout": 0.2, "hand_over": True},
    "transformer": {"width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.2},
}


@pytest.mark.parametrize("name", TEXT_NETWORKS)
def test_training_on_texts_equals_a_loop_written_by_hand(name):
    """Batches of other lengths, masks, dropout, states handed over: as in the paper."""

    def network():
        return models.build_text(
            name, num_classes=NUM_CLASSES, vocab_size=VOCABULARY, **TEXT_NETWORKS[name]
        )

    model, by_hand, batches = seeded(network), seeded(network), texts()
    parts = split(model, models.paper_cuts(name), example=batches[0][0])
    method = SCPL(
        head=Identity(),
        cross_entropy=0,
        standardise=False,
        classifier_gradient=False,
    )
    pipeline = Pipeline(parts, method, adam, scheduler=cosine, clip_norm=CLIP, seed=SEED)
    losses = train(pipeline, batches, EPOCHS)

    layers = dict(by_hand.named_children())
    names = [["embedding"], ["layer1"], ["layer2"], ["layer3", "pool"]]
    stages = [
        HandStage([layers[n] for n in group], k, None, by_hand.classifier if k == 3 else None)
        for k, group in enumerate(names)
    ]

    def loss_of(stage, output, target):
        is_last = stage.classifier is not None
        seen = output if is_last else stage.layers[-1].summarize(output)
        terms = {"contrastive": supervised_contrastive_loss(seen, target)}
        if is_last:
            terms["cross_entropy"] = F.cross_entropy(stage.classifier(seen.detach()), target)
        return terms

    expected = []
    for features, target in batches * EPOCHS:
        step = []
        for stage in stages:
            features, terms = stage.step(features, partial(loss_of, target=target))
            step.append(terms)
        expected.append(step)
    assert losses == expected
    assert_same_state(dict(model.state_dict()), dict(by_hand.state_dict()))
    for stage, hand in zip(pipeline.stages, stages, strict=True):
        assert_same_state(stage.optimizer.state_dict(), hand.optimizer.state_dict())
        assert torch.equal(stage.state_dict()["random"]["cpu"], hand.random)


def test_the_comparison_can_fail():
    """The hand-written loop notices a single bit."""
    by_hand = cnn()
    with torch.no_grad():
        by_hand.conv3.weight[0, 0, 0, 0] = torch.nextafter(
            by_hand.conv3.weight[0, 0, 0, 0], torch.tensor(9.0)
        )
    pipeline = build(cnn(), METHODS["scpl"])
    hand_written_training("scpl", by_hand, images())
    train(pipeline, images(), EPOCHS)
    with pytest.raises(AssertionError, match="these differ"):
        assert_same_state(dict(pipeline.export().state_dict()), dict(by_hand.state_dict()))


def test_mixed_precision_equals_a_loop_written_by_hand():
    model, batches = mlp(), rows()
    by_hand = copy.deepcopy(model)
    parts = split(model, before=["linear1"], example=batches[0][0])
    sgd = lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
    pipeline = Pipeline(parts, EarlyExit(), sgd, precision=torch.bfloat16, seed=SEED)
    losses = train(pipeline, batches, 2)

    first, second = by_hand[:2], by_hand[2:-1]
    exit_head = drawn(0, PooledMLP(512, NUM_CLASSES), (6,))
    groups = [(first, exit_head), (second, by_hand.classifier)]
    optimizers = [sgd([*body.parameters(), *head.parameters()]) for body, head in groups]
    expected = []
    for inputs, target in batches * 2:
        step = []
        for (body, head), optimizer in zip(groups, optimizers, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                output = body(inputs)
                logits = head(output)
            loss = F.cross_entropy(logits.float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            inputs = output.detach()
            step.append({"cross_entropy": loss.item()})
        expected.append(step)
    assert losses == expected
    assert_same_state(dict(model.state_dict()), dict(by_hand.state_dict()))


# Isolation: nothing a stage minimises reaches another one.


class Absurd(Objective):
    """Multiply a loss, or minimise something that makes no sense."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, features, target, carry):
        terms = self.inner(features, target, carry)
        if self.how == "scaled":
            return {name: term * 1e3 for name, term in terms.items()}
        return {"garbage": (features * features).sum() - 7 * features.abs().max()}

    def predict(self, features):
        return self.inner.predict(features)


@dataclass(frozen=True)
class Sabotaged(SCPL):
    stage: int = 0
    how: str = "scaled"

    def objective(self, site):
        if site.index == self.stage and self.how == "other head":
            return replace(self, head=Linear(3), how="scaled", stage=-1).objective(site)
        normal = super().objective(site)
        return Absurd(normal, self.how) if site.index == self.stage else normal


@pytest.mark.parametrize("how", ["scaled", "garbage", "other head"])
@pytest.mark.parametrize("stage", range(4))
def test_an_absurd_loss_of_one_stage_leaves_the_others_alone(stage, how):
    """Earlier stages never notice; later ones not before they see what that stage has learnt."""
    normal = build(cnn(), SCPL())
    sabotaged = build(cnn(), Sabotaged(stage=stage, how=how))
    batches = images()
    train(normal, batches[:1])
    train(sabotaged, batches[:1])
    for index, (one, other) in enumerate(zip(states(normal), states(sabotaged), strict=True)):
        if index != stage:
            assert_same_state(one, other)
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            normal.stages[stage].body.parameters(),
            sabotaged.stages[stage].body.parameters(),
            strict=True,
        )
    )

    train(normal, batches, 2)
    train(sabotaged, batches, 2)
    for one, other in zip(states(normal)[:stage], states(sabotaged)[:stage], strict=True):
        assert_same_state(one, other)


def test_a_frozen_stage_hides_its_head_from_all_others():
    batches, results = images(), []
    for how in ("none", "scaled", "other head"):
        model = cnn(dropout=0.0)
        for layer in (model.norm1, model.conv2):
            layer.requires_grad_(False)
        pipeline = build(model, Sabotaged(stage=1, how=how), ["norm1", "norm2"])
        train(pipeline, batches, 2)
        results.append(states(pipeline))
    for other in results[1:]:
        assert_same_state([results[0][0], results[0][2]], [other[0], other[2]])
        assert_same_state(results[0][1]["body"], other[1]["body"])


@pytest.mark.parametrize("reaches", [False, True])
def test_the_classifiers_gradient_stays_out_of_the_last_stage_unless_asked(reaches):
    results = []
    for seed in (1, 2):
        model = cnn()
        seeded_layers(model.classifier, seed)
        pipeline = build(model, SCPL(classifier_gradient=reaches), clip_norm=None)
        train(pipeline, images())
        results.append(states(pipeline))
    one, other = results
    assert_same_state(one[:3], other[:3])
    if reaches:
        assert not torch.equal(one[3]["body"]["hidden.weight"], other[3]["body"]["hidden.weight"])
    else:
        assert_same_state(one[3]["body"], other[3]["body"])


def test_gradients_stop_at_every_cut():
    model = cnn()
    pipeline = build(model, SCPL())
    inputs, target = images()[0]
    first, second = pipeline.stages[:2]
    passed_on = first.forward(inputs)
    assert not passed_on.requires_grad
    second.forward(passed_on)
    second.learn(target, None, 1)
    assert all(p.grad is None for p in first.parameters)


# Export, evaluation, prediction


@EACH_METHOD
def test_the_exported_network_predicts_as_the_stages_do(name):
    model = cnn()
    keys = list(model.state_dict())
    pipeline = build(model, METHODS[name])
    train(pipeline, images(), 2)
    inputs = torch.cat([inputs for inputs, _ in images(seed=3)])
    exported = pipeline.export()
    assert list(exported.state_dict()) == keys
    assert type(exported) is type(model)
    assert exported is not model
    assert not exported.training
    with torch.no_grad():
        assert torch.equal(exported(inputs), pipeline.predict(inputs))


def test_the_export_is_a_copy():
    pipeline = build(cnn(), SCPL())
    exported = pipeline.export()
    before = copy.deepcopy(exported.state_dict())
    train(pipeline, images())
    assert_same_state(dict(exported.state_dict()), dict(before))


@EACH_METHOD
def test_evaluating_and_predicting_in_between_changes_nothing(name):
    watched, alone = build(cnn(), METHODS[name]), build(cnn(), METHODS[name])
    batches, losses = images(), []
    for epoch in range(2):
        for report in watched.steps(batches):
            losses.append(report.values())
            if report.step % 3 == 1:
                watched.evaluate(images(seed=2)).result()
                watched.predict(batches[epoch][0])
                watched.export()
    assert losses == train(alone, batches, 2)
    assert_same_state(states(watched), states(alone))


def test_the_users_own_evaluation_of_the_network_changes_nothing():
    """The stages train the user's layers, so he may well set his network to eval()."""
    model = cnn()
    watched, alone = build(model, SCPL()), build(cnn(), SCPL())
    for _ in range(2):
        train(watched, images())
        model.eval()
        model(images()[0][0])
        train(alone, images())
    assert_same_state(states(watched), states(alone))


def test_scores_are_those_of_the_exported_network():
    pipeline, batches = build(cnn(), EarlyExit()), images(seed=4)
    train(pipeline, images(), 2)
    found = pipeline.evaluate(batches).result()
    with torch.no_grad():
        logits = torch.cat([pipeline.export()(inputs) for inputs, _ in batches])
    target = torch.cat([target for _, target in batches])
    assert found.num_samples == len(target)
    assert found.accuracy == (logits.argmax(1) == target).double().mean()
    assert found.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)
    assert len(found.stage_accuracy) == 4
    assert found.stage_accuracy[-1] == found.accuracy


# Checkpoints


@pytest.fixture(scope="module")
def uninterrupted():
    """Whole runs, each made once; tests must not change them."""

    @cache
    def run(name, loader_of):
        pipeline = build(cnn(), METHODS[name])
        return train(pipeline, loader_of(images()), EPOCHS), states(pipeline)

    return run


@EACH_METHOD
@pytest.mark.parametrize("loader_of", [list, Indexed], ids=["list", "indexed"])
@pytest.mark.parametrize("stop", [10, 14], ids=["within an epoch", "after its last batch"])
def test_a_restored_run_equals_an_uninterrupted_one(name, loader_of, stop, uninterrupted, tmp_path):
    loader = loader_of(images())
    expected, whole = uninterrupted(name, loader_of)

    losses = []
    with build(cnn(), METHODS[name], checkpoints=tmp_path) as first:
        while first.step < stop:
            for report in first.steps(loader):
                losses.append(report.values())
                if report.step == stop:
                    first.checkpoint(best=0.5, note="half way")
                    break
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{stop:09d}"]

    torch.manual_seed(999)
    model = seeded_layers(cnn(), seed=42)  # other weights, to be overwritten
    second = build(model, METHODS[name], checkpoints=tmp_path)
    note = second.restore()
    assert (note["best"], note["note"], second.step) == (0.5, "half way", stop)
    while second.epoch < EPOCHS:
        losses += [report.values() for report in second.steps(loader)]
    assert losses == expected
    assert_same_state(states(second), whole)
    assert (second.step, second.epoch, second.batch) == (21, EPOCHS, 0)


def test_an_indexed_loader_is_not_asked_for_batches_already_seen(tmp_path):
    with build(cnn(), SCPL(), checkpoints=tmp_path) as first:
        for report in first.steps(Indexed(images())):
            if report.step == 4:
                first.checkpoint()
                break
    loader = Indexed(images())
    second = build(cnn(), SCPL(), checkpoints=tmp_path)
    second.restore()
    train(second, loader)
    assert loader.starts == [4]


def test_writing_a_checkpoint_changes_nothing(tmp_path):
    alone = build(cnn(), SCPL())
    train(alone, images())
    with build(cnn(), SCPL(), checkpoints=tmp_path) as saving:
        for _ in saving.steps(images()):
            saving.checkpoint()
        assert_same_state(states(saving), states(alone))


# Randomness


@EACH_METHOD
def test_the_global_generators_are_not_touched(name, tmp_path):
    model = cnn()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with build(model, METHODS[name], checkpoints=tmp_path) as pipeline:
        train(pipeline, images())
        pipeline.evaluate(images()).result()
        pipeline.predict(images()[0][0])
        pipeline.checkpoint()
    pipeline.restore()
    pipeline.export()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_global_generator_does_not_decide_any_number():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pipeline = build(cnn(), SCPL())
        for _ in pipeline.steps(images()):
            torch.rand(seed)
        results.append(states(pipeline))
    assert_same_state(*results)


def test_another_seed_gives_other_numbers():
    losses = [train(build(cnn(), SCPL(), seed=seed), images()) for seed in (1, 2)]
    assert losses[0] != losses[1]


class Draws(nn.Module):
    """Remember what would be dropped; optionally draw more."""

    def __init__(self, extra=0):
        super().__init__()
        self.extra, self.drawn = extra, []

    def forward(self, features):
        if self.training:
            torch.rand(self.extra)
            self.drawn.append(torch.rand(3).tolist())
        return features


def test_a_stage_draws_the_same_whatever_the_others_draw():
    results = []
    for extra in (0, 7):
        model = nn.Sequential(
            nn.Linear(5, 4), Draws(extra), nn.Linear(4, 4), Draws(), nn.Linear(4, NUM_CLASSES)
        )
        parts = split(model, before=["2"], example=rows()[0][0])
        for layer in (model[1], model[3]):
            layer.drawn.clear()  # what was drawn to check the cut
        pipeline = Pipeline(parts, SCPL(), adam, seed=3)
        train(pipeline, rows(), 2)
        results.append((model[1].drawn, model[3].drawn))
    assert results[0][0] != results[1][0]
    assert results[0][1] == results[1][1]
    assert len({tuple(draw) for draw in results[0][1]}) == 6
    assert results[0][0] != results[0][1]


# Networks that are not a plain row of out-of-place layers


def test_an_in_place_layer_after_a_cut_gives_the_same_numbers():
    results = []
    for inplace in (False, True):
        pipeline = build(cnn(inplace=inplace), SCPL(), ["relu1", "relu2", "relu3"])
        losses = train(pipeline, images(), EPOCHS)
        pipeline.evaluate(images())
        results.append((losses, states(pipeline)))
    assert results[0][0] == results[1][0]
    assert_same_state(results[0][1], results[1][1])


class Transposed(nn.Module):
    def forward(self, features):
        return features.transpose(1, 2)


def test_an_output_that_is_not_contiguous_is_made_so_at_the_cut():
    """Strides choose kernels, and a message between processes has none of its own."""

    def network():
        return seeded_layers(
            nn.Sequential(
                nn.Linear(5, 6), Transposed(), nn.Linear(4, 8), nn.Flatten(), nn.Linear(48, 3)
            )
        )

    model, by_hand, batches = network(), network(), data((4, 5), (8, 8, 3))
    parts = split(model, before=["2"], example=batches[0][0])
    method = SCPL(
        head=Identity(),
        cross_entropy=0.0,
        standardise=False,
        classifier_gradient=False,
    )
    pipeline = Pipeline(parts, method, adam)
    train(pipeline, batches, 2)

    groups = [by_hand[:2], by_hand[2:4]]
    optimizers = [adam([*by_hand[0].parameters()]), adam([*by_hand[2:].parameters()])]
    for inputs, target in batches * 2:
        for index, body in enumerate(groups):
            output = body(inputs)
            loss = supervised_contrastive_loss(output.flatten(1), target)
            if index == 1:
                loss = loss + F.cross_entropy(by_hand[4](output.detach()), target)
            loss.backward()
            optimizers[index].step()
            optimizers[index].zero_grad()
            inputs = output.detach().contiguous()
    assert_same_state(dict(model.state_dict()), dict(by_hand.state_dict()))
    inputs = batches[0][0]
    assert torch.equal(pipeline.predict(inputs), pipeline.export()(inputs).detach())


class ToPair(nn.Module):
    def forward(self, features):
        return {"low": features[:, :3], "high": (features[:, 3:], features.sum(1))}


class FromPair(nn.Module):
    def forward(self, pair):
        high, total = pair["high"]
        return torch.cat([pair["low"], high, total[:, None]], dim=1)


class FirstHalf(nn.Module):
    """A head that picks what it compares."""

    def forward(self, pair):
        return pair["low"]


def tree_network():
    return seeded_layers(
        nn.Sequential(nn.Linear(5, 6), ToPair(), FromPair(), nn.Linear(7, 6), nn.Linear(6, 3))
    )


def test_a_dictionary_of_tuples_crosses_a_cut():
    model, by_hand = tree_network(), tree_network()
    batches = rows()

    def head(shape):
        return FirstHalf() if shape == (3,) else nn.Identity()

    parts = split(model, before=["2"], example=batches[0][0])
    assert parts.feature_shapes == ((3,), (6,))
    method = SCPL(head=head, cross_entropy=0.0, standardise=False, classifier_gradient=False)
    pipeline = Pipeline(parts, method, adam)
    train(pipeline, batches, 2)

    optimizers = [adam(by_hand[0].parameters()), adam([*by_hand[3:].parameters()])]
    for inputs, target in batches * 2:
        pair = by_hand[:2](inputs)
        supervised_contrastive_loss(pair["low"], target).backward()
        joined = by_hand[2]({"low": pair["low"].detach(),
                             "high": tuple(t.detach() for t in pair["high"])})  # fmt: skip
        features = by_hand[3](joined)
        loss = supervised_contrastive_loss(features, target)
        (loss + F.cross_entropy(by_hand[4](features.detach()), target)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(dict(model.state_dict()), dict(by_hand.state_dict()))
    with torch.no_grad():
        assert torch.equal(pipeline.predict(inputs), by_hand(inputs))


def test_the_last_stage_may_hand_a_dictionary_to_the_readout():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), ToPair(), FromPair(), nn.Linear(7, 3))
    parts = split(model, before=["1"], readout="3", example=rows()[0][0])
    method = SCPL(
        head=lambda s: FirstHalf() if s == (3,) else nn.Identity(),
        cross_entropy=0.0,
        standardise=False,
    )
    pipeline = Pipeline(parts, method, adam)
    before = model[4].weight.clone()
    train(pipeline, rows())
    assert not torch.equal(model[4].weight, before)


def test_a_stage_without_parameters_trains_no_head():
    """A head would learn for nothing: no layer learns from it, and nobody predicts with it."""
    model, batches = mlp(), rows()
    parts = split(model, before=["relu0", "linear1"], example=batches[0][0])
    pipeline = Pipeline(parts, SCPL(), adam, scheduler=cosine)
    assert not pipeline.stages[1].parameters
    losses = train(pipeline, batches)
    assert all(not step[1] and step[0] and step[2] for step in losses)


def test_a_stage_with_nothing_to_train_only_passes_on(tmp_path):
    model, batches = mlp(), rows()
    parts = split(model, before=["relu0", "linear1"], example=batches[0][0])
    with Pipeline(parts, SCPL(), adam, scheduler=cosine, checkpoints=tmp_path) as pipeline:
        assert pipeline.stages[1].optimizer is None
        losses = train(pipeline, batches)
        pipeline.checkpoint()
    assert all(not step[1] for step in losses)
    assert pipeline.restore() is not None


def test_a_frozen_stage_keeps_its_weights_and_the_others_learn():
    model, batches = mlp(), rows()
    model.linear1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    parts = split(model, before=["linear1", "linear2"], example=batches[0][0])
    pipeline = Pipeline(parts, SCPL(), adam)
    train(pipeline, batches)
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == before.keys() - {"linear1.weight", "linear1.bias"}
    assert not model.linear1.weight.requires_grad


def test_the_readout_may_be_the_whole_last_stage():
    model, by_hand, batches = mlp(3), mlp(3), rows()
    parts = split(model, before=["linear1", "classifier"], example=batches[0][0])
    assert parts.names == (("linear0", "relu0"), ("linear1", "relu1"), ())
    assert parts.cuts == ("linear1", "classifier")
    pipeline = Pipeline(parts, EarlyExit(), adam)
    train(pipeline, batches)

    optimizer, heads = adam(by_hand.classifier.parameters()), []
    for index in range(2):
        torch.manual_seed(derive_seed(0, "objective", index))
        heads.append(PooledMLP(512, NUM_CLASSES)((6,)))
    groups = [(by_hand[:2], heads[0]), (by_hand[2:4], heads[1])]
    others = [adam([*body.parameters(), *head.parameters()]) for body, head in groups]
    for inputs, target in batches:
        for (body, head), other in zip(groups, others, strict=True):
            output = body(inputs)
            F.cross_entropy(head(output), target).backward()
            other.step()
            other.zero_grad()
            inputs = output.detach()
        F.cross_entropy(by_hand.classifier(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_state(dict(model.state_dict()), dict(by_hand.state_dict()))


def test_cuts_do_not_change_backpropagation():
    results = []
    for cuts in ([], UNEVEN_CUTS):
        pipeline = build(cnn(), Backpropagation(), cuts)
        results.append((train(pipeline, images()), states(pipeline)))
    assert results[0][0] == results[1][0]
    assert_same_state(results[0][1], results[1][1])


def test_the_users_batches_are_left_as_they_were():
    batches = images()
    before = copy.deepcopy(batches)
    pipeline = build(cnn(inplace=True), SCPL(), ["relu1", "relu3"])
    train(pipeline, batches)
    pipeline.evaluate(batches)
    pipeline.predict(batches[0][0])
    assert_same_state(batches, before)
