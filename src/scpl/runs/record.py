"""Everything a run folder says about one run, as numbers.

A run may still be going on, so everything but a first trace of results is optional.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scpl.errors import CheckpointError
from scpl.runs.columns import ACCURACY, EPOCH, TRAIN, VALID, stage_columns
from scpl.runs.folder import RunFolder, damaged

__all__ = ["Event", "LoggedStep", "RunRecord", "as_number", "as_numbers"]


@dataclass(frozen=True)
class LoggedStep:
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
    steps: tuple[LoggedStep, ...]
    timeline: tuple[Event, ...]

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run folder.

        Raises:
            CheckpointError: The folder is not a run folder, or one of its files is damaged.
        """
        folder = RunFolder(Path(path))
        if not (folder.summary.is_file() or folder.metrics.is_file()):
            what = "has neither" if folder.path.is_dir() else "is not a folder"
            raise CheckpointError(
                f"A run folder holds {folder.summary.name} or {folder.metrics.name}",
                f"{str(folder.path)!r} {what}",
                "Give the folder that `scpl train` wrote",
            )
        return cls(
            folder=folder.path,
            summary=folder.read_json(folder.summary, optional=True),
            config=folder.read_text(folder.config),
            environment=folder.read_json(folder.environment, optional=True),
            epochs=_epochs(folder),
            steps=_steps(folder),
            timeline=_timeline(folder),
        )

    @property
    def finished(self) -> bool:
        """Whether the run got as far as writing its summary."""
        return bool(self.summary)

    @property
    def num_stages(self) -> int:
        """Number of stages, from whichever file tells."""
        counts = [len(row.losses) for row in self.steps]
        counts += [max(by_stage) + 1 for by_stage in self.stage_columns(TRAIN).values()]
        counts += [stage + 1 for stage in self.accuracy_columns()]
        counts += [len(self.numbers("wait_share"))]
        stated = self.number("stages")
        return max(1, *counts, int(stated) if math.isfinite(stated) else 0)

    @property
    def command(self) -> str:
        """The command line that started the run, or nothing if it was not recorded."""
        command = self.environment.get("command", "")
        if isinstance(command, list | tuple):
            return shlex.join(str(word) for word in command)
        return str(command or "")

    def number(self, key: str) -> float:
        """Give a number of the summary; NaN where it is missing."""
        return as_number(self.summary.get(key))

    def numbers(self, key: str) -> list[float]:
        """Give the numbers of a list in the summary; none where it is missing."""
        return as_numbers(self.summary.get(key))

    def column(self, name: str) -> list[float]:
        """Give one column of the metrics, NaN where a row has no value."""
        return [row.get(name, math.nan) for row in self.epochs]

    def has(self, name: str) -> bool:
        """Whether a column of the metrics holds at least one finite number."""
        return any(map(math.isfinite, self.column(name)))

    def stage_columns(self, group: str) -> dict[str, dict[int, str]]:
        """Find the columns of a group that hold a number, by quantity and stage."""
        names = self.epochs[0] if self.epochs else ()
        return stage_columns(filter(self.has, names), group)

    def accuracy_columns(self) -> dict[int, str]:
        """Find the columns of the validation accuracy of single stages, by stage."""
        return dict(sorted(self.stage_columns(VALID).get(ACCURACY, {}).items()))


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
    return [as_number(v) for v in (value if isinstance(value, list | tuple) else [value])]


def _epochs(folder: RunFolder) -> tuple[Mapping[str, float], ...]:
    by_epoch: dict[float, Mapping[str, float]] = {}
    for line, cells in folder.metrics_lines():
        try:
            row = {k: float(v) if v.strip() else math.nan for k, v in cells.items()}
        except ValueError as error:
            raise damaged(folder.metrics, "numbers", f"{error}, in line {line}") from error
        by_epoch[row[EPOCH]] = row  # a resumed run repeats an epoch; the later row counts
    return tuple(by_epoch.values())


def _steps(folder: RunFolder) -> tuple[LoggedStep, ...]:
    by_step: dict[int, LoggedStep] = {}
    for line, content in folder.step_lines():
        try:
            losses = tuple(
                {str(term): as_number(value) for term, value in (terms or {}).items()}
                for terms in content["losses"]
            )
            seconds = as_number(content.get("seconds"))
            row = LoggedStep(int(content["step"]), int(content.get("epoch") or 0), seconds, losses)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in line {line}"
            rule = "an object with step and losses per line"
            raise damaged(folder.steps, rule, got) from error
        by_step[row.step] = row
    return tuple(by_step[step] for step in sorted(by_step))


def _timeline(folder: RunFolder) -> tuple[Event, ...]:
    content = folder.read_value(folder.timeline)
    if not isinstance(content, list | None):
        raise damaged(folder.timeline, "a list of events", f"a {type(content).__name__}")
    events = []
    for index, item in enumerate(content or ()):
        try:
            place = (int(item["rank"]), int(item["stage"]), int(item["step"]))
            event = Event(*place, str(item["activity"]), float(item["begin"]), float(item["end"]))
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in event {index}"
            rule = "events with rank, stage, step, activity, begin, end"
            raise damaged(folder.timeline, rule, got) from error
        if math.isfinite(event.begin) and event.begin <= event.end < math.inf:
            events.append(event)
    return tuple(events)
