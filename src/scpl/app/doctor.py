"""`scpl doctor`: what is installed, what the machine offers, and what is wrong.

Every check stands alone: one that fails becomes a problem of its own. Whatever can hang or crash
(torch, its drivers, torchvision) runs in a process of its own with a time limit, and torch is
imported here only after that went well.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scpl import __version__
from scpl.app.commands import DoctorConfig

__all__ = ["doctor"]

TIME_LIMIT = 60.0  # seconds for one process; a cold import of torch takes up to 20
_TORCH_PAGE = "https://pytorch.org/get-started"
_GIB = 1 << 30
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PROBE_TORCH = """
import json, sys, torch
import torch.distributed as dist
count = torch.cuda.device_count()
usable = torch.cuda.is_available()
sys.stdout.write("\\n" + json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "hip": torch.version.hip,
    "threads": torch.get_num_threads(),
    "devices": [torch.cuda.get_device_name(i) for i in range(count)] if usable else [],
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


@dataclass
class _Report:
    """What was found so far; `torch` is what its probe said, None if it cannot be used."""

    config: DoctorConfig
    findings: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    torch: dict[str, Any] | None = None


def doctor(config: DoctorConfig) -> tuple[dict[str, Any], bool]:
    """Look at everything that a run needs.

    Returns:
        Findings, name to text, with a list ``problems`` at the end; and whether there are none.
    """
    report = _Report(config)
    for check in _CHECKS:
        try:
            check(report)
        except Exception as error:  # a diagnosis must come to its end on any machine
            name = check.__name__.strip("_").replace("_", " ")
            report.problems.append(
                f"The check of {name} failed: {type(error).__name__}: {error}. Please report this."
            )
    return {**report.findings, "problems": report.problems}, not report.problems


def _versions(report: _Report) -> None:
    report.findings["python"] = f"{platform.python_version()}, {sys.executable}"
    report.findings["scpl"] = __version__
    report.findings["system"] = platform.platform()


def _torch(report: _Report) -> None:
    failure, output = _run_python(_PROBE_TORCH)
    if failure:
        report.findings["torch"] = "unusable"
        report.problems.append(
            f"torch must be importable. {failure}. Install it again as {_TORCH_PAGE} says."
        )
        return
    found = report.torch = json.loads(output.splitlines()[-1])
    build = f"CUDA {found['cuda']}" if found["cuda"] else "ROCm" if found["hip"] else "CPU"
    report.findings["torch"] = f"{found['version']}, {build} build"
    report.findings["devices"] = ", ".join(["cpu", *found["devices"]])
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and not found["cuda"]:
        report.problems.append(
            f"This machine has an NVIDIA driver, but torch is a {build} build. To use the GPU, "
            f"install a CUDA build as {_TORCH_PAGE} says."
        )
    elif driver and not found["devices"]:
        report.problems.append(
            f"This machine has an NVIDIA driver, but torch built for CUDA {found['cuda']} finds no "
            "device. Compare `nvidia-smi` with that version, and look at CUDA_VISIBLE_DEVICES."
        )
    report.findings["backends"] = ", ".join(
        f"{name} {'available' if found[name] else 'not available'}" for name in ("gloo", "nccl")
    )
    if found["devices"]:
        direct = "nccl where each has a GPU to itself, else " if found["nccl"] else ""
        report.findings["links of processes on GPUs"] = f"{direct}gloo, through the host's memory"
    if not found["gloo"]:
        report.problems.append(
            "Several processes need the backend gloo, which this torch lacks: use --processes 1, "
            "or install an official build of torch."
        )
    if len(found["devices"]) > 1 and not found["nccl"]:
        report.problems.append(
            "GPUs are linked directly by the backend nccl, which this torch lacks: processes send "
            "through the host's memory, which is slower. Install an official build of torch."
        )


def _processor(report: _Report) -> None:
    # Those that this process may use: a container or a scheduler may have limited them.
    limited = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    threads = f", torch uses {report.torch['threads']} threads" if report.torch else ""
    report.findings["processor"] = f"{cores} cores{threads}"
    setting = os.environ.get("OMP_NUM_THREADS")
    report.findings["OMP_NUM_THREADS"] = setting or "not set"
    if setting and (not setting.isdecimal() or not 1 <= int(setting) <= cores):
        report.problems.append(
            f"OMP_NUM_THREADS is {setting!r}, but this process may use {cores} cores: "
            "unset OMP_NUM_THREADS; --threads sets the threads of a run."
        )


def _optional_packages(report: _Report) -> None:
    present, missing = [], []
    for package, extra in sorted(_extras().items()):
        if version := _version(package):
            present.append(f"{package} {version}")
        else:
            missing.append(f"{package} (pip install 'scpl[{extra}]')")
    report.findings["optional packages"] = ", ".join(present) or "none"
    report.findings["not installed"] = ", ".join(missing) or "none"


def _torchvision(report: _Report) -> None:
    version = _version("torchvision")
    if version is None:
        report.findings["torchvision"] = "not installed; scpl does not need it"
        return
    failure, _ = _run_python("import torchvision")
    report.findings["torchvision"] = f"{version}, {'unusable' if failure else 'usable'}"
    if not failure:
        return
    torch = report.torch["version"] if report.torch else "of this environment"
    if "torchvision::nms does not exist" in failure:
        cause = f"was built for another torch than the {torch} here (torchvision::nms is missing)"
    else:
        cause = f"cannot be imported. {failure}"
    report.problems.append(
        f"torchvision {version} {cause}. Other packages fail with it (timm, torchmetrics, "
        "transformers); scpl does not use it. Remove it with `pip uninstall torchvision`, or "
        f"install the two as a pair from one index, as {_TORCH_PAGE} says."
    )


def _data_sets(report: _Report) -> None:
    given, setting = report.config.data_dir, os.environ.get("SCPL_DATA")
    roots = [Path(root).expanduser() for root in (given, setting) if root]
    hint = "none; name one with --data-dir or SCPL_DATA"
    report.findings["data folders"] = ", ".join(map(str, roots)) or hint
    report.problems += [
        f"--data-dir and SCPL_DATA must name existing folders. There is no {root}."
        for root in roots
        if not root.is_dir()
    ]
    if report.torch is None:  # the readers need it
        return
    from scpl.data.images import IMAGE_SETS
    from scpl.data.images.load import locate  # where `scpl train` looks, without reading any image

    places = {
        name: [found[0] for root in roots if (found := locate(root, name))] for name in IMAGE_SETS
    }
    shown = [f"{name} in {folders[0]}" for name, folders in places.items() if folders]
    absent = [name for name, folders in places.items() if not folders]
    report.findings["data sets"] = ", ".join(["digits (comes with scpl)", *shown])
    report.findings["data sets not found"] = ", ".join(absent) or "none"


def _disk(report: _Report) -> None:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    report.findings["free disk"] = f"{_size(free)} in {here}"
    full, locked = free < _GIB, not os.access(here, os.W_OK)
    if full or locked:
        report.problems.append(
            f"Runs are written to {here / 'runs'}, where {_size(free)} are free"
            f"{' and nothing may be written' if locked else ''}: choose another folder with --out."
        )


def _shared_memory(report: _Report) -> None:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:  # not on Linux
        return
    report.findings["shared memory"] = _size(size)
    several = report.torch is not None and len(report.torch["devices"]) > 1
    if several and size < _GIB / 4:
        report.problems.append(
            f"nccl needs shared memory between several GPUs, and /dev/shm has {_size(size)}: "
            "start the container with --shm-size=1g."
        )


def _network(report: _Report) -> None:
    """Processes meet on a TCP port of this machine: try one."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            report.findings["localhost"] = "TCP works"
    except OSError as error:
        report.findings["localhost"] = "unusable"
        report.problems.append(
            f"Processes talk over TCP on 127.0.0.1, which fails here: {error}. Look at the "
            "firewall or the sandbox; --processes 1 works without."
        )


def _environment(report: _Report) -> None:
    names = [name for name in _TORCHRUN if name in os.environ]
    report.findings["torchrun variables"] = ", ".join(names) or "not set"
    if names and "TORCHELASTIC_RUN_ID" not in os.environ:
        report.problems.append(
            f"Variables of torchrun are set, though it did not start this: {', '.join(names)}. "
            f"Ranks would wait for others. Unless that is meant: unset {' '.join(names)}"
        )


_CHECKS: tuple[Callable[[_Report], None], ...] = (
    _versions, _torch, _processor, _optional_packages, _torchvision, _data_sets, _disk,
    _shared_memory, _network, _environment,
)  # fmt: skip


def _run_python(code: str) -> tuple[str, str]:
    """Run code in a Python of its own; returns why it failed, or nothing, and what it printed."""
    # Without the current folder: a file torch.py in it is not what `scpl` imports.
    code = f"import sys; sys.path = [p for p in sys.path if p]\n{code}"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = child.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        child.kill()
        # A process that hangs in a driver cannot be killed; do not wait for it for ever.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=2)
        return f"It did not come back within {TIME_LIMIT:.0f} seconds", ""
    if child.returncode == 0:
        return "", output
    last = errors.strip().rpartition("\n")[2].strip().rstrip(".")
    return last or f"It ended with status {child.returncode}", output


def _extras() -> dict[str, str]:
    """Optional packages and the extra that brings each, from the metadata of scpl itself."""
    try:
        wanted = importlib.metadata.requires("scpl") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    pattern = re.compile(r"([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)['\"]")
    matches = (pattern.match(line) for line in wanted)  # of two extras the last is as good
    return {match[1]: match[2] for match in matches if match and match[2] not in ("all", "dev")}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
