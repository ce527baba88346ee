import pytest
import torch

from scpl.app.bench.bench import synthetic_data
from scpl.app.build import build_partition, laid_out
from scpl.app.config import TrainConfig

LAST = torch.channels_last


def maps(network):
    found = [p for p in network.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert found
    return found


def test_on_a_cpu_convolutions_are_channels_last_with_the_same_values():
    config = TrainConfig.of(model="small-cnn", device="cpu")
    data = synthetic_data(config)
    parts = build_partition(config, data.inputs, data.num_classes)
    assert all(p.is_contiguous(memory_format=LAST) for p in maps(parts.model))
    plain = torch.nn.Conv2d(3, 4, 3)
    before = plain.weight.detach().clone()
    last = laid_out(plain, torch.device("cpu"))
    assert torch.equal(last.weight, before)
    inputs = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(last(inputs), torch.nn.functional.conv2d(inputs, before, plain.bias))


def test_elsewhere_weights_stay_as_they_are():
    plain = torch.nn.Conv2d(3, 4, 3)
    laid_out(plain, torch.device("meta"))
    assert plain.weight.is_contiguous()


@pytest.mark.parametrize(("model", "largest"), [("vgg8", 0.34), ("resnet18", 0.29)])
def test_without_cuts_no_stage_is_much_larger_than_it_must_be(model, largest):
    config = TrainConfig.of(model=model, data="cifar10", device="cpu", width=0.25)
    data = synthetic_data(config)
    parts = build_partition(config, data.inputs, data.num_classes)
    assert parts.num_stages == 4
    assert max(parts.costs) < largest * sum(parts.costs)
