"""One rank that trains networks of the zoo for a few steps, with several methods in turn.

Started alone and under torchrun; `checks.py` compares what the ranks leave behind.

usage: rank.py OUT STAGES METHODS NAME
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import CLASSES, ZOO, Entry

import scpl
from scpl.engine.ranks import Ranks, connect
from scpl.methods import METHODS

ROWS = (6, 6, 4, 6, 4)
LENGTHS = (9, 5, 12, 7, 9)


def loader(entry: Entry) -> list[tuple[Any, Tensor]]:
    """Five batches that differ in rows and length."""
    torch.manual_seed(1)
    return [
        (entry.batch(rows, length), torch.randint(0, CLASSES, (rows,)))
        for rows, length in zip(ROWS, LENGTHS, strict=True)
    ]


def without_chance(model: nn.Module) -> nn.Module:
    """Switch dropout off, wherever it is kept: rivals that slice batches draw other numbers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def cut(entry: Entry, num_stages: int, *, chance: bool) -> scpl.Partition:
    torch.manual_seed(0)
    model = entry.build()
    if not chance:
        without_chance(model)
    example = entry.batch(4, 9)
    return scpl.split(model, num_stages=num_stages, example=example, output=entry.output)


def train(entry: Entry, parts: scpl.Partition, method: str, ranks: Ranks) -> dict[str, Any]:
    """Train a network for five steps, and return everything that came of it."""
    sliced = method in ("gpipe", "1f1b")
    pipeline = scpl.Pipeline(
        copy.deepcopy(parts),
        METHODS[method](**({"num_micro_batches": 2} if sliced else {})),
        sgd,
        ranks=ranks,
    )
    batches = loader(entry)
    losses = [report.values() for report in pipeline.steps(batches)]
    scores = pipeline.evaluate(batches).result()
    exported = pipeline.export()
    pipeline.close()
    return {"losses": losses, "accuracy": scores.accuracy, "state": exported.state_dict()}


def plain(entry: Entry) -> dict[str, Tensor]:
    """Train the network itself with a loop as anyone would write it, without dropout."""
    parts, batches = cut(entry, 1, chance=False), loader(entry)
    model = parts.model
    optimizer = sgd(p for n, p in model.named_parameters() if n not in parts.unused)
    model.train()
    for inputs, target in batches:
        args, kwargs = parts.form.arguments(parts.form.arrange(inputs))
        logits = parts.logits(model(*args, **kwargs))
        nn.functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(model.state_dict())


def main() -> None:
    out, stages, methods, name = sys.argv[1:]
    torch.set_num_threads(1)
    ranks, entry = connect("cpu"), ZOO[name]
    local = [method for method in methods.split(",") if METHODS[method].cuts_gradients]
    rivals = [method for method in methods.split(",") if method not in local]
    for group in filter(None, (local, rivals)):
        parts = cut(entry, int(stages), chance=group is local)
        for method in group:
            found = train(entry, parts, method, ranks)
            if ranks.mesh.is_last:
                torch.save(found, Path(out) / f"{method}-{ranks.mesh.num_ranks}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
