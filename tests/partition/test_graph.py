"""Networks that are no chain of layers: cut along their graph, or refused with the reason."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import scpl
from networks import assert_same_state
from scpl import EarlyExit, Pipeline, split
from scpl.errors import InputError, PartitionError
from scpl.partition.reading import first_token

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Three(nn.Module):
    """Three linear layers; a subclass says how they are used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def fault(model, example=ROWS, **how):
    with pytest.raises(PartitionError) as caught:
        split(model, example=example, **(how or {"num_stages": 2}))
    return str(caught.value)


def compare_by_hand(model, parts, batch):
    """The stages against the network: output and, in training mode, gradients and buffers."""
    for training in (False, True):
        results = []
        twin, cut = copy.deepcopy((model, parts))
        for network in (lambda x, twin=twin: twin(x), cut.run):
            (twin if not results else cut.model).train(training)
            for body in (*cut.bodies, cut.readout):
                body.train(training)
            torch.manual_seed(3)
            logits = network(batch)
            logits.square().sum().backward()
            owner = twin if not results else cut.model
            grads = {n: p.grad for n, p in owner.named_parameters()}
            results.append((logits.detach(), grads, dict(owner.named_buffers())))
        (expected, *one), (found, *other) = results
        assert torch.equal(expected, found)
        for theirs, ours in zip(one, other, strict=True):
            assert_same_state(theirs, ours)


# Three faults of version 0.1, which compared outputs in evaluation mode, on the network as it was


class FunctionalDropout(Three):
    def forward(self, x):
        x = functional.dropout(self.a(x), 0.5, self.training)
        return self.head(functional.dropout(self.b(x), 0.5, self.training))


class ShiftOnTheRoot(Three):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.head(self.b(self.a(x) + self.shift))


class SkipBehindAGate(Three):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        a = self.a(x)
        return self.head(self.b(a) + self.gate * a)


@pytest.mark.parametrize("kind", [FunctionalDropout, ShiftOnTheRoot, SkipBehindAGate])
def test_what_a_comparison_of_outputs_would_miss_is_cut_right(kind):
    torch.manual_seed(0)
    model = kind()
    parts = split(model, before=["b"], example=ROWS)
    assert parts.is_traced
    assert parts.unused == ()
    held = {key for part in (*parts.bodies, parts.readout) for key in part.state_dict()}
    assert held == set(model.state_dict())
    compare_by_hand(model, parts, ROWS)


def test_a_parameter_on_the_root_is_trained_by_the_stage_that_uses_it():
    torch.manual_seed(0)
    model = ShiftOnTheRoot()
    parts = split(model, before=["b"], example=ROWS)
    assert "shift" in parts.bodies[0].state_dict()
    with Pipeline(parts, EarlyExit(), lambda p: torch.optim.SGD(p, lr=0.5)) as pipeline:
        pipeline.train([(ROWS, torch.tensor([0, 1, 2, 0]))])
        assert pipeline.export().shift.abs().max() > 0
    assert model.shift.abs().max() > 0


# What is still needed behind a cut


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        a = self.a(x)
        c = self.c(torch.relu(self.b(a))) + a
        return self.head(self.d(torch.relu(c)))


def test_a_value_rides_along_only_as_far_as_it_is_needed():
    parts = split(Skips(), before=["b", "c", "d"], example=ROWS)
    crossing = [parts.bodies[0](ROWS)]
    for body in parts.bodies[1:]:
        crossing.append(body(crossing[-1]))
    counts = [len(values) if isinstance(values, tuple) else 1 for values in crossing]
    assert counts == [1, 2, 1, 1]  # the shortcut is itself what `b` reads


