"""How files from outside are read: nothing in them decides how much time or memory they take.

A file may come from someone else, or be damaged. What is too large, nested too deeply, or holds a
number nobody can mean, is a ``ValueError`` like any other fault of its text; who reads the file
knows its name and what to do about it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "LARGEST_TEXT",
    "available_memory",
    "machine_memory",
    "most_unpacked",
    "parse_json",
    "parse_toml",
    "read_bytes",
    "read_text",
    "shown",
]

LARGEST_TEXT = 1 << 30
"""Bytes of a text that is read as a whole, such as the timeline of a long run."""
LARGEST_TOML = 1 << 20
"""Characters of a recipe; ours have two thousand."""
DEEPEST = 64
"""Levels of lists and objects. Python's own limit is reached by whoever walks through them."""
LONGEST_NUMBER = 300
"""Digits of a whole number: any of these is a finite float, too."""
_LONGEST_KEY = 16  # parts; tomllib's time for a dotted key grows with their square

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-]){_PART}(?:[ \t]*\.[ \t]*{_PART}){{{_LONGEST_KEY}}}")
_LONG_NUMBER = 10**LONGEST_NUMBER
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")

_UNPACKED, _RATIO = 64 << 20, 100


def read_bytes(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """Read a whole file.

    Raises:
        ValueError: it holds more than ``most`` bytes.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        # A file that is no ordinary one may not say how large it is.
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    return content


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """Read a whole UTF-8 text, its lines ended by a newline; otherwise as `read_bytes`."""
    text = read_bytes(path, most).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def parse_json(text: str | bytes, repaired: Callable[[], object] = lambda: None) -> Any:
    """Read JSON.

    Half of a character that takes two escapes (a lone surrogate, such as a text leaves that was cut
    off in the middle) cannot be written anywhere: U+FFFD takes its place.

    Args:
        text: What is read.
        repaired: Called if that was done.

    Raises:
        ValueError: it is none, nested deeper than ``DEEPEST``, or holds a whole number of more than
            ``LONGEST_NUMBER`` digits. NaN and infinite numbers are read.
    """
    try:
        values = _bounded(json.loads(text))
    except RecursionError:
        raise _too_deep() from None
    if isinstance(text, str) and not _ESCAPED.search(text):
        return values
    whole = _whole(values)
    if whole != values:
        repaired()
    return whole


def _whole(value: Any) -> Any:
    """Replace lone surrogates in all texts of a JSON value."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(each) for key, each in value.items()}
    return value


def shown(name: str | Path) -> str:
    """Return the name of a file as text that can be written, whatever bytes it is made of."""
    try:
        content = os.fsencode(name)
    except UnicodeEncodeError:  # no name that this machine could give
        content = str(name).encode("utf-8", "backslashreplace")
    return content.decode("utf-8", "backslashreplace")


def parse_toml(text: str) -> dict[str, Any]:
    """Read TOML.

    Raises:
        ValueError: it is none, holds more than ``LARGEST_TOML`` characters or a key of more than 16
            parts; otherwise as `parse_json`.
    """
    if len(text) > LARGEST_TOML:
        raise ValueError(f"it holds more than {LARGEST_TOML:,} characters")
    if found := _LONG_KEY.search(text):
        raise ValueError(f"{found[0][:30]!r} begins a name of more than {_LONGEST_KEY} parts")
    try:
        values: dict[str, Any] = _bounded(tomllib.loads(text))
    except RecursionError:
        raise _too_deep() from None
    return values


def _bounded(value: Any) -> Any:
    """Check depth and whole numbers, level by level."""
    level = [value]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is dict:
                inside += each.values()
            elif kind is list:
                inside += each
            elif kind is int and not -_LONG_NUMBER < each < _LONG_NUMBER:
                raise ValueError(f"it holds a number of more than {LONGEST_NUMBER} digits")
        if not inside:
            return value
        level = inside
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {DEEPEST} levels")


def most_unpacked(size: int) -> int:
    """Say to how many bytes a compressed file of so many bytes may unpack.

    Real data sets shrink to a tenth at best; formats that allow a thousandth or a millionth are
    how a small file fills the memory.
    """
    return max(_UNPACKED, _RATIO * size)


def machine_memory() -> int:
    """Memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Memory that this process may still take, in bytes: as Linux says it, else all there is."""
    bounds = [machine_memory()]
    with suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        bounds += [int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):  # of a container
        bounds.append(int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return min(bounds)
