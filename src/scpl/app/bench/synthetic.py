"""Random mini-batches of a data set's shape, for benchmarks where the data set is not."""

from __future__ import annotations

import torch
from torch import Tensor

from scpl.app.config import TrainConfig
from scpl.app.kinds.base import Facts, ImageInputs, Inputs, TextInputs
from scpl.app.kinds.texts import network_sizes
from scpl.data import images as data
from scpl.data.images import EMBEDDED, IMAGE_SETS
from scpl.data.text import TEXT_SETS, TextSet
from scpl.errors import unknown_name
from scpl.seeding import derive_seed

__all__ = ["synthetic_batches", "synthetic_facts"]

NUM_BATCHES = 8


def synthetic_facts(config: TrainConfig) -> Facts:
    """Describe a known data set without reading it.

    Raises:
        InputError: for one whose shape is not known.
    """
    if config.data in TEXT_SETS:
        texts = TEXT_SETS[config.data]
        classes, inputs = texts.classes, _text_inputs(config, texts)
    else:
        classes, inputs = _images(config)
    return Facts(
        name=config.data,
        classes=classes,
        inputs=inputs,
        train_samples=NUM_BATCHES * config.batch_size,
        valid_samples=0,
        test_samples=0,
        steps=NUM_BATCHES,
    )


def synthetic_batches(config: TrainConfig, facts: Facts) -> list[tuple[Tensor, Tensor]]:
    """Draw inputs ``[N * views, ...]`` with classes ``[N * views]``."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "synthetic"))
    batches = []
    for _ in range(NUM_BATCHES):
        inputs = facts.inputs.draw(config.batch_size * config.views, generator)
        target = torch.randint(facts.num_classes, (config.batch_size,), generator=generator)
        batches.append((inputs, target.repeat(config.views)))
    return batches


def _text_inputs(config: TrainConfig, known: TextSet) -> Inputs:
    return TextInputs(
        config.vocab_size,
        config.max_tokens,
        config.text or known.text[:1],
        config.label or "label",
        fingerprint="",
        sizes=network_sizes(config),
    )


def _images(config: TrainConfig) -> tuple[tuple[str, ...], Inputs]:
    if config.data == EMBEDDED:
        digits = data.load(EMBEDDED)
        num_classes, channels, size = len(digits.classes), digits.channels, digits.image_size
    elif config.data in IMAGE_SETS:
        known = IMAGE_SETS[config.data]
        num_classes, channels = known.num_classes, known.channels
        size = known.image_size or known.published_size
    else:
        advice = "A folder of images works too, or a table of texts, without --synthetic"
        raise unknown_name("--data", config.data, (*data.known(), *TEXT_SETS), advice)
    mean, std = (0.0,) * channels, (1.0,) * channels
    inputs = ImageInputs(channels, config.image_size or size, mean, std, config.width)
    return tuple(map(str, range(num_classes))), inputs
