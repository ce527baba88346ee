"""Fine-tuning over a cable: local learning beside GPipe, 1F1B and DDP at its best.

Two ranks with a core each, over loopback and over a cable of a known speed (which needs root).
See cable.md beside this file.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "throughput"))
from writing import environment, say, shown, verdict

from links import (
    LOOPBACK,
    UNSHAPED,
    Cable,
    bits_per_second,
    go_to_cable,
    go_to_loopback,
    refusal,
)
from scpl.app.bench.bench import config_for
from scpl.app.bench.measure import Block, Contender, summary, train_block
from scpl.app.bench.workers import Timing, Workers, sending_failures
from scpl.app.build import (
    build_loaders,
    build_method,
    build_pipeline,
    connect_ranks,
)
from scpl.app.config import TrainConfig
from scpl.app.environment import set_threads
from scpl.app.inputs.base import DataSummary
from scpl.app.signals import end_signals
from scpl.app.train.run import train
from scpl.data.loader import Batch
from scpl.engine.ranks import Ranks
from scpl.errors import ScplError
from scpl.pipeline import Pipeline
from turns import Networks, block_of

SLICED = ("gpipe", "1f1b")
LOCAL = "scpl"
ALONE = ("bp", "bp-wide")
TOGETHER = 4
"""Mini-batches whose gradients DDP averages together, where it does."""
NO_DROPOUT = ("hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
TARGETS = {
    LOOPBACK: {"bp": 1.75, "bp-wide": 1.15, "ddp": 1.0, "gpipe": 1.2, "1f1b": 1.2},
    "1gbit": {"ddp": 1.5},
    "200mbit": {"ddp": 3.0, "ddp bf16": 1.5},
}
SAME_LOSS = 1e-4
NO_SPEED: dict[str, Any] = {
    "results": [],
    "ratios": [],
    "speeds": {},
    "equal": None,
    "no_cable": "",
}
QUICK_TEXTS = 96
MANY_STEPS = 100_000  # so that learning rates stay where they are


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        method: Its name.
        options: Its options, by the names of flags.
        cuts: Where the second stage begins; none: as `scpl train` would cut.
        dropout: Whether the network drops anything.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    dropout: bool = True

    @property
    def family(self) -> str:
        """What it is called, without a number of micro-batches, of which the best counts."""
        words = [self.method]
        words += ["bf16"] if "compress_gradients" in self.options else []
        words += [f"x{self.options['accumulation']}"] if "accumulation" in self.options else []
        return " ".join(words)

    @property
    def name(self) -> str:
        """What it is called."""
        count = self.options.get("micro_batches")
        return f"{self.family}/{count}" if count else self.family

    def config(self, base: TrainConfig) -> TrainConfig:
        """The settings of a run."""
        if not self.dropout:
            base = base.changed(model_args=NO_DROPOUT)
        if self.cuts:
            base = base.changed(cuts=self.cuts)
        chosen = replace(base.method, method=self.method, options=self.options)
        return config_for(replace(base, method=chosen), self.method)


DDP = (
    Variant("ddp"),
    Variant("ddp", {"compress_gradients": "bfloat16"}),
    Variant("ddp", {"accumulation": TOGETHER}),
    Variant("ddp", {"compress_gradients": "bfloat16", "accumulation": TOGETHER}),
)


# ---- The processes. ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What processes are for.

    Attributes:
        base: Settings that all variants share.
        cable: Whether each is at an end of the cable.
        steps: Timed steps; as many mini-batches are used, in a circle.
    """

    base: TrainConfig
    cable: bool
    steps: int


@dataclass(frozen=True)
class Timed(Timing):
    """A block, with the processor's time per step."""

    processor: float = 0.0


