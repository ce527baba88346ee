"""For processes that serve all variants of a benchmark, one after the other, as they are told.

Starting processes, importing torch and building a network take longer than a block of steps.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from scpl.app.bench.measure import Block
from scpl.app.build import build_partition
from scpl.app.config import NetworkConfig, TrainConfig
from scpl.app.inputs.base import DataSummary
from scpl.methods.base import Method
from scpl.partition import Partition

__all__ = ["Networks", "block_of"]


class Networks:
    """Each network, cut once; every variant trains a copy.

    Args:
        data: What goes into them.
    """

    def __init__(self, data: DataSummary) -> None:
        self._data = data
        self._cut: dict[NetworkConfig, Partition] = {}

    def copy(self, config: TrainConfig) -> Partition:
        """Return a fresh copy of the network of a configuration."""
        key, data = config.network, self._data
        if key not in self._cut:
            made = build_partition(config, data.inputs, data.num_classes, task=data.task)
            self._cut[key] = made
        return deepcopy(self._cut[key])


def block_of(steps: int, method: Method, num_ranks: int, depth: int) -> Block:
    """As few steps before and after the timed ones as will do: batches are at hand."""
    block = Block.of(steps, method, num_ranks, depth)
    return replace(block, warm=max(block.cool, 1))
