"""The run folder: what a run leaves behind, and how it is written without losing anything."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scpl.errors import CheckpointError, InputError

__all__ = ["RunFolder"]


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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                "A run folder must be writable", f"{self.path}: {error}"
            ) from error
        for name, text in files.items():
            if not (self.path / name).is_file():
                self.write_text(self.path / name, text)

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        self.write_bytes(path, text.encode("utf-8"))

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        draft = path.with_name(f".{path.name}.tmp")
        try:
            draft.write_bytes(content)
            os.replace(draft, path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()  # half a file on a full disk
            raise CheckpointError(
                "A run folder must be writable", f"{path}: {error}", "Free some space"
            ) from error

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

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "A run folder must be complete", f"{path}: {error}", "Train the run to its end"
            ) from error
        if not isinstance(value, dict):
            raise CheckpointError("A run's file must hold a JSON object", f"{path} does not")
        return value

    def read_steps(self, until: int) -> list[dict[str, Any]]:
        """Read the logged steps up to step ``until``; a half-written last line is dropped."""
        rows = []
        if self.steps.exists():
            for line in self.steps.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if row["step"] <= until:
                    rows.append(row)
        return rows

    def write_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the logged steps."""
        self.write_text(self.steps, "".join(f"{json.dumps(row)}\n" for row in rows))

    def append_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log further steps."""
        self._append(self.steps, "".join(f"{json.dumps(row)}\n" for row in rows))

    def append_log(self, line: str) -> None:
        """Add a line to the log."""
        self._append(self.log, f"{line}\n")

    def read_metrics(self, epochs: int) -> list[dict[str, str]]:
        """Read the rows of the first ``epochs`` epochs."""
        if not self.metrics.exists():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table of epochs."""
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[-1]), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.write_text(self.metrics, text.getvalue())

    def _append(self, path: Path, text: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise CheckpointError(
                "A run folder must be writable", f"{path}: {error}", "Free some space"
            ) from error
