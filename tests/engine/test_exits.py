import copy
import pickle

import pytest
import torch
from torch import nn

from networks import NUM_CLASSES, UNEVEN_CUTS, assert_same_state, cnn, images
from scpl import split
from scpl.engine.export import ExitNetwork
from scpl.errors import InputError
from scpl.heads import Linear

INPUTS = torch.cat([inputs for inputs, _ in images(seed=3)])
SHAPES = [(4, 8, 8), (4, 8, 8), (8, 2, 2)]


def make(stages=(0, 1, 2), model=None, last=None):
    """An untrained network in eval mode; some samples are sure at every exit, some are not."""
    torch.manual_seed(3)
    parts = split(model or cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
    exits = {k: Linear(NUM_CLASSES)(SHAPES[k]) for k in stages}
    exits[3] = last or parts.readout
    network = ExitNetwork(parts, exits).eval()
    with torch.no_grad():
        for stage, logits in logits_of_every_exit(parts, exits, INPUTS).items():
            layer = (
                exits[stage]
                if stage == 3 and last
                else (exits[stage] if stage < 3 else exits[stage].layers)[-1]
            )
            layer.weight *= 1.5 / logits.std(0).mean()
            layer.bias.zero_()
    return network, parts, exits


def logits_of_every_exit(parts, exits, inputs):
    features, found = inputs, {}
    for index, body in enumerate(parts.bodies):
        features = body(features)
        if index in exits:
            found[index] = exits[index](features)
    return found


@torch.no_grad()
def by_rows(parts, exits, threshold):
    """Every sample by itself, one stage after the other."""
    rows, stages = [], []
    for sample in INPUTS.split(1):
        found = logits_of_every_exit(parts, exits, sample)
        left = next(k for k in found if k == 3 or float(found[k].softmax(1).max()) >= threshold)
        rows.append(found[left])
        stages.append(left)
    return torch.cat(rows), stages


def test_it_predicts_as_the_network_itself():
    model = cnn()
    network, _, _ = make(model=model)
    with torch.no_grad():
        assert torch.equal(network(INPUTS), model.eval()(INPUTS))


def test_the_users_layers_keep_their_keys():
    keys = list(cnn().state_dict())
    network, _, _ = make()
    assert list(network.state_dict())[: len(keys)] == keys
    others = {key.rpartition(".")[0] for key in list(network.state_dict())[len(keys) :]}
    assert {".".join(key.split(".")[:2]) for key in others} == {"exits.0", "exits.1", "exits.2"}


@pytest.mark.parametrize("threshold", [0.6, 0.75, 0.9])
def test_sure_samples_leave_where_each_alone_would(threshold):
    network, parts, exits = make()
    with torch.no_grad():
        found = network.leave_early(INPUTS, threshold)
    expected, stages = by_rows(parts, exits, threshold)
    assert found.stages.tolist() == stages
    torch.testing.assert_close(found.logits, expected)
    assert len(set(stages)) > 2


@pytest.mark.parametrize("stages", [(0, 1, 2), (1,)])
def test_every_exit_answers_for_all_samples(stages):
    network, parts, exits = make(stages=stages)
    with torch.no_grad():
        found = network.every_exit(INPUTS)
        expected = logits_of_every_exit(parts, exits, INPUTS)
    assert len(found) == len(stages) + 1
    assert all(map(torch.equal, found, expected.values()))


def test_nobody_leaves_early_who_is_never_sure():
    network, _, _ = make()
    with torch.no_grad():
        found = network.leave_early(INPUTS, 1.0)
        assert (found.stages == 3).float().mean() > 0.9
        last = found.stages == 3
        assert torch.equal(found.logits[last], network(INPUTS)[last])


def test_later_stages_do_not_run_when_all_have_left():
    network, parts, _ = make()

    def forward(features):
        raise AssertionError("nobody is here any more")

    parts.bodies[1].forward = forward
    found = network.leave_early(INPUTS, 0.01)
    assert found.stages.unique().tolist() == [0]


def test_stages_without_an_exit_are_passed_through():
    network, parts, exits = make(stages=(1,))
    with torch.no_grad():
        found = network.leave_early(INPUTS, 0.6)
    expected, stages = by_rows(parts, exits, 0.6)
    assert found.stages.tolist() == stages
    assert set(stages) == {1, 3}
    torch.testing.assert_close(found.logits, expected)


def test_features_may_be_a_tree():
    class Twice(nn.Module):
        def forward(self, features):
            return {"a": features, "b": [features + 1]}

    class Once(nn.Module):
        def forward(self, features):
            return features["a"] + features["b"][0]

    class Read(nn.Module):
        def forward(self, features):
            return features["a"]

    inputs = torch.randn(6, NUM_CLASSES) * 3
    model = nn.Sequential(Twice(), Once(), nn.Linear(NUM_CLASSES, NUM_CLASSES))
    parts = split(model, before=["1"], example=inputs)
    network = ExitNetwork(parts, {0: Read(), 1: parts.readout})
    found = network.leave_early(inputs, 0.8)
    sure = inputs.softmax(1).amax(1) >= 0.8
    assert torch.equal(found.stages, (~sure).long())
    assert 0 < sure.sum() < 6
    assert torch.equal(found.logits[sure], inputs[sure])
    torch.testing.assert_close(found.logits[~sure], model(inputs)[~sure])


def test_another_readout_takes_the_place_of_the_users():
    last = nn.Linear(10, NUM_CLASSES)
    network, parts, exits = make(stages=(), last=last)
    assert not [key for key in network.state_dict() if key.startswith("classifier")]
    assert list(network.state_dict())[-2:] == ["exits.3.weight", "exits.3.bias"]
    assert torch.equal(network(INPUTS), logits_of_every_exit(parts, exits, INPUTS)[3])


def test_a_readout_inside_a_nested_chain_is_removed_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, NUM_CLASSES)))
    parts = split(model, before=["1.0"], readout="1.1", example=torch.randn(2, 4))
    network = ExitNetwork(parts, {1: nn.Linear(4, NUM_CLASSES)})
    assert list(network.state_dict()) == ["0.weight", "0.bias", "exits.1.weight", "exits.1.bias"]
    assert network(torch.randn(2, 4)).shape == (2, NUM_CLASSES)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_is_a_module_like_any_other(clone):
    network, _, _ = make()
    other = clone(network)
    assert_same_state(dict(other.state_dict()), dict(network.state_dict()))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert other(INPUTS).std(0).max() == 0  # its own layers, not those it was copied from
        assert network(INPUTS).std(0).max() > 0
        assert network.double()(INPUTS.double()).dtype == torch.float64


def test_layers_may_be_called_like_its_methods():
    model = nn.Sequential()
    for name in ("leave_early", "num_stages", "forward"):
        model._modules[name] = nn.Linear(4, 4 if name != "forward" else NUM_CLASSES)
    parts = split(model, before=["num_stages"], example=torch.randn(2, 4))
    network = ExitNetwork(parts, {0: nn.Linear(4, NUM_CLASSES), 1: parts.readout})
    inputs = torch.randn(2, 4)
    assert torch.equal(network(inputs), model(inputs))
    assert network.leave_early(inputs, 0.5).logits.shape == (2, NUM_CLASSES)


def test_a_layer_called_exits_is_refused():
    model = nn.Sequential()
    model.add_module("exits", nn.Linear(4, 4))
    model.add_module("classifier", nn.Linear(4, NUM_CLASSES))
    parts = split(model, before=["classifier"], example=torch.randn(2, 4))
    with pytest.raises(InputError, match=r"no layer called 'exits'.*Rename it"):
        ExitNetwork(parts, {1: parts.readout})


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(InputError, match=r"exit threshold must be a probability.*Got"):
        make()[0].leave_early(INPUTS, threshold)
