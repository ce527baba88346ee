"""Peak extra memory of one training step: `scpl` against end-to-end training.

Every measurement runs in a fresh process. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    import scpl

NUM_CLASSES = 10
MIB = 2**20

# `scpl.split` balances floating-point operations. These cuts, found with this benchmark, make the
# largest peak smaller: the early layers, whose maps are large, are spread over more stages.
MEMORY_CUTS = {
    ("resnet18", 4): ("layer1.1", "layer2", "layer3"),
    ("resnet18", 8): (
        *("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4"),
    ),
    ("vgg8", 4): ("block1.3", "block2", "block3"),
    ("vgg8", 8): (
        "block1.3",  # second convolution
        "block1.4",  # its batch norm and ReLU
        "block1.6",  # its pool, with the third convolution
        *("block2.3", "block3.0", "block4.0", "classifier.0"),
    ),
}
MOST_BY_FLOPS = {"vgg8": 7}  # it has no more layers that compute before its last one


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: "vgg8", "resnet18" or "transformer".
        method: "scpl", "bp" (the same pipeline as one stage) or "bp-plain" (a hand-written loop).
        stages: Number of stages.
        cuts: "flops" (chosen by `scpl.split`), "even" (blocks counted) or "memory".
        batch_size: Rows of the batch.
        device: Where to compute.
        small: Narrow networks, for a quick look at whether everything runs.
    """

    model: str
    method: str
    stages: int
    cuts: str
    batch_size: int
    device: str
    small: bool


# ---- The child process: build, take a small step, measure one step. -----------------------------


def build(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """Return network, inputs and target."""
    import torch

    torch.manual_seed(0)
    target = torch.arange(case.batch_size) % NUM_CLASSES
    if case.model == "transformer":
        width, blocks, tokens = (32, 8, 16) if case.small else (256, 12, 64)
        network = transformer(width, blocks)
        return network, torch.randint(4096, (case.batch_size, tokens)), target
    from scpl.models.resnet import ResNet
    from scpl.models.vgg import VGG8

    width_factor = 1 / 16 if case.small else 1.0
    make = {"vgg8": VGG8, "resnet18": ResNet}[case.model]
    images: nn.Module = make(NUM_CLASSES, width=width_factor)
    return images, torch.randn(case.batch_size, 3, 32, 32), target


def transformer(width: int, num_blocks: int) -> nn.Sequential:
    """Build an encoder that classifies token sequences ``[N, L]``."""
    from torch import nn

    from scpl.heads.projection import MeanOverPositions

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)

    return nn.Sequential(
        nn.Embedding(4096, width),
        *(block() for _ in range(num_blocks)),
        MeanOverPositions(),
        nn.Linear(width, NUM_CLASSES),
    )


def partition(case: Case, network: nn.Module, example: Tensor) -> scpl.Partition:
    import scpl

    if case.cuts == "memory":
        cuts = MEMORY_CUTS[case.model, case.stages]
        readout = "classifier.2" if "classifier.0" in cuts else None
        return scpl.split(network, cuts, readout=readout, example=example)
    if case.cuts == "even":
        first, blocks = (
            1,
            len(list(network.children())) - 3,
        )  # an embedding before the blocks, two layers after
        even = [f"{first + blocks * i // case.stages}" for i in range(1, case.stages)]
        return scpl.split(network, even, example=example)
    return scpl.split(network, num_stages=case.stages, example=example)


def measure(case: Case) -> dict[str, Any]:
    """Measure one step in this process."""
    import torch

    import scpl

    torch.set_num_threads(1)
    network, inputs, target = build(case)
    inputs, target = inputs.to(case.device), target.to(case.device)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-4)

    modules: list[nn.Module]
    if case.method == "bp-plain":
        train = plain_loop(network.to(case.device), optimizer)
        modules, names = [network], []
    else:
        method = scpl.SCPL() if case.method == "scpl" else scpl.Backpropagation()
        parts = partition(case, network, inputs[:2].cpu())
        pipeline = scpl.Pipeline(parts, method, optimizer, ranks=scpl.connect(case.device))
        modules = [m for stage in pipeline.stages for m in (stage.body, stage.objective)]
        names = [" ".join(part) for part in pipeline.parts.names]
        mark_stages(pipeline)

        def train(inputs: Tensor, target: Tensor) -> None:
            pipeline.train([(inputs, target)])

    train(inputs[:8], target[:8])  # optimizer state exists from here on
    state = sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) * 3
    step = on_cuda if case.device.startswith("cuda") else on_cpu
    return {"state_bytes": state, **step(lambda: train(inputs, target), names)}


def plain_loop(network: nn.Module, optimizer: Any) -> Any:
    """Return a step of end-to-end training without this library."""
    from torch.nn.functional import cross_entropy

    network.train()
    adam = optimizer(network.parameters())

    def train(inputs: Tensor, target: Tensor) -> None:
        cross_entropy(network(inputs), target).backward()
        adam.step()
        adam.zero_grad()

    return train


def mark_stages(pipeline: scpl.Pipeline) -> None:
    """Give what each stage does a name in the profile."""
    from torch.profiler import record_function

    def named(function: Any, name: str) -> Any:
        def run(*args: Any) -> Any:
            with record_function(name):
                return function(*args)

        return run

    for stage in pipeline.stages:
        stage.forward = named(stage.forward, f"forward {stage.index}")  # type: ignore[method-assign]
        stage.learn = named(stage.learn, f"learn {stage.index}")  # type: ignore[method-assign]


