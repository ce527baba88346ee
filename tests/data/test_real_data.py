"""The real sets, where the machine has them: set ``SCPL_DATA`` to the folder that holds them."""

import os
from pathlib import Path

import pytest
import torch

from scpl.data.images import load
from scpl.data.images.dataset import channel_stats
from scpl.data.text import TEXT_SETS, SplitSettings, TextSettings, load_text
from scpl.errors import DataError

pytestmark = pytest.mark.skipif(not os.environ.get("SCPL_DATA"), reason="SCPL_DATA is not set")

SETS = {
    "mnist": (60000, 10000, 10, 28),
    "fashion-mnist": (60000, 10000, 10, 28),
    "cifar10": (50000, 10000, 10, 32),
    "cifar100": (50000, 10000, 100, 32),
    "tiny-imagenet": (100000, 10000, 200, 32),
}


@pytest.mark.parametrize("name", SETS)
def test_real_set(name):
    try:
        data = load(name, data_dir=Path(os.environ["SCPL_DATA"]), download=False)
    except DataError as error:
        if "must be on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    sizes = (len(data.train), len(data.test), data.num_classes, data.image_size)
    assert sizes == SETS[name]
    for split in (data.train, data.test):
        counts = torch.bincount(split.labels, minlength=data.num_classes)
        if name != "mnist":
            assert counts.unique().numel() == 1
    mean, std = channel_stats(data.train.images)
    assert mean == pytest.approx(data.mean, abs=0.02)
    assert std == pytest.approx(data.std, abs=0.07)


@pytest.mark.parametrize("name", ["dbpedia_14", "sst2"])
def test_real_texts(name):
    settings = TextSettings(splits=SplitSettings(validation=0.0))
    try:
        data = load_text(name, settings, data_dir=Path(os.environ["SCPL_DATA"]), download=False)
    except DataError as error:
        if "must be on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    known = TEXT_SETS[name]
    assert (len(data.train), len(data.test)) == (known.num_train, known.num_test)
    assert (data.train.labels.bincount() > known.num_train / data.num_classes / 2).all()
    # What is common in English is common here: words and their numbers were not mixed up.
    assert {"the", "of", "and"} <= set(data.tokenizer.words[2:12])