def serve(connection: Connection, job: Job) -> None:
    """Be one rank: build a variant when it is received, and train a block of it on anything else.

    One process serves all variants, one after the other, because loading and cutting the network
    takes longer than a block.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks > 1:
        (go_to_cable if job.cable else go_to_loopback)()
    ranks = connect_ranks(job.base)
    with sending_failures(connection, ranks):
        data, batches = share_batches(job, ranks)
        connection.send(())
        networks = Networks(data)
        pipeline, block = None, Block(job.steps)
        while True:
            order = connection.recv()
            if isinstance(order, Variant):
                pipeline = None
                gc.collect()  # a replica leaves hooks on the weights until it is gone
                config = order.config(job.base)
                use_cores(rank, config.run.threads or 1)
                method = build_method(config.suited, config.rows)
                parts = networks.copy(config)
                pipeline = build_pipeline(config, parts, method, MANY_STEPS, None, ranks)
                block = block_of(job.steps, method, ranks.mesh.num_ranks, config.run.depth)
                # A schedule prepares for every shape, so it must see all of them first; and losses
                # are compared on all of them.
                all_shapes = order.method in SLICED or not order.dropout
                steps = job.steps - 1 if all_shapes else 1
                connection.send(timed(pipeline, cycle(batches), Block(steps, warm=1)))
            elif pipeline is not None:
                connection.send(timed(pipeline, cycle(batches), block))
                pipeline.close()


def use_cores(rank: int, threads: int) -> None:
    """One core for each thread of each rank."""
    cores = sorted(os.sched_getaffinity(os.getppid()))
    own = [cores[(rank * threads + thread) % len(cores)] for thread in range(threads)]
    for task in os.listdir("/proc/self/task"):  # also those that send and receive
        os.sched_setaffinity(int(task), own)
    set_threads(threads, 1)


def share_batches(job: Job, ranks: Ranks) -> tuple[DataSummary, list[Batch]]:
    """Take mini-batches that stand for an epoch: of those in order of length every so many-th."""
    batches: list[Batch] = []
    if ranks.mesh.is_first:
        loaders, size = build_loaders(job.base), job.base.data.batch_size
        ranks.share("data", DataSummary.of(loaders).to_json())
        full = sorted(
            (batch for batch in loaders.train if len(batch[1]) == size),
            key=lambda batch: batch[0]["input_ids"].numel(),
        )
        batches = [full[(2 * i + 1) * len(full) // (2 * job.steps)] for i in range(job.steps)]
    return DataSummary.from_json(ranks.fetch("data")), batches


def timed(pipeline: Pipeline, batches: Iterator[Batch], block: Block) -> Timed:
    """Train a block, and keep the time of this process's threads, too."""
    before = time.process_time()
    timing = train_block(pipeline, batches, block)
    processor = (time.process_time() - before) / block.size
    return Timed(**vars(timing), processor=processor)


@dataclass(frozen=True)
class Training:
    """A whole run.

    Attributes:
        config: Its settings.
        core: That of its first rank.
    """

    config: TrainConfig
    core: int = 0


def serve_training(connection: Connection, job: Training) -> None:
    """Be one rank of a whole run, when told to begin."""
    connection.send(())
    connection.recv()
    use_cores(int(os.environ["RANK"]) + job.core, 1)
    with sending_failures(connection):
        train(job.config)
        connection.send(None)


# ---- Speed. --------------------------------------------------------------------------------------


class Bench:
    """The processes, and the variants on every network.

    Args:
        base: Settings that all share.
        cable: Between two of the processes; None where none can be made.
        rates: Of the cable.
        steps: Timed steps of a block.
    """

    def __init__(
        self, base: TrainConfig, cable: Cable | None, rates: Sequence[str], steps: int
    ) -> None:
        self._base, self._cable, self._steps = base, cable, steps
        self.networks = [LOOPBACK, *(rates if cable else ())]
        places = {"alone": 1, LOOPBACK: 2, **({"cable": 2} if cable else {})}
        self._workers = {
            place: Workers(
                f"the process{'es' * (number > 1)} {place}",
                serve,
                Job(base.alone() if number == 1 else base, place == "cable", steps),
                processes=number,
            )
            for place, number in places.items()
        }
        self.contenders: dict[tuple[str, str], Contender] = {}
        self.traffic: dict[tuple[str, str], list[float]] = {}

    def start(self) -> None:
        """Start all processes."""
        for workers in self._workers.values():
            say(f"starting {workers.name}")
            workers.start()

    def kill(self) -> None:
        """End all processes."""
        for workers in self._workers.values():
            workers.kill()

    def measure(self, variant: Variant, network: str) -> None:
        """Let a variant have its turn."""
        key = (variant.name, network)
        if key not in self.contenders:
            self.traffic.pop(key, None)
            self.contenders[key] = self._contender(variant, network)
        self.contenders[key].measure()

    def rate(self, variant: Variant, network: str) -> float:
        """Measure samples per second once, to choose by."""
        contender = self._contender(variant, network)
        contender.measure()
        return contender.rates[0]

    def _contender(self, variant: Variant, network: str) -> Contender:
        place = network if network in self._workers else "cable"
        samples = self._steps * self._base.data.batch_size
        return Contender(self._workers[place], samples, partial(self._train, variant, network))

    def losses(self, variant: Variant, place: str) -> list[float]:
        """Train the first mini-batches, and return their losses as the last rank knows them."""
        losses = self._workers[place].train(variant)[-1].losses
        self._workers[place].train()
        return [losses[step] for step in sorted(losses)]

    def _train(self, variant: Variant, network: str, workers: Workers) -> list[Timing]:
        """Train a block; the cable has its speed while that is done, and no longer."""
        workers.train(variant)
        if self._cable is None or network not in self.networks[1:]:
            return workers.train()
        self._cable.shape(network)
        before = self._cable.carried_bytes()
        timings = workers.train()
        carried = self._cable.carried_bytes() - before
        self._cable.shape(UNSHAPED)
        self.traffic.setdefault((variant.name, network), []).append(carried / timings[-1].steps)
        return timings


