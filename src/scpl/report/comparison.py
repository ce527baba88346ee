"""A comparison: the runs, what they are measured by, and those that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scpl.errors import InputError
from scpl.report.reading import RunRecord
from scpl.report.results import comparison_results
from scpl.report.tables import Absent, ComparisonTable
from scpl.report.target import Target, choose_target, with_target

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods on the same network and data.

    Attributes:
        title: Heading of the report.
        runs: The runs; with a target, their summaries hold ``seconds_to_target``.
        target: The accuracy to reach; None if the runs were not validated.
        absent: Runs that are missing, and why.
        command: The command line that made it.
    """

    title: str
    runs: tuple[RunRecord, ...]
    target: Target | None = None
    absent: tuple[Absent, ...] = ()
    command: str = ""

    @classmethod
    def read(
        cls,
        folders: Sequence[Path],
        title: str = "Comparison of methods",
        *,
        target: float | None = None,
        absent: Sequence[Absent] = (),
        command: str = "",
    ) -> Comparison:
        """Read run folders.

        Args:
            folders: Runs; those that differ only in their seed are put together.
            title: Heading of the report.
            target: Accuracy to reach, 0 .. 1; default: chosen from the runs.
            absent: Runs that are missing, and why.
            command: The command line that made it.

        Raises:
            InputError: There is no run, or a folder is not a run folder or is damaged.
        """
        if not folders:
            raise InputError("A comparison needs at least one run folder", "Got none")
        runs = [RunRecord.read(folder) for folder in folders]
        chosen = choose_target(runs, target)
        return cls(title, tuple(with_target(runs, chosen)), chosen, tuple(absent), command)

    def table(self) -> ComparisonTable:
        """Put the results into one row per method."""
        return ComparisonTable([run.summary for run in self.runs], self.target, self.absent)

    def results(self) -> list[dict[str, Any]]:
        """Give the results as JSON values, one per method."""
        return comparison_results([run.summary for run in self.runs])
