"""What the checks train: small networks, data that can be learned, and a loop that notes all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import scpl
from checks.base import Setup, require
from scpl import models
from scpl.engine.ranks import OneRank
from scpl.methods import METHODS

__all__ = [
    "LOCAL", "METHOD_NAMES", "NUM_CLASSES", "Learned", "Task", "adam", "deterministic", "falls",
    "image_batches", "image_task", "larger", "learn", "make_pipeline", "seeded", "sgd",
    "task_named", "text_batches", "text_task",
]  # fmt: skip

NUM_CLASSES = 5
VOCABULARY = 60
LOCAL = tuple(name for name in METHODS if METHODS[name].cuts_gradients)
"""Methods whose stages learn from objectives of their own."""
METHOD_NAMES = (*LOCAL, "bp", "bp-wide")
"""All methods that run on one process."""

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Task:
    """A network with data.

    Attributes:
        make: Makes the network, always with the same weights.
        cuts: Layers that later stages begin with; or how many stages there are.
        batches: Batches to learn from, on the CPU; the last one is smaller.
    """

    make: Callable[[], nn.Module]
    cuts: tuple[str, ...] | int
    batches: list[Batch]

    def split(self, device: str = "cpu") -> scpl.Partition:
        """Cut a new network that lies on a device, by an example that lies on the CPU."""
        inputs = self.batches[0][0]
        few = (
            {name: value[:3] for name, value in inputs.items()}
            if isinstance(inputs, dict)
            else inputs[:3]
        )
        if isinstance(self.cuts, int):
            return scpl.split(self.make().to(device), num_stages=self.cuts, example=few)
        return scpl.split(self.make().to(device), before=self.cuts, example=few)


def larger(task: Task, times: int) -> Task:
    """The same task with every batch several times as large."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))

    batches = [(repeated(inputs), repeated(target)) for inputs, target in task.batches]
    return replace(task, batches=batches)


def task_named(name: str, setup: Setup, *, dropout: float = 0.0) -> Task:
    """Make the task of one of our networks, cut into four stages."""
    if name in models.known_text():
        return text_task(name, setup, dropout=dropout)
    return image_task(name, setup)


def image_task(name: str, setup: Setup) -> Task:
    """Images of noisy patterns, one for each class."""
    size = 16 if setup.tiny else 32
    # The narrow ones still have some channels everywhere; the small ones are not narrow.
    full = name in ("small-cnn", "mlp")
    width = (0.25 if full else 1 / 16) if setup.tiny else (1.0 if full else 0.25)

    def make() -> nn.Module:
        return models.build(name, num_classes=NUM_CLASSES, image_size=size, width=width)

    return Task(seeded(make), models.paper_cuts(name), image_batches(setup, size))


def image_batches(setup: Setup, size: int) -> list[Batch]:
    """Batches of images ``[N, 3, size, size]``; the last one is smaller."""
    rows, count = batch_sizes(setup)
    random = torch.Generator().manual_seed(1)
    patterns = torch.randn(NUM_CLASSES, 3, size, size, generator=random)
    batches = []
    for number in range(count):
        target = torch.randint(NUM_CLASSES, (rows[number == count - 1],), generator=random)
        noise = torch.randn(len(target), 3, size, size, generator=random)
        batches.append((patterns[target] + noise, target))
    return batches


def text_task(name: str, setup: Setup, *, dropout: float = 0.0) -> Task:
    """Texts of several lengths, whose class shows in which words are frequent."""
    width = 12 if setup.tiny else 48
    sizes = {"depth": 3, "width": width, "dropout": dropout}
    if name == "transformer":
        sizes |= {"feed_forward": 2 * width, "heads": 4}

    def make() -> nn.Module:
        return models.build_text(name, num_classes=NUM_CLASSES, vocab_size=VOCABULARY, **sizes)

    return Task(seeded(make), models.paper_cuts(name), text_batches(setup))


