"""What a setting is: a field of a configuration, which values it takes, and how a file gives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args, get_origin

from scpl.errors import InputError
from scpl.outside import LARGEST_TOML, parse_toml, read_text

__all__ = [
    "BATCH", "LAYERS", "MOST_OPTION", "NOT_NEGATIVE", "PASSES", "PIXELS", "POSITIVE", "PROCESSES",
    "PROPER_SHARE", "SEED", "SHARE", "THREADS", "TOKENS", "TWO_OR_MORE", "WEEK", "WIDTH", "WORDS",
    "Decides", "Range", "Samples", "converted", "read_toml", "setting", "up_to",
]  # fmt: skip

T = TypeVar("T")
Samples: TypeAlias = Literal["images", "texts"]
Decides: TypeAlias = Literal["numbers", "speed", "nothing"]


class Range(NamedTuple):
    """Which numbers a setting takes: what is required, as it follows the name, and a test of it."""

    rule: str
    holds: Callable[[float], bool]


POSITIVE = Range("must be more than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("must not be negative", lambda value: 0 <= value < math.inf)
SHARE = Range("must be a share, from 0 to below 1", lambda value: 0 <= value < 1)
PROPER_SHARE = Range("must be a share, above 0 and below 1", lambda value: 0 < value < 1)
SEED = Range("must lie in 0 .. 2**63 - 1", lambda value: 0 <= value < 2**63)
TWO_OR_MORE = Range(
    "must lie in 2 .. 1024: one mini-batch is worked on while the next travels",
    lambda value: 2 <= value <= 1024,
)


def up_to(most: int) -> Range:
    """Numbers of which the machine makes as many as the user, or a file, says: never too many.

    The bounds lie far above what anyone needs, and below what ends in an allocator's or the
    system's own words, or does not end.
    """
    return Range(f"must be more than 0 and at most {most:,}", lambda value: 0 < value <= most)


THREADS, PROCESSES, LAYERS = up_to(1024), up_to(1024), up_to(1024)
WIDTH, PIXELS, BATCH = up_to(1 << 16), up_to(1 << 12), up_to(1 << 20)
TOKENS, WORDS, PASSES = up_to(1 << 20), up_to(1 << 24), up_to(10**6)
WEEK = up_to(7 * 24 * 3600)
MOST_OPTION = 1 << 20  # of what methods count: features, layers, samples


def setting(
    default: T,
    takes: Range | None = None,
    *,
    samples: Samples | None = None,
    model: str | None = None,
    ours: bool = False,
    decides: Decides = "numbers",
    together: bool = False,
) -> T:
    """Say of a field what else is known of it.

    Args:
        default: Its default.
        takes: Which numbers; None, where that is a value, is always fine.
        samples: Which data it is for; None: any.
        model: Which network it is for; None: any.
        ours: Whether it is only for networks that come with scpl, of these samples.
        decides: What depends on it: the numbers of a run on a CPU, so that a resumed run must keep
            it; else its speed, so that all runs of one comparison must have it; else nothing.
        together: Whether it is for several processes.
    """
    about: dict[str, Any] = {"takes": takes, "samples": samples, "model": model, "ours": ours}
    return field(default=default, metadata={**about, "decides": decides, "together": together})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: if it is missing, unreadable or no TOML.
    """
    try:
        return parse_toml(read_text(path, LARGEST_TOML))
    except FileNotFoundError as error:
        raise InputError(
            "A recipe must be an existing TOML file", f"Got {path}", "See `scpl recipes ls`"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError("A recipe must be readable TOML", f"{path}: {error}") from error


def converted(value: Any, hint: Any, what: str) -> Any:
    """Check a recipe's value against the type of its field; ``what`` names it in messages."""
    options, kind = get_args(hint), get_origin(hint) or hint
    if type(None) in options:
        return converted(value, next(o for o in options if o is not type(None)), what)
    if kind is Literal:
        if value in options and not isinstance(value, bool):
            return value
        raise InputError(f"{what} must be one of {', '.join(map(str, options))}", f"Got {value!r}")
    if kind is tuple:
        if get_origin(options[0]) is Literal and isinstance(value, (list, tuple)):
            return tuple(converted(each, options[0], what) for each in value)
        accepted = (float, int) if options[0] is float else options[:1]
        if isinstance(value, (list, tuple)) and all(type(each) in accepted for each in value):
            return tuple(map(options[0], value))
        raise InputError(f"{what} must be a list of {options[0].__name__}", f"Got {value!r}")
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(value, bool) == (kind is bool):  # to Python a bool is a number
        if kind is float and isinstance(value, int):
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind):
            return value
    raise InputError(f"{what} must be of type {getattr(hint, '__name__', hint)}", f"Got {value!r}")
