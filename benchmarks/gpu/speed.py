"""How long is a training step on one GPU, and why?

For each network: `bp` (a plain loop, and this library's), `early-exit` and `scpl` with 2, 4 and 8
stages, in mixed precision, launched from Python and as CUDA graphs, at will compiled. Variants of
one network take turns; a ratio is of two neighbours in time. Beside the times: how long the device
computes, how many kernels it is given, and how much memory a step takes. Where there are several
GPUs, `scpl bench` follows, with a rank on each and the rivals over several ranks.

usage: speed.py [--device cuda] [--networks vgg8 resnet18 vit bert] [--compile] [--seconds 170]
                [--rounds 5] [--steps 10] [--ranks N] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import scpl
from scpl.app.environment import choose_device
from scpl.engine.trainers.captured import CudaLane
from scpl.errors import InputError
from scpl.heads.projection import MeanOverPositions
from scpl.models.resnet import ResNet
from scpl.models.vgg import VGG8

CLASSES = 10
Steps = Callable[[int], None]
LATE = "no time left"
SEVERAL = 300  # seconds that several ranks get


class Patches(nn.Module):
    """Images to patches with positions, ``[N, 3, H, W] -> [N, L, C]``."""

    def __init__(self, width: int, side: int, patch: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.project(images).flatten(2).transpose(1, 2) + self.position


class Words(nn.Module):
    """Word ids to vectors with positions, ``[N, L] -> [N, L, C]``."""

    def __init__(self, width: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(1, length, width))

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        return self.words(ids) + self.position


def encoder(first: nn.Module, width: int, heads: int, blocks: int) -> nn.Module:
    """An encoder of blocks without dropout, for what launching costs is in question here."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )

    layers = [block() for _ in range(blocks)]
    return nn.Sequential(first, *layers, MeanOverPositions(), nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Network:
    """A network and what goes in.

    Attributes:
        build: Makes it, tiny or in its full size.
        batch: Makes a batch of inputs, the same.
        most_stages: The most that are measured.
        maps: Whether it computes on maps, which can be laid out with their channels last.
    """

    build: Callable[[bool], nn.Module]
    batch: Callable[[bool], Tensor]
    most_stages: int = 8
    maps: bool = True


def _images(rows: int, side: int) -> Callable[[bool], Tensor]:
    return lambda small: torch.randn(8, 3, 32, 32) if small else torch.randn(rows, 3, side, side)


def _vit(small: bool) -> nn.Module:
    width, side, patch, blocks = (32, 32, 8, 8) if small else (384, 224, 16, 12)
    return encoder(Patches(width, side, patch), width, width // 16 if small else 6, blocks)


def _bert(small: bool) -> nn.Module:
    width, length, blocks = (32, 16, 8) if small else (768, 128, 12)
    words = 100 if small else 30_000
    return encoder(Words(width, length, words), width, 2 if small else 12, blocks)


def _ids(small: bool) -> Tensor:
    return torch.randint(100, (8, 16)) if small else torch.randint(30_000, (32, 128))


NETWORKS = {
    "vgg8": Network(
        lambda small: VGG8(CLASSES, width=1 / 16 if small else 1.0), _images(128, 32), most_stages=7
    ),
    "resnet18": Network(
        lambda small: ResNet(CLASSES, width=1 / 16 if small else 1.0), _images(128, 32)
    ),
    "vit": Network(_vit, _images(64, 224), maps=False),
    "bert": Network(_bert, _ids, maps=False),
}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        method: "loop" (written by hand), or a method of the library.
        stages: How many.
        graphs: CUDA graphs.
        lanes: With graphs, whether every stage has a stream of its own.
        compiled: torch.compile.
        layout: Of images and kernels: "contiguous" or "channels-last".
    """

    method: str
    stages: int = 1
    graphs: bool = False
    compiled: bool = False
    layout: str = "contiguous"
    lanes: bool = True

    @property
    def name(self) -> str:
        """What the table calls it."""
        parts = [self.method if self.stages == 1 else f"{self.method} {self.stages}"]
        parts += ["graphs" if self.lanes else "graphs in turns"] * self.graphs
        parts += ["compiled"] * self.compiled
        parts += ["channels last"] * (self.layout == "channels-last")
        return ", ".join(parts)


METHODS = {
    "bp": scpl.Backpropagation,
    "scpl": scpl.SCPL,
    "early-exit": scpl.EarlyExit,
}


def variants(network: Network, options: argparse.Namespace) -> Iterator[Variant]:
    layouts = ["contiguous", "channels-last"] if network.maps else ["contiguous"]
    cases = [("loop", 1), ("bp", 1), ("early-exit", 4), ("scpl", 2), ("scpl", 4),
             ("scpl", network.most_stages)]  # fmt: skip
    cases = [case for case in cases if not options.quick or case[1] in (1, 4)]
    modes = [(False, False), (True, False)]
    modes += [(False, True), (True, True)] if options.compile else []
    best = layouts[-1]
    for graphs, compiled in modes:
        for method, stages in cases:
            if graphs and (method == "loop" or options.device == "cpu"):
                continue
            if compiled and method != "loop" and (method, stages) not in (("bp", 1), ("scpl", 4)):
                continue
            yield Variant(method, stages, graphs, compiled, best)
    if options.device != "cpu":
        yield Variant("scpl", 4, True, layout=best, lanes=False)
        yield Variant("scpl", network.most_stages, True, layout=best, lanes=False)
    for layout in layouts[:-1]:
        yield Variant("bp", layout=layout)
        yield Variant("scpl", 4, layout=layout)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4, fused=True)


@functools.cache
def cut(name: str, stages: int, *, small: bool) -> scpl.Partition:
    """Cut a network into stages; take a copy of what comes."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    example = network.batch(small)[:2]
    return scpl.split(network.build(small), num_stages=max(stages, 2), example=example)


class Runner:
    """A variant, ready to take steps."""

    def __init__(self, name: str, variant: Variant, options: argparse.Namespace) -> None:
        self.variant, self.device = variant, options.device
        torch.manual_seed(1)
        inputs = NETWORKS[name].batch(options.quick)
        parts = copy.deepcopy(cut(name, variant.stages, small=options.quick))
        if variant.layout == "channels-last":
            parts.model.to(memory_format=torch.channels_last)
        target = torch.arange(len(inputs)) % CLASSES
        before = memory(self.device)
        train = self._loop if variant.method == "loop" else self._pipeline
        self._train = train(parts, inputs.to(self.device), target.to(self.device))
        self._train(6)  # graphs are recorded, kernels chosen
        settle(self.device)
        reset_memory(self.device)
        self._train(2)
        settle(self.device)
        self.memory = memory(self.device, peak=True) - before

    def _loop(self, parts: scpl.Partition, inputs: Tensor, target: Tensor) -> Steps:
        model = parts.model.to(self.device).train()
        if self.variant.compiled:
            model.compile()
        optimizer = adam(model.parameters())

        def train(steps: int) -> None:
            for _ in range(steps):
                with torch.autocast(inputs.device.type, torch.bfloat16):
                    logits = model(inputs)
                cross_entropy(logits.float(), target).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return train

    def _pipeline(self, parts: scpl.Partition, inputs: Tensor, target: Tensor) -> Steps:
        variant, device = self.variant, torch.device(self.device)
        shared = CudaLane.new(device) if not variant.lanes else None
        lanes = patch.object(CudaLane, "new", lambda device: shared) if shared else nullcontext()
        with lanes:
            pipeline = scpl.Pipeline(
                parts,
                METHODS[variant.method](),
                adam,
                precision=torch.bfloat16,
                cuda_graphs=variant.graphs,
                ranks=scpl.connect(device),
            )
        if variant.compiled:
            pipeline.parts.compiled()
        return lambda steps: pipeline.train([(inputs, target)] * steps)

    def seconds(self, steps: int) -> float:
        """Time one step, the mean of some."""
        settle(self.device)
        begin = time.perf_counter()
        self._train(steps)
        settle(self.device)
        return (time.perf_counter() - begin) / steps

    def profile(self) -> dict[str, Any]:
        """Say how long the device computes in a step, with what, and how many kernels there are."""
        cuda = self.device.startswith("cuda")
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CUDA] if cuda else [kinds.CPU]
        steps = 3
        with torch.profiler.profile(activities=activities) as profiler:
            self._train(steps)
            settle(self.device)
        # What the driver is asked for is listed, too; on a CPU operations are the kernels.
        spent = {
            row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total, row.count)
            for row in profiler.key_averages()
            if row.self_device_time_total > 0 or not cuda
        }
        top = sorted(spent.items(), key=lambda item: item[1][0], reverse=True)[:12]
        return {
            "kernels": sum(count for _, count in spent.values()) / steps,
            "device_ms": sum(microseconds for microseconds, _ in spent.values()) / steps / 1e3,
            "top": [(key[:90], time / steps / 1e3, count / steps) for key, (time, count) in top],
        }


def settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory(device: str, *, peak: bool = False) -> int:
    if not device.startswith("cuda"):
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def reset_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def measure(name: str, options: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure all variants of a network in turns; yields a row for each."""
    network, runners = NETWORKS[name], []
    for variant in variants(network, options):
        if time.monotonic() > deadline:
            yield {"network": name, "variant": variant.name, "failed": LATE}
            continue
        try:
            runners.append(Runner(name, variant, options))
        except Exception as error:
            settle(options.device)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"network": name, "variant": variant.name, "failed": reason[:300]}
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(options.rounds):
        for runner, found in zip(runners, times, strict=True):
            found.append(runner.seconds(options.steps))
    rival = {r.variant.name: found for r, found in zip(runners, times, strict=True)}
    for runner, found in zip(runners, times, strict=True):
        variant = runner.variant
        against = Variant("bp", 1, variant.graphs, variant.compiled, variant.layout).name
        ratios = [one / other for one, other in zip(found, rival.get(against, []), strict=False)]
        yield {
            "network": name,
            "variant": variant.name,
            "ms": 1e3 * statistics.median(found),
            "ms_all": [1e3 * value for value in found],
            "to_bp": [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None,
            # What graphs hold between steps is not counted as allocated.
            "memory_mib": None if variant.graphs else runner.memory / 2**20,
            **runner.profile(),
        }
    del runners
    gc.collect()
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()


def several(options: argparse.Namespace) -> dict[str, Any]:
    """Let `scpl bench` compare what trains on several ranks."""
    sizes = ["--width", "1", "--batch-size", "128", "--repeats", "5"]
    if options.quick:
        sizes = [
            "--width",
            "0.0625",
            "--batch-size",
            "8",
            "--repeats",
            "1",
            "--methods",
            "scpl,ddp",
        ]
    command = [sys.executable, "-m", "scpl", "bench", "--synthetic", "--data", "cifar10",
               "--model", "resnet18", "--image-size", "32", *sizes,
               "--precision", "float32" if options.quick else "bfloat16",
               "--stages", "4", "--processes", str(options.ranks),
               "--device", "cuda" if options.device.startswith("cuda") else "cpu",
               "--json"]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SEVERAL)
    except subprocess.TimeoutExpired:
        return {"failed": f"scpl bench took more than {SEVERAL} s"}
    if done.returncode:
        return {"failed": f"scpl bench ended with status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


HEADER = (
    f"{'':10}{'':36}{'ms/step':>9}{'x bp, same mode':>22}{'device ms':>11}{'kernels':>9}{'MiB':>8}"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['network']:10}{row['variant']:36}"
    if "failed" in row:
        return f"{start}  {row['failed']}"
    ratio = "{:.2f} ({:.2f} .. {:.2f})".format(*row["to_bp"]) if row["to_bp"] else ""
    memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
    device = f"{row['device_ms']:11.3f}{row['kernels']:9.0f}"
    return f"{start}{row['ms']:9.3f}{ratio:>22}{device}{memory:>8}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--compile", action="store_true", help="also compiled; takes minutes")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--seconds", type=float, default=170, help="begin nothing after that")
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it run?")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps = 1, 2
    if min(options.rounds, options.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    options.device = str(choose_device(options.device))
    warnings.simplefilter("ignore")
    deadline, rows = time.monotonic() + options.seconds, []
    if options.device.startswith("cuda"):
        print(torch.cuda.get_device_name(), torch.__version__)
    print(HEADER, flush=True)
    for name in options.networks:
        for row in measure(name, options, deadline):
            rows.append(row)
            print(line(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows))
    for row in rows:
        if row["variant"].startswith("scpl 4") and row.get("to_bp") and row["to_bp"][0] > 1:
            print(f"\n{row['network']}, {row['variant']}: what the device does in a step")
            for kernel, milliseconds, count in row["top"]:
                print(f"  {milliseconds:8.3f} ms {count:6.0f}x  {kernel}")
    if options.ranks > 1:
        found = several(options)
        print(f"\nresnet18 on {options.ranks} ranks, samples/s")
        for result in found.get("results", []):
            rate = result["samples_per_second"]
            print(
                "  {:12}{median:12,.0f} ({min:,.0f} .. {max:,.0f})".format(result["method"], **rate)
            )
        for name, reason in {"": found.get("failed"), **found.get("failures", {})}.items():
            if reason:
                print(f"  {name:12}{reason}")
        rows.append({"ranks": options.ranks, **found})
        if options.json:
            options.json.write_text(json.dumps(rows))
    return 1 if any(row.get("failed", LATE) != LATE or row.get("failures") for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"speed.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