def text_batches(setup: Setup) -> list[Batch]:
    """Batches of token ids ``[N, L]``, padded with 0; the last one is smaller and shorter."""
    rows, count = batch_sizes(setup)
    longest = (5, 8) if setup.tiny else (17, 24)
    random = torch.Generator().manual_seed(2)
    words = (VOCABULARY - 2) // NUM_CLASSES
    batches = []
    for number in range(count):
        target = torch.randint(NUM_CLASSES, (rows[number == count - 1],), generator=random)
        length = longest[number != count - 1]
        shape = (len(target), length)
        own = 2 + target[:, None] * words + torch.randint(words, shape, generator=random)
        any_word = torch.randint(2, VOCABULARY, shape, generator=random)
        tokens = torch.where(torch.rand(shape, generator=random) < 0.5, own, any_word)
        lengths = torch.randint(1, length + 1, (len(target), 1), generator=random)
        lengths[0] = length
        batches.append((tokens.masked_fill(torch.arange(length) >= lengths, 0), target))
    return batches


def batch_sizes(setup: Setup) -> tuple[tuple[int, int], int]:
    """Rows of a batch and of the last one, and how many batches there are."""
    return ((20, 13), 4) if setup.tiny else ((32, 19), 8)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Have a network made with the same weights every time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return make()

    return build


def method_named(name: str) -> scpl.Method:
    """A method with its defaults."""
    return METHODS[name]()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient, so that rounding stays small."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of the commands."""
    return torch.optim.AdamW(parameters, lr=2e-3, fused=True)


def make_pipeline(
    task: Task, method: str, device: str, *, optimizer: Any = sgd, compiled: bool = False,
    layout: torch.memory_format | None = None, **options: Any,
) -> scpl.Pipeline:  # fmt: skip
    """Cut a new network, and put its pipeline on a device."""
    parts = task.split()
    if layout is not None:
        parts.model.to(memory_format=layout)
    if compiled:
        parts.compiled()
    options.setdefault("ranks", OneRank(device))
    return scpl.Pipeline(parts, method_named(method), optimizer, **options)


@dataclass
class Learned:
    """What came of training.

    Attributes:
        losses: The loss of every stage (outer) at every step (inner).
        accuracies: Share of samples that is right after each epoch.
        weights: Of the exported network.
    """

    losses: list[list[float]] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def summary(self) -> str:
        """Say how much there is to compare, and where it ended."""
        first, last = (sum(curve[at] for curve in self.losses) for at in (0, -1))
        return (
            f"{len(self.losses[0])} steps x {len(self.losses)} stages, "
            f"loss {first:.3g} to {last:.3g}, accuracy {self.accuracies[-1]:.2f}"
        )

    def __add__(self, later: Learned) -> Learned:
        """What came of training on."""
        losses = [a + b for a, b in zip(self.losses, later.losses, strict=True)]
        return Learned(losses, self.accuracies + later.accuracies, later.weights)


def learn(pipeline: scpl.Pipeline, batches: Iterable[Batch], epochs: int = 3) -> Learned:
    """Train, evaluate after each epoch, and export."""
    batches, reports, accuracies = list(batches), [], []
    for _ in range(epochs):
        pipeline.train(batches, on_step=reports.append)
        accuracies.append(pipeline.evaluate(batches).result().accuracy)
    steps = [[sum(terms.values()) for terms in report.values()] for report in reports]
    curves = [list(curve) for curve in zip(*steps, strict=True)]
    return Learned(curves, accuracies, dict(pipeline.export().state_dict()))


def falls(learned: Learned) -> None:
    """Check that the network learned at all.

    Raises:
        Differs: if the losses of the last epoch are not below the first ones.
    """
    first = sum(curve[0] for curve in learned.losses)
    last = sum(curve[-2] for curve in learned.losses)  # the last batch is another size
    require(last < first, f"losses must fall; they went from {first:.4g} to {last:.4g}")


@contextmanager
def deterministic() -> Iterator[None]:
    """Choose algorithms that give the same bits each time; one without such a variant raises."""
    # With `warn_only` attention would choose one that does not.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
