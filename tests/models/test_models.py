import subprocess
import sys

import pytest
import torch
from torch import nn

from scpl import models
from scpl.errors import InputError
from scpl.models.resnet import ResidualBlock, ResNet
from scpl.models.small import MLP, SmallCNN
from scpl.models.vgg import VGG8

BLOCKS = ["block1", "block2", "block3", "block4"]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
NETWORKS = {
    "vgg8": lambda c, s: VGG8(5, c, s, width=1 / 16),
    "resnet18": lambda c, s: ResNet(5, c, s, width=1 / 16),
    "resnet18-3x3": lambda c, s: ResNet(5, c, s, width=1 / 16, shortcut="projection3x3"),
    "resnet50": lambda c, s: ResNet(5, c, s, width=1 / 16, depth=50),
    "small-cnn": lambda c, s: SmallCNN(5, c, s, width=4),
    "mlp": lambda c, s: MLP(5, c * s**2, hidden=16),
}
EACH = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def shapes_of(model, size, channels=3):
    """Shape of one sample's features after each child."""
    features, shapes = torch.zeros(1, channels, size, size), {}
    model.eval()
    with torch.no_grad():
        for name, child in model.named_children():
            features = child(features)
            shapes[name] = tuple(features.shape[1:])
    return shapes


# All networks


@EACH
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 32), (2, 64)])
def test_a_batch_becomes_logits(make, channels, size):
    assert make(channels, size)(torch.randn(2, channels, size, size)).shape == (2, 5)


@EACH
def test_forward_is_the_chain_of_the_named_children(make):
    model = make(3, 16).eval()
    images = torch.randn(2, 3, 16, 16)
    features = images
    for _, child in model.named_children():
        features = child(features)
    assert torch.equal(model(images), features)
    assert type(model).forward is nn.Sequential.forward


@EACH
def test_every_parameter_learns_and_the_input_is_left_alone(make):
    model, images = make(3, 16), torch.randn(4, 3, 16, 16, requires_grad=True)
    before = images.detach().clone()
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert images.grad.abs().sum() > 0
    assert torch.equal(images, before)


@EACH
def test_the_seed_determines_the_weights(make):
    def weights(seed):
        torch.manual_seed(seed)
        return list(make(3, 8).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@EACH
def test_nothing_works_in_place(make):
    # A stage's first layer must not write into what the stage before it sent.
    assert not any(getattr(module, "inplace", False) for module in make(3, 8).modules())


# VGG8


def test_vgg8_has_the_papers_shapes_and_size():
    model = VGG8(10)
    assert list(dict(model.named_children())) == [*BLOCKS, "flatten", "classifier"]
    shapes = shapes_of(model, 32)
    assert [shapes[name] for name in [*BLOCKS, "flatten"]] == [
        (256, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
        (2048,),
    ]
    assert num_parameters(model) == 11_938_294
    assert num_parameters(model.classifier) == 5_147_510
    assert num_parameters(model) - num_parameters(model.classifier) == 6_790_784
    assert [type(layer) for layer in model.classifier] == [nn.Linear, nn.Sigmoid, nn.Linear]


@pytest.mark.parametrize(
    ("size", "sides"), [(64, (32, 16, 8, 4)), (16, (8, 4, 2, 1)), (9, (4, 2, 1, 1))]
)
def test_vgg8_leaves_out_the_pools_that_would_leave_nothing(size, sides):
    shapes = shapes_of(VGG8(10, image_size=size, width=1 / 32), size)
    assert tuple(shapes[name][1] for name in BLOCKS) == sides


# ResNet


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Those with 1 x 1 shortcuts agree with the numbers usually given for CIFAR ResNets.
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        # Three shortcuts have 9 times the weights: 8 * (64 * 128 + 128 * 256 + 256 * 512) more.
        ("resnet18-3x3", 11_173_962 + 8 * (64 * 128 + 128 * 256 + 256 * 512)),
    ],
)
def test_resnet_parameters(name, count):
    with torch.device("meta"):
        assert num_parameters(models.build(name, num_classes=10)) == count


def test_resnet_has_the_papers_shapes():
    model = ResNet(10)
    assert list(dict(model.named_children())) == ["stem", *LAYERS, "pool", "flatten", "classifier"]
    shapes = shapes_of(model, 32)
    assert [shapes[name] for name in ["stem", *LAYERS, "flatten"]] == [
        (64, 32, 32),
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512,),
    ]


@pytest.mark.parametrize(("shortcut", "kernel"), [("projection1x1", 1), ("projection3x3", 3)])
def test_a_shortcut_projects_only_where_the_shape_changes(shortcut, kernel):
    model = ResNet(10, width=1 / 16, shortcut=shortcut)
    blocks = [block for name in LAYERS for block in model.get_submodule(name)]
    projecting = [block for block in blocks if len(block.shortcut)]
    assert projecting == [model.get_submodule(name)[0] for name in LAYERS[1:]]
    for block in projecting:
        convolution, norm = block.shortcut
        assert convolution.kernel_size == (kernel, kernel)
        assert convolution.stride == (2, 2)
        assert isinstance(norm, nn.BatchNorm2d)


