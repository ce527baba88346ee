"""Random mini-batches of a data set's shape, for benchmarks where the data set is not."""

from __future__ import annotations

import torch
from torch import Tensor

from scpl import data
from scpl.data.catalogue import KNOWN
from scpl.errors import unknown_name
from scpl.randomness import derive_seed
from scpl.run.config import TrainConfig
from scpl.run.facts import Facts

__all__ = ["synthetic_batches", "synthetic_facts"]

NUM_BATCHES = 8


def synthetic_facts(config: TrainConfig) -> Facts:
    """Describe a known data set without reading it.

    Raises:
        InputError: for one whose shape is not known.
    """
    if config.data == "digits":
        digits = data.load("digits")
        num_classes, channels, size = len(digits.classes), digits.channels, digits.image_size
    elif config.data in KNOWN:
        known = KNOWN[config.data]
        num_classes, channels = known.num_classes, known.channels
        size = known.image_size or known.published_size
    else:
        advice = "A folder of images works too, without --synthetic"
        raise unknown_name("--data", config.data, data.known(), advice)
    return Facts(
        name=config.data,
        classes=tuple(map(str, range(num_classes))),
        channels=channels,
        image_size=config.image_size or size,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        train_images=NUM_BATCHES * config.batch_size,
        valid_images=0,
        test_images=0,
        steps=NUM_BATCHES,
    )


def synthetic_batches(config: TrainConfig, facts: Facts) -> list[tuple[Tensor, Tensor]]:
    """Draw normalised images ``[N * views, C, H, W]`` with classes ``[N * views]``."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "synthetic"))
    shape = (facts.channels, facts.image_size, facts.image_size)
    batches = []
    for _ in range(NUM_BATCHES):
        inputs = torch.randn(config.batch_size * config.views, *shape, generator=generator)
        target = torch.randint(facts.num_classes, (config.batch_size,), generator=generator)
        batches.append((inputs, target.repeat(config.views)))
    return batches