def check_equal(bench: Bench) -> dict[str, Any]:
    """Without dropout the end-to-end methods must have the losses of backpropagation.

    Returns:
        The largest difference of each, and of how many steps.

    Raises:
        RuntimeError: if one is not equal up to rounding.
    """
    say("the same losses without dropout?")
    expected = bench.losses(Variant("bp", dropout=False), "alone")
    micro = {"micro_batches": 4}
    rivals = [Variant(name, micro, dropout=False) for name in SLICED]
    found = {}
    for variant in [*rivals, Variant("ddp", dropout=False)]:
        losses = bench.losses(variant, LOOPBACK)
        pairs = zip(losses, expected, strict=True)
        found[variant.name] = max(abs(own - other) for own, other in pairs)
        if found[variant.name] > SAME_LOSS:
            raise RuntimeError(f"{variant.name} has losses {losses}, and bp {expected}")
    return {"steps": len(expected), "difference": found}


def local(arguments: argparse.Namespace) -> Variant:
    """Local learning as it was asked for."""
    options = {"head": arguments.head} if arguments.head else {}
    return Variant(LOCAL, options, tuple(arguments.cuts or ()))


def measure_all(bench: Bench, arguments: argparse.Namespace) -> dict[str, dict[str, Variant]]:
    """Find the best numbers of micro-batches, and then let all take turns.

    Returns:
        The variants that count on every network, by family.
    """
    chosen: dict[str, dict[str, Variant]] = {}
    for network in bench.networks:
        found = {}
        for method in SLICED:
            tried = [Variant(method, {"micro_batches": n}) for n in arguments.micro_batches]
            rates = {variant.name: bench.rate(variant, network) for variant in tried}
            found[method] = max(tried, key=lambda variant: rates[variant.name])
            told = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
            say(f"{time.strftime('%H:%M:%S')} {network}, samples/s: {told}")
        variants = [local(arguments), *found.values(), *DDP]
        if network == LOOPBACK:
            variants += [Variant(name) for name in ALONE]
        chosen[network] = {variant.family: variant for variant in variants}
    turns = [(v, network) for network, own in chosen.items() for v in own.values()]
    turns = [(v, "alone" if v.method in ALONE else network) for v, network in turns]
    for number in range(1, arguments.rounds + 1):
        # Every other round backwards, so that a steady drift cancels out.
        for variant, network in turns if number % 2 else reversed(turns):
            bench.measure(variant, network)
        rates = {
            f"{v.family} {network}": bench.contenders[v.name, network].rates[-1]
            for v, network in turns
        }
        told = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        say(f"{time.strftime('%H:%M:%S')} round {number}/{arguments.rounds}, samples/s: {told}")
    return chosen


# ---- Accuracy. -----------------------------------------------------------------------------------


def curve_of(family: str) -> str:
    """Whose accuracy a method has: that of backpropagation, unless its numbers are others."""
    return family if family == LOCAL or family in {v.family for v in DDP[1:]} else "bp"


