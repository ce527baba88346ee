"""What a run writes down while it trains. Only the last rank records: it knows every loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scpl.app.config import TrainConfig, in_flags
from scpl.app.inputs import modality_of
from scpl.app.inputs.base import DataSummary
from scpl.app.train.logs import Logs
from scpl.app.train.progress import NOTHING, Clock, Progress, Usage
from scpl.engine.scores import Scores
from scpl.engine.worker import Report, read_reports
from scpl.methods import METHODS
from scpl.runs import RunFolder
from scpl.runs.columns import (
    EPOCH,
    LOSS,
    STEP,
    epoch_row,
    mean_values,
    stage_column,
    valid_column,
)
from scpl.runs.metrics import METRICS, metric_of
from scpl.tasks import Task

__all__ = ["Recorder", "advise", "is_flat"]


class Recorder:
    """Logs steps and epochs of a run in its folder, and shows progress unless ``quiet``."""

    def __init__(
        self, config: TrainConfig, data: DataSummary, folder: RunFolder, *, quiet: bool
    ) -> None:
        self._config, self._data, self._folder = config, data, folder
        self._waiting: list[tuple[float, Report]] = []
        self._rows: list[dict[str, Any]] = []  # steps of this epoch
        self._table: list[dict[str, Any]] = []  # finished epochs
        self._warned = set[int]()
        epochs, samples, log = config.chosen.epochs, data.train_samples, folder.append_log
        self.progress = Progress(
            epochs, data.steps, samples, log,
            quiet=quiet, noun=data.noun, metric=metric_of(data.task.metrics[0]),
        )  # fmt: skip
        self._logs = Logs(
            config.run.log, folder, config.resolved().to_dict(),
            lambda line: self.progress.say(f"Warning: {line}"),
        )  # fmt: skip

    def begin(self, step: int) -> None:
        """Start the live logs of other tools, after so many training steps."""
        self._logs.start(step)

    def validation(self, epoch: int) -> dict[str, float | None]:
        """Metrics of the validation after an epoch, by column."""
        row = next((row for row in self._table if int(row[EPOCH]) == epoch), {})
        found = {name: row.get(name, "") for name in map(valid_column, self._data.task.metrics)}
        # After a resume they are text.
        return {name: None if value == "" else float(value) for name, value in found.items()}

    def restore(self, step: int, epochs: int) -> None:
        """Forget what was logged after a checkpoint, by when so many steps and epochs were done."""
        rows = self._folder.read_steps(step)
        self._folder.write_steps(rows)
        self._rows = [row for row in rows if row["epoch"] == epochs + 1]
        self._table = list(self._folder.read_metrics(epochs))
        self._folder.write_metrics(self._table)

    def add(self, seconds: float, report: Report) -> None:
        """Take a report; its numbers are read later, all at once."""
        self._waiting.append((seconds, report))

    def flush(self, usage: Usage = NOTHING) -> None:
        """Read the losses that are waiting (one device sync) and log them."""
        steps = self._data.steps
        read = read_reports([report for _, report in self._waiting])
        rows: list[dict[str, Any]] = [
            {
                "step": report.step,
                "epoch": (report.step - 1) // steps + 1,
                "seconds": round(seconds, 4),
                "samples": report.num_samples // self._config.data.views,
                "losses": losses,
                "observed": observed,
            }
            for (seconds, report), (losses, observed) in zip(self._waiting, read, strict=True)
        ]
        self._waiting = []
        if rows:
            self._folder.append_steps(rows)
            self._rows += rows
            step, losses = rows[-1]["step"], rows[-1]["losses"]
            self.progress.update((step - 1) % steps + 1, losses, usage)
            if step % steps:  # else the row of the epoch follows at once
                live = (sum(terms.values()) for terms in losses)
                self._logs.log(
                    step, {stage_column(STEP, LOSS, k): loss for k, loss in enumerate(live)}
                )

    def end_epoch(
        self,
        epoch: int,
        clock: Clock,
        seconds: float,
        lr: float,
        scores: Scores | None,
        usage: Usage = NOTHING,
        *,
        best: bool = False,
    ) -> None:
        """Write the row of an epoch, counted from 1, whose training took so many seconds.

        ``best`` says that its validation is the best so far.
        """
        self.flush()
        losses, observed = mean_values(self._rows, "losses"), mean_values(self._rows, "observed")
        samples = sum(row["samples"] for row in self._rows)
        row = epoch_row(
            epoch=epoch,
            step=self._rows[-1]["step"],
            seconds=round(clock.now(), 4),
            train_seconds=round(clock.train_seconds(), 4),
            samples_per_second=round(samples / max(seconds, 1e-9), 2),
            lr=lr,
            losses=losses,
            observed=observed,
            validation=scores.peek() if scores else None,
            metrics=self._data.task.metrics,
        )
        self._rows = []
        self._table.append(row)
        self._folder.write_metrics(self._table)
        self.progress.end_epoch(row, losses, usage, best=best)
        self._warn(observed)
        self._logs.log(row[STEP], {k: v for k, v in row.items() if k != STEP})

    def _warn(self, observed: list[dict[str, float]]) -> None:
        """Say once of each stage that it stays flat, if it does."""
        for stage, seen in enumerate(observed):
            if stage not in self._warned and is_flat(seen, self._data.task, self._data.num_classes):
                self._warned.add(stage)
                self.progress.say(f"Warning: {advise(stage, seen, self._config)}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the live logs with what the run came to."""
        results = {k: v for k, v in summary.items() if k.startswith("test_")}
        self._logs.end(int(self._table[-1][STEP]), results)

    def close(self) -> None:
        """Leave the terminal clean and the files complete."""
        self.progress.close()
        self._logs.end()