def test_a_block_adds_its_input():
    block = ResidualBlock(3, 3).eval()
    nn.init.zeros_(block.residual[-1].weight)
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(block(features), nn.functional.leaky_relu(features, 0.01))


def test_activation_is_leaky_by_default_as_in_the_papers_code():
    kinds = {nn.LeakyReLU, nn.ReLU}
    for options, expected in (({}, nn.LeakyReLU), ({"activation": "relu"}, nn.ReLU)):
        model = ResNet(10, width=1 / 16, **options)
        assert {type(module) for module in model.modules()} & kinds == {expected}


# SmallCNN and MLP


@pytest.mark.parametrize(
    ("size", "sides"),
    [(4, (4, 4, 4, 4)), (8, (4, 4, 4, 4)), (28, (14, 7, 3, 3)), (64, (32, 16, 8, 4))],
)
def test_small_cnn_keeps_maps_that_every_block_can_work_on(size, sides):
    model = SmallCNN(10, 1, size)
    assert list(dict(model.named_children())) == [*BLOCKS, "pool", "flatten", "classifier"]
    shapes = shapes_of(model, size, channels=1)
    assert tuple(shapes[name][1] for name in BLOCKS) == sides
    assert shapes["pool"] == (64, 2, 2)


def test_mlp_takes_rows_and_has_as_many_layers_as_asked():
    model = MLP(3, 11, hidden=6, depth=2)
    assert list(dict(model.named_children())) == ["flatten", "layer1", "layer2", "classifier"]
    assert model(torch.randn(4, 11)).shape == (4, 3)
    assert num_parameters(model) == 12 * 6 + 7 * 6 + 7 * 3


# The registry


def test_build_makes_each_known_network():
    assert models.known() == (
        "vgg8",
        "resnet18",
        "resnet18-3x3",
        "resnet34",
        "resnet50",
        "small-cnn",
        "mlp",
    )
    for name in models.known():
        with torch.device("meta"):
            model = models.build(name, num_classes=7, in_channels=1, image_size=16)
            assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
        children = [child for child, _ in model.named_children()]
        cuts = models.paper_cuts(name)
        assert len(cuts) == 3
        assert [child for child in children if child in cuts] == list(cuts)
        assert children[-1] == models.readout(name) == "classifier"


def test_build_distinguishes_the_shortcuts():
    with torch.device("meta"):
        standard = models.build("resnet18", num_classes=2)
        authors = models.build("resnet18-3x3", num_classes=2)
    assert standard.layer2[0].shortcut[0].kernel_size == (1, 1)
    assert authors.layer2[0].shortcut[0].kernel_size == (3, 3)


def test_names_are_known_before_torch_is_loaded():
    code = "import sys, scpl.models as m; m.known(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Errors


@pytest.mark.parametrize(
    "call",
    [
        lambda name: models.build(name, num_classes=2),
        models.paper_cuts,
        models.readout,
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(call):
    with pytest.raises(InputError) as raised:
        call("resnet-18")
    message = str(raised.value)
    assert "model must be one of: resnet18" in message
    assert "Did you mean 'resnet18'?" in message
    assert all(name in message for name in models.known())


@pytest.mark.parametrize(("network", "smallest"), [(VGG8, 8), (ResNet, 8), (SmallCNN, 4)])
def test_an_image_that_is_too_small_is_refused(network, smallest):
    with pytest.raises(InputError) as raised:
        network(10, 3, smallest - 1)
    assert f"at least {smallest} x {smallest} pixels" in str(raised.value)
    assert f"Got {smallest - 1} x {smallest - 1}" in str(raised.value)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: VGG8(0, -1), ["VGG8", "num_classes=0", "in_channels=-1"]),
        (lambda: ResNet(10, width=0.0), ["ResNet", "width=0.0"]),
        (lambda: SmallCNN(10, 0), ["SmallCNN", "in_channels=0"]),
        (lambda: MLP(10, 4, depth=0), ["MLP", "depth=0"]),
        (lambda: ResNet(10, depth=20), ["18, 34 or 50", "Got 20"]),
        (lambda: ResNet(10, shortcut="projection3"), ["shortcut", "'projection3x3'"]),
        (lambda: ResNet(10, activation="leaky-relu"), ["activation", "'leaky_relu'"]),
    ],
)
def test_a_size_or_option_that_cannot_be_is_named(make, parts):
    with pytest.raises(InputError) as raised:
        make()
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", models.known())
def test_a_width_scales_the_network(name):
    narrow, full = (
        num_parameters(models.build(name, num_classes=4, image_size=16, width=width))
        for width in (0.25, 1.0)
    )
    assert narrow < full / 3


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_no_factor_is_refused(width):
    with pytest.raises(InputError, match="must be a factor above 0"):
        models.build("vgg8", num_classes=4, width=width)
