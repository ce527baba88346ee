"""The layers behind a cut, which a head may copy."""

import copy

import pytest
import torch
from torch import nn

import scpl
from scpl.heads import PooledMLP
from scpl.methods.base import Site
from scpl.partition.pieces import OwnCopy

MASK = torch.ones(4, 6, dtype=torch.long)
MASK[1, 4:] = MASK[3, 2:] = 0
BATCH = {"x": torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)), "mask": MASK}


class Layer(nn.Module):
    """A layer of a Transformer, with normalisation before or behind its two parts."""

    def __init__(self, *, before):
        super().__init__()
        self.before = before
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.3))

    def attend(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, dim=2)
        kept = mask[:, None, :].bool()
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, kept))

    def forward(self, x, mask):
        if self.before:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.feed(x))


class Encoder(nn.Module):
    def __init__(self, *, before):
        super().__init__()
        self.layers = nn.ModuleList(Layer(before=before) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x[:, 0])


def encoder(*, before=False):
    torch.manual_seed(1)
    return Encoder(before=before)


def cut(model, before):
    return scpl.split(model, before=before, example=BATCH)


def handed_on(parts):
    values = parts.form.arrange(BATCH)
    for body in parts.bodies[:-1]:
        values = body(values)
    return values


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_behind_a_layer_follows_the_attention_of_the_next_one(before, training):
    model = encoder(before=before)
    parts = cut(model, ["layers.1"])
    unit = parts.following[0]
    assert {name.split(".")[2] for name, _ in unit.body.named_parameters()} == {
        "qkv", "out", "norm1",
    }  # fmt: skip
    for part in (model, *parts.bodies, parts.readout, unit.body):
        part.train(training)
    torch.manual_seed(0)
    values = handed_on(parts)
    x, layer = values[0], model.layers[1]
    if before:
        expected = x + layer.attend(layer.norm1(x), MASK)
    else:
        expected = layer.norm1(x + layer.attend(x, MASK))
    kept = MASK[:, :, None].bool()
    mean = (expected * kept).sum(1) / kept.sum(1)
    torch.testing.assert_close(unit.own_copy().train(training)(values), mean)
    assert unit.shape == (8,)


def test_behind_an_attention_follows_the_feed_forward_part():
    parts = cut(encoder(), ["layers.1.feed"])
    held = {name for name, _ in parts.following[0].body.named_parameters()}
    assert all(name.startswith(("layers.1.feed", "layers.1.norm2")) for name in held)
    assert len(held) == 6


def test_at_the_end_the_classifier_is_not_part_of_it():
    parts = cut(encoder(), ["layers.2.feed"])
    assert not any("head" in name for name, _ in parts.following[0].body.named_parameters())
    assert parts.following[-1] is None


def test_of_a_chain_it_is_the_next_layer_with_matrices_and_what_belongs_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    parts = scpl.split(model, before=["2", "5"], example=torch.randn(4, 1, 8, 8))
    first, second, last = parts.following
    assert {name for name, _ in first.body.named_parameters()} == {
        "2.weight", "2.bias", "3.weight", "3.bias",
    }  # fmt: skip
    assert first.shape == (4, 4, 4)
    assert second.shape == (16,)
    assert last is None


def test_features_of_the_user_need_not_fit_what_no_stage_hands_on():
    def features(value, mask):
        assert value.ndim != 3
        return value.flatten(1)

    model = nn.Sequential(
        nn.Linear(8, 6), nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 3), nn.Flatten(),
        nn.Linear(6, 6), nn.Linear(6, 3),
    )  # fmt: skip
    parts = scpl.split(model, before=["1", "5"], features=features, example=torch.randn(4, 8))
    assert parts.following[0] is None  # ends in [N, 2, 3]


def test_end_to_end_there_is_nothing_to_follow():
    assert cut(encoder(), ["layers.1"]).merged().following == (None,)


def test_a_copy_has_weights_of_its_own():
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    unit = cut(model, ["layers.1"]).following[0]
    made = unit.own_copy()
    theirs = {id(parameter) for parameter in model.parameters()}
    assert not theirs & {id(parameter) for parameter in made.parameters()}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    made.double()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(unit.own_copy().parameters()).dtype == torch.float32


def test_the_last_stage_has_its_head_on_its_own_features():
    head = Site(1, 2, 3, (8,), nn.Linear(8, 3)).head_behind_next(PooledMLP(4, 5))
    assert head(torch.zeros(2, 8)).shape == (2, 5)


class TestLearning:
    """`SCPL(head="next")` on the whole way."""

    def pipeline(self, seen=None):
        parts = cut(encoder(), ["layers.1", "layers.2"])

        def optimizer(parameters):
            if seen is not None:
                seen.append(parameters)
            groups = parameters.groups(0.0, head_lr=1e-2)
            return torch.optim.AdamW(groups, lr=1e-3)

        return scpl.Pipeline(parts, scpl.SCPL(head="next"), optimizer, seed=3)

    def batches(self):
        generator = torch.Generator().manual_seed(2)
        return [(BATCH, torch.randint(0, 3, (4,), generator=generator)) for _ in range(3)]

    def test_copies_learn_apart_from_the_layers_and_with_their_rate(self):
        seen = []
        pipeline = self.pipeline(seen)
        names = dict(zip(seen[0].names, seen[0].in_objective, strict=True))
        copies = [name for name in names if ".reading." in name]
        assert len(copies) == 6
        assert not any(names[name] for name in copies)
        assert names["objective.classifier.weight"]
        head = pipeline.stages[0].objective.contrastive.head
        assert isinstance(head.reading, OwnCopy)
        layer = pipeline.parts.model.layers[1]
        copied = dict(head.reading.body.named_parameters())["layers.1.qkv.weight"]
        torch.testing.assert_close(copied, layer.qkv.weight)
        before = copied.clone()
        pipeline.train(self.batches())
        assert not torch.equal(copied, layer.qkv.weight)
        assert 0 < (copied - before).abs().max() < 3.5e-3  # three steps of 1e-3 at most

    def test_the_network_comes_back_without_copies_and_exits_read_through_them(self):
        pipeline = self.pipeline()
        pipeline.train(self.batches())
        scores = pipeline.evaluate(self.batches()).result()
        assert all(accuracy is not None for accuracy in scores.stage_accuracy)
        assert pipeline.export().state_dict().keys() == encoder().state_dict().keys()
        exits = pipeline.export_exits()
        first = exits.leave_early(BATCH, 1e-6)
        assert set(first.stages.tolist()) == {0}
        objective = pipeline.stages[0].objective.eval()
        values = pipeline.parts.bodies[0].eval()(pipeline.parts.form.arrange(BATCH))
        torch.testing.assert_close(first.logits, objective.predict(values).detach())
