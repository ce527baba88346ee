"""Networks not written for scpl are the same after they are cut; `benchmarks/networks` has more."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from scpl import split
from scpl.errors import PartitionError
from scpl.partition.verify import BOTH_MODES, difference

PATH = Path(__file__).parents[2] / "benchmarks" / "networks" / "zoo.py"


def load_zoo():
    spec = importlib.util.spec_from_file_location("zoo", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


zoo = load_zoo()
FAMILIES = ("DistilBERT", "ConvNeXt")
"""One for texts and one for images. The benchmark has the others."""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*zoo.USERS, *FAMILIES])
def test_a_network_is_the_same_after_it_is_cut(name):
    entry = zoo.ZOO[name]
    torch.manual_seed(0)
    model, example = entry.build(), entry.batch(4, 9)
    if entry.refused:
        with pytest.raises(PartitionError, match=entry.refused):
            split(model, num_stages=3, example=example, output=entry.output)
        return
    parts = split(model, num_stages=3, example=example, output=entry.output)
    assert parts.num_stages == 3
    assert parts.rounding == ""
    for rows, length in ((1, 9), (17, 5)):
        batch = parts.form.arrange(entry.batch(rows, length))
        modes = BOTH_MODES if rows > 1 else (False,)
        assert difference(model, parts, batch, modes, parts.unused) is None
