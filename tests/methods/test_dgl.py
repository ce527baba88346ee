import pytest
import torch
from torch import nn

from scpl.errors import InputError
from scpl.methods.dgl import DGL, auxiliary_network

KINDS = ["mlp", "mlp-sr", "cnn"]
SHAPES = [(7,), (5, 7), (6, 8, 8), (6, 7, 9), (6, 4, 4), (6, 2, 1), (6, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [5, 1])
def test_it_maps_a_batch_to_logits_and_gives_gradients(kind, shape, num_rows):
    """A single row, too, and down to a map of one pixel."""
    network = auxiliary_network(kind, shape, 4)
    features = torch.randn(num_rows, *shape, requires_grad=True)
    logits = network(features)
    assert logits.shape == (num_rows, 4)
    logits.square().sum().backward()
    assert features.grad.isfinite().all()
    assert all(p.grad is not None for p in network.parameters())


def kinds_of(network):
    return [type(layer).__name__ for layer in network]


def test_the_layers_on_maps():
    unit = ["Conv2d", "MapNorm", "ReLU"]
    perceptron = ["Linear", "RowNorm", "ReLU", "Linear", "RowNorm", "ReLU", "Linear"]
    pool = ["AdaptiveAvgPool2d", "Flatten"]
    made = {kind: auxiliary_network(kind, (6, 16, 16), 4) for kind in KINDS}
    assert kinds_of(made["mlp"]) == [*pool, *perceptron]
    assert kinds_of(made["cnn"]) == [*unit * 2, *pool, "Linear"]
    assert kinds_of(made["mlp-sr"]) == ["AdaptiveAvgPool2d", *unit * 3, *pool, *perceptron]
    assert made["mlp"][2].out_features == 4 * 6
    assert made["mlp-sr"][0].output_size == (4, 4)
    kernels = {kind: {m.kernel_size for m in made[kind] if isinstance(m, nn.Conv2d)}
               for kind in KINDS}  # fmt: skip
    assert kernels == {"mlp": set(), "mlp-sr": {(1, 1)}, "cnn": {(3, 3)}}


def test_features_that_are_no_maps_get_the_perceptron():
    assert kinds_of(auxiliary_network("cnn", (7,), 4)) == kinds_of(
        auxiliary_network("mlp", (7,), 4)
    )
    assert kinds_of(auxiliary_network("cnn", (5, 7), 4))[0] == "MeanOverPositions"


def test_what_it_cannot_build_is_refused():
    with pytest.raises(
        InputError, match=r"auxiliary must be one of.*Got 'mpl'.*Did you mean 'mlp'"
    ):
        DGL("mpl")
    with pytest.raises(InputError, match=r"Got \[3, 4, 4, 4\]"):
        auxiliary_network("mlp", (3, 4, 4, 4), 4)
