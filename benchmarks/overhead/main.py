"""Step time of a `scpl` pipeline in one process against a hand-written loop of the same arithmetic.

Both train the same network on the same batches, in turns, and must end with the same bits.
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import scpl
from scpl.app.environment import describe_environment
from scpl.heads import Head, Linear, PooledMLP
from scpl.heads.projection import MeanOverPositions
from scpl.losses.contrastive import supervised_contrastive_loss
from scpl.methods.base import CrossEntropy, Sum
from scpl.methods.scpl import Contrastive
from scpl.models.small import MLP, SmallCNN

NUM_CLASSES = 10
NUM_BLOCKS = 5  # the pairs are taken in this many blocks, to see whether the machine drifts


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        about: For the table.
        network: Builds it.
        cuts: Where stages begin.
        shape: Of a batch of inputs.
        pairs: How many steps of each loop are timed.
        head: Builds the projection heads.
    """

    about: str
    network: Callable[[], nn.Sequential]
    cuts: tuple[str, ...]
    shape: tuple[int, ...]
    pairs: int
    head: Head


def transformer() -> nn.Sequential:
    """Build an encoder that classifies sequences ``[N, L, 256]``."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)

    return nn.Sequential(
        *(block() for _ in range(8)), MeanOverPositions(), nn.Linear(256, NUM_CLASSES)
    )


CASES = {
    "transformer": Case(
        "8 encoder layers, d = 256, 64 x 32 tokens",
        transformer,
        ("2", "4", "6"),
        (64, 32, 256),
        60,
        PooledMLP(),
    ),
    "small-cnn": Case(
        "small CNN, 128 x 1 x 28 x 28",
        lambda: SmallCNN(NUM_CLASSES, 1, 28),
        ("block2", "block3", "block4"),
        (128, 1, 28, 28),
        800,
        PooledMLP(),
    ),
    "mlp": Case(
        "MLP of width 16, 32 x 16 (worst case)",
        lambda: MLP(NUM_CLASSES, 16, hidden=16),
        ("layer2", "layer3", "layer4"),
        (32, 16),
        4000,
        Linear(16),
    ),
}


class HandWritten:
    """The loop one would write without a library, for copies of a pipeline's parts."""

    def __init__(self, pipeline: scpl.Pipeline, make_optimizer: Callable[[Any], Any]) -> None:
        self.parts = []
        for stage in pipeline.stages:
            body, objective = copy.deepcopy((stage.body, stage.objective))
            terms = list(objective.parts) if isinstance(objective, Sum) else [objective]
            heads = [term.head for term in terms if isinstance(term, Contrastive)]
            classifiers = [term.classifier for term in terms if isinstance(term, CrossEntropy)]
            optimizer = make_optimizer([*body.parameters(), *objective.parameters()])
            self.parts.append((body, heads[0], classifiers[0] if classifiers else None, optimizer))

    def step(self, inputs: Tensor, target: Tensor) -> list[Tensor]:
        """Train every stage on one batch."""
        features, losses = inputs, []
        for body, head, classifier, optimizer in self.parts:
            output = body(features)
            loss = supervised_contrastive_loss(head(output), target, temperature=0.1)
            if classifier is not None:
                loss = loss + cross_entropy(classifier(output.detach()), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            features = output.detach()
        return losses


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Take turns: one step of the pipeline, one step by hand."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(case.shape), torch.randint(NUM_CLASSES, case.shape[:1])) for _ in range(4)
    ]

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=1e-4)

    parts = scpl.split(case.network(), case.cuts, example=batches[0][0][:2])
    method = scpl.SCPL(
        temperature=0.1,
        head=case.head,
        cross_entropy=0.0,
        standardise=False,
        classifier_gradient=False,
    )
    pipeline = scpl.Pipeline(parts, method, adam)
    by_hand = HandWritten(pipeline, adam)
    steps = pipeline.steps(cycle(batches))
    feed = cycle(batches)

    def one_step_by_hand() -> list[Tensor]:
        return by_hand.step(*next(feed))

    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    warm_up = max(3, pairs // 20)
    for number in range(warm_up + pairs):
        if number % 2:
            report, ours = timed(lambda: next(steps))
            losses, theirs = timed(one_step_by_hand)
        else:
            losses, theirs = timed(one_step_by_hand)
            report, ours = timed(lambda: next(steps))
        check_losses(report, losses)
        if number >= warm_up:
            times.append((ours, theirs))
    check_weights(pipeline, by_hand)
    pipeline.close()
    return {
        clock: summary([(ours[i], theirs[i]) for ours, theirs in times], pipeline.parts.num_stages)
        for i, clock in enumerate(("wall", "processor"))
    }


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Return the result, the wall-clock time and the processor time of this process."""
    begin, busy = perf_counter(), process_time()
    result = function()
    return result, (perf_counter() - begin, process_time() - busy)


def check_losses(report: scpl.Report, losses: list[Tensor]) -> None:
    for index, (terms, loss) in enumerate(zip(report.losses, losses, strict=True)):
        ours = torch.stack(list(terms.values())).sum()
        if not torch.equal(ours, loss):
            raise SystemExit(f"step {report.step}, stage {index}: loss {ours} is not {loss}")


def check_weights(pipeline: scpl.Pipeline, by_hand: HandWritten) -> None:
    for stage, (*_, optimizer) in zip(pipeline.stages, by_hand.parts, strict=True):
        ours, theirs = stage.parameters, optimizer.param_groups[0]["params"]
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            raise SystemExit(f"stage {stage.index}: the weights are not equal")


def summary(wall: list[tuple[float, float]], num_stages: int) -> dict[str, Any]:
    """Compare pairs (pipeline, by hand)."""
    extra = median(ours - theirs for ours, theirs in wall)
    return {
        "pairs": len(wall),
        "pipeline_seconds": median(ours for ours, _ in wall),
        "by_hand_seconds": median(theirs for _, theirs in wall),
        "extra_microseconds_per_stage": extra / num_stages * 1e6,
        "ratio": summary_of_ratios([ours / theirs for ours, theirs in wall]),
    }


def summary_of_ratios(ratios: list[float]) -> dict[str, Any]:
    """The median, with the spread of single pairs and of the medians of blocks of pairs."""
    size = max(1, len(ratios) // NUM_BLOCKS)
    blocks = [median(ratios[i : i + size]) for i in range(0, size * NUM_BLOCKS, size)]
    low, middle, high = quantiles(ratios, n=4)
    return {"median": middle, "quartiles": [low, high], "blocks": [min(blocks), max(blocks)]}


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield (
        "| what is trained, 4 stages | clock | by hand | scpl | ratio (quartiles of pairs) "
        "| of 5 blocks | extra per stage and step | pairs |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for name, clocks in results.items():
        for clock, row in clocks.items():
            ratio = row["ratio"]
            (low, high), (least, most) = ratio["quartiles"], ratio["blocks"]
            inner = f"**{ratio['median']:.3f}** ({low:.3f} .. {high:.3f})"
            yield (
                f"| {CASES[name].about} | {clock} | {row['by_hand_seconds'] * 1e3:.2f} ms "
                f"| {row['pipeline_seconds'] * 1e3:.2f} ms "
                f"| {inner} | {least:.3f} .. {most:.3f} "
                f"| {row['extra_microseconds_per_stage']:.0f} us | {row['pairs']} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*CASES, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="10 pairs of steps, not for quoting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in CASES if arguments.model == "all" else [arguments.model]:
        print(f"measuring {name}", file=sys.stderr)
        results[name] = measure(CASES[name], 10 if arguments.quick else CASES[name].pairs)
    if arguments.json:
        about = describe_environment(torch.device("cpu"), threads=1)
        print(json.dumps({"results": results, "environment": about}))
    else:
        print("\n".join(table(results)))


if __name__ == "__main__":
    main()
