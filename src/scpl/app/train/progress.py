"""What a person sees while a network trains: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tqdm import tqdm

from scpl.app.environment import peak_memory
from scpl.app.progress import LIVE, SECONDS_BETWEEN_LINES, format_seconds
from scpl.pipeline import Pipeline
from scpl.report.formats import memory
from scpl.runs.columns import stage_scores, valid_column
from scpl.runs.metrics import METRICS, Metric

__all__ = ["Clock", "Meter", "Progress", "Usage", "format_losses", "format_usage"]

Log: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Usage:
    """What the processes use.

    Attributes:
        memory: Peak memory of each process in bytes.
        waits: For each stage the share of the epoch that its process waited, 0 .. 1; nothing if
            there is one process, which has nobody to wait for.
    """

    memory: tuple[int, ...] = ()
    waits: tuple[float, ...] = ()


NOTHING = Usage()


class Progress:
    """Prints to stderr unless ``quiet``, and hands every full line to ``log`` in any case.

    Args:
        epochs: Epochs of the whole run.
        steps: Steps per epoch.
        samples: Samples per epoch.
        log: Takes every line.
        quiet: Print nothing.
        noun: What is learnt from, in the plural.
        metric: The main metric of the validation.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        samples: int,
        log: Log,
        *,
        quiet: bool,
        noun: str = "images",
        metric: Metric = METRICS["accuracy"],
    ) -> None:
        self._metric = metric
        self._epochs, self._steps, self._samples = epochs, steps, samples
        self._log, self._quiet, self._noun = log, quiet, noun
        self._bar: tqdm[Any] | None = None
        self._epoch = self._begun_at = 0
        self._valid = ""
        self._first = self._since = self._printed = time.perf_counter()
        self._done_at_start = 0

    def say(self, line: str) -> None:
        """Print a line above whatever is live."""
        self._log(line)
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Start epoch ``epoch`` (from 1) at mini-batch ``batch``."""
        self._epoch, self._since, self._begun_at = epoch, time.perf_counter(), batch
        if epoch == 1 or self._done_at_start == 0:
            self._done_at_start = (epoch - 1) * self._steps + batch
            self._first = self._since
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps,
                initial=batch,
                desc=f"epoch {epoch}/{self._epochs}",
                bar_format=LIVE,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(
        self, batch: int, losses: Sequence[Mapping[str, float]], usage: Usage = NOTHING
    ) -> None:
        """Show the state after mini-batch ``batch`` of the epoch."""
        now = time.perf_counter()
        place = f"epoch {self._epoch}/{self._epochs}  step {batch}/{self._steps}"
        if self._bar is not None:
            self._bar.n = batch
            rate = f"{self._rate(batch, now):,.0f} {self._noun}/s"
            self._bar.set_description_str(
                f"{place}  {rate}  {self._to_go(batch, now)}  "
                f"loss {format_losses(losses)}{self._valid}{format_usage(usage)}"
            )
        elif now - self._printed >= SECONDS_BETWEEN_LINES and batch < self._steps:
            self.say(
                f"{place}  loss {format_losses(losses)}  {self._to_go(batch, now)}"
                f"{format_usage(usage)}"
            )
            self._printed = now

    def end_epoch(
        self,
        row: Mapping[str, Any],
        losses: Sequence[Mapping[str, float]],
        usage: Usage = NOTHING,
        *,
        best: bool = False,
    ) -> None:
        """Print the line of a finished epoch; ``best`` marks the best so far."""
        self.close()
        now = self._printed = time.perf_counter()
        score = row.get(valid_column(self._metric.name))
        valid = "" if score in (None, "") else f"  valid {self._named(score)}"
        exits = format_exits(row, len(losses), self._metric)
        self._valid = valid  # stays in sight while the next epoch runs
        self.say(
            f"epoch {self._epoch}/{self._epochs}  loss {format_losses(losses)}{valid}{exits}"
            f"{'  best so far' if best else ''}  {row['samples_per_second']:,.0f} {self._noun}/s  "
            f"{format_seconds(row['seconds'])} so far, "
            f"{self._to_go(self._steps, now)}{format_usage(usage)}"
        )

    def _named(self, score: float) -> str:
        """Write the main metric; the commonest one needs no name."""
        plain = self._metric.name == "accuracy"
        return (
            f"{100 * score:5.2f} %"
            if plain
            else f"{self._metric.title} {self._metric.write(score)}"
        )

    def _rate(self, batch: int, now: float) -> float:
        """Samples per second since the epoch began, or went on after a resume."""
        samples = (batch - self._begun_at) / self._steps * self._samples
        return samples / max(now - self._since, 1e-9)

    def _to_go(self, batch: int, now: float) -> str:
        """What is left, judged by all that was done here, validation included."""
        at = (self._epoch - 1) * self._steps + batch
        per_step = (now - self._first) / max(at - self._done_at_start, 1)
        return f"{format_seconds(per_step * (self._epochs * self._steps - at))} to go"

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_losses(losses: Sequence[Mapping[str, float]]) -> str:
    """Write every stage's loss; several terms of one stage are joined by a plus sign."""
    return " | ".join("+".join(f"{value:.3f}" for value in part.values()) for part in losses)


