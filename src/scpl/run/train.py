"""`scpl train`: the loop around the pipeline, and everything a run leaves behind."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from scpl.errors import InputError, Interrupted
from scpl.pipeline import Pipeline
from scpl.run.build import (
    Loaders,
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    set_threads,
)
from scpl.run.config import TrainConfig, write_toml
from scpl.run.environment import describe_environment, peak_memory
from scpl.run.folder import RunFolder
from scpl.run.preview import describe_stages
from scpl.run.progress import Progress
from scpl.run.rows import loss_columns, mean_losses, number, valid_columns
from scpl.run.signals import GracefulStop
from scpl.worker import Report

__all__ = ["train"]

SECONDS_BETWEEN_FLUSHES = 0.5


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a network as configured.

    Args:
        config: What to train; with `resume` the configuration of that run.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ScplError: for bad input, a non-finite loss, or an interruption.
    """
    config.check()
    threads = set_threads(config.threads, config.processes)
    if config.processes != 1:
        raise InputError("--processes must be 1 in this version", f"Got {config.processes}")
    if config.resume is not None:
        folder = RunFolder.open(config.resume)
        if folder.summary.exists():
            return folder.read_json(folder.summary)
    loaders = build_loaders(config)
    parts = build_partition(config, loaders.source)
    method = build_method(config, loaders.source.num_classes)
    if config.resume is None:
        name = f"{Path(config.data).name}-{config.model}-{config.method}"
        folder = RunFolder.create(config.out, name, force=config.force)
        folder.write_text(folder.config, write_toml(replace(config, out=None, force=False)))
    total_steps = config.epochs * len(loaders.train)
    pipeline = build_pipeline(config, parts, method, total_steps, folder.checkpoints)
    environment = describe_environment(pipeline.device, threads)
    if config.resume is None:
        folder.write_json(folder.environment, environment)
        folder.write_json(folder.description, _describe_model(config, loaders))
    return _Run(config, folder, loaders, pipeline).complete()


@dataclass
class _Clock:
    """Wall-clock since training began, over interruptions."""

    offset: float = 0.0
    started: float = 0.0

    def start(self, offset: float) -> None:
        self.offset, self.started = offset, time.perf_counter()

    def now(self) -> float:
        return self.offset + time.perf_counter() - self.started


