from itertools import pairwise

import pytest
import torch
from torch import nn

from scpl import heads, models
from scpl.errors import InputError

SHAPES = [(7,), (5, 7), (3, 8, 8), (3, 7, 9), (3, 2, 2), (3, 1, 5)]
FACTORIES = [heads.Identity(), heads.Linear(6), heads.MLP(9, 6), heads.PooledMLP(9, 6)]


def num_parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def block_shapes():
    """Shapes that VGG8 puts out after each block, at 32 x 32 pixels."""
    model = models.build("vgg8", num_classes=10).eval()
    features, shapes = torch.zeros(1, 3, 32, 32), []
    with torch.no_grad():
        for name in ("block1", "block2", "block3", "block4"):
            features = model.get_submodule(name)(features)
            shapes.append(tuple(features.shape[1:]))
    return shapes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factory", FACTORIES, ids=repr)
def test_maps_a_batch_to_rows_and_gives_gradients(factory, shape):
    head = factory(shape)
    features = torch.randn(4, *shape, requires_grad=True)
    projections = head(features)
    size = torch.Size(shape).numel() if factory == heads.Identity() else 6
    assert projections.shape == (4, size)
    projections.square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("factory", FACTORIES, ids=repr)
def test_each_call_builds_a_module_of_its_own(factory):
    first, second = factory((3, 4, 4)), factory((3, 4, 4))
    assert first is not second
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_flat_heads_flatten_and_nothing_else():
    features = torch.randn(4, 3, 5, 5)
    assert torch.equal(heads.Identity()((3, 5, 5))(features), features.flatten(1))
    linear = heads.Linear(6)((3, 5, 5))
    torch.testing.assert_close(linear(features), linear[1](features.flatten(1)))


@pytest.mark.parametrize(
    ("size", "layer"),
    [
        ((8, 8), nn.AvgPool2d),
        ((6, 4), nn.AvgPool2d),
        ((3, 1), nn.AdaptiveAvgPool2d),
        ((7, 7), nn.AdaptiveAvgPool2d),
        ((2, 2), None),
        ((1, 2), None),
    ],
    ids=str,
)
def test_pooling_is_adaptive_averaging_by_the_faster_layer_that_fits(size, layer):
    head = heads.PooledMLP(9, 6, pool=2)((3, *size))
    features = torch.randn(4, 3, *size)
    target = tuple(min(2, side) for side in size)
    expected = nn.functional.adaptive_avg_pool2d(features, target).flatten(1)
    assert head[-3].in_features == expected.shape[1]
    torch.testing.assert_close(head[:-3](features), expected)
    pools = [m for m in head if isinstance(m, nn.AvgPool2d | nn.AdaptiveAvgPool2d)]
    assert [type(m) for m in pools] == ([layer] if layer else [])


def test_pool_of_another_size():
    assert heads.PooledMLP(9, 6, pool=1)((3, 8, 8))[-3].in_features == 3
    assert heads.PooledMLP(9, 6, pool=4)((3, 8, 8))[-3].in_features == 3 * 16


def test_a_pooled_sequence_is_its_mean_of_any_length():
    head = heads.PooledMLP(9, 6)((5, 7))
    features = torch.randn(4, 11, 7)
    torch.testing.assert_close(head(features), head[1:](features.mean(dim=1)))


def test_numbers_of_parameters_that_the_documentation_states(block_shapes):
    network = num_parameters(models.build("vgg8", num_classes=10))
    flat = num_parameters(*map(heads.MLP(), block_shapes))
    pooled = num_parameters(*map(heads.PooledMLP(), block_shapes))
    assert (flat, pooled) == (57_677_824, 3_934_720)
    assert flat / network == pytest.approx(4.8, abs=0.05)
    assert pooled / network == pytest.approx(1 / 3, abs=0.01)
    for number in (flat, pooled):
        assert f"{number:,}" in heads.PooledMLP.__doc__


def test_factories_are_values():
    assert heads.MLP() == heads.MLP(512, 1024)
    assert repr(heads.PooledMLP()) == "PooledMLP(hidden_features=512, out_features=128, pool=2)"
    assert len({heads.Linear(), heads.Linear(128), heads.Linear(64)}) == 2


def test_by_name_knows_its_names():
    made = [heads.by_name(name) for name in heads.known()]
    assert made == [heads.Identity(), heads.Linear(), heads.MLP(), heads.PooledMLP()]
    assert heads.known() == ("identity", "linear", "mlp", "pooled-mlp")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(InputError) as raised:
        heads.by_name("pooled_mlp")
    message = str(raised.value)
    positions = [message.index(name) for name in ("head", "pooled-mlp", "identity", "linear")]
    assert all(a < b for a, b in pairwise(positions))
    assert "Did you mean 'pooled-mlp'?" in message


@pytest.mark.parametrize("factory", FACTORIES, ids=repr)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4)], ids=str)
def test_a_shape_without_positive_sizes_is_refused(factory, shape):
    with pytest.raises(InputError, match="batch dimension") as raised:
        factory(shape)
    assert str(list(shape)) in str(raised.value)


def test_a_pooled_head_refuses_other_ranks():
    with pytest.raises(InputError, match=r"\[C, H, W\].*Got \[3, 4, 4, 4\].*'mlp'"):
        heads.PooledMLP()((3, 4, 4, 4))


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (heads.Linear, {"out_features": 0}),
        (heads.MLP, {"hidden_features": -1}),
        (heads.PooledMLP, {"pool": 0}),
    ],
)
def test_a_width_below_one_is_refused(factory, options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name} .* at least 1. Got {value}"):
        factory(**options)
