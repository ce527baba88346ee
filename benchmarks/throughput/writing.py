"""How the benchmarks write what they found."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def shown(values: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Write a spread; nothing where nothing was measured."""
    if values is None:
        return ""
    middle, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"**{middle}** ({low} .. {high})"


def verdict(ratio: Mapping[str, Any]) -> str:
    """Whether a ratio meets its target, if it has one."""
    target = ratio["target"]
    return "" if target is None else "met" if ratio["median"] >= target else "missed"


def say(line: str) -> None:
    """Tell people how far it is, whatever stdout is for."""
    print(line, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Describe hardware and versions; imports torch late, which measuring does not need."""
    import torch

    from scpl.app.environment import describe_environment

    return describe_environment(torch.device("cpu"), threads=1)