def curves_of(base: TrainConfig, ours: Variant, folder: Path) -> dict[str, list[float]]:
    """Train every method whose numbers differ to the end.

    What runs on one process gives the numbers of two, and two such runs share the machine.

    Returns:
        The validation accuracy after each epoch.
    """
    jobs = {}
    for core, variant in enumerate([Variant("bp"), ours]):
        jobs[variant.family] = Training(variant.config(base).alone(), core % 2)
    for variant in DDP[1:]:
        jobs[variant.family] = Training(variant.config(base))
    for name, job in jobs.items():
        out = folder / name.replace(" ", "-")
        jobs[name] = replace(job, config=job.config.changed(out=out))
    names = list(jobs)
    for together in (names[:2], *([name] for name in names[2:])):
        say(f"{time.strftime('%H:%M:%S')} training {' and '.join(together)}")
        everyone = [
            Workers(name, serve_training, jobs[name], processes=jobs[name].config.run.processes)
            for name in together
        ]
        try:
            for workers in everyone:
                workers.start()
            with ThreadPoolExecutor(len(everyone)) as pool:
                list(pool.map(Workers.train, everyone))
        finally:
            for workers in everyone:
                workers.kill()
    return {name: accuracies(job.config.run.out) for name, job in jobs.items()}


def accuracies(run: Path | None) -> list[float]:
    """Validation accuracy after each epoch of a run."""
    assert run is not None
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["valid_accuracy"]) for row in csv.DictReader(file)]


def seconds_to(target: float, curve: Sequence[float], epoch: float) -> float | None:
    """Seconds until an accuracy is reached, on straight lines between epochs; None for never."""
    if curve[0] >= target:
        return epoch
    for number, (low, high) in enumerate(pairwise(curve), 1):
        if low < target <= high:
            return epoch * (number + (target - low) / (high - low))
    return None


# ---- What was found. -----------------------------------------------------------------------------


def describe(bench: Bench, chosen: Mapping[str, Mapping[str, Variant]]) -> dict[str, Any]:
    """Speed, ratios and traffic in JSON values."""
    results, ratios = [], []
    for network, variants in chosen.items():
        own = {family: contender_of(bench, v, network) for family, v in variants.items()}
        one_core = contender_of(bench, Variant("bp"), network)
        for family, variant in variants.items():
            last, contender = own[family].timings, own[family]
            others = [load["others"] for load in contender.loads]
            traffic = bench.traffic.get((variant.name, network))
            results.append(
                {
                    "method": family,
                    "variant": variant.name,
                    "network": network,
                    "samples_per_second": summary(contender.rates),
                    "rates": contender.rates,
                    "to_bp": summary(contender.ratios(one_core)),
                    "bytes_per_step": summary(traffic) if traffic else None,
                    "processor_seconds": [
                        median(t.processor for t in rank) for rank in zip(*last, strict=True)
                    ],
                    "shares": contender.mean_shares(),
                    "others": summary(others) if others else None,
                }
            )
            if family != LOCAL:
                target = TARGETS.get(network, {}).get(family)
                ratio = {**summary(own[LOCAL].ratios(contender)), "target": target}
                ratios.append({"network": network, "below": variant.name, **ratio})
    return {"results": results, "ratios": ratios}


def contender_of(bench: Bench, variant: Variant, network: str) -> Contender:
    return bench.contenders[variant.name, "alone" if variant.method in ALONE else network]


