"""The loop keeps the device busy: nothing waits for it, and little memory is needed at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scpl
from checks.base import Setup, check, require
from checks.subjects import METHOD_NAMES, adam, larger, make_pipeline, task_named

WARM_UP, STEPS = 5, 20  # fewer than the losses that are looked at together


@check(
    "sync",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method in METHOD_NAMES
        for name in ("small-cnn", "transformer")
        if method != "bp-wide"  # the same as bp
    }
    | {
        f"scpl-{name}": {"method": "scpl", "name": name}
        for name in ("vgg8", "resnet18", "mlp", "lstm")
    }
    | {
        f"{method}-{name}-on-the-gpu": {"method": method, "name": name, "on_device": True}
        for method in ("scpl", "bp")
        for name in ("small-cnn", "transformer")
    }
    | {"scpl-large-texts": {"method": "scpl", "name": "transformer", "times": 8}}
    | {"scpl-send-bf16": {"method": "scpl", "name": "transformer", "send": True}},
    needs_cuda=True,
)
def syncs(
    setup: Setup,
    method: str,
    name: str,
    *,
    on_device: bool = False,
    send: bool = False,
    times: int = 1,
) -> str:
    """No operation of a training step in bf16 waits for the device."""
    task = larger(task_named(name, setup, dropout=0.1), times)
    narrow = torch.bfloat16
    pipeline = make_pipeline(
        task, method, setup.device, optimizer=adam,
        precision=scpl.Precision(narrow, send_as=narrow if send else None),
    )  # fmt: skip
    batches = task.batches * -(-(WARM_UP + STEPS) // len(task.batches))
    if on_device:
        batches = [(x.to(setup.device), target.to(setup.device)) for x, target in batches]
    try:
        for report in pipeline.steps(batches[: WARM_UP + STEPS]):
            if report.step == WARM_UP:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            elif report.step == WARM_UP + STEPS:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{STEPS} steps, batches {'on the GPU' if on_device else 'on the CPU'}"


@check("pinned", {name: {"name": name} for name in ("small-cnn", "transformer")}, needs_cuda=True)
def pinned(setup: Setup, name: str) -> str:
    """Batches go from the CPU to the device out of pinned memory; others make the host wait."""
    task = task_named(name, setup)
    pipeline = make_pipeline(task, "scpl", setup.device)
    pipeline.train(task.batches)
    with Copies() as copies:
        pipeline.train(task.batches)
    require(copies.count > 0, "there must be copies to the device")
    require(not copies.pageable, f"not pinned: {', '.join(copies.pageable[:4])}")
    return f"{copies.count} copies to the device, all pinned"


class Copies(TorchDispatchMode):
    """Watches what is copied from the CPU to the device.

    Attributes:
        count: How many tensors were copied.
        pageable: Shapes of those that were not pinned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.pageable = 0, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0], result
        elif func is torch.ops.aten.copy_.default:
            target, source = args[:2]
        else:
            return result
        if isinstance(source, Tensor) and source.device.type == "cpu" and target.is_cuda:
            self.count += 1
            if not source.is_pinned():
                self.pageable.append(str(list(source.shape)))
        return result


@check(
    "memory",
    {name: {"name": name} for name in ("transformer", "resnet18", "vgg8")},
    alone=True,
    limit=120.0,
)
def memory(setup: Setup, name: str) -> str:
    """The peak memory of a step of scpl in 8 stages is below that of bp."""
    bench = memory_benchmark()

    def peak(method: str, stages: int) -> int:
        by_hand = (name, stages) in bench.MEMORY_CUTS
        cuts, rows = "memory" if by_hand else "even", 16 if setup.tiny else 256
        case = bench.Case(name, method, stages, cuts, rows, setup.device, setup.tiny)
        with one_thread():
            found: int = bench.measure(case)["peak_bytes"]
        return found

    whole = peak("bp", 1)
    shares = {stages: peak("scpl", stages) / whole for stages in (4, 8)}
    text = f"bp {whole / bench.MIB:.0f} MiB beside its state; scpl " + ", ".join(
        f"in {stages} stages {share:.2f} of it" for stages, share in shares.items()
    )
    require(shares[8] <= 1.0, text)
    return text


@contextmanager
def one_thread() -> Iterator[None]:
    """Put the number of threads back, which the benchmark sets."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache
def memory_benchmark() -> ModuleType:
    """The benchmark of memory, as a module."""
    file = Path(__file__).parents[2] / "memory" / "main.py"
    spec = spec_from_file_location("memory_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["memory_benchmark"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
