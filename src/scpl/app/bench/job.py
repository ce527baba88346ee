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
from scpl.app.bench.synthetic import synthetic_batches, synthetic_facts
from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    choose_device,
    set_threads,
)
from scpl.app.config import TrainConfig
from scpl.app.kinds.base import Facts, Loader
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Ranks, connect
from scpl.errors import DataError, Interrupted

__all__ = ["main"]


def main() -> None:
    """Get ready, then train a block for every order."""
    orders, plan = Orders(), json.loads(sys.argv[1])
    config = TrainConfig.from_dict(plan["config"], "the benchmark")
    with orders.reporting():
        set_threads(config.threads, Mesh.from_env().num_ranks)
        ranks = connect(
            choose_device(config.device),
            stages_per_rank=config.spread or None,
            depth=config.depth,
            timeout=config.timeout,
        )
    with orders.reporting(ranks):
        _work(orders, config, ranks, plan)


def _work(orders: Orders, config: TrainConfig, ranks: Ranks, plan: dict[str, Any]) -> None:
    facts, batches = _data(config, ranks, synthetic=plan["synthetic"])
    parts = build_partition(config, facts)
    method = build_method(config)
    block = Block.of(plan["steps"], method, ranks.mesh.num_ranks, config.depth)
    total_steps = config.epochs * facts.steps
    pipeline = build_pipeline(config, parts, method, total_steps, None, ranks)
    orders.answer(ready=True, stages=pipeline.parts.num_stages)
    with suppress(Interrupted):  # how the stream ends on other ranks than the first
        serve(pipeline, orders, batches, block)
    pipeline.close()
    ranks.close()


def _data(config: TrainConfig, ranks: Ranks, *, synthetic: bool) -> tuple[Facts, Iterator[Batch]]:
    """What is trained on; the first rank reads it."""
    if synthetic:
        facts = synthetic_facts(config)
        return facts, itertools.cycle(synthetic_batches(config, facts))
    batches: Iterator[Batch] = iter(())
    if ranks.mesh.is_first:
        loaders = build_loaders(config)
        if loaders.train.num_samples < config.batch_size:
            raise DataError(
                "A benchmark needs at least one full mini-batch",
                f"Got {loaders.train.num_samples} samples and --batch-size {config.batch_size}",
            )
        ranks.share("facts", Facts.of(loaders).to_json())
        batches = _endless(loaders.train, config.batch_size * config.views)
    return Facts.from_json(ranks.fetch("facts")), batches


def _endless(loader: Loader, full: int) -> Iterator[Batch]:
    """All full mini-batches, epoch after epoch, prepared as in training; ``full`` is their rows."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for inputs, target in loader:
            if len(target) == full:
                yield inputs, target


if __name__ == "__main__":
    main()
