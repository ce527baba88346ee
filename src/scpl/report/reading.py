"""Read a run folder back: summary, configuration, environment, metrics, steps, timeline.

A run may still be going on or may have been killed, so everything but a first trace of results is
optional and a half-written last line is left out. A file that is damaged anywhere else is an error
that names the file and the line: a report must not show half of a result as the whole.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scpl.errors import CheckpointError
from scpl.report.formats import DASH

__all__ = ["Event", "RunRecord", "StepRow", "as_number", "as_numbers"]

_COLUMN = r"_(?P<term>.+)_stage(?P<stage>\d+)"
_READOUT_COLUMN = re.compile(r"valid_accuracy_stage(?P<stage>\d+)")


@dataclass(frozen=True)
class StepRow:
    """One logged training step; ``losses`` holds one mapping of term to value per stage."""

    step: int
    epoch: int
    seconds: float
    losses: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Event:
    """What one stage did between two moments (seconds since training began)."""

    rank: int
    stage: int
    step: int
    activity: str
    begin: float
    end: float


@dataclass(frozen=True)
class RunRecord:
    """Everything a run folder says about one run.

    Args:
        folder: Where it was read from.
        summary: ``summary.json``; empty while the run is not finished.
        config: The text of ``config.toml``, exactly as written.
        environment: ``env.json``: versions, hardware, command.
        epochs: Rows of ``metrics.csv``; an empty field is NaN.
        steps: Rows of ``steps.jsonl``.
        timeline: Events of ``timeline.json``.
    """

    folder: Path
    summary: Mapping[str, Any]
    config: str
    environment: Mapping[str, Any]
    epochs: tuple[Mapping[str, float], ...]
    steps: tuple[StepRow, ...]
    timeline: tuple[Event, ...]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read a run folder.

        Raises:
            CheckpointError: The folder is not a run folder, or one of its files is damaged.
        """
        folder = Path(folder)
        if not any((folder / name).is_file() for name in ("summary.json", "metrics.csv")):
            raise CheckpointError(
                "A run folder holds summary.json or metrics.csv",
                f"{str(folder)!r} " + ("has neither" if folder.is_dir() else "is not a folder"),
                "Give the folder that `scpl train --out` wrote",
            )
        return cls(
            folder=folder,
            summary=_read_object(folder / "summary.json"),
            config=_read_text(folder / "config.toml"),
            environment=_read_object(folder / "env.json"),
            epochs=_read_metrics(folder / "metrics.csv"),
            steps=_read_steps(folder / "steps.jsonl"),
            timeline=_read_timeline(folder / "timeline.json"),
        )

    @property
    def finished(self) -> bool:
        """Whether the run got as far as writing its summary."""
        return bool(self.summary)

    @property
    def num_stages(self) -> int:
        """Number of stages, from whichever file tells."""
        counts = [len(row.losses) for row in self.steps]
        counts += [stage + 1 for stages in self.train_columns().values() for stage in stages]
        counts += [stage + 1 for stage in self.readout_columns()]
        counts += [len(as_numbers(self.summary.get("wait_share")))]
        stated = as_number(self.summary.get("stages"))
        return max(1, *counts, int(stated) if math.isfinite(stated) else 0)

    @property
    def command(self) -> str:
        """The command line that started the run, or nothing if it was not recorded."""
        command = self.environment.get("command", "")
        if isinstance(command, list | tuple):
            return shlex.join(str(word) for word in command)
        return str(command or "")

    def text(self, key: str) -> str:
        """Give a value of the summary as text; a dash where it is missing."""
        value = self.summary.get(key)
        return DASH if value is None else str(value)

    def number(self, key: str) -> float:
        """Give a number of the summary; NaN where it is missing."""
        return as_number(self.summary.get(key))

    def column(self, name: str) -> list[float]:
        """Give one column of the metrics, NaN where a row has no value."""
        return [row.get(name, math.nan) for row in self.epochs]

    def has(self, name: str) -> bool:
        """Whether a column of the metrics holds at least one finite number."""
        return any(map(math.isfinite, self.column(name)))

    def train_columns(self, kind: str = "train") -> dict[str, dict[int, str]]:
        """Find the columns ``train_<term>_stage<k>``, or ``observed_...``, by term and stage."""
        return _columns(self.epochs, re.compile(kind + _COLUMN))

    def readout_columns(self) -> dict[int, str]:
        """Find the columns ``valid_accuracy_stage<k>`` that hold a value, as stage to name."""
        found = {
            int(match["stage"]): name
            for name in (self.epochs[0] if self.epochs else ())
            if (match := _READOUT_COLUMN.fullmatch(name)) and self.has(name)
        }
        return dict(sorted(found.items()))


