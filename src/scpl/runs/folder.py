"""The run folder: its files, how they are written without losing anything, and how they are read.

A run may still be going on or may have been killed, so a half-written last line is left out. A file
that is damaged anywhere else is an error that names the file and the line: who reads half of a
result must not take it for the whole.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scpl.errors import CheckpointError, InputError
from scpl.files import write_whole
from scpl.runs.columns import EPOCH, STEP

__all__ = ["RunFolder", "damaged"]


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
        self.tokenizer = path / "tokenizer.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.csv"
        self.steps = path / "steps.jsonl"
        self.timeline = path / "timeline.json"
        self.trace = path / "trace.json"
        self.log = path / "log.txt"
        self.environment = path / "env.json"

    @classmethod
    def create(cls, wanted: Path | None, default_name: str, *, force: bool) -> RunFolder:
        """Make a new run folder.

        Args:
            wanted: Where; by default ``runs/<default_name>``, numbered if it exists.
            default_name: See above.
            force: Empty an existing run folder first.

        Raises:
            InputError: if `wanted` exists, or cannot be made.
        """
        path = wanted or cls.free_name(Path("runs") / default_name)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not force:
                raise InputError(
                    "A run folder must not exist yet",
                    f"Got {path}",
                    f"Choose another with --out, continue it with --resume {path}, or overwrite "
                    "it with --force",
                )
            if not (path / "config.toml").is_file():
                raise InputError(
                    "--force overwrites run folders only",
                    f"{path} is none: it holds no config.toml",
                    "Choose another folder with --out",
                )
            shutil.rmtree(path)
        folder = cls(path)
        folder.ensure()
        return folder

    def ensure(self) -> None:
        """Make the folder itself, if it is not there.

        Raises:
            InputError: if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "Choose another with --out"
            raise InputError(
                "A run folder must be writable", f"{self.path}: {error}", fix
            ) from error

    @staticmethod
    def free_name(path: Path) -> Path:
        """Return ``path``, numbered if it exists."""
        number, candidate = 1, path
        while candidate.exists():
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        return candidate

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

    def read_about(self) -> dict[str, str]:
        """Read the files that say what the run is, for machines with a disk of their own."""
        paths = (self.config, self.environment, self.description, self.tokenizer)
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}

    def complete_about(self, files: Mapping[str, str]) -> None:
        """Write the files of `read_about` that are not here, so that this machine can resume."""
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (self.path / name).is_file():
                self.write_text(self.path / name, text)

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        self.write_bytes(path, text.encode("utf-8"))

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        with _writing(path):
            write_whole(path, content)

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
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise damaged(path, "readable UTF-8 text", str(error)) from error

    def read_value(self, path: Path) -> Any:
        """Read a JSON file; None if it is missing or empty.

        Raises:
            CheckpointError: if it is damaged.
        """
        text = self.read_text(path)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise damaged(path, "valid JSON", str(error)) from error

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
            raise damaged(path, "a JSON object", f"a {type(value).__name__}")
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
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    return
                got = f"{error}, in line {number}"
                raise damaged(self.steps, "one JSON object per line", got) from error
            if not isinstance(row, dict) or not isinstance(row.get(STEP), int):
                got = f"{line[:60]}, in line {number}"
                raise damaged(self.steps, f"an object with {STEP} per line", got)
            yield number, row

    def read_steps(self, until: int) -> list[dict[str, Any]]:
        """Read the logged steps up to step ``until``."""
        return [row for _, row in self.step_lines() if row[STEP] <= until]

    def write_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the logged steps."""
        self.write_text(self.steps, "".join(f"{json.dumps(row)}\n" for row in rows))

    def append_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log further steps."""
        self._append(self.steps, "".join(f"{json.dumps(row)}\n" for row in rows))

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
        rows = csv.reader(lines)
        header = next(rows, [])
        if header and EPOCH not in header:
            rule = f"a first line that names the columns, among them {EPOCH}"
            raise damaged(self.metrics, rule, f"{header[:6]}")
        for fields in filter(None, rows):
            if len(fields) != len(header):
                got = f"{len(fields)} fields, not {len(header)}, in line {rows.line_num}"
                raise damaged(self.metrics, "one field per column", got)
            yield rows.line_num, dict(zip(header, fields, strict=True))

    def read_metrics(self, epochs: int) -> list[dict[str, str]]:
        """Read the rows of the first ``epochs`` epochs."""
        return [row for _, row in self.metrics_lines() if int(row[EPOCH]) <= epochs]

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table of epochs."""
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[-1]), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.write_text(self.metrics, text.getvalue())

    def _append(self, path: Path, text: str) -> None:
        with _writing(path), path.open("a", encoding="utf-8") as file:
            file.write(text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell a full or read-only disk in our words."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "A run folder must be writable", f"{path}: {error}", "Free some space"
        ) from error


def damaged(path: Path, rule: str, got: str) -> CheckpointError:
    """Make the error about a file of a run folder that does not hold what it must."""
    return CheckpointError(
        f"{path.name} must hold {rule}",
        f"In {str(path.parent)!r}: {got}",
        "Restore the file, or remove it to go on without it",
    )
