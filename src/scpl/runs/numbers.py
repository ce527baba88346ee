"""Numbers in files of a run folder: whatever stands there becomes a float."""

from __future__ import annotations

import math

__all__ = ["as_number", "as_numbers"]

_IMMENSE = 1e100
"""No measurement comes near it, and a picture has no axis for it: as good as infinite."""


def as_number(value: object) -> float:
    """Turn a JSON value into a float; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if abs(number) < _IMMENSE else math.copysign(math.inf, number)


def as_numbers(value: object) -> list[float]:
    """Turn a JSON list, or one number, into floats; nothing for null."""
    if value is None:
        return []
    return [as_number(v) for v in (value if isinstance(value, list | tuple) else [value])]
