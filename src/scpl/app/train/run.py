"""`scpl train`: the loop around the pipeline, and everything a run leaves behind."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    choose_device,
    set_threads,
)
from scpl.app.config import TrainConfig, write_toml
from scpl.app.environment import describe_environment
from scpl.app.folder import RunFolder
from scpl.app.kinds.base import Facts, Loaders
from scpl.app.network import describe_network
from scpl.app.signals import GracefulStop
from scpl.app.train.clock import Clock
from scpl.app.train.finish import finish
from scpl.app.train.preview import describe_stages
from scpl.app.train.progress import Meter
from scpl.app.train.recorder import Recorder
from scpl.app.train.resume import after_restart, check_same_data, launcher, restore
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import Control, connect
from scpl.errors import Interrupted, RemoteError
from scpl.pipeline import Pipeline

__all__ = ["train"]

SECONDS_BETWEEN_FLUSHES = 0.5


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train a network as configured; every rank of a run calls it.

    Args:
        config: What to train; with `resume` the configuration of that run.

    Returns:
        On the last rank (or the only one) the summary, as in ``summary.json``; None elsewhere.

    Raises:
        ScplError: for bad input, a non-finite loss, or an interruption. If another rank failed
            first, RemoteError.
    """
    config.check()
    mesh = Mesh.from_env(config.spread or None)
    config = replace(config, processes=mesh.num_ranks)
    threads = set_threads(config.threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = choose_device(config.device)
    control = connect(mesh, device, config.timeout)
    # A launcher that sees one rank die sends the others SIGTERM: they must outlive it for the
    # moment that it takes to agree on the cause.
    stop = GracefulStop(control.hurry)
    with stop if mesh.num_ranks > 1 else nullcontext():
        try:
            summary = _train(after_restart(config, control), control, threads, stop)
            control.close()
        except Interrupted:
            control.close()
            if mesh.is_first:
                raise
            raise RemoteError("The first rank ended the run", "It has said why") from None
        except Exception as error:
            if control.fail(error, f"Rank {mesh.rank}: {error}"):
                raise
            raise RemoteError("Another rank failed first", str(error)) from error
    return summary


def _train(
    config: TrainConfig, control: Control, threads: int, stop: GracefulStop
) -> dict[str, Any] | None:
    mesh, device = control.mesh, choose_device(config.device)
    if mesh.is_first:
        control.share("finished", _finished(config))
    if (summary := control.fetch("finished")) is not None:
        return dict(summary) if mesh.is_last else None
    loaders = build_loaders(config) if mesh.is_first else None
    if loaders is not None:
        control.share("facts", Facts.of(loaders).to_json())
    facts = Facts.from_json(control.fetch("facts"))
    initial = loaders.initial() if loaders is not None else None
    parts = build_partition(config, facts, initial)
    method = build_method(config)
    if loaders is not None:
        description = describe_network(config, facts, parts)
        made = _prepare_folder(config, description, loaders.files, device, threads)
        control.share("folder", {"path": str(made.path), "files": made.read_about()})
    shared = control.fetch("folder")
    folder = RunFolder(Path(shared["path"]))
    folder.complete_about(shared["files"])
    pipeline = build_pipeline(
        config, parts, method, config.epochs * facts.steps, folder.checkpoints, control
    )
    return _Run(config, facts, folder, loaders, pipeline, stop).complete()


def _finished(config: TrainConfig) -> dict[str, Any] | None:
    if config.resume is None:
        return None
    folder = RunFolder.open(config.resume)
    return folder.read_json(folder.summary) if folder.summary.exists() else None


def _prepare_folder(
    config: TrainConfig,
    description: dict[str, Any],
    files: Mapping[str, str],
    device: Any,
    threads: int,
) -> RunFolder:
    """Make or open the run folder; a resumed one keeps what it says of the run."""
    if config.resume is not None:
        folder = RunFolder.open(config.resume)
        check_same_data(folder, description, files)
        return folder
    name = f"{Path(config.data).name}-{config.model}-{config.method}"
    folder = RunFolder.create(config.out, name, force=config.force)
    # Where this run lies and what it shows is not for those that continue or repeat it.
    # The number of threads decides the last bit of a sum, so it is kept.
    kept = replace(config, out=None, force=False, json=False, quiet=False, threads=threads)
    folder.write_text(folder.config, write_toml(kept))
    about = {**describe_environment(device, threads), "launcher": launcher()}
    folder.write_json(folder.environment, about)
    for file, content in files.items():
        folder.write_text(folder.path / file, content)
    folder.write_json(folder.description, description)
    return folder


class _Run:
    """One run on one rank, from its first or next step to its summary.

    The first rank reads the data, decides on checkpoints and hears signals; the last one records.
    """

    def __init__(
        self,
        config: TrainConfig,
        facts: Facts,
        folder: RunFolder,
        loaders: Loaders | None,
        pipeline: Pipeline,
        stop: GracefulStop,
    ) -> None:
        self.config, self.facts, self.folder = config, facts, folder
        self.loaders, self.pipeline, self.stop = loaders, pipeline, stop
        self.clock = Clock()
        self.meter = Meter(pipeline)
        self.recorder: Recorder | None = None
        if pipeline.mesh.is_last:
            folder.ensure()  # on a disk of its own
            self.recorder = Recorder(config, facts, folder, quiet=config.quiet)
            stop.on_signal(self._notify)
            pipeline.on_checkpoint(self.recorder.flush)

    def complete(self) -> dict[str, Any] | None:
        """Train to the end, test once, write everything."""
        note = restore(self.pipeline, self.folder) if self.config.resume is not None else None
        lines = self.pipeline.control.exchange("stages", describe_stages(self.pipeline))
        if self.recorder is not None:
            self._introduce(self.recorder, [line for rank in lines for line in rank])
        self.clock = Clock(note)
        try:
            with self.stop:
                while self.pipeline.epoch < self.config.epochs:
                    self._train_epoch()
            return finish(
                self.config, self.facts, self.folder, self.loaders, self.pipeline,
                self.clock, self.recorder,
            )  # fmt: skip
        except Interrupted:
            self.pipeline.close()  # the checkpoint is on disk before anyone is told of it
            raise
        except Exception:
            self.pipeline.abort()
            if self.recorder is not None:
                with suppress(Exception):  # what went wrong first is what counts
                    self.recorder.flush()
            raise
        finally:
            if self.recorder is not None:
                self.recorder.close()

    def _introduce(self, recorder: Recorder, stages: list[str]) -> None:
        config, facts, pipeline = self.config, self.facts, self.pipeline
        if config.resume is not None:
            recorder.restore(pipeline.step, pipeline.epoch)
        say = recorder.progress.say
        say(
            f"{config.method}: {config.model} on {facts.name}, {facts.train_samples:,} "
            f"{facts.noun} to train, {facts.valid_samples:,} to validate, "
            f"{facts.test_samples:,} to test; "
            f"{config.processes} process{'es' * (config.processes > 1)} on {pipeline.device}, "
            f"{config.precision}"
        )
        for line in (*facts.notes, *stages):
            say(line)
        if pipeline.step:
            say(f"Continuing after step {pipeline.step}")

    def _notify(self, name: str) -> None:
        if self.recorder is not None and not self.config.quiet:
            say = self.recorder.progress.say
            say(f"{name}: finishing this step and saving; once more to end at once")

    def _train_epoch(self) -> None:
        pipeline, recorder = self.pipeline, self.recorder
        epoch = pipeline.epoch + 1
        if recorder is not None:
            recorder.progress.begin_epoch(epoch, pipeline.batch)
        self.clock.begin_epoch()
        self.meter.begin_epoch()
        flushed = time.perf_counter()
        for report in pipeline.train(self.loaders.train if self.loaders else ()):
            if recorder is not None:
                recorder.add(self.clock.now(), report)
                if time.perf_counter() - flushed >= SECONDS_BETWEEN_FLUSHES:
                    recorder.flush(self.meter.live())
                    flushed = time.perf_counter()
            if pipeline.mesh.is_first:
                self._checkpoint_if_due()
        seconds = self.clock.end_epoch()
        self.meter.end_epoch(epoch)
        scores = None
        if self.facts.valid_samples:
            scores = pipeline.evaluate(self.loaders.valid or () if self.loaders else ())
        if recorder is not None:
            usage = self.meter.collect(epoch)
            recorder.end_epoch(epoch, self.clock, seconds, _learning_rate(pipeline), scores, usage)
        if pipeline.mesh.is_first and (self.config.checkpoint_every is None or self.stop.received):
            pipeline.checkpoint(**self.clock.note(in_epoch=False))
        if pipeline.mesh.is_first and self.stop.received and epoch < self.config.epochs:
            self._interrupt(self.stop.received)

    def _checkpoint_if_due(self) -> None:
        """The first rank decides; the others hear of it in the stream."""
        every = self.config.checkpoint_every
        if self.stop.received or (every is not None and self.pipeline.step % every == 0):
            self.pipeline.checkpoint(**self.clock.note(in_epoch=True))
        if self.stop.received:
            self._interrupt(self.stop.received)

    def _interrupt(self, number: int) -> None:
        self.pipeline.stop(f"after step {self.pipeline.step}")
        error = Interrupted(
            f"Interrupted after step {self.pipeline.step}; everything is saved",
            fix=f"Continue with: scpl train --resume {self.folder.path}",
        )
        error.signal = number
        raise error


def _learning_rate(pipeline: Pipeline) -> float:
    """Of this rank's first stage that has an optimizer; all stages have the same schedule."""
    optimizers = [stage.optimizer for stage in pipeline.stages if stage.optimizer]
    return float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
