"""What a run writes down while it trains. Only the last rank records: it knows every loss."""

from __future__ import annotations

from typing import Any

from scpl.run.clock import Clock
from scpl.run.config import TrainConfig
from scpl.run.diagnosis import advise
from scpl.run.facts import Facts
from scpl.run.folder import RunFolder
from scpl.run.progress import NOTHING, Progress
from scpl.run.rows import (
    loss_columns,
    mean_values,
    number,
    observed_columns,
    valid_columns,
)
from scpl.run.usage import Usage
from scpl.scores import Scores
from scpl.worker import Report

__all__ = ["Recorder"]


class Recorder:
    """Logs steps and epochs, and shows progress.

    Args:
        config: The run's configuration.
        facts: Its data in numbers.
        folder: Where to write.
        quiet: Show nothing.
    """

    def __init__(
        self, config: TrainConfig, facts: Facts, folder: RunFolder, *, quiet: bool
    ) -> None:
        self._config, self._facts, self._folder = config, facts, folder
        self._waiting: list[tuple[float, Report]] = []
        self._rows: list[dict[str, Any]] = []  # steps of this epoch
        self._table: list[dict[str, Any]] = []  # finished epochs
        self._board: Any = None
        self._classes, self._warned = facts.num_classes, set[int]()
        self.progress = Progress(
            config.epochs,
            facts.steps,
            facts.train_samples,
            folder.append_log,
            quiet=quiet,
            noun=facts.noun,
        )
        if config.tensorboard:
            self._board = _open_board(folder)

    @property
    def valid_accuracy(self) -> float | None:
        """Validation accuracy of the last epoch."""
        return number(self._table[-1].get("valid_accuracy")) if self._table else None

    def restore(self, step: int, epochs: int) -> None:
        """Forget what was logged after a checkpoint.

        Args:
            step: Steps done at the checkpoint.
            epochs: Epochs finished by then.
        """
        rows = self._folder.read_steps(step)
        self._folder.write_steps(rows)
        self._rows = [row for row in rows if row["epoch"] == epochs + 1]
        self._table = list(self._folder.read_metrics(epochs))
        self._folder.write_metrics(self._table)

    def add(self, seconds: float, report: Report) -> None:
        """Take a report; its numbers are read later, all at once."""
        self._waiting.append((seconds, report))

    def flush(self, usage: Usage = NOTHING) -> None:
        """Read the losses that are waiting (one device sync) and log them.

        Args:
            usage: What to show of memory and waiting.
        """
        steps = self._facts.steps
        rows: list[dict[str, Any]] = [
            {
                "step": report.step,
                "epoch": (report.step - 1) // steps + 1,
                "seconds": round(seconds, 4),
                "samples": report.num_samples // self._config.views,
                "losses": losses,
                "observed": observed,
            }
            for seconds, report in self._waiting
            for losses, observed in (report.read(),)
        ]
        self._waiting = []
        if rows:
            self._folder.append_steps(rows)
            self._rows += rows
            self.progress.update((rows[-1]["step"] - 1) % steps + 1, rows[-1]["losses"], usage)

    def end_epoch(
        self,
        epoch: int,
        clock: Clock,
        seconds: float,
        lr: float,
        scores: Scores | None,
        usage: Usage = NOTHING,
    ) -> None:
        """Write the row of an epoch.

        Args:
            epoch: From 1.
            clock: The run's time.
            seconds: What the epoch's training took.
            lr: The learning rate at its end.
            scores: Its validation.
            usage: What to show of memory and waiting.
        """
        self.flush()
        losses, observed = mean_values(self._rows, "losses"), mean_values(self._rows, "observed")
        samples = sum(row["samples"] for row in self._rows)
        row = {
            "epoch": epoch,
            "step": self._rows[-1]["step"],
            "seconds": round(clock.now(), 4),
            "train_seconds": round(clock.train_seconds(), 4),
            "samples_per_second": round(samples / max(seconds, 1e-9), 2),
            "lr": lr,
            **loss_columns(losses),
            **observed_columns(observed),
            **valid_columns(scores.peek() if scores else None),
        }
        self._rows = []
        self._table.append(row)
        self._folder.write_metrics(self._table)
        self.progress.end_epoch(row, losses, usage)
        self._warn(observed)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    self._board.add_scalar(name, value, row["step"])

    def _warn(self, observed: list[dict[str, float]]) -> None:
        """Say once of each stage that it stays flat, if it does."""
        for stage, part in enumerate(observed):
            if stage not in self._warned and (advice := advise(stage, part, self._classes)):
                self._warned.add(stage)
                self.progress.say(f"Warning: {advice}")

    def close(self) -> None:
        """Leave the terminal clean and the files complete."""
        self.progress.close()
        if self._board is not None:
            self._board.close()


def _open_board(folder: RunFolder) -> Any:
    from scpl.data.extras import require

    require("tensorboard", "tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / "tensorboard"))
