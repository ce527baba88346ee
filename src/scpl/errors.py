"""The few exceptions of the library.

Every message has three parts, in this order: what we require, what we got (names, numbers,
shapes), and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "ImageWarning",
    "InputError",
    "Interrupted",
    "LinkError",
    "NonFiniteError",
    "PartitionError",
    "RemoteError",
    "ScplError",
    "StageError",
    "unknown_name",
]


class ScplError(Exception):
    """Base of all errors raised on purpose.

    Args:
        rule: What is required.
        got: What was found instead, with names, numbers and shapes.
        fix: What the user can do about it.
    """

    def __init__(self, rule: str, got: str = "", fix: str = "") -> None:
        self.rule, self.got, self.fix = rule, got, fix
        super().__init__(" ".join(_sentence(part) for part in (rule, got, fix) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str], dict[str, object]]:
        return type(self), (self.rule, self.got, self.fix), vars(self)


class InputError(ScplError, ValueError):
    """An argument, flag or configuration key is not usable."""


class PartitionError(InputError):
    """The network cannot be cut as asked."""


class DataError(InputError):
    """A data set is missing, empty, corrupt or does not fit the network."""


class CheckpointError(InputError):
    """A checkpoint or run folder is missing, incomplete, damaged or of another network."""


class NonFiniteError(ScplError, ArithmeticError):
    """A loss became NaN or infinite; the message names stage and step."""


class ImageWarning(ScplError, UserWarning):
    """A decoder had doubts about images that it read; the message counts them."""


class StageError(ScplError, RuntimeError):
    """User code inside a stage failed; the original exception is the ``__cause__``."""


class LinkError(ScplError, ConnectionError):
    """The link to a neighbouring rank broke; rarely the first cause of a failure.

    Attributes:
        peer: The rank at the other end, if known.
    """

    peer: int | None = None


class RemoteError(ScplError, RuntimeError):
    """Another rank ended first; its cause is told there.

    Attributes:
        status: With which exit status this process is to follow it.
    """

    status: int = 1


class Interrupted(ScplError):
    """Training was asked to end early (Ctrl-C, SIGTERM, SIGHUP) and ended cleanly.

    Attributes:
        signal: Number of the signal that asked for it.
    """

    signal: int = 2


def unknown_name(what: str, got: str, known: Iterable[str], fix: str = "") -> InputError:
    """Build the error for an unknown name: lists the known ones, closest first.

    Args:
        what: The kind of thing that was named, e.g. ``"method"``.
        got: The name that is not known.
        known: All names that are.
        fix: Advice that replaces the default one.
    """
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    ordered = close + [name for name in names if name not in close]
    hint = f"Did you mean {close[0]!r}?" if close else ""
    return InputError(f"{what} must be one of: {', '.join(ordered)}", f"Got {got!r}", fix or hint)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!", ":", "\n")) else f"{text}."
