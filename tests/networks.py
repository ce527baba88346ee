"""Small networks and data for the tests of the engine."""

from collections import OrderedDict

import torch
from torch import nn

from scpl.tasks import Classes, MultiLabel, Regression

NUM_CLASSES = 3
IMAGE = (2, 8, 8)
VOCABULARY = 20


def seeded(build, seed=7):
    """Build with seeded weights, whatever the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def cnn(*, inplace=False, dropout=0.25):
    """Three convolutions with BatchNorm and dropout, a hidden linear layer, a classifier."""
    layers = OrderedDict(
        conv1=nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(4),
        relu1=nn.ReLU(inplace),
        drop1=nn.Dropout(dropout),
        conv2=nn.Conv2d(4, 6, 3, padding=1),
        norm2=nn.BatchNorm2d(6),
        relu2=nn.ReLU(inplace),
        pool2=nn.MaxPool2d(2),
        drop2=nn.Dropout2d(dropout),
        conv3=nn.Conv2d(6, 8, 3, padding=1, stride=2),
        relu3=nn.ReLU(inplace),
        flat=nn.Flatten(),
        hidden=nn.Linear(32, 10),
        relu4=nn.ReLU(inplace),
        drop4=nn.Dropout(dropout),
        classifier=nn.Linear(10, NUM_CLASSES),
    )
    return seeded_layers(nn.Sequential(layers))


def seeded_layers(model, seed=7):
    """Give every layer that can draw its weights new ones, from a seed."""

    def reset():
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model

    return seeded(reset, seed)


UNEVEN_CUTS = ["norm1", "conv2", "flat"]
"""Stages of 1, 3, 7 and 4 layers; a stage may begin in the middle of a block."""


def mlp(num_layers=4, width=6):
    """Linear layers with ReLU between: ``linear0, relu0, linear1, ..., classifier``."""
    layers = OrderedDict()
    for index in range(num_layers - 1):
        layers[f"linear{index}"] = nn.Linear(5 if index == 0 else width, width)
        layers[f"relu{index}"] = nn.ReLU()
    layers["classifier"] = nn.Linear(width, NUM_CLASSES)
    return seeded_layers(nn.Sequential(layers))


def data(shape, sizes, seed=1):
    """A list of batches of these sizes: inputs of this shape and targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(NUM_CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def for_task(kind, batches):
    """A task of three outputs, and the batches with targets of it instead of classes."""
    if kind == "classes":
        return Classes(), batches
    if kind == "weighted":
        return Classes((0.5, 1.0, 2.0)), batches
    generator = torch.Generator().manual_seed(4)
    if kind == "multi-label":
        drawn = [torch.randint(2, (len(y), 3), generator=generator) for _, y in batches]
        task = MultiLabel((1.0, 2.0, 0.5))
    else:
        drawn = [5 + 2 * torch.randn(len(y), 3, generator=generator) for _, y in batches]
        task = Regression((5.0,) * 3, (2.0,) * 3)
    return task, [(x, target) for (x, _), target in zip(batches, drawn, strict=True)]


def images(sizes=(9, 9, 9, 9, 9, 9, 4), seed=1):
    """Batches of images; by default seven, the last of them partial."""
    return data(IMAGE, sizes, seed)


def rows(sizes=(8, 8, 5), seed=1):
    """Batches of table rows for `mlp`."""
    return data((5,), sizes, seed)


def texts(longest=(7, 4, 9), rows=6, seed=1):
    """Batches of token ids, each as wide as its longest text; one of them has an empty text."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, length in enumerate(longest):
        lengths = torch.randint(1, length + 1, (rows,), generator=generator)
        lengths[0] = length
        lengths[1] = 0 if number == 0 else lengths[1]
        tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        tokens[torch.arange(length) >= lengths[:, None]] = 0
        target = torch.randint(NUM_CLASSES, (rows,), generator=generator)
        batches.append((tokens, target))
    return batches


class Indexed:
    """A loader that can begin anywhere and knows its epoch, as the library's own loader."""

    def __init__(self, batches):
        self._batches, self.epoch, self.starts = batches, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        return self.batches()

    def batches(self, start=0):
        self.starts.append(start)
        order = torch.randperm(
            len(self._batches), generator=torch.Generator().manual_seed(self.epoch)
        )
        for index in order[start:]:
            yield self._batches[index]


def flat(value, prefix=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    found = {}
    for key, item in items:
        found |= flat(item, f"{prefix}/{key}")
    return found


def assert_same_state(found, expected):
    """Bit for bit: names, tensors and numbers."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    differing = [name for name in found if not same(found[name], expected[name])]
    assert not differing, f"these differ: {differing}"


def same(a, b):
    """Whether two tensors or values are equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def states(pipeline):
    """Copies of everything every stage needs to continue."""
    return [stage.snapshot(pipeline.step) for stage in pipeline.stages]
