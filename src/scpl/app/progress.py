"""What a person sees while something long goes on: one live line on a terminal, else plain lines.

A plain line comes now and then; what is done before that says nothing.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["LIVE", "SECONDS_BETWEEN_LINES", "Count", "format_seconds"]

SECONDS_BETWEEN_LINES = 30.0
LIVE = "{bar:10} {desc}"  # what does not fit the terminal is cut off at the end


class Count:
    """How many of something are done, on stderr, while it is active.

    Args:
        noun: What is counted, in the plural.
        total: How many there will be, if that is known.
        out: Where results go: if that is a terminal, they are what a person sees, and no live line
            is drawn among them.
    """

    def __init__(self, noun: str, total: int | None, out: TextIO | None = None) -> None:
        self.done = 0
        self._noun, self._total = noun, total
        self._started = self._printed = time.perf_counter()
        self._live = sys.stderr.isatty() and not (out is not None and out.isatty())
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Count:
        if self._live:
            self._bar = tqdm(
                total=self._total,
                bar_format=LIVE if self._total else "{desc}",
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def add(self, number: int) -> None:
        """So many more are done."""
        self.done += number
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.set_description_str(self._line(now))
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self.say(self._line(now))
            self._printed = now

    def say(self, line: str) -> None:
        """Print a line above whatever is live; any thread may."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def summary(self) -> str:
        """All that was done, in words."""
        seconds = time.perf_counter() - self._started
        return f"{self.done:,} {self._noun} in {format_seconds(seconds)}"

    def _line(self, now: float) -> str:
        rate = self.done / max(now - self._started, 1e-9)
        speed = f"{rate:,.0f} {self._noun}/s"
        if not self._total:
            return f"{self.done:,} {self._noun}  {speed}"
        left = format_seconds(max(self._total - self.done, 0) / max(rate, 1e-9))
        share = 100 * min(self.done / self._total, 1)
        return f"{self.done:,}/{self._total:,} {self._noun}  {share:.0f} %  {speed}  {left} to go"


def format_seconds(seconds: float) -> str:
    """Write a duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
