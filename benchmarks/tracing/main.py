"""What does tracing cost? Seconds to cut a network, and a step of its stages against its layers.

The network's own step (forward, backward, AdamW) and that of its stages, one after the other in the
same process, alternate; each ratio is of two neighbours. Processor time counts, because other
programs disturb it less.

usage: main.py [--networks bert resnet] [--repeats 25] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import scpl

CLASSES = 4


def bert(layers: int, width: int) -> nn.Module:
    import transformers  # takes seconds, which --help need not wait for

    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=4000,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def resnet() -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 4000, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(rows: int, side: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, side, side)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (lambda: bert(4, 256), lambda: texts(16, 48)),
    "resnet": (resnet, lambda: images(16, 48)),
}


def compare_steps(name: str, repeats: int) -> dict[str, Any]:
    """Time a step of the network and of its stages in turns."""
    build, batch = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = build(), batch()
    twin = copy.deepcopy(model)
    parts = scpl.split(model, num_stages=3, example=inputs)
    target = torch.randint(0, CLASSES, (len(next(iter(inputs.values()))),))
    values = parts.form.arrange(inputs)
    for module in (twin, *parts.bodies, parts.readout):
        module.train()

    def stages() -> Any:
        features = values
        for body in parts.bodies:
            features = body(features)
        return parts.readout(features)

    clocks = []
    for network, logits in ((twin, lambda: twin(**inputs).logits), (model, stages)):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        clocks.append(_step(logits, target, optimizer))
    ratios = []
    for _ in range(repeats + 3):
        layers, traced = (clock() for clock in clocks)
        ratios.append(traced / layers)
    return {"ratio": _spread(ratios[3:]), "cuts": parts.cuts}


def _step(logits: Callable[[], Any], target: torch.Tensor, optimizer: Any) -> Callable[[], float]:
    def step() -> float:
        begin = time.process_time()
        cross_entropy(logits(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - begin

    return step


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high}


def time_cutting(layers: int, width: int) -> dict[str, float]:
    """Time `split` on a BERT of some layers, with all its checks."""
    model, example = bert(layers, width), texts(8, 64)
    begin = time.perf_counter()
    scpl.split(model, num_stages=4 if layers > 4 else 2, example=example)
    return {"seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=25, help="steps of each")
    parser.add_argument("--quick", action="store_true", help="few steps, a small BERT")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    repeats = 4 if options.quick else options.repeats
    steps = {name: compare_steps(name, repeats) for name in options.networks}
    sizes = [(2, 64)] if options.quick else [(12, 256), (12, 768)]
    cutting = {
        f"{layers} layers of {width}": time_cutting(layers, width) for layers, width in sizes
    }
    if options.json:
        print(json.dumps({"steps": steps, "cutting": cutting}))
        return
    for name, found in steps.items():
        ratio = found["ratio"]
        print(
            f"{name}: a step of the stages takes {ratio['median']:.3f} of that of the layers "
            f"({ratio['low']:.3f} .. {ratio['high']:.3f})"
        )
    for name, found in cutting.items():
        print(f"BERT, {name}: cut in {found['seconds']:.1f} s")


if __name__ == "__main__":
    main()