class Masked(nn.Module):
    """A mask of all pairs and positions, both computed from the tokens and their number."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        length = ids.shape[1]
        x = self.embed(ids) + self.positions(torch.arange(length, device=ids.device))
        seen = (ids != 0)[:, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
        for layer in self.layers:
            weights = (x @ x.transpose(1, 2)).masked_fill(~seen, -1e9).softmax(-1)
            x = x + layer(weights @ x)
        return self.head(x.mean(1))


def test_what_follows_from_tokens_and_sizes_is_computed_anew_behind_a_cut():
    torch.manual_seed(0)
    model, ids = Masked(), torch.randint(1, 20, (3, 12))
    ids[1, 7:] = 0
    parts = split(model, before=["layers.1", "layers.2"], example=ids)
    values = parts.bodies[0](ids)
    assert sorted(tuple(value.shape) for value in values) == [(3, 12), (3, 12, 8), (3, 12, 8)]
    for length in (1, 2, 5, 12, 20):
        for rows in (1, 2, 17):
            batch = torch.randint(0, 20, (rows, length))
            model.eval()
            for part in (*parts.bodies, parts.readout):
                part.eval()
            assert torch.equal(parts.run(batch), model(batch))


def test_padding_does_not_count_in_what_an_objective_reads():
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (3, 12))
    ids[1, 5:] = 0
    parts = split(Masked(), before=["layers.1"], example=ids)
    values = parts.bodies[0](ids)
    read = parts.readings[0](values)
    assert read.shape == (3, 8)
    main = values[0]
    assert torch.allclose(read[1], main[1, :5].mean(0), atol=1e-6)
    assert torch.allclose(read[0], main[0].mean(0), atol=1e-6)
    first = split(Masked(), before=["layers.1"], features=first_token, example=ids)
    values = first.bodies[0](ids)
    assert torch.equal(first.readings[0](values), values[0][:, 0])


def test_an_input_that_all_samples_share_is_not_taken_for_the_batch():
    class Shared(Three):
        def forward(self, x, scale):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)) * scale)))

    torch.manual_seed(0)
    model, scale = Shared(), torch.rand(1, 8)
    parts = split(model, num_stages=2, example=(ROWS, scale))
    batch = parts.form.arrange((ROWS[:3], scale))
    assert torch.equal(parts.run(batch), model(ROWS[:3], scale))
    assert parts.batch_dims == ((0,), (0,))


def test_a_batch_that_is_not_the_first_dimension_is_found():
    class LengthFirst(Masked):
        def forward(self, ids):
            x = self.embed(ids).transpose(0, 1)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x.mean(0))

    parts = split(LengthFirst(), num_stages=2, example=torch.randint(1, 20, (3, 6)))
    ids = torch.randint(1, 20, (5, 9))
    assert parts.bodies[0](ids).shape == (9, 5, 8)
    assert parts.readings[0](parts.bodies[0](ids)).shape == (5, 8)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_take_any_length(kind):
    """torch.export would write out the steps of the example's length."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.first = kind(8, 8, 2, dropout=0.2, bidirectional=True, batch_first=True)
            self.second, self.head = kind(16, 8), nn.Linear(8, 3)

        def forward(self, ids):
            x, _ = self.first(self.embed(ids))
            x, _ = self.second(x.transpose(0, 1))
            return self.head(x[-1])

    torch.manual_seed(0)
    model = Reader()
    parts = split(model, before=["second"], example=torch.randint(0, 20, (3, 6)))
    for rows, length in ((2, 3), (5, 11)):
        compare_by_hand(model, parts, torch.randint(0, 20, (rows, length)))


# What a user passes


@pytest.mark.parametrize(
    "example", [ROWS, (ROWS,), {"x": ROWS}, {"x": ROWS, "labels": torch.zeros(4)}]
)
def test_an_example_may_be_a_tensor_arguments_or_keywords(example):
    parts = split(Three(), num_stages=2, example=example)
    inputs = parts.form.arrange(example)
    assert torch.equal(inputs, ROWS)
    assert parts.num_outputs == 3


def test_a_batch_of_another_form_than_the_example_is_explained():
    parts = split(Three(), num_stages=2, example={"x": ROWS})
    with pytest.raises(InputError, match=r"mapping with 'x'.*Got Tensor"):
        parts.form.arrange(ROWS)
    with pytest.raises(InputError, match=r"Got one without 'x' and with 'y' besides"):
        parts.form.arrange({"y": ROWS})
    with pytest.raises(InputError, match=r"'x' of the shape \[any, 8\]. Got \[4, 7\]"):
        parts.form.arrange({"x": ROWS[:, :7]})


