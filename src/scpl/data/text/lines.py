"""Lines of a text file, whatever its encoding; in constant memory.

A file that begins with a byte order mark is read as that says. Any other is UTF-8; a line in it
that is not valid UTF-8 is read as Windows-1252, what old spreadsheets write, and counted.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from scpl.data.text.faults import Faults
from scpl.errors import DataError

__all__ = ["LONGEST_LINE", "NOT_UTF8", "text_lines"]

LONGEST_LINE = 64 << 20  # bytes; longer ones are no rows, but files that are no tables
NOT_UTF8 = "lines that are not valid UTF-8 read as Windows-1252"

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's mark, so it is tried first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_lines(path: Path, faults: Faults) -> Iterator[str]:
    """Yield the lines of a file, with their ends.

    Raises:
        DataError: The file is missing or unreadable, holds a NUL byte, is damaged UTF-16 or -32,
            or a line is longer than ``LONGEST_LINE``.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None)
        yield from _utf8(path, faults) if encoding is None else _marked(path, encoding)
    except OSError as error:
        raise DataError("a file of texts must be readable", f"Got {path}: {error}") from error


def _utf8(path: Path, faults: Faults) -> Iterator[str]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            _check(raw, path, number)
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError:
                faults.add(NOT_UTF8, f"{path.name} line {number}")
                yield raw.decode("cp1252", "replace")


def _check(raw: bytes, path: Path, number: int) -> None:
    if b"\0" in raw:
        raise DataError(
            "a file of texts must not hold NUL bytes",
            f"Got one in {path}, line {number}",
            "It may be UTF-16 without a byte order mark, or no text: save it as UTF-8",
        )
    if len(raw) > LONGEST_LINE:
        raise DataError(
            f"a line of a file of texts must be at most {LONGEST_LINE >> 20} MB long",
            f"Got a longer one in {path}, line {number}",
        )


def _marked(path: Path, encoding: str) -> Iterator[str]:
    try:
        # Only \n ends a line here, as in UTF-8; the reader of rows knows what \r means.
        with path.open(encoding=encoding, newline="\n") as file:
            while line := file.readline(LONGEST_LINE + 1):
                _check(line.encode("utf-8", "replace"), path, 0)
                yield line
    except UnicodeError as error:
        raise DataError(
            f"a file that begins with the mark of {encoding.upper()} must be that",
            f"Got {path}: {error}",
            "Save it as UTF-8",
        ) from error
