"""Measured cuts against the best of all cuts, and how long processes wait with and without them.

Every possible stage of a network is trained for real, in turns; so the slowest stage of every way
to cut it is known. The planned cuts are then timed against the best ones found, stage by stage in
turns. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

import scpl
from scpl import models
from scpl.app.environment import describe_environment
from scpl.engine.batches import Source
from scpl.engine.build import build_objective
from scpl.engine.costs import Costs, Plan
from scpl.engine.planning import measure
from scpl.engine.stage import Stage, StageOptions
from scpl.partition.cutting import Joined, split_everywhere
from scpl.partition.values import Tree

NUM_CLASSES = 10
CPU = torch.device("cpu")
METHOD = scpl.SCPL()
OPTIONS = StageOptions(lambda parameters: Adam(parameters, lr=1e-3, fused=True))


@dataclass(frozen=True)
class Case:
    """A network and its batches.

    Attributes:
        build: Makes it.
        inputs: Makes a mini-batch.
        readout: Where its classifier begins, if that must be said.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    readout: str | None = None


def images(rows: int, side: int, channels: int = 3) -> Callable[[], Tensor]:
    """Make batches of images."""
    return lambda: torch.randn(rows, channels, side, side)


def texts(rows: int, length: int, vocabulary: int) -> Callable[[], Tensor]:
    """Make batches of token ids."""
    return lambda: torch.randint(5, vocabulary, (rows, length))