class SeveralOutputs(Three):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 2)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        return {"estimate": self.other(x), "classes": self.head(x)}


def test_an_output_is_chosen_by_name():
    text = fault(SeveralOutputs())
    assert "which output" in text
    assert "'estimate', 'classes'" in text
    parts = split(SeveralOutputs(), num_stages=2, output="classes", example=ROWS)
    assert parts.num_outputs == 3
    assert parts.unused == ("other.weight", "other.bias")
    assert "Got 'no'" in fault(SeveralOutputs(), num_stages=2, output="no")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_wrappers_are_taken_off():
    for wrap in (nn.DataParallel, torch.compile):
        model = Three()
        parts = split(wrap(model), num_stages=2, example=ROWS)
        assert parts.model is model


def test_a_compiled_layer_is_not_compiled_to_be_cut():
    model = Three()

    def fail(graph, inputs):
        raise AssertionError("compiled")

    model.a = torch.compile(model.a, backend=fail)
    parts = split(model, num_stages=2, example=ROWS)
    assert set(parts.bodies[0].state_dict()) == {"a._orig_mod.weight", "a._orig_mod.bias"}


def test_stages_may_be_cut_by_hand():
    layers = [nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)]
    parts = split(layers, num_stages=2, example=ROWS)
    assert (parts.names, parts.readout_names) == ((("0",), ("1",)), ("2",))
    with pytest.raises(PartitionError, match=r"Got 3 modules and num_stages=3"):
        split(layers, num_stages=3, example=ROWS)
    with pytest.raises(PartitionError, match=r"Got int in it"):
        split([*layers, 3], num_stages=3, example=ROWS)


def test_splitting_leaves_no_trace():
    class Noisy(Three):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x):
            return self.head(self.drop(self.norm(self.b(self.a(x)))))

    model = Noisy().train()
    model.a.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    example = ROWS.clone()
    with torch.no_grad():
        split(model, num_stages=2, example=example)
    assert_same_state(dict(model.state_dict()), dict(state))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == chance[1:]
    assert torch.equal(example, ROWS)
    assert all(p.grad is None for p in model.parameters())


def test_a_moved_stage_takes_the_networks_buffers_along():
    class Normed(Three):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(8), persistent=False)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.head(self.norm(self.b(self.a(x) * self.scale)))

    model = Normed()
    parts = split(model, before=["b"], example=ROWS)
    for part in (*parts.bodies, parts.readout):
        part.double()
    assert model.norm.running_mean.dtype == model.scale.dtype == torch.float64
    parts.bodies[1].train()(parts.bodies[0](ROWS.double()))
    assert model.norm.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_with_the_old_weight_norm_can_be_exported():
    """It keeps the weight that it computed last, which deepcopy refused to copy."""
    model = Three()
    model.b = torch.nn.utils.weight_norm(model.b)
    parts = split(model, before=["b"], example=ROWS)
    with Pipeline(parts, EarlyExit(), lambda p: torch.optim.SGD(p, lr=0.5)) as pipeline:
        pipeline.train([(ROWS, torch.tensor([0, 1, 2, 0]))])
        exported, logits = pipeline.export(), pipeline.predict(ROWS)
    assert list(exported.state_dict()) == list(model.state_dict())
    assert torch.equal(exported(ROWS), logits)


def test_stages_of_a_graph_are_checkpointed_under_the_networks_keys(tmp_path):
    torch.manual_seed(0)
    batches = [(ROWS, torch.tensor([0, 1, 2, 0])), (ROWS[:2], torch.tensor([1, 2]))]

    def build():
        torch.manual_seed(0)
        parts = split(SkipBehindAGate(), before=["b"], example=ROWS)
        adam = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
        return Pipeline(parts, scpl.SCPL(), adam, checkpoints=tmp_path)

    with build() as pipeline:
        pipeline.train(batches)
        pipeline.checkpoint()
        pipeline.train(batches)
        expected = pipeline.export().state_dict()
    with build() as resumed:
        assert resumed.restore()["step"] == 2
        resumed.train(batches)
        assert_same_state(resumed.export().state_dict(), expected)