def times_of(
    results: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[float]], samples: int
) -> list[dict[str, Any]]:
    """When each method is as accurate as backpropagation is at its end, on every network."""
    target, found = curves["bp"][-1], []
    rates = {
        (row["method"], row["network"]): row["samples_per_second"]["median"] for row in results
    }
    reference = seconds_to(target, curves["bp"], samples / rates["bp", LOOPBACK])
    for (family, network), rate in rates.items():
        curve = curves[curve_of(family)]
        seconds = seconds_to(target, curve, samples / rate)
        found.append(
            {
                "method": family,
                "network": network,
                "seconds_of_an_epoch": samples / rate,
                "accuracy": list(curve),
                "seconds_to_target": seconds,
                "times_sooner_than_bp": None if seconds is None else reference / seconds,
            }
        )
    return found


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    for name, curve in found["curves"].items():
        yield f"{name}, after each epoch: {', '.join(f'{100 * value:.1f} %' for value in curve)}"
    if not found["results"]:
        return
    yield ""
    yield (
        "| network | method | samples/s: median (min .. max) | to one-core bp, paired "
        "| MB per step | processor seconds per step | ranks wait | other load, cores |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for row in found["results"]:
        traffic, seconds = row["bytes_per_step"], row["processor_seconds"]
        cells = [
            row["network"],
            row["variant"],
            shown(row["samples_per_second"], 1),
            shown(row["to_bp"], 2),
            "" if traffic is None else f"{traffic['median'] / 1e6:.1f}",
            ", ".join(f"{each:.3f}" for each in seconds),
            ", ".join(f"{100 * shares['wait']:.0f} %" for shares in row["shares"]),
            shown(row["others"], 2),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"| `{LOCAL}` against | network | ratio, paired: median (min .. max) | target | |"
    yield "|---|---|---:|---:|---|"
    for row in found["ratios"]:
        cells = [row["below"], row["network"], shown(row, 2), f"{row['target'] or ''}"]
        yield f"| {' | '.join([*cells, verdict(row)])} |"
    if found["times"]:
        yield ""
        yield (
            "| network | method | seconds of an epoch | accuracy after each epoch "
            "| seconds to the accuracy that bp ends with | times sooner than one-core bp |"
        )
        yield "|---|---|---:|---:|---:|---:|"
    for row in found["times"]:
        seconds, ratio = row["seconds_to_target"], row["times_sooner_than_bp"]
        cells = [
            row["network"],
            row["method"],
            f"{row['seconds_of_an_epoch']:.1f}",
            ", ".join(f"{100 * value:.1f}" for value in row["accuracy"]),
            "not reached" if seconds is None else f"{seconds:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for rate, speed in found["speeds"].items():
        yield f"The cable of {rate} carried {speed / 1e6:.0f} Mbit/s without headers."
    if equal := found["equal"]:
        worst = ", ".join(f"{name} {value:.1e}" for name, value in equal["difference"].items())
        yield (
            f"Without dropout, losses of {equal['steps']} steps differ from those of bp by at most "
            f"{worst}."
        )
    if found["no_cable"]:
        yield f"Over loopback alone: {found['no_cable']}."


def draw(times: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against wall-clock time, a panel for each network."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses windows

    networks = list(dict.fromkeys(row["network"] for row in times))
    names = list(dict.fromkeys(row["method"] for row in times))
    looks = {name: (f"C{i % 10}", "osD^vP*X<>"[i % 10]) for i, name in enumerate(names)}
    alone = [row for row in times if row["method"] in ALONE]
    figure = Figure(figsize=(4.2 * len(networks), 4.2))
    axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)
    for network, axis in zip(networks, axes[0], strict=True):
        rows = [row for row in times if row["network"] == network and row not in alone]
        for row in [*rows, *alone]:
            color, mark = looks[row["method"]]
            width = 2.5 if row["method"] == LOCAL else 1.2
            axis.plot(
                [row["seconds_of_an_epoch"] * n for n in range(1, len(row["accuracy"]) + 1)],
                [100 * value for value in row["accuracy"]],
                color=color, marker=mark, linewidth=width, markersize=5, label=row["method"],
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(network)
        axis.set_xlabel("seconds of training")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation accuracy, %")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- The command. --------------------------------------------------------------------------------


def quick_data(folder: Path) -> dict[str, Any]:
    """Write a tiny BERT of drawn weights and a table of texts; not for quoting."""
    from transformers import BertConfig, BertTokenizer

    words = [f"{letter}{number}" for letter in "xy" for number in range(8)]
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    tokenizer.save_pretrained(folder / "bert")
    BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    ).save_pretrained(folder / "bert")  # fmt: skip
    rows = [
        f"{' '.join(words[8 * (n % 2) + (n * k) % 8] for k in range(1, 2 + n % 7))},{'xy'[n % 2]}"
        for n in range(160)
    ]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return {"model": f"hf:{folder / 'bert'}", "data": str(folder / "texts.csv"), "batch_size": 8}


def base_config(arguments: argparse.Namespace, folder: Path) -> TrainConfig:
    """What all methods share; all else is the default of `scpl train`."""
    if arguments.quick:
        # All variants without dropout, so that every process cuts one network alone.
        task = {**quick_data(folder), "validation": 0.25, "model_args": NO_DROPOUT}
    else:
        everything = arguments.train + arguments.validate
        task = {
            "model": f"hf:{arguments.model}",
            "data": arguments.data,
            "data_dir": arguments.data_dir,
            "batch_size": arguments.batch_size,
            "limit_train": everything,
            "validation": arguments.validate / everything,
            "limit_test": arguments.batch_size,  # not what is looked at
        }
        task |= {"text": tuple(arguments.text)} if arguments.text else {}
    shared = {"stages": 2, "processes": 2, "threads": 1, "timeout": 120.0, "quiet": True}
    return TrainConfig.of(**task, **shared, epochs=max(arguments.epochs, 1))


def measured_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure speed and accuracy; everything found, in JSON values."""
    with tempfile.TemporaryDirectory(prefix="scpl-cable-") as path:
        folder = Path(path)
        base = base_config(arguments, folder)
        found = speed_by(arguments, base) if arguments.rounds else {**NO_SPEED}
        if arguments.curves:
            curves = json.loads(arguments.curves.read_text(encoding="utf-8"))["curves"]
        else:
            curves = curves_of(base, local(arguments), folder) if arguments.epochs else {}
    samples = QUICK_TEXTS if arguments.quick else arguments.train
    times = times_of(found["results"], curves, samples) if curves and found["results"] else []
    return {**found, "curves": curves, "times": times}


def speed_by(arguments: argparse.Namespace, base: TrainConfig) -> dict[str, Any]:
    """Measure the speed of all methods on all networks."""
    no_cable = refusal() if arguments.rate else ""
    if no_cable and not arguments.quick:
        raise RuntimeError(no_cable)
    with Cable() if arguments.rate and not no_cable else nullcontext() as cable:
        speeds = {rate: cable.checked_speed(rate) for rate in arguments.rate} if cable else {}
        for rate, speed in speeds.items():
            say(f"the cable of {rate} carries {speed / 1e6:.0f} Mbit/s without headers")
        if cable is not None:
            cable.shape(UNSHAPED)
        bench = Bench(base, cable, arguments.rate, arguments.steps)
        try:
            bench.start()
            equal = check_equal(bench)
            chosen = measure_all(bench, arguments)
        finally:
            bench.kill()
    found = describe(bench, chosen)
    return {**found, "speeds": speeds, "equal": equal, "no_cable": no_cable}


def interrupt(received: int) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", default="sst2", help="data set or table, as for scpl train")
    parser.add_argument("--text", nargs="+", help="its columns of texts")
    parser.add_argument("--data-dir", type=Path, help="where data sets lie")
    parser.add_argument("--rate", nargs="*", default=["1gbit", "200mbit"], help="of the cable")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--head", help="of scpl; default: that of scpl train")
    parser.add_argument("--cuts", nargs=1, help="where the second stage of scpl begins")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=TOGETHER, help="timed steps of a block")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="blocks of each method and network; 0: none, accuracy alone",
    )
    parser.add_argument("--epochs", type=int, default=2, help="for accuracy; 0: none is measured")
    parser.add_argument("--train", type=int, default=2000, help="texts to learn from")
    parser.add_argument("--validate", type=int, default=1000, help="texts to validate on")
    parser.add_argument("--curves", type=Path, help="take accuracy from an earlier --out")
    parser.add_argument("--picture", type=Path, help="draw accuracy against time into this file")
    parser.add_argument("--out", type=Path, help="write what was found into this file, as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny network, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.model is None and not arguments.quick:
        parser.error("--model must name the folder of a network of transformers, or give --quick")
    if arguments.steps % TOGETHER:
        parser.error(f"--steps must be a multiple of {TOGETHER}, the mini-batches of an update")
    load, begin = os.getloadavg(), time.monotonic()
    try:
        for rate in arguments.rate:
            bits_per_second(rate)
        with end_signals(interrupt):
            found = measured_by(arguments)
    except (KeyboardInterrupt, RuntimeError, ValueError, ScplError) as error:
        raise SystemExit(str(error) or "Interrupted") from None
    if arguments.picture and found["times"]:
        draw(found["times"], arguments.picture)
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    found |= {"environment": environment(), "load_before": load, "arguments": settings}
    found["minutes"] = (time.monotonic() - begin) / 60
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found) if arguments.json else "\n".join(tables(found)))
    say(f"{found['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