def format_usage(usage: Usage) -> str:
    """Write the memory of the largest process, and for each stage how much it waited."""
    used = f"  {memory(max(usage.memory))}" if usage.memory else ""
    waits = " | ".join(f"{100 * share:.0f}" for share in usage.waits)
    return f"{used}  waits {waits} %" if waits else used


def format_exits(
    row: Mapping[str, Any], num_stages: int, metric: Metric = METRICS["accuracy"]
) -> str:
    """Write the main metric of every stage, where more than the last one predicts."""
    found = stage_scores(row, metric.name, num_stages)
    if all(value in (None, "") for value in found[:-1]):
        return ""
    digits = 1 if metric.is_share else 3
    shown = ("-" if v in (None, "") else f"{metric.scale * v:.{digits}f}" for v in found)
    return f" (stages {' | '.join(shown)})"


class Meter:
    """Measures the pipeline of this rank, and on the last rank knows all."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._others: list[dict[str, float]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Measure waiting from now on."""
        self._since = time.perf_counter()
        self._waited = self._pipeline.timeline.seconds().get("wait", 0.0)

    def end_epoch(self, epoch: int) -> None:
        """Take the measure of an epoch's training, and tell the last rank."""
        self._own = self._measure()
        mesh = self._pipeline.mesh
        if not mesh.is_last:
            self._pipeline.ranks.share(f"usage/{epoch}/{mesh.rank}", self._own)

    def collect(self, epoch: int) -> Usage:
        """On the last rank: put together what all ranks measured in an epoch."""
        take, mesh = self._pipeline.ranks.take, self._pipeline.mesh
        self._others = [take(f"usage/{epoch}/{rank}") for rank in range(mesh.num_ranks - 1)]
        return self._together(self._own)

    def live(self) -> Usage:
        """On the last rank: its own numbers of this moment, and those of others as last told."""
        if len(self._others) + 1 < self._pipeline.mesh.num_ranks:
            return Usage((int(self._measure()["memory"]),))
        return self._together(self._measure())

    def _measure(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        waited = self._pipeline.timeline.seconds().get("wait", 0.0) - self._waited
        return {
            "memory": peak_memory(self._pipeline.device),
            "wait": waited / seconds if seconds > 0 else 0.0,
            "stages": len(self._pipeline.stages),
        }

    def _together(self, own: dict[str, float]) -> Usage:
        every = [*self._others, own]
        waits = [one["wait"] for one in every for _ in range(int(one["stages"]))]
        memory = tuple(int(one["memory"]) for one in every)
        return Usage(memory, tuple(waits) if self._others else ())


class Clock:
    """Counts seconds since training began, seconds of training, and seconds of this epoch.

    Args:
        note: What an interrupted run had counted.
    """

    def __init__(self, note: Mapping[str, float] | None = None) -> None:
        before = note or {}
        self._train = before.get("train_seconds", 0.0)
        self._epoch = before.get("epoch_seconds", 0.0)
        self._epoch_started = time.perf_counter()
        self._started = self._epoch_started - before.get("seconds", 0.0)

    def now(self) -> float:
        """Seconds since training began, validation included."""
        return time.perf_counter() - self._started

    def begin_epoch(self) -> None:
        """An epoch begins or goes on."""
        self._epoch_started = time.perf_counter()

    def end_epoch(self) -> float:
        """Close the epoch; returns its seconds."""
        seconds = self._epoch_seconds()
        self._train += seconds
        self._epoch = 0.0
        return seconds

    def train_seconds(self) -> float:
        """Seconds of training in finished epochs, without validation."""
        return self._train

    def note(self, *, in_epoch: bool) -> dict[str, float]:
        """What to remember in a checkpoint."""
        epoch = self._epoch_seconds() if in_epoch else 0.0
        return {"seconds": self.now(), "train_seconds": self._train, "epoch_seconds": epoch}

    def _epoch_seconds(self) -> float:
        return self._epoch + time.perf_counter() - self._epoch_started
