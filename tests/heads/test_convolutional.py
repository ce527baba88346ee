import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scpl import models, split
from scpl.errors import InputError
from scpl.heads import Convolutional, PooledMLP, projection

SHAPES = [(7,), (5, 7), (6, 8, 8), (6, 7, 9), (6, 4, 4), (6, 2, 1), (6, 1, 1)]


@pytest.mark.parametrize(("norm", "shape"), [("RowNorm", (3,)), ("MapNorm", (3, 2, 2))])
def test_a_norm_is_batch_norm(norm, shape):
    mine, torchs = getattr(projection, norm)(3), (nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) > 1](3)
    for _ in range(3):
        rows = torch.randn(6, *shape)
        assert torch.equal(mine(rows), torchs(rows))
    mine.eval(), torchs.eval()
    assert torch.equal(mine(rows[:1]), torchs(rows[:1]))
    assert mine.state_dict().keys() == torchs.state_dict().keys()


def test_one_row_is_normalised_by_the_running_statistics():
    norm, rows = projection.RowNorm(3), torch.randn(6, 3)
    norm(rows)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    found = norm(rows[:1])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(found, norm.eval()(rows[:1]))


@pytest.mark.parametrize(
    ("size", "strides", "in_features"),
    [
        ((16, 16), [(2, 2), (2, 2)], 32 * 4),
        ((4, 4), [(2, 2), (1, 1)], 32 * 4),
        ((7, 2), [(2, 1), (2, 1)], 32 * 4),
        ((1, 1), [(1, 1), (1, 1)], 32),
    ],
    ids=str,
)
def test_convolutions_halve_a_map_until_it_is_as_small_as_the_pool(size, strides, in_features):
    head = Convolutional(depth=2, hidden_features=9, out_features=6)((3, *size))
    assert [layer.stride for layer in head if isinstance(layer, nn.Conv2d)] == strides
    first = next(layer for layer in head[-1] if isinstance(layer, nn.Linear))
    assert first.in_features == in_features
    assert head(torch.randn(4, 3, *size)).shape == (4, 6)


def test_the_width_of_a_convolutional_head_follows_the_features():
    head = Convolutional(depth=3, width=1.5)((40, 8, 8))
    convolutions = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [60, 60, 60]
    assert Convolutional(width=0.01)((40, 8, 8))[0].out_channels == 32


@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=str)
def test_where_nothing_is_to_convolve_the_head_is_the_pooled_one(shape):
    torch.manual_seed(0)
    head = Convolutional(hidden_features=9, out_features=6)(shape)
    torch.manual_seed(0)
    pooled = PooledMLP(9, 6)(shape)
    features = torch.randn(2, *shape)
    assert torch.equal(head(features), pooled(features))


@pytest.mark.parametrize(
    "options", [{"depth": -1}, {"width": 0.0}, {"width": float("inf")}], ids=str
)
def test_a_convolutional_head_refuses_impossible_sizes(options):
    with pytest.raises(InputError, match="depth of at least 0 and a width above 0"):
        Convolutional(**options)


@pytest.mark.parametrize("num_rows", [5, 1])
def test_a_convolutional_head_gives_gradients_also_to_a_single_row(num_rows):
    for shape in SHAPES:
        features = torch.randn(num_rows, *shape, requires_grad=True)
        head = Convolutional(out_features=6)(shape)
        projections = head(features)
        assert projections.shape == (num_rows, 6)
        projections.square().sum().backward()
        assert features.grad.isfinite().all()


def test_a_convolutional_head_refuses_other_shapes():
    for shape in ((3, 4, 4, 4), (), (3, 0, 4)):
        with pytest.raises(InputError, match="shape"):
            Convolutional()(shape)


def test_the_heads_cost_the_share_of_the_network_that_is_stated():
    for name, share in (("vgg8", 8), ("resnet18", 5)):
        model = models.build(name, num_classes=10).eval()
        parts = split(
            model,
            before=models.paper_cuts(name),
            readout="classifier",
            example=torch.zeros(1, 3, 32, 32),
        )
        bodies = extras = 0
        features = torch.zeros(1, 3, 32, 32)
        for body, shape in zip(parts.bodies, parts.feature_shapes, strict=True):
            with FlopCounterMode(display=False) as own:
                features = body(features)
            with FlopCounterMode(display=False) as extra:
                Convolutional()(shape).eval()(features)
            bodies, extras = bodies + own.get_total_flops(), extras + extra.get_total_flops()
        assert 100 * extras / (bodies + extras) == pytest.approx(share, abs=0.5)
        assert f"{share} % of" in Convolutional.__doc__
