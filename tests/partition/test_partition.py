import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from networks import UNEVEN_CUTS, assert_same_state, cnn, mlp, seeded_layers
from scpl import models, split
from scpl.errors import PartitionError
from scpl.partition import verify

IMAGES = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def nested():
    return seeded_layers(
        nn.Sequential(
            OrderedDict(
                stem=nn.Linear(5, 6),
                body=nn.Sequential(
                    nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 6)
                ),
                classifier=nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
            )
        )
    )


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.last = nn.Linear(width, width)

    def forward(self, features):
        return features + self.last(self.inner(features))


class Flattens(nn.Module):
    """The usual way to write a CNN."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(64, 3)

    def forward(self, images):
        return self.fc(torch.flatten(self.conv2(self.conv1(images)), 1))


# What a partition is


def test_stages_are_the_users_layers_in_order():
    model = cnn()
    parts = split(model, before=UNEVEN_CUTS, example=IMAGES)
    assert parts.num_stages == 4
    assert parts.names == (
        ("conv1",),
        ("norm1", "relu1", "drop1"),
        ("conv2", "norm2", "relu2", "pool2", "drop2", "conv3", "relu3"),
        ("flat", "hidden", "relu4", "drop4"),
    )
    assert parts.readout_names == ("classifier",)
    assert parts.cuts == tuple(UNEVEN_CUTS)
    assert parts.feature_shapes == ((4, 8, 8), (4, 8, 8), (8, 2, 2), (10,))
    assert parts.num_outputs == 3
    for names, body in zip(parts.names, parts.bodies, strict=True):
        for name, layer in zip(names, body.layers, strict=True):
            assert layer is model.get_submodule(name)
    assert parts.readout.layers[0] is model.classifier
    assert parts.model is model


def test_merged_stages_are_one():
    parts = split(cnn(), before=UNEVEN_CUTS, example=IMAGES).merged()
    assert parts.num_stages == 1
    assert parts.cuts == ()
    assert parts.feature_shapes == ((10,),)
    assert parts.names[0][0] == "conv1"
    assert parts.names[0][-1] == "drop4"
    assert parts.readout_names == ("classifier",)


def test_no_cut_is_one_stage():
    parts = split(mlp(), before=[], example=ROWS)
    assert (parts.num_stages, parts.cuts) == (1, ())


def test_a_single_name_may_stand_alone():
    assert split(mlp(), before="linear1", example=ROWS).cuts == ("linear1",)


@pytest.mark.parametrize(
    "cuts",
    [
        ["body"],
        ["body.1"],
        ["body.0", "body.2"],
        ["body.1.1"],
        ["body.1.1", "body.2", "classifier.0"],
    ],
)
def test_nested_rows_of_layers_are_opened_where_they_are_cut(cuts):
    model = nested()
    parts = split(model, before=cuts, example=ROWS)
    assert parts.cuts == tuple(cuts)
    names = [name for stage in (*parts.names, parts.readout_names) for name in stage]
    covered = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    assert covered == {id(p) for p in model.parameters()}
    if not any(cut.startswith("classifier") for cut in cuts):
        assert parts.readout_names == ("classifier",)
    else:
        assert parts.readout_names == ("classifier.2",)


def test_a_readout_may_lie_inside_a_nested_row():
    parts = split(nested(), before=["body"], readout="classifier.2", example=ROWS)
    assert parts.readout_names == ("classifier.2",)
    assert parts.names[1] == ("body", "classifier.0", "classifier.1")


def test_a_layer_used_twice_stays_twice():
    """One nn.ReLU object in several places of a row is common."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(5, 6), relu, nn.Linear(6, 6), relu, nn.Linear(6, 3))
    parts = split(model, before=["2"], example=ROWS)
    assert parts.names == (("0", "1"), ("2", "3"))
    assert split(model, num_stages=2, example=ROWS).cuts == ("2",)


@pytest.mark.parametrize(("num_stages", "cuts"), [(1, ()), (2, ("linear2",)), (4, None)])
def test_cuts_can_be_chosen_by_number(num_stages, cuts):
    parts = split(mlp(5), num_stages=num_stages, example=ROWS)
    assert parts.num_stages == num_stages
    assert cuts is None or parts.cuts == cuts


def test_splitting_changes_nothing():
    model = cnn()
    model.train()
    model.norm1.eval()
    modes = [module.training for module in model.modules()]
    before, example = copy.deepcopy(model.state_dict()), IMAGES.clone()
    random = torch.get_rng_state()
    split(model, before=UNEVEN_CUTS, example=example)
    split(model, num_stages=3, example=example)
    assert [module.training for module in model.modules()] == modes
    assert_same_state(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(example, IMAGES)
    assert all(p.grad is None for p in model.parameters())


def test_an_in_place_first_layer_does_not_change_the_example():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Linear(4, 3))
    example = ROWS.clone()
    split(model, before=["1"], example=example)
    split(model, num_stages=1, example=example)
    assert torch.equal(example, ROWS)


@pytest.mark.parametrize("name", models.known())
def test_the_librarys_networks_have_the_papers_stages(name):
    model = models.build(name, num_classes=4, image_size=16)
    parts = split(
        model,
        before=models.paper_cuts(name),
        readout=models.readout(name),
        example=torch.zeros(1, 3, 16, 16),
    )
    assert (parts.num_stages, parts.num_outputs) == (4, 4)


# What cannot be cut


def fault(model, example=ROWS, **how):
    with pytest.raises(PartitionError) as caught:
        split(model, example=example, **how)
    return str(caught.value)


