"""One process of one method of `scpl bench`, which starts it.

usage: python -m scpl.app.bench.job PLAN

PLAN is JSON: ``config`` (as in a recipe), ``steps`` of a block, ``synthetic``.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from scpl.app.bench.blocks import Batch, Block, serve
from scpl.app.bench.orders import Orders
from scpl.app.bench.synthetic import synthetic_batches, synthetic_data
from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
)
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, set_threads
from scpl.app.inputs.base import DataSummary, Loader
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Control, connect
from scpl.errors import DataError, Interrupted

__all__ = ["main"]


def main() -> None:
    """Get ready, then train a block for every order."""
    orders, plan = Orders(), json.loads(sys.argv[1])
    config = TrainConfig.from_dict(plan["config"], "the benchmark")
    with orders.reporting():
        mesh = Mesh.from_env(config.run.spread or None)
        set_threads(config.run.threads, mesh.num_ranks)
        control = connect(mesh, choose_device(config.run.device), config.run.timeout)
    with orders.reporting(control):
        _work(orders, config, control, plan)


def _work(orders: Orders, config: TrainConfig, control: Control, plan: dict[str, Any]) -> None:
    facts, batches = _data(config, control, synthetic=plan["synthetic"])
    parts = build_partition(config, facts)
    method = build_method(config.method, config.rows)
    block = Block.of(plan["steps"], method, control.mesh.num_ranks, config.run.depth)
    total_steps = config.optimizer.epochs * facts.steps
    pipeline = build_pipeline(config, parts, method, total_steps, None, control)
    orders.answer(ready=True, stages=pipeline.parts.num_stages)
    with suppress(Interrupted):  # how the stream ends on other ranks than the first
        serve(pipeline, orders, batches, block)
    pipeline.close()
    control.close()


def _data(
    config: TrainConfig, control: Control, *, synthetic: bool
) -> tuple[DataSummary, Iterator[Batch]]:
    """What is trained on; the first rank reads it."""
    if synthetic:
        facts = synthetic_data(config)
        return facts, itertools.cycle(synthetic_batches(config, facts))
    batches: Iterator[Batch] = iter(())
    if control.mesh.is_first:
        loaders, size = build_loaders(config), config.data.batch_size
        if loaders.train.num_samples < size:
            raise DataError(
                "A benchmark needs at least one full mini-batch",
                f"Got {loaders.train.num_samples} samples and --batch-size {size}",
            )
        control.share("data", DataSummary.of(loaders).to_json())
        batches = _endless(loaders.train, config.rows)
    return DataSummary.from_json(control.fetch("data")), batches


def _endless(loader: Loader, full: int) -> Iterator[Batch]:
    """All full mini-batches, epoch after epoch, prepared as in training; ``full`` is their rows."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for inputs, target in loader:
            if len(target) == full:
                yield inputs, target


if __name__ == "__main__":
    main()
