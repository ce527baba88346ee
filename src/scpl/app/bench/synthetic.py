"""Random mini-batches of a data set's shape, for benchmarks where the data set is not."""

from __future__ import annotations

import torch
from torch import Tensor

from scpl.app.config import TrainConfig
from scpl.app.inputs.base import DataSummary, ImageInputs, Inputs, TextInputs
from scpl.app.inputs.images import side_of
from scpl.app.inputs.texts import network_sizes
from scpl.data import images as data
from scpl.data.images import EMBEDDED, IMAGE_SETS
from scpl.data.text import TEXT_SETS, TextSet
from scpl.errors import unknown_name
from scpl.seeding import derive_seed

__all__ = ["synthetic_batches", "synthetic_data"]

NUM_BATCHES = 8


def synthetic_data(config: TrainConfig) -> DataSummary:
    """Describe a known data set without reading it.

    Raises:
        InputError: for one whose shape is not known.
    """
    if config.data.data in TEXT_SETS:
        config.check_samples("texts")
        texts = TEXT_SETS[config.data.data]
        classes, inputs = texts.classes, _text_inputs(config, texts)
    else:
        config.check_samples("images")
        classes, inputs = _images(config)
    return DataSummary(
        name=config.data.data,
        classes=classes,
        inputs=inputs,
        train_samples=NUM_BATCHES * config.data.batch_size,
        valid_samples=0,
        test_samples=0,
        steps=NUM_BATCHES,
    )


def synthetic_batches(config: TrainConfig, facts: DataSummary) -> list[tuple[Tensor, Tensor]]:
    """Draw inputs ``[N * views, ...]`` with classes ``[N * views]``."""
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "synthetic"))
    batches = []
    for _ in range(NUM_BATCHES):
        inputs = facts.inputs.draw(config.rows, generator)
        target = torch.randint(facts.num_classes, (config.data.batch_size,), generator=generator)
        batches.append((inputs, target.repeat(config.data.views)))
    return batches


def _text_inputs(config: TrainConfig, known: TextSet) -> Inputs:
    return TextInputs(
        config.data.vocab_size,
        config.data.max_tokens,
        config.data.text or known.text[:1],
        config.data.label or "label",
        fingerprint="",
        sizes=network_sizes(config),
    )


def _images(config: TrainConfig) -> tuple[tuple[str, ...], Inputs]:
    if config.data.data == EMBEDDED:
        digits = data.load(EMBEDDED)
        num_classes, channels, size = len(digits.classes), digits.channels, digits.image_size
    elif config.data.data in IMAGE_SETS:
        known = IMAGE_SETS[config.data.data]
        num_classes, channels = known.num_classes, known.channels
        size = known.image_size or known.published_size
    else:
        advice = "A folder of images works too, or a table of texts, without --synthetic"
        raise unknown_name("--data", config.data.data, (*data.known(), *TEXT_SETS), advice)
    mean, std = (0.0,) * channels, (1.0,) * channels
    inputs = ImageInputs(channels, side_of(size, config), mean, std, config.network.width)
    return tuple(map(str, range(num_classes))), inputs