# What is refused, with the reason


class PythonChance(Three):
    def forward(self, x):
        x = self.a(x)
        return self.head(x if self.training and random.random() < 0.5 else self.b(x))


class NumpyChance(Three):
    def forward(self, x):
        x = self.a(x)
        return self.head(x if self.training and np.random.rand() < 0.5 else self.b(x))


class Counter(Three):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.b(self.a(x)) * self.calls)


class DataDependent(Three):
    def forward(self, x):
        x = self.a(x)
        return self.head(self.b(x) if x.sum() > 0 else x)


class FixedBatch(Three):
    def forward(self, x):
        return self.head(self.b(self.a(x).reshape(4, 2, 4).flatten(1)))


class AliasOverTheCut(Three):
    """What happens to a view behind the cut would not happen to the value on another machine."""

    def forward(self, x):
        x = self.a(x)
        view = x[:, :4]
        y = self.b(x)
        view.mul_(2)
        return self.head(y + x)


class Tied(Three):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (PythonChance, "depends on those of Python or numpy"),
        (NumpyChance, "depends on those of Python or numpy"),
        (Counter, "Counter changes 'calls'"),
        (DataDependent, "torch.export must be able to trace DataDependent"),
        (FixedBatch, "must take batches of any size"),
        (AliasOverTheCut, "is not the same cut into stages"),
        (Tied, "'a.weight' = 'b.weight' is used in stages 0 and 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(kind, told):
    torch.manual_seed(0)
    assert told in fault(kind(), before=["b"])


def test_a_failed_trace_prints_nothing(capfd):
    fault(DataDependent())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"before": ["bb"]}, "no layer 'bb'; did you mean 'b'?"),
        ({"before": ["a"]}, "'a' comes first"),
        ({"before": ["b", "b"]}, "'b' is named twice"),
        ({"before": ["head"]}, "'head' lies inside the readout"),
        ({"before": [3]}, "must be a list of layer names. Got [3]"),
        ({"num_stages": 9}, "Ask for at most 2 stages"),
        ({"num_stages": "2"}, "must be a whole number. Got '2'"),
        ({"num_stages": 2, "readout": "hed"}, "did you mean 'head'?"),
        ({"num_stages": 2, "output": 1}, "Got 1 for Tensor"),
        ({"num_stages": 2, "features": "mean"}, "must be a function. Got 'mean'"),
        ({"num_stages": 2, "features": lambda value, mask: value.sum()}, "a row per sample"),
    ],
)
def test_wrong_arguments_are_explained(how, told):
    assert told in fault(Three(), **how)


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ("text", "x: str"),
        (None, "nothing"),
        (ROWS[:0], r"x: (0, 8) float32"),
        ({"y": ROWS}, "unexpected keyword argument 'y'"),
        (ROWS[:, :3], "must accept the example batch"),
    ],
)
def test_wrong_examples_are_explained(example, told):
    assert told in fault(Three(), example)


def test_a_thing_that_is_no_network_is_refused():
    assert "must be a torch.nn.Module" in fault(Path())


def test_extra_state_must_stay_as_it_is():
    class Extra(nn.Linear):
        count = 0

        def get_extra_state(self):
            return self.count

        def set_extra_state(self, state):
            self.count = state

    class Counts(Extra):
        def forward(self, x):
            self.count = self.count + 1
            return super().forward(x)

    model = Three()
    model.b = Extra(8, 8)
    keys = list(model.state_dict())
    parts = split(model, num_stages=2, example=ROWS)
    assert list(copy.deepcopy(parts).model.state_dict()) == keys
    model.b = Counts(8, 8)
    assert "changes 'b.count', 'b.get_extra_state()'" in fault(model)
