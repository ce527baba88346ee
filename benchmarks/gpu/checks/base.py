"""What every check is made of: its place in the registry, and how two things are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["CHECKS", "Check", "Differs", "Setup", "Skipped", "check", "distance", "require"]


class Skipped(Exception):
    """A check cannot be made here; says why."""


class Differs(AssertionError):
    """What must be equal, near or small is not; says by how much."""


@dataclass(frozen=True)
class Setup:
    """Where a check is made, and how large.

    Attributes:
        device: "cuda" or "cpu".
        tiny: Networks and data as small as can be.
        folder: An empty folder of the check's own.
        tolerance: The largest distance that the check accepts; None: equal bit for bit.
        limit: Seconds after which the check is given up; what it starts must end before.
    """

    device: str
    tiny: bool
    folder: Path
    tolerance: float | None = None
    limit: float = 60.0

    def near(self, what: str, found: float) -> str:
        """Say how far two things are apart.

        Raises:
            Differs: if that is more than the tolerance.
        """
        text = f"{what} {found:.1e} apart (allowed {self.tolerance:.0e})"
        require(self.tolerance is not None and found <= self.tolerance, text)
        return text


Function: TypeAlias = Callable[..., str]


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: ``theme`` or ``theme/case``.
        states: What it proves, in one line.
        function: Makes it; returns what was compared, with numbers.
        arguments: What the function gets besides the setup.
        tolerance: The largest distance that it accepts; None: equal bit for bit, or no distance.
        needs_cuda: Whether there is nothing to see on a CPU.
        alone: Whether nothing else may run beside it, because it measures.
        limit: Seconds after which it is given up.
    """

    name: str
    states: str
    function: Function
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    needs_cuda: bool = False
    alone: bool = False
    limit: float = 60.0

    def make(self, device: str, folder: Path, *, tiny: bool) -> str:
        """Make the check; returns what was compared, with numbers.

        Raises:
            Skipped: if it cannot be made here.
            Exception: any other one, if it failed.
        """
        if self.needs_cuda and device != "cuda":
            raise Skipped("there is nothing to see without CUDA")
        setup = Setup(device, tiny, folder, self.tolerance, self.limit)
        return self.function(setup, **self.arguments)


CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order of the table."""


def check(
    theme: str, cases: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> Callable[[Function], Function]:
    """Enter a function into the registry; the first line of its docstring says what it proves.

    Args:
        theme: Its name; with cases the first half of their names.
        cases: The arguments of the function for each case; default: it takes none.
        settings: Further attributes of `Check`.
    """

    def enter(function: Function) -> Function:
        states = (function.__doc__ or "").strip().splitlines()[0]
        for case, arguments in ({"": {}} if cases is None else cases).items():
            name = f"{theme}/{case}" if case else theme
            CHECKS[name] = Check(name, states, function, arguments, **settings)
        return function

    return enter


def require(condition: bool, text: str) -> None:
    """Go on only if a condition holds.

    Raises:
        Differs: with this text, if not.
    """
    if not condition:
        raise Differs(text)


def distance(found: Any, expected: Any) -> float:
    """How far two trees are apart.

    Returns:
        The largest difference of two tensors, or of two curves, as a share of the largest number
        of the expected one; a sequence of numbers is a curve. Infinite where forms differ, or
        anything else than tensors and curves.
    """
    if isinstance(expected, Mapping):
        same = isinstance(found, Mapping) and found.keys() == expected.keys()
        pairs = [(found[key], expected[key]) for key in expected] if same else None
    elif isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.shape == expected.shape
        return _apart(found, expected) if same else math.inf
    elif isinstance(expected, Sequence) and all(isinstance(x, (int, float)) for x in expected):
        same = isinstance(found, Sequence) and len(found) == len(expected)
        return _apart(torch.tensor(found), torch.tensor(expected)) if same else math.inf
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        same = isinstance(found, Sequence) and len(found) == len(expected)
        pairs = list(zip(found, expected, strict=True)) if same else None
    else:
        return 0.0 if found == expected else math.inf
    return math.inf if pairs is None else max((distance(*pair) for pair in pairs), default=0.0)


def _apart(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if torch.equal(found, expected):  # infinite entries, too
        return 0.0
    apart = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
    return apart if math.isfinite(apart) else math.inf
