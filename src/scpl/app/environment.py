"""What a run runs on: its device and threads, and what someone needs to repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import sys
from contextlib import suppress
from typing import Any

import torch

from scpl.engine.ranks import local_cuda
from scpl.errors import InputError

__all__ = [
    "choose_device",
    "describe_environment",
    "free_memory",
    "peak_memory",
    "set_threads",
    "share_of_cores",
]

PACKAGES = ("scpl", "torch", "numpy", "kornia", "pillow", "pyarrow", "matplotlib")


def choose_device(name: str) -> torch.device:
    """Turn ``--device`` into a device.

    Raises:
        InputError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        shared = name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.device_count() > 0
        device = local_cuda() if shared else torch.device(name)
        torch.zeros(1, device=device).item()  # which a device without memory cannot say
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            "--device must name a device of this machine",
            f"Got {name!r}: {reason}",
            "Use auto or cpu",
        ) from error
    return device


def set_threads(threads: int | None, processes: int) -> int:
    """Give this process its share of the cores: two pools on the same cores slow each other."""
    chosen = threads or share_of_cores(processes)
    torch.set_num_threads(chosen)
    return chosen


def share_of_cores(processes: int) -> int:
    """Cores for each of several processes of this machine, at least one."""
    limited = hasattr(os, "sched_getaffinity")  # to some of the cores
    available = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    return max(1, available // processes)


def describe_environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Collect what someone needs to repeat a run."""
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": str(device),
    }
    if device.type == "cuda":
        hardware["accelerator"] = torch.cuda.get_device_name(device)
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "hardware": hardware,
        "system": platform.platform(),
        "command": shlex.join(["scpl", *sys.argv[1:]]),
    }


def free_memory(device: torch.device) -> int | None:
    """Memory of an accelerator that no process uses, in bytes; None where the CPU's is used."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