def test_all_faults_are_told_at_once_with_the_closest_names():
    text = fault(
        cnn(),
        IMAGES,
        before=["conv1", "relu3", "relu_2", "conv2", "conv2", "classifer", "nothing"],
    )
    assert "'conv1' is the first layer" in text
    assert "no layer 'relu_2'; did you mean 'relu2'?" in text
    assert "'conv2' comes before 'relu3'" in text
    assert text.count("'conv2' is named twice") == 1
    assert "no layer 'classifer'; did you mean 'classifier'?" in text
    assert "no layer 'nothing'\n" in text
    assert "The layers are: conv1, norm1, relu1" in text


def test_a_cut_inside_the_readout_is_refused():
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3), nn.Softplus())
    assert "'4' lies inside the readout, which begins at '3'" in fault(model, before=["1", "4"])


@pytest.mark.parametrize("cut", ["1.inner.0", "1.last"])
def test_a_cut_inside_a_residual_block_takes_the_shortcut_along(cut):
    model = nn.Sequential(nn.Linear(5, 6), Residual(), nn.Linear(6, 3))
    parts = split(model, before=[cut], example=ROWS)
    assert (parts.cuts, parts.is_traced) == ((cut,), True)


def test_a_chain_is_not_traced():
    assert not split(nested(), before=["body.1"], example=ROWS).is_traced


def test_a_sequential_with_its_own_forward_is_not_opened():
    class Skip(nn.Sequential):
        def forward(self, features):
            return features + super().forward(features)

    model = nn.Sequential(
        nn.Linear(5, 6), Skip(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6), nn.Linear(6, 3)
    )
    assert split(model, num_stages=3, example=ROWS).cuts == ("1", "2")
    assert split(model, before=["1.1"], example=ROWS).is_traced


def test_the_closest_inner_name_is_suggested():
    assert "no layer 'body.7'; did you mean 'body.2'?" in fault(nested(), before=["body.7"])
    model = nn.Sequential(
        OrderedDict(a=nn.Sequential(OrderedDict(conv=nn.Linear(5, 5))), b=nn.Linear(5, 3))
    )
    assert "did you mean 'a.conv'?" in fault(model, before=["a.cnv"])


def test_an_unknown_readout_is_answered_with_the_closest_name():
    text = fault(mlp(), before=["linear1"], readout="clasifier")
    assert "readout must name a layer" in text
    assert "did you mean 'classifier'?" in text


def test_a_parameter_shared_by_two_stages_is_refused():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    text = fault(model, before=["2"])
    assert "'0.weight' and '2.weight' are the same tensor in stages 0 and 1" in text
    assert split(model, before=[], example=ROWS).num_stages == 1


def test_a_layer_shared_by_two_stages_is_refused():
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(5, 3))
    assert "'0.weight' and '2.weight' are the same tensor" in fault(model, before=["2"])


@pytest.mark.parametrize("how", [{"before": ["conv2"]}, {"num_stages": 2}])
def test_an_example_of_the_wrong_shape_is_named(how):
    text = fault(cnn(), torch.zeros(2, 5, 8, 8), **how)
    assert "must accept the example batch" in text
    assert "(2, 5, 8, 8)" in text


def test_a_network_must_end_in_logits():
    model = nn.Sequential(nn.Linear(5, 5), nn.Unflatten(1, (5, 1)), nn.Linear(1, 3))
    assert "must end in logits [N, C]. Got (2, 5, 3) float32" in fault(model, before=["1"])


@pytest.mark.parametrize("how", [{}, {"before": ["linear1"], "num_stages": 2}])
def test_cuts_or_a_number_but_not_both(how):
    assert "either `before`" in fault(mlp(), **how)


@pytest.mark.parametrize("number", [0, -1, 9])
def test_a_number_of_stages_must_be_possible(number):
    text = fault(mlp(4), num_stages=number)
    assert "Ask for at most 3 stages" in text or "at least 1" in text


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Linear(5, 3), "must be a layer"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "must have parameters"),
    ],
)
def test_a_network_without_layers_or_parameters_is_refused(model, told):
    with pytest.raises(PartitionError, match=told):
        split(model, before=[], example=ROWS)


def test_what_crosses_a_cut_must_be_plain():
    class Boxed(nn.Module):
        def forward(self, features):
            return {"x": features, "n": 3}

    class Unboxed(nn.Module):
        def forward(self, box):
            return box["x"]

    model = nn.Sequential(nn.Linear(5, 5), Boxed(), Unboxed(), nn.Linear(5, 3))
    with pytest.raises(
        ValueError, match=r"plain lists, tuples and dicts of them. Got builtins.int"
    ):
        split(model, before=["2"], example=ROWS)


def test_modes_are_put_back_after_a_failure():
    model = Flattens().train()
    fault(model, IMAGES, before=["conv3"])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("apart", "rounds"), [(1e-8, True), (1e-5, False)])
def test_what_rounding_leaves_of_a_gradient_of_zero_is_no_difference(apart, rounds):
    """On a GPU the gradient of an attention's key bias, zero by its formula, is noise each time."""

    def outcome(noise):
        gradients = {"weight": torch.tensor([1.0, -0.5]), "key.bias": torch.tensor([noise])}
        return verify._Outcome(torch.zeros(2, 3), gradients, {})

    fault = verify._compare(outcome(apart), outcome(-apart), "training", ())
    assert "'key.bias' differs" in fault.what
    assert fault.is_rounding == rounds


def test_beside_an_infinite_gradient_others_still_count():
    """Compared by the size of the others, any gradient was as good as another beside that one."""

    def outcome(value):
        gradients = {"gate": torch.tensor([torch.inf]), "weight": torch.tensor([1.0, value])}
        return verify._Outcome(torch.zeros(2, 3), gradients, {})

    fault = verify._compare(outcome(0.5), outcome(-0.5), "training", ())
    assert "'weight' differs" in fault.what
    assert not fault.is_rounding
