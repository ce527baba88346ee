"""The run folder: its files, written without losing anything, and what they say as numbers.

A run may still be going on or may have been killed, so a half-written last line is left out. A file
that is damaged anywhere else is an error that names the file and the line: who reads half of a
result must not take it for the whole.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scpl.errors import CheckpointError, InputError
from scpl.files import as_utf8, is_draft, reason, sync_folder, write_whole
from scpl.outside import parse_json, read_text
from scpl.runs.columns import EPOCH, STEP, TRAIN, VALID, stage_columns, valid_column
from scpl.runs.lock import LOCK_FILE, RunLock
from scpl.runs.metrics import METRICS, Metric, metric_of
from scpl.runs.numbers import as_number, as_numbers
from scpl.runs.tested import Tested

__all__ = ["Event", "LoggedStep", "RunFolder", "RunRecord"]


MOST = 1024
"""Stages or processes of a run; a file that names more is damaged."""


class RunFolder:
    """Paths and files of one run.

    Args:
        path: The folder; it must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "model.safetensors"
        self.exits = path / "exits.safetensors"
        self.description = path / "model.json"
        self.summary = path / "summary.json"
        self.test = path / "test.json"
        self.test_table = path / "test.csv"
        self.metrics = path / "metrics.csv"
        self.steps = path / "steps.jsonl"
        self.timeline = path / "timeline.json"
        self.trace = path / "trace.json"
        self.log = path / "log.txt"
        self.environment = path / "env.json"
        self.logged = path / "logged.json"
        self._lock: RunLock | None = None

    @classmethod
    def create(cls, wanted: Path | None, default_name: str, *, force: bool) -> RunFolder:
        """Make a new run folder, and lock it: of several that start at once, one gets it.

        Args:
            wanted: Where; by default ``runs/<default_name>``, numbered if it exists.
            default_name: See above.
            force: Empty an existing run folder first.

        Raises:
            InputError: if `wanted` exists, or cannot be made.
            CheckpointError: if another run is writing into it.
        """
        folder = cls(wanted) if wanted else cls.reserve(Path("runs") / default_name)
        if folder._is_used():
            folder._check_overwrites(force)
        folder.ensure()
        lock = folder.lock()
        try:
            # Looked at again, now that nobody else can begin here. Where a disk has no locks, it is
            # the run that made the file of the lock.
            if folder._is_used() or not (lock.works or lock.is_new):
                folder._check_overwrites(force)
            folder._empty()
            with _writing(folder.path):
                sync_folder(folder.path.absolute().parent)
        except BaseException:
            folder.unlock()
            if lock.is_new and not lock.works:  # there the file itself is the lock
                (folder.path / LOCK_FILE).unlink(missing_ok=True)
            raise
        return folder

    def _is_used(self) -> bool:
        """Whether there is anything but what a run that never began has left: lock and drafts."""
        with _writing(self.path):
            if not self.path.is_dir():
                return self.path.exists()
            names = {entry.name for entry in self.path.iterdir()} - {LOCK_FILE}
            return not all(is_draft(name) for name in names)

    def _check_overwrites(self, force: bool) -> None:
        if not force:
            raise InputError(
                "A run folder must not exist yet",
                f"Got {self.path}",
                f"Choose another with `out`, continue it with `resume` {self.path}, or overwrite "
                "it with `force`",
            )
        if not self.config.is_file():
            raise InputError(
                "`force` overwrites run folders only",
                f"{self.path} is none: it holds no config.toml",
                "Choose another folder with `out`",
            )

    def _empty(self) -> None:
        """Remove all but the lock; what makes it a run folder goes last."""
        entries = [entry for entry in self.path.iterdir() if entry.name != LOCK_FILE]
        with _writing(self.path):
            for entry in sorted(entries, key=lambda entry: entry == self.config):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()

    def lock(self, rank: int = 0) -> RunLock:
        """Have no other run write here until `unlock` or the end of this process.

        Raises:
            CheckpointError: if another run is writing here, or this process may not.
        """
        with _writing(self.path):
            self._lock = RunLock(self.path, rank)
        return self._lock

    @property
    def last(self) -> RunFolder:
        """Where a run that keeps its best epoch leaves the last one, as a finished run."""
        return RunFolder(self.path / "last")

    @property
    def run(self) -> str | None:
        """The name of the run, which no other run has; None if its files do not say it."""
        name = self.read_json(self.environment, optional=True).get("run")
        return name if isinstance(name, str) else None

    @property
    def launchers(self) -> frozenset[str]:
        """Who has started the ranks of the run so far; nobody if its files do not say it."""
        names = self.read_json(self.environment, optional=True).get("launchers")
        return (
            frozenset(n for n in names if isinstance(n, str))
            if isinstance(names, list)
            else frozenset()
        )

    @property
    def is_locked(self) -> bool:
        """Whether other runs are kept out: not if the disk has no locks."""
        return self._lock is not None and self._lock.works

    def unlock(self) -> None:
        """Let others write here again."""
        if self._lock is not None:
            self._lock.release()

    def ensure(self) -> None:
        """Make the folder itself, if it is not there.

        Raises:
            InputError: if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            rule, fix = "A run folder must be writable", "Choose another with `out`"
            raise InputError(rule, f"{self.path}: {reason(error, self.path)}", fix) from error

    @classmethod
    def reserve(cls, path: Path) -> RunFolder:
        """Make a folder that nobody else has made: ``path``, numbered if it exists.

        Raises:
            InputError: if it cannot be made.
        """
        cls(path.parent).ensure()
        number, candidate = 1, path
        while True:
            try:
                candidate.mkdir()  # making it decides whose it is
                return cls(candidate)
            except FileExistsError:
                number += 1
                candidate = path.with_name(f"{path.name}-{number}")
            except OSError:
                cls(candidate).ensure()  # says what is wrong

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            CheckpointError: if it is none.
        """
        if not (path / "config.toml").is_file():
            raise CheckpointError(
                "A run folder must hold config.toml",
                f"Got {path}" + ("" if path.exists() else ", which does not exist"),
            )
        return cls(path)

    def read_about(self, files: Iterable[str] = ()) -> dict[str, str]:
        """Read the files that say what the run is, for machines with a disk of their own.

        Args:
            files: Names of others than those of every run.
        """
        others = (self.path / name for name in files)
        paths = (self.config, self.environment, self.description, *others)
        return {path.name: self.read_text(path) for path in paths if path.is_file()}

    def complete_about(self, files: Mapping[str, str]) -> None:
        """Write the files of `read_about` that are not here, so that this machine can resume."""
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (self.path / name).is_file():
                self.write_text(self.path / name, text)

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        self.write_bytes(path, as_utf8(text))

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        with _writing(path):
            write_whole(path, content, durable=True)

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(path, json.dumps(value, indent=2) + "\n")

    def read_bytes(self, name: str) -> bytes:
        """Read a file of the folder.

        Raises:
            CheckpointError: if it is missing.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                "A run folder must be complete", f"{self.path / name}: {error}", "Train it again"
            ) from error

    def read_text(self, path: Path) -> str:
        """Read a text file; nothing if it is missing.

        Raises:
            CheckpointError: if it is no text.
        """
        try:
            return read_text(path)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            raise _damaged(path, "readable UTF-8 text", str(error)) from error

    def read_value(self, path: Path) -> Any:
        """Read a JSON file; None if it is missing or empty.

        Raises:
            CheckpointError: if it is damaged.
        """
        text = self.read_text(path)
        try:
            return parse_json(text) if text.strip() else None
        except ValueError as error:
            raise _damaged(path, "valid JSON", str(error)) from error

    def read_json(self, path: Path, *, optional: bool = False) -> dict[str, Any]:
        """Read a JSON object.

        Args:
            path: Which file of the folder.
            optional: Return an empty object if it is missing or empty.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        value = self.read_value(path)
        if value is None and optional:
            return {}
        if value is None:
            got = f"{path} is {'empty' if path.exists() else 'missing'}"
            raise CheckpointError("A run folder must be complete", got, "Train the run to its end")
        if not isinstance(value, dict):
            raise _damaged(path, "a JSON object", f"a {type(value).__name__}")
        return value

    def step_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the logged steps, each with the number of its line.

        Raises:
            CheckpointError: if one is damaged other than the last.
        """
        lines = self.read_text(self.steps).splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                if number == len(lines):
                    return
                got = f"{error}, in line {number}"
                raise _damaged(self.steps, "one JSON object per line", got) from error
            if not isinstance(row, dict) or not isinstance(row.get(STEP), int):
                got = f"{line[:60]}, in line {number}"
                raise _damaged(self.steps, f"an object with {STEP} per line", got)
            yield number, row

    def read_steps(self, until: int) -> list[dict[str, Any]]:
        """Read the logged steps up to step ``until``."""
        return [row for _, row in self.step_lines() if row[STEP] <= until]

    def write_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the logged steps."""
        self.write_text(self.steps, _json_lines(rows))

    def append_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log further steps."""
        self._append(self.steps, _json_lines(rows))

    def append_log(self, line: str) -> None:
        """Add a line to the log."""
        self._append(self.log, f"{line}\n")

    def metrics_lines(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Read the rows of the table of epochs, each with the number of its line.

        Raises:
            CheckpointError: if one is damaged other than the last.
        """
        lines = self.read_text(self.metrics).splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # a number cut short still reads as a number: 0.9 instead of 0.91
        rows = self._fields(lines)
        _, header = next(rows, (0, []))
        if header and EPOCH not in header:
            rule = f"a first line that names the columns, among them {EPOCH}"
            raise _damaged(self.metrics, rule, f"{header[:6]}")
        for number, fields in rows:
            if len(fields) != len(header):
                got = f"{len(fields)} fields, not {len(header)}, in line {number}"
                raise _damaged(self.metrics, "one field per column", got)
            yield number, dict(zip(header, fields, strict=True))

    def _fields(self, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
        rows = csv.reader(lines)
        try:
            yield from ((rows.line_num, fields) for fields in rows if fields)
        except csv.Error as error:
            got = f"{error}, in line {rows.line_num}"
            raise _damaged(self.metrics, "comma-separated values", got) from error

    def read_metrics(self, epochs: int) -> list[dict[str, str]]:
        """Read the rows of the first ``epochs`` epochs."""
        return [row for _, row in self.metrics_lines() if as_number(row[EPOCH]) <= epochs]

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table of epochs."""
        self.write_text(self.metrics, _csv(rows))

    def write_test(self, details: Mapping[str, Any]) -> None:
        """Write what the final test found, and its table once more for other programs."""
        self.write_text(self.test_table, _csv(details["table"]))
        # On one line, for the counts of a thousand classes are a million numbers.
        self.write_text(self.test, json.dumps(details) + "\n")

    def _append(self, path: Path, text: str) -> None:
        with _writing(path), path.open("ab") as file:
            file.write(as_utf8(text))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a table with the columns of the last one."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[-1]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell a full or read-only disk in our words."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "A run folder must be writable", f"{path}: {reason(error, path)}", "Free some space"
        ) from error


def _damaged(path: Path, rule: str, got: str) -> CheckpointError:
    """Make the error about a file of a run folder that does not hold what it must."""
    return CheckpointError(
        f"{path.name} must hold {rule}",
        f"In {str(path.parent)!r}: {got}",
        "Restore the file, or remove it to go on without it",
    )


# What a run folder says; the run may be going on, so nearly everything is optional


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
        tested: ``test.json``; empty while the run is not finished.
    """

    folder: Path
    summary: Mapping[str, Any]
    config: str
    environment: Mapping[str, Any]
    epochs: tuple[Mapping[str, float], ...]
    steps: tuple[LoggedStep, ...]
    timeline: tuple[Event, ...]
    tested: Tested = field(default_factory=Tested)

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
        record = cls(
            folder=folder.path,
            summary=folder.read_json(folder.summary, optional=True),
            config=folder.read_text(folder.config),
            environment=folder.read_json(folder.environment, optional=True),
            epochs=_epochs(folder),
            steps=_steps(folder),
            timeline=_timeline(folder),
            tested=_tested(folder),
        )
        if record.num_stages > MOST:
            rule, got = f"at most {MOST} stages", f"{record.num_stages}"
            raise _damaged(folder.summary, rule, got)
        return record

    @property
    def finished(self) -> bool:
        """Whether the run got as far as writing its summary."""
        return bool(self.summary)

    @property
    def num_stages(self) -> int:
        """Number of stages, from whichever file tells."""
        counts = [len(row.losses) for row in self.steps]
        counts += [max(by_stage) + 1 for by_stage in self.stage_columns(TRAIN).values()]
        counts += [stage + 1 for stage in self.score_columns()]
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

    @property
    def metric(self) -> Metric:
        """The main metric of the run, from whichever file tells."""
        if "metric" in self.summary:
            return metric_of(self.summary["metric"])
        columns = self.epochs[0] if self.epochs else ()
        return next(
            (m for m in METRICS.values() if valid_column(m.name) in columns), METRICS["accuracy"]
        )

    @property
    def valid_column(self) -> str:
        """The column of the metrics that holds the main metric of the validation."""
        return valid_column(self.metric.name)

    def score_columns(self) -> dict[int, str]:
        """Find the columns of the main metric of single stages in validation, by stage."""
        return dict(sorted(self.stage_columns(VALID).get(self.metric.name, {}).items()))


def _whole(value: object) -> int:
    """Turn a JSON value into a whole number; ValueError for what nobody counts up to."""
    number = as_number(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.60} is no whole number")
    return int(number)


def _place(value: object) -> int:
    """The same of a rank or stage."""
    number = _whole(value)
    if not 0 <= number < MOST:
        raise ValueError(f"{value!r:.60} is not in 0 .. {MOST - 1}")
    return number


def _epochs(folder: RunFolder) -> tuple[Mapping[str, float], ...]:
    by_epoch: dict[float, Mapping[str, float]] = {}
    for line, cells in folder.metrics_lines():
        try:
            row = {k: _cell(v) for k, v in cells.items()}
        except ValueError as error:
            raise _damaged(folder.metrics, "numbers", f"{error}, in line {line}") from error
        by_epoch[row[EPOCH]] = row  # a resumed run repeats an epoch; the later row counts
    return tuple(by_epoch.values())


def _cell(text: str) -> float:
    """Read a cell of the table; ValueError if it is no number."""
    return as_number(float(text)) if text.strip() else math.nan


def _steps(folder: RunFolder) -> tuple[LoggedStep, ...]:
    by_step: dict[int, LoggedStep] = {}
    for line, content in folder.step_lines():
        try:
            if len(content["losses"]) > MOST:
                raise ValueError(f"losses of {len(content['losses'])} stages")
            losses = tuple(
                {str(term): as_number(value) for term, value in (terms or {}).items()}
                for terms in content["losses"]
            )
            seconds = as_number(content.get("seconds"))
            epoch = _whole(content.get("epoch") or 0)
            row = LoggedStep(_whole(content["step"]), epoch, seconds, losses)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in line {line}"
            rule = "an object with step and losses per line"
            raise _damaged(folder.steps, rule, got) from error
        by_step[row.step] = row
    return tuple(by_step[step] for step in sorted(by_step))


def _timeline(folder: RunFolder) -> tuple[Event, ...]:
    content = folder.read_value(folder.timeline)
    if not isinstance(content, list | None):
        raise _damaged(folder.timeline, "a list of events", f"a {type(content).__name__}")
    events = []
    for index, item in enumerate(content or ()):
        try:
            place = (_place(item["rank"]), _place(item["stage"]), _whole(item["step"]))
            begin, end = as_number(item["begin"]), as_number(item["end"])
            event = Event(*place, str(item["activity"]), begin, end)
        except (LookupError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}, in event {index}"
            rule = "events with rank, stage, step, activity, begin, end"
            raise _damaged(folder.timeline, rule, got) from error
        if math.isfinite(event.begin) and event.begin <= event.end < math.inf:
            events.append(event)
    return tuple(events)


def _tested(folder: RunFolder) -> Tested:
    content = folder.read_json(folder.test, optional=True)
    try:
        return Tested.of(content)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise _damaged(folder.test, "what the final test found", got) from error