def as_number(value: object) -> float:
    """Turn a JSON value into a float; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def as_numbers(value: object) -> list[float]:
    """Turn a JSON list, or one number, into floats; nothing for null."""
    if value is None:
        return []
    return (
        [as_number(item) for item in value]
        if isinstance(value, list | tuple)
        else [as_number(value)]
    )


def _columns(
    rows: tuple[Mapping[str, float], ...], pattern: re.Pattern[str]
) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name in rows[0] if rows else ():
        match = pattern.fullmatch(name)
        if match and any(math.isfinite(row[name]) for row in rows):
            found.setdefault(match["term"], {})[int(match["stage"])] = name
    return found


def _read_text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "readable UTF-8 text", str(error)) from error


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise _damaged(path, "valid JSON", str(error)) from error


def _read_object(path: Path) -> Mapping[str, Any]:
    content = _read_json(path)
    if not isinstance(content, dict | None):
        raise _damaged(path, "a JSON object", f"a {type(content).__name__}")
    return content or {}


def _read_metrics(path: Path) -> tuple[Mapping[str, float], ...]:
    lines = _read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a number cut short still reads as a number: 0.9 instead of 0.91
    rows = csv.reader(lines)
    header = next(rows, [])
    if header and "epoch" not in header:
        raise _damaged(
            path, "a first line that names the columns, among them epoch", f"{header[:6]}"
        )
    by_epoch: dict[float, Mapping[str, float]] = {}
    for fields in rows:
        if not fields:
            continue
        if len(fields) != len(header):
            got = f"{len(fields)} fields, not {len(header)}"
            raise _damaged(path, "one field per column", f"{got}, in line {rows.line_num}")
        try:
            row = {
                k: float(v) if v.strip() else math.nan for k, v in zip(header, fields, strict=True)
            }
        except ValueError as error:
            raise _damaged(path, "numbers", f"{error}, in line {rows.line_num}") from error
        by_epoch[row["epoch"]] = row  # a resumed run repeats an epoch; the later row counts
    return tuple(by_epoch.values())


def _read_steps(path: Path) -> tuple[StepRow, ...]:
    by_step: dict[int, StepRow] = {}
    for number, content in _json_lines(path):
        try:
            losses = tuple(
                {str(term): as_number(value) for term, value in (terms or {}).items()}
                for terms in content["losses"]
            )
            seconds = as_number(content.get("seconds"))
            row = StepRow(int(content["step"]), int(content.get("epoch") or 0), seconds, losses)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in line {number}"
            raise _damaged(path, "an object with step and losses per line", got) from error
        by_step[row.step] = row
    return tuple(by_step[step] for step in sorted(by_step))


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    lines = _read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise _damaged(
                path, "one JSON object per line", f"{error}, in line {number}"
            ) from error
        yield number, content


def _read_timeline(path: Path) -> tuple[Event, ...]:
    content = _read_json(path)
    if content is None:
        return ()
    if not isinstance(content, list):
        raise _damaged(path, "a list of events", f"a {type(content).__name__}")
    events = []
    for index, item in enumerate(content):
        try:
            place = (int(item["rank"]), int(item["stage"]), int(item["step"]))
            event = Event(*place, str(item["activity"]), float(item["begin"]), float(item["end"]))
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in event {index}"
            raise _damaged(
                path, "events with rank, stage, step, activity, begin, end", got
            ) from error
        if math.isfinite(event.begin) and event.begin <= event.end < math.inf:
            events.append(event)
    return tuple(events)


def _damaged(path: Path, rule: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} must hold {rule}",
        f"In {str(path.parent)!r}: {got}",
        "Restore the file, or remove it to report without it",
    )