def built_in(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Build one of our networks, laid out as the command line does."""

    def build() -> nn.Module:
        network = models.build(name, num_classes=NUM_CLASSES, **sizes)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    return build


def of_transformers(kind: str, task: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Build a network of ``transformers`` from a configuration."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(num_labels=NUM_CLASSES, **sizes)
        model: nn.Module = getattr(transformers, f"{kind}For{task}Classification")(config)
        return model

    return build


LAYERS = {
    "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384,
}  # fmt: skip
CASES = {
    "small-cnn": Case(
        built_in("small-cnn", in_channels=1, image_size=16), images(64, 16, 1), "classifier"
    ),
    "vgg8": Case(built_in("vgg8", width=0.25), images(16, 32), models.readout("vgg8")),
    "resnet18": Case(
        built_in("resnet18", width=0.25, image_size=32), images(32, 32), models.readout("resnet18")
    ),
    "transformer": Case(
        lambda: models.build_text(
            "transformer", num_classes=NUM_CLASSES, vocab_size=2000, depth=6, width=96, heads=4
        ),
        texts(16, 64, 2000),
        models.readout("transformer"),
    ),
    "BERT": Case(
        of_transformers("Bert", "Sequence", **LAYERS, vocab_size=2000, max_position_embeddings=64),
        texts(8, 48, 2000),
    ),
    "ViT": Case(
        of_transformers("ViT", "Image", **LAYERS, image_size=32, patch_size=4), images(8, 32)
    ),
}


class Trained:
    """A stage that is trained on what the stages before it hand on.

    Args:
        stage: The stage.
        values: What comes in.
        target: Class indices ``[N]``.
    """

    def __init__(self, stage: Stage, values: Tree, target: Tensor) -> None:
        self.stage, self.values, self.target = stage, values, target

    def seconds(self) -> float:
        """Train one step; processor time, because other jobs on the machine disturb it less."""
        begin = process_time()
        with self.stage.random.active():
            self.stage.forward(self.values)
            self.stage.hand_on(self.target, None)
            self.stage.learn(self.target, None, 1)
        return process_time() - begin


def every_stage(
    case: Case, batch: tuple[Any, Tensor], num_stages: int
) -> dict[tuple[int, int], Trained]:
    """Build every stage that the network could have, by the places where it begins and ends."""
    parts = split_everywhere(
        case.build(), num_stages=num_stages, readout=case.readout, example=batch[0]
    )
    message = Source(parts.num_outputs, parts.task, CPU, parts.form).to_train(1, batch)
    values = [message.features]
    with torch.no_grad():
        for body in parts.bodies:
            found = body(values[-1])
            values.append(
                found.contiguous()
                if isinstance(found, Tensor)
                else tuple(t.contiguous() for t in found)
            )
    size = parts.num_stages
    return {
        (begin, end): Trained(
            Stage(
                end - 1,
                Joined(parts.bodies[begin:end]),
                (),
                build_objective(parts, METHOD, end - 1, 0),
                OPTIONS,
                seed=0,
                device=CPU,
            ),
            values[begin],
            message.target,
        )
        for begin, end in combinations(range(size + 1), 2)
    }


def ranges(plan: Plan, costs: Costs) -> tuple[tuple[int, int], ...]:
    """The places where the stages of a plan begin and end."""
    places = [costs.cuts.index(cut) + 1 for cut in plan.cuts]
    return tuple(pairwise([0, *places, len(costs.units)]))


def slowest(stages: Sequence[tuple[int, int]], seconds: dict[tuple[int, int], float]) -> float:
    """The time of the slowest stage."""
    return max(seconds[stage] for stage in stages)


def compare(name: str, num_stages: int, rounds: int, duels: int) -> dict[str, Any]:
    """Plan, try all cuts, and time the planned, the default and the best ones in turns."""
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.inputs()
    batch = inputs, torch.randint(NUM_CLASSES, (len(inputs),))
    begin = perf_counter()
    costs = measure(
        case.build(), METHOD, OPTIONS, num_stages=num_stages, batch=batch, device=CPU,
        readout=case.readout,
    )  # fmt: skip
    planning = perf_counter() - begin
    plan = costs.plan(num_stages)
    default = scpl.split(case.build(), num_stages=num_stages, readout=case.readout, example=inputs)
    trained = every_stage(case, batch, num_stages)
    taken: dict[tuple[int, int], list[float]] = {stage: [] for stage in trained}
    for number in range(rounds + 1):
        for stage, one in trained.items():
            seconds = one.seconds()
            if number > 0:  # the first step allocates
                taken[stage].append(seconds)
    known = {stage: median(seconds) for stage, seconds in taken.items()}
    size = len(costs.units)
    ways = [
        tuple(pairwise([0, *inner, size])) for inner in combinations(range(1, size), num_stages - 1)
    ]
    best = min(ways, key=lambda way: slowest(way, known))
    rivals = {
        "planned": ranges(plan, costs),
        "best": best,
        "operations": ranges(costs.at(default.cuts), costs),
    }
    fought: dict[tuple[int, int], list[float]] = {
        stage: [] for way in rivals.values() for stage in way
    }
    for _ in range(duels):
        for stage, seconds_of in fought.items():
            trained[stage].seconds()  # what ran before decides what is in the cache
            seconds_of.append(trained[stage].seconds())
    medians = {stage: median(seconds) for stage, seconds in fought.items()}
    critical = {rival: max(way, key=lambda stage: medians[stage]) for rival, way in rivals.items()}

    def ratio(rival: str) -> dict[str, float]:
        pairs = zip(fought[critical[rival]], fought[critical["best"]], strict=True)
        low, middle, high = quantiles([ours / theirs for ours, theirs in pairs], n=4)
        return {"median": middle, "low": low, "high": high}

    return {
        "units": size,
        "ways": len(ways),
        "planning_seconds": planning,
        "best_seconds": medians[critical["best"]],
        "planned": ratio("planned"),
        "operations": ratio("operations"),
        "planned_cuts": plan.cuts,
        "best_cuts": [costs.cuts[begin - 1] for begin, _ in best[1:]],
        "operations_cuts": default.cuts,
    }


def digits(repeats: int, epochs: int) -> dict[str, Any]:
    """Train handwritten digits on two processes, in turns, with the default and measured cuts."""
    found: dict[str, Any] = {"operations": [], "measured": []}
    for _ in range(repeats):
        for balance, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [
                        *(
                            sys.executable,
                            "-m",
                            "scpl",
                            "train",
                            "quick/digits",
                            "--processes",
                            "2",
                        ),
                        *("--epochs", str(epochs), "--balance", balance, "--quiet"),
                        *("--out", f"{folder}/run"),
                    ],
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                assert done.returncode == 0
                summary = json.loads(Path(folder, "run", "summary.json").read_text())
            kept = "wait_share", "samples_per_second", "test_accuracy"
            runs.append({key: summary[key] for key in kept})
    return found


def table(found: dict[str, Any]) -> str:
    """Write all results as Markdown."""
    lines = [
        "| network | units | ways to cut | best, slowest stage | planned / best (quartiles) "
        "| operations / best (quartiles) | planning |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["networks"].items():
        planned, default = row["planned"], row["operations"]
        lines.append(
            f"| {name} | {row['units']} | {row['ways']} | {1e3 * row['best_seconds']:.1f} ms "
            f"| **{planned['median']:.3f}** ({planned['low']:.2f} .. {planned['high']:.2f}) "
            f"| {default['median']:.3f} ({default['low']:.2f} .. {default['high']:.2f}) "
            f"| {row['planning_seconds']:.1f} s |"
        )
    if found["digits"]:
        lines += ["", "| digits, 2 processes | images/s | waits of the two | test accuracy |"]
        lines += ["|---|---:|---:|---:|"]
    for balance, runs in (found["digits"] or {}).items():
        speeds = [run["samples_per_second"] for run in runs]
        first = median(run["wait_share"][0] for run in runs)
        last = median(run["wait_share"][-1] for run in runs)
        accuracy = ", ".join(f"{100 * run['test_accuracy']:.2f}" for run in runs)
        lines.append(
            f"| --balance {balance} | {median(speeds):,.0f} ({min(speeds):,.0f} .. "
            f"{max(speeds):,.0f}) | {100 * first:.0f} %, {100 * last:.0f} % | {accuracy} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="steps of every possible stage")
    parser.add_argument("--duels", type=int, default=15, help="steps of planned and best stages")
    parser.add_argument("--digits", type=int, default=3, help="runs of each kind on two processes")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.duels, options.digits = 1, 4, 0
    torch.set_num_threads(1)
    found: dict[str, Any] = {"networks": {}, "digits": None}
    for name in options.networks:
        row = compare(name, options.stages, options.rounds, options.duels)
        sys.stderr.write(f"{name}: planned / best {row['planned']['median']:.3f}\n")
        found["networks"][name] = row
    if options.digits:
        sys.stderr.write("digits on two processes\n")
        found["digits"] = digits(options.digits, 5)
    found["environment"] = describe_environment(CPU, 1)
    sys.stdout.write((json.dumps(found) if options.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