class _Run:
    """One run from its first or next step to its summary."""

    def __init__(
        self, config: TrainConfig, folder: RunFolder, loaders: Loaders, pipeline: Pipeline
    ) -> None:
        self.config, self.folder, self.loaders, self.pipeline = config, folder, loaders, pipeline
        self.clock = _Clock()
        self.train_seconds = 0.0
        self.epoch_seconds = 0.0
        self.rows: list[dict[str, Any]] = []  # steps of this epoch
        self.table: list[dict[str, Any]] = []  # finished epochs
        self.waiting: list[tuple[float, Report]] = []
        self.progress = Progress(
            config.epochs,
            len(loaders.train),
            loaders.train.num_samples,
            folder.append_log,
            quiet=config.quiet,
        )

    def complete(self) -> dict[str, Any]:
        """Train to the end, test once, write everything."""
        offset = self._restore()
        self._introduce()
        self.clock.start(offset)
        try:
            with GracefulStop(self._notify) as stop:
                while self.pipeline.epoch < self.config.epochs:
                    self._train_epoch(stop)
        finally:
            self.progress.close()
            self.pipeline.close()
        return self._finish()

    def _restore(self) -> float:
        if self.config.resume is None:
            return 0.0
        note = self.pipeline.restore()
        if note is None:
            self.folder.write_steps([])
            self.folder.write_metrics([])
            return 0.0
        rows = self.folder.read_steps(self.pipeline.step)
        self.folder.write_steps(rows)
        self.rows = [row for row in rows if row["epoch"] == self.pipeline.epoch + 1]
        self.table = list(self.folder.read_metrics(self.pipeline.epoch))
        self.folder.write_metrics(self.table)
        self.train_seconds, self.epoch_seconds = note["train_seconds"], note["epoch_seconds"]
        return float(note["seconds"])

    def _introduce(self) -> None:
        config, source, pipeline = self.config, self.loaders.source, self.pipeline
        valid = self.loaders.valid
        self.progress.say(
            f"{config.method}: {config.model} on {source.name}, "
            f"{self.loaders.train.num_samples:,} images to train, "
            f"{valid.num_samples if valid else 0:,} to validate, "
            f"{self.loaders.test.num_samples:,} to test; device {pipeline.device}, "
            f"{config.precision}"
        )
        for line in describe_stages(pipeline):
            self.progress.say(line)
        if pipeline.step:
            self.progress.say(f"Continuing after step {pipeline.step}")

    def _notify(self, name: str) -> None:
        self.progress.say(f"{name}: finishing this step and saving; once more to end at once")

    def _train_epoch(self, stop: GracefulStop) -> None:
        pipeline, started = self.pipeline, time.perf_counter()
        before = self.epoch_seconds
        epoch = pipeline.epoch + 1
        self.progress.begin_epoch(epoch, pipeline.batch)
        flushed = started
        for report in pipeline.train(self.loaders.train):
            now = time.perf_counter()
            self.waiting.append((self.clock.now(), report))
            if now - flushed >= SECONDS_BETWEEN_FLUSHES:
                self._flush(epoch)
                flushed = now
            self.epoch_seconds = before + now - started
            every = self.config.checkpoint_every
            due = every is not None and pipeline.step % every == 0
            if stop.received or due:
                self._flush(epoch)
                self._checkpoint()
            if stop.received:
                raise self._interrupted(stop.received)
        self._flush(epoch)
        self.epoch_seconds = before + time.perf_counter() - started
        self._end_epoch(epoch)
        if self.config.checkpoint_every is None or stop.received:
            self._checkpoint()
        if stop.received and pipeline.epoch < self.config.epochs:
            raise self._interrupted(stop.received)

    def _flush(self, epoch: int) -> None:
        """Read the losses that are waiting (one device sync) and log them."""
        rows: list[dict[str, Any]] = [
            {
                "step": report.step,
                "epoch": epoch,
                "seconds": round(seconds, 4),
                "samples": report.num_samples // self.config.views,
                "losses": report.values(),
            }
            for seconds, report in self.waiting
        ]
        self.waiting = []
        if rows:
            self.folder.append_steps(rows)
            self.rows += rows
            batch = rows[-1]["step"] - (epoch - 1) * len(self.loaders.train)
            self.progress.update(batch, rows[-1]["losses"])

    def _end_epoch(self, epoch: int) -> None:
        self.train_seconds += self.epoch_seconds
        losses = mean_losses(self.rows)
        samples = sum(row["samples"] for row in self.rows)
        scores = None
        if self.loaders.valid is not None:
            scores = self.pipeline.evaluate(self.loaders.valid).result()
        row = {
            "epoch": epoch,
            "step": self.pipeline.step,
            "seconds": round(self.clock.now(), 4),
            "train_seconds": round(self.train_seconds, 4),
            "samples_per_second": round(samples / max(self.epoch_seconds, 1e-9), 2),
            "lr": self.pipeline.learning_rate(),
            **loss_columns(losses),
            **valid_columns(scores),
        }
        self.rows, self.epoch_seconds = [], 0.0
        self.table.append(row)
        self.folder.write_metrics(self.table)
        self.progress.end_epoch(row, losses)

    def _checkpoint(self) -> None:
        self.pipeline.checkpoint(
            seconds=self.clock.now(),
            train_seconds=self.train_seconds,
            epoch_seconds=self.epoch_seconds,
        )

    def _interrupted(self, number: int) -> Interrupted:
        self.pipeline.close()  # the checkpoint is on disk before anyone is told of it
        error = Interrupted(
            f"Interrupted after step {self.pipeline.step}; everything is saved",
            fix=f"Continue with: scpl train --resume {self.folder.path}",
        )
        error.signal = number
        return error

    def _finish(self) -> dict[str, Any]:
        config, folder = self.config, self.folder
        test = self.pipeline.evaluate(self.loaders.test).result()
        state = {k: v.contiguous() for k, v in self.pipeline.export().state_dict().items()}
        description = folder.read_json(folder.description)
        draft = folder.weights.with_suffix(".tmp")
        save_file(state, draft, metadata={"scpl": json.dumps(description)})
        draft.replace(folder.weights)
        last = self.table[-1]
        images = self.loaders.train.num_samples * config.epochs
        summary = {
            "method": config.method,
            "data": config.data,
            "model": config.model,
            "stages": self.pipeline.parts.num_stages,
            "processes": config.processes,
            "epochs": config.epochs,
            "seed": config.seed,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "valid_accuracy": number(last.get("valid_accuracy")),
            "samples_per_second": images / self.train_seconds,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.clock.now(),
            "peak_memory_bytes": [peak_memory(self.pipeline.device)],
            "wait_share": [0.0 for _ in self.pipeline.stages],
            "run": str(folder.path),
        }
        folder.write_json(folder.summary, summary)
        self.progress.say(
            f"test accuracy {100 * test.accuracy:.2f} % on {test.num_samples:,} images; "
            f"{summary['samples_per_second']:,.0f} images/s"
        )
        return summary


def _describe_model(config: TrainConfig, loaders: Loaders) -> dict[str, Any]:
    """What is needed to use the trained network without its data set."""
    source = loaders.source
    return {
        "model": config.model,
        "num_classes": source.num_classes,
        "in_channels": source.channels,
        "image_size": source.image_size,
        "mean": list(source.mean),
        "std": list(source.std),
        "classes": list(source.classes),
    }
