"""On what a run ran: versions, hardware, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import sys
from typing import Any

import torch

__all__ = ["describe_environment", "peak_memory"]

PACKAGES = ("scpl", "torch", "numpy", "kornia", "pillow", "pyarrow", "matplotlib")


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


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
