"""One rank that trains networks of the zoo for a few steps, with several methods in turn.

Started alone and under torchrun; `checks.py` compares what the ranks leave behind.

usage: rank.py OUT STAGES METHODS NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import CLASSES, ZOO, Entry

import scpl
from scpl.engine.ranks import Ranks, connect
from scpl.methods import METHODS
from scpl.partition.values import tree_map

ROWS = (6, 6, 4, 6, 2)
LENGTHS = (9, 5, 12, 7, 9)


def loader(entry: Entry) -> list[tuple[Any, Tensor]]:
    """Five batches that differ in rows and length."""
    torch.manual_seed(1)
    return [
        (entry.batch(rows, length), torch.randint(0, CLASSES, (rows,)))
        for rows, length in zip(ROWS, LENGTHS, strict=True)
    ]


def network(entry: Entry) -> nn.Module:
    torch.manual_seed(0)
    return entry.build()


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


def train(entry: Entry, num_stages: int, method: str, ranks: Ranks) -> dict[str, Any]:
    """Cut a network, train it for five steps, and return everything that came of it."""
    batches = loader(entry)
    model = network(entry)
    rival = not METHODS[method].cuts_gradients and method != "bp"
    if rival:
        without_chance(model)
    sliced = method in ("gpipe", "1f1b")
    parts = scpl.split(model, num_stages=num_stages, example=entry.batch(4, 9), output=entry.output)
    pipeline = scpl.Pipeline(
        parts, METHODS[method](**({"num_micro_batches": 2} if sliced else {})), sgd, ranks=ranks
    )
    losses = [report.values() for report in pipeline.steps(batches)]
    scores = pipeline.evaluate(batches).result()
    state = {k: v.clone() for k, v in pipeline.export().state_dict().items()}
    pipeline.close()
    return {
        "losses": losses,
        "accuracy": scores.accuracy,
        "state": state,
        "bytes": pipeline.bytes_per_step,
    }


def plain(entry: Entry) -> dict[str, Tensor]:
    """Train the network itself with a loop as anyone would write it, without dropout."""
    model, batches = without_chance(network(entry)), loader(entry)
    parts = scpl.split(model, num_stages=1, example=entry.batch(4, 9), output=entry.output)
    optimizer = sgd(p for n, p in model.named_parameters() if n not in parts.unused)
    model.train()
    for inputs, target in batches:
        args, kwargs = parts.form.arguments(parts.form.arrange(tree_map_any(inputs)))
        logits = parts.logits(model(*args, **kwargs))
        nn.functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return dict(model.state_dict())


def tree_map_any(inputs: Any) -> Any:
    return tree_map(Tensor.clone, inputs)


def main() -> None:
    out, stages, methods, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = connect("cpu")
    for name in names:
        for method in methods.split(","):
            found = train(ZOO[name], int(stages), method, ranks)
            if ranks.mesh.is_last:
                path = Path(out) / f"{name}-{method}-{ranks.mesh.num_ranks}.pt".replace("/", "_")
                torch.save(found, path)
    ranks.close()


if __name__ == "__main__":
    main()