_FLAT = -0.02
"""A contrastive loss that has not fallen this far below its chance level has taught nothing."""
_COLLAPSED = 0.1
_LONELY = 0.5


def is_flat(observed: Mapping[str, float], task: Task, num_outputs: int) -> bool:
    """Whether a stage has learned nothing in an epoch, as far as is known.

    ``observed`` has means over the epoch, by name; see `Objective.observed`.
    """
    above = observed.get("above_chance")
    predicts = task.learns(observed, num_outputs)
    known = [
        each for each in (predicts, None if above is None else above < _FLAT) if each is not None
    ]
    return bool(known) and not any(known)


def advise(stage: int, observed: Mapping[str, float], config: TrainConfig) -> str:
    """Say why a stage has learned nothing in an epoch, and what to do; ``observed`` as above."""
    above = observed.get("above_chance")
    found = [f"contrast {above:+.3f} from chance level"] if above is not None else []
    found += [
        f"{METRICS[name].title} {METRICS[name].write(value, 1)}"
        for name, value in observed.items()
        if name in METRICS
    ]
    cause = in_flags(_cause(observed, config))
    return f"Stage {stage} has learned nothing yet ({', '.join(found)}): {cause}"


def _cause(observed: Mapping[str, float], config: TrainConfig) -> str:
    without, spread = observed.get("without_positives", 0.0), observed.get("spread", 1.0)
    if without > _LONELY:
        second_view = " or use `views` 2" if modality_of(config.data).SAMPLES == "images" else ""
        return (
            f"{100 * without:.0f} % of the anchors have no other sample of their class in the "
            f"mini-batch; raise `batch_size`{second_view}"
        )
    if spread < _COLLAPSED:
        return (
            f"its projections have collapsed to one direction (spread {spread:.2f}); lower `lr` "
            "or set `clip_norm`"
        )
    advice = METHODS[config.method.method].advice(observed)
    return (
        f"raise `lr`, or {advice or 'cut the network so that this stage has more layers (`cuts`)'}"
    )