def on_cpu(step: Any, names: list[str]) -> dict[str, Any]:
    """Follow every allocation of PyTorch's CPU allocator, and the resident set beside it."""
    from torch.profiler import ProfilerActivity, profile

    resident = reset_peak_resident()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        peak_resident = status("VmHWM")
    kineto: Any = profiler.profiler
    events = kineto.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    spans = {
        e.name(): (e.start_ns(), e.end_ns())
        for e in events
        if e.name().startswith(("forward ", "learn "))
    }
    curve = list(running_sum(sorted(changes, key=lambda change: change[0])))

    def peak(span: tuple[int, int]) -> int:
        return max((size for at, size in curve if span[0] <= at <= span[1]), default=0)

    return {
        "peak_bytes": max(size for _, size in curve),
        "left_bytes": curve[-1][1],
        "resident_bytes": None if resident is None else peak_resident - resident,
        "per_stage": [
            {
                "layers": name,
                "forward_bytes": peak(spans[f"forward {i}"]),
                "learn_bytes": peak(spans[f"learn {i}"]),
            }
            for i, name in enumerate(names)
        ],
    }


def running_sum(changes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    total = 0
    for at, size in changes:
        total += size
        yield at, total


def reset_peak_resident() -> int | None:
    """Forget the highest resident set so far (Linux); return the present one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except OSError:
        return None


def status(field: str) -> int:
    """Read a size from this process's status (Linux), in bytes; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def on_cuda(step: Any, names: list[str]) -> dict[str, Any]:
    """Ask the caching allocator."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "left_bytes": torch.cuda.memory_allocated() - before,
        "resident_bytes": None,
        "per_stage": [],
    }


# ---- The parent process: one child per case, and the table. -------------------------------------


def run_child(case: Case) -> dict[str, Any]:
    """Measure in a fresh process."""
    # A fixed threshold makes glibc give every block of 64 KiB or more back when it is freed, so
    # that the resident set follows the allocator.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    child = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(case))],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {**asdict(case), **measured}


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    models = ["transformer", "resnet18", "vgg8"] if arguments.model == "all" else [arguments.model]
    batch_size = arguments.batch_size or (16 if arguments.quick else 256)
    cases = []
    for model in models:
        cuts = "even" if model == "transformer" else "flops"
        wanted = [("bp", 1, cuts), ("bp-plain", 1, cuts)]
        for stages in arguments.stages:
            wanted.append(("scpl", min(stages, MOST_BY_FLOPS.get(model, stages)), cuts))
            if (model, stages) in MEMORY_CUTS:
                wanted.append(("scpl", stages, "memory"))
        cases += [
            Case(model, method, stages, cut, batch_size, arguments.device, arguments.quick)
            for method, stages, cut in dict.fromkeys(wanted)
        ]
    return cases


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown; `of bp` and `all` compare with `bp` of the same network."""
    yield "| network | method | stages | cuts | peak extra | of bp | resident | state | all |"
    yield "|---|---|---:|---|---:|---:|---:|---:|---:|"
    base: dict[str, Any] = {}
    for row in results:
        if row["method"] == "bp":
            base = row
        peak, resident, state = (row[f"{key}_bytes"] for key in ("peak", "resident", "state"))
        fields = [
            row["model"],
            row["method"],
            str(row["stages"]),
            row["cuts"] if row["method"] == "scpl" else "",
            f"{peak / MIB:.0f} MiB",
            f"{peak / base['peak_bytes']:.2f}",
            "-" if resident is None else f"{resident / MIB:.0f} MiB",
            f"{state / MIB:.0f} MiB",
            f"{(state + peak) / (base['state_bytes'] + base['peak_bytes']):.2f}",
        ]
        yield f"| {' | '.join(fields)} |"


def stage_table(row: dict[str, Any]) -> Iterator[str]:
    """Where the peak of one pipeline sits."""
    yield f"{row['model']}, {row['stages']} stages ({row['cuts']}): peak of each stage, MiB"
    for index, stage in enumerate(row["per_stage"]):
        forward, learn = stage["forward_bytes"] / MIB, stage["learn_bytes"] / MIB
        yield f"  stage {index}: forward {forward:.0f}, learn {learn:.0f}  ({stage['layers']})"


def environment() -> dict[str, Any]:
    """Describe hardware and versions; torch comes late, since measuring does not need it."""
    import torch

    from scpl.app.environment import describe_environment

    return describe_environment(torch.device("cpu"), threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", choices=["transformer", "resnet18", "vgg8", "all"], default="all"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch-size", type=int, help="default 256 (16 with --quick)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="narrow networks, small batch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Case(**json.loads(arguments.child)))))
        return
    results = []
    for case in cases_of(arguments):
        print(f"measuring {case.model} {case.method} {case.stages}", file=sys.stderr)
        results.append(run_child(case))
    if arguments.json:
        print(json.dumps({"results": results, "environment": environment()}))
        return
    print("\n".join(table(results)))
    for row in results:
        if row["method"] == "scpl":
            print("\n".join(["", *stage_table(row)]))


if __name__ == "__main__":
    main()
