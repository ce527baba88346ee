"""`scpl train`: the loop around the pipeline, and everything a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    connect_ranks,
)
from scpl.app.config import TrainConfig, changed_settings, write_toml
from scpl.app.environment import choose_device, describe_environment, peak_memory, set_threads
from scpl.app.inputs.base import (
    DataSummary,
    Loaders,
    changed_data,
    measured,
    shown_samples,
    with_samples,
)
from scpl.app.launch import after_restart, is_rank, launcher, to_go_on
from scpl.app.network import check_named, describe_network, save_exits, save_network
from scpl.app.planning import balanced
from scpl.app.signals import GracefulStop, outlive_launcher
from scpl.app.train.best import Best, Watch, watch_of
from scpl.app.train.logs import import_tools
from scpl.app.train.progress import Clock, Meter
from scpl.app.train.recorder import Recorder
from scpl.engine.checkpoint import Checkpoints
from scpl.engine.costs import Plan
from scpl.engine.export import ExitNetwork
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import OneRank, Ranks
from scpl.engine.scores import Scores
from scpl.engine.worker import Report
from scpl.errors import CheckpointError, InputError, Interrupted, RemoteError
from scpl.methods import CutBackpropagation, DataParallel
from scpl.pipeline import Pipeline
from scpl.runs import RunFolder
from scpl.runs.metrics import metric_of

__all__ = ["chrome_trace", "dry_run", "resumed_config", "train"]

SECONDS_BETWEEN_FLUSHES = 0.5


def resumed_config(config: TrainConfig, run: Path, named: str | None = None) -> TrainConfig:
    """Check that the flags given now, over the run's own configuration, fit the run.

    Args:
        config: Flags and configuration.
        run: Its folder.
        named: The network as the user names it now; needed where it is made by code of his.

    Raises:
        InputError: if a flag would change the numbers of the run, or the folder alone names code.
    """
    folder = RunFolder.open(run)
    check_named(folder, config.network.model, named)
    out = config.run.out
    if config.run.force or (out is not None and out.resolve() != run.resolve()):
        raise InputError(
            "A resumed run must go on in its own folder, with what is in it",
            f"Got --resume {run}{f' --out {out}' if out else ''}{' --force' * config.run.force}",
            f"Leave out all but --resume {run}; to go on elsewhere, copy the folder first",
        )
    kept = TrainConfig.read(folder.config)
    config.check_together(kept)
    processes = Mesh.from_env().num_ranks if is_rank() else config.run.processes
    if processes != kept.run.processes:
        # Those of the run are one number per process, and say nothing of another number of them.
        given = config.run.stages_per_process
        config = config.changed(
            stages_per_process=() if given == kept.run.stages_per_process else given
        )
    changed = changed_settings(kept, config)
    if changed:
        raise InputError(
            "A resumed run must keep the settings that decide its numbers",
            f"Changed: {', '.join(changed)}",
            "Drop these flags, or start a new run",
        )
    return config.changed(resume=run)


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train a network as configured, with `resume` as that run was; every rank of a run calls it.

    Returns:
        On the last rank (or the only one) the summary, as in ``summary.json``; None elsewhere.

    Raises:
        ScplError: for bad input, a non-finite loss, or an interruption. If another rank failed
            first, RemoteError.
    """
    config.check()
    mesh = Mesh.from_env()
    config = config.changed(processes=mesh.num_ranks)
    threads = set_threads(config.run.threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    ranks = connect_ranks(config)
    # A launcher that sees one rank die sends the others SIGTERM: they must outlive it for the
    # moment that it takes to agree on the cause.
    outlive_launcher()
    stop = GracefulStop(ranks.hurry)
    if not mesh.is_first:  # the one that decides where the run ends
        stop.on_signal(ranks.ask_to_stop)
    with stop if mesh.num_ranks > 1 else nullcontext():
        try:
            launchers = ranks.exchange("launcher", launcher())
            config = after_restart(config, ranks, launchers)
            summary = _train(config, ranks, threads, stop, launchers)
            ranks.close()
        except Interrupted as error:
            ranks.close()
            if mesh.is_first:
                raise
            remote = RemoteError("The first rank ended the run", "It has said why")
            remote.status = 128 + error.signal
            raise remote from None
        except Exception as error:
            if ranks.fail(error, f"Rank {mesh.rank}: {error}"):
                raise
            raise RemoteError("Another rank failed first", str(error)) from error
    return summary


def _train(
    config: TrainConfig, ranks: Ranks, threads: int, stop: GracefulStop, launchers: Sequence[str]
) -> dict[str, Any] | None:
    mesh = ranks.mesh
    with ExitStack() as held:
        resumed = None
        if mesh.is_first:
            resumed, summary = _resumed(config, held)
            ranks.share("finished", summary)
        if (summary := ranks.fetch("finished")) is not None:
            return dict(summary) if mesh.is_last else None
        return _train_run(config, ranks, threads, stop, launchers, resumed, held)


def _resumed(
    config: TrainConfig, held: ExitStack
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Open and lock the folder of a run that is resumed; or read its summary, if it has ended."""
    if config.run.resume is None:
        return None, None
    folder = RunFolder.open(config.run.resume)
    if not folder.summary.exists():
        folder.lock()
        held.callback(folder.unlock)
    # Who held the lock until now may have been about to end it.
    return folder, folder.read_json(folder.summary) if folder.summary.exists() else None


def _train_run(
    config: TrainConfig,
    ranks: Ranks,
    threads: int,
    stop: GracefulStop,
    launchers: Sequence[str],
    resumed: RunFolder | None,
    held: ExitStack,
) -> dict[str, Any] | None:
    mesh = ranks.mesh
    method = build_method(config.suited, config.rows)
    loaders = build_loaders(config) if mesh.is_first else None
    if loaders is not None:
        ranks.share("data", DataSummary.of(loaders).to_json())
    data = DataSummary.from_json(ranks.fetch("data"))
    watch = watch_of(config, data)
    if mesh.is_last:
        import_tools(config.run.log)
    config, plan = balanced(config, ranks, data, loaders)
    initial = loaders.initial() if loaders is not None else None
    told: list[str] = []
    parts = build_partition(config, data.inputs, data.num_classes, initial, told.append, data.task)
    if loaders is not None:
        description = describe_network(config, data, parts)
        if resumed is None:
            folder = _make_folder(config, description, loaders.files, threads, launchers)
            held.callback(folder.unlock)
        else:
            folder = resumed
            _check_same_data(folder, description, loaders.files, data.noun)
            _remember(folder, launchers)
        about = {
            "path": str(folder.path),
            "files": folder.read_about(loaders.files),
            "run": folder.run,
            "locked": folder.is_locked,
        }
        ranks.share("folder", about)
    shared = ranks.fetch("folder")
    if not mesh.is_first:
        folder = RunFolder(Path(shared["path"]))
        folder.complete_about(shared["files"])
        folder.lock(mesh.rank)
        held.callback(folder.unlock)
    if not shared["locked"]:
        told.append(f"Warning: no locks on the disk of {folder.path}: start no other run there")
    run = _Run(config, data, folder, loaders, stop, told, plan, watch)
    checkpoints = Checkpoints(
        folder.checkpoints,
        every=config.run.checkpoint_every,
        keep=config.run.keep,
        note=lambda: run.note(in_epoch=True),
        before_saving=run.flush,
        run=shared["run"],
        tell=run.warn,
    )
    steps = config.chosen.epochs * data.steps
    return run.complete(build_pipeline(config, parts, method, steps, checkpoints, ranks))


def _make_folder(
    config: TrainConfig,
    description: dict[str, Any],
    files: Mapping[str, str],
    threads: int,
    launchers: Sequence[str],
) -> RunFolder:
    """Make the folder of a new run."""
    folder = RunFolder.create(config.run.out, config.run_name, force=config.run.force)
    # Where this run lies and what it shows is not for those that continue or repeat it.
    # The number of threads decides the last bit of a sum, so it is kept.
    shown = {"out": None, "force": False, "json": False, "quiet": False}
    wish = config.data.max_tokens
    read = {"max_tokens": description.get("max_tokens") if wish is None else wish}
    kept = config.resolved().changed(**shown, **read, threads=threads)
    folder.write_text(folder.config, write_toml(kept))
    environment = describe_environment(choose_device(config.run.device), threads)
    folder.write_json(folder.environment, {**environment, "run": uuid.uuid4().hex})
    _remember(folder, launchers)
    for file, content in files.items():
        folder.write_text(folder.path / file, content)
    folder.write_json(folder.description, description)
    return folder


def _remember(folder: RunFolder, launchers: Sequence[str]) -> None:
    """Note who starts the ranks of a run: those that start them again are known by it."""
    about = folder.read_json(folder.environment, optional=True)
    known = {*folder.launchers, *filter(None, launchers)}
    folder.write_json(folder.environment, {**about, "launchers": sorted(known)})


def _check_same_data(
    folder: RunFolder, description: Mapping[str, Any], files: Mapping[str, str], noun: str
) -> None:
    """Check that a resumed run finds the data that it began with; `files` by name as made now."""
    if not folder.description.is_file():
        return
    now, before = json.loads(json.dumps(description)), folder.read_json(folder.description)
    # What only one version of scpl writes down says nothing of the data.
    names = sorted(now.keys() & before.keys() - {"data"})
    changed = changed_data(before, now, noun) or [n for n in names if now[n] != before[n]]
    changed += [name for name, text in files.items() if text.encode() != folder.read_bytes(name)]
    if changed:
        raise CheckpointError(
            "A resumed run must find the data as it was when it began",
            f"Changed: {'; '.join(changed)}",
            "Put the old data back, or start a new run",
        )


class _Run:
    """One run on one rank, from its first or next step to its summary.

    The first rank reads the data, decides on checkpoints and hears signals; the last one records.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSummary,
        folder: RunFolder,
        loaders: Loaders | None,
        stop: GracefulStop,
        told: Sequence[str],
        plan: Plan | None,
        watch: Watch | None,
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.loaders, self.stop, self.told, self.plan = loaders, stop, told, plan
        self.watch = watch
        self.clock = Clock()
        self.recorder: Recorder | None = None
        self._saved: tuple[int, int] | None = None  # step and epoch of the newest checkpoint

    def complete(self, pipeline: Pipeline) -> dict[str, Any] | None:
        """Train to the end, test once, write everything."""
        self.pipeline, self.meter = pipeline, Meter(pipeline)
        if pipeline.mesh.is_last:
            self.folder.ensure()  # on a disk of its own
            quiet = self.config.run.quiet
            self.recorder = Recorder(self.config, self.data, self.folder, quiet=quiet)
            self.stop.on_signal(self._notify)
        note = pipeline.restore() if self.config.run.resume is not None else None
        if note is not None:
            self._saved = pipeline.step, pipeline.epoch
        lines = pipeline.ranks.exchange("stages", describe_stages(pipeline))
        if self.recorder is not None:
            self._introduce(self.recorder, [line for rank in lines for line in rank])
        self.clock = Clock(note)
        if self.watch is not None:
            self.watch.restore(note or {})
        try:
            with self.stop:
                while not self._is_over:
                    self._train_epoch()
                return self._finish()
        except Interrupted:
            pipeline.close()  # the checkpoint is on disk before anyone is told of it
            raise
        except Exception:
            pipeline.abort()
            with suppress(Exception):  # what went wrong first is what counts
                self.flush()
            raise
        finally:
            if self.recorder is not None:
                self.recorder.close()

    @property
    def _is_over(self) -> bool:
        """Whether every epoch is done, or none has got better for too long."""
        epoch, watch = self.pipeline.epoch, self.watch
        over = watch is not None and watch.is_over(epoch)
        return over or epoch >= self.config.chosen.epochs

    def note(self, *, in_epoch: bool) -> dict[str, float]:
        """What to remember in a checkpoint."""
        watched = self.watch.note() if self.watch is not None else {}
        return {**self.clock.note(in_epoch=in_epoch), **watched}

    def flush(self) -> None:
        """Write down all that is known, on the rank that records."""
        if self.recorder is not None:
            self.recorder.flush()

    def warn(self, line: str) -> None:
        """Tell what is to be known but ends nothing."""
        if self.recorder is not None:
            self.recorder.progress.say(f"Warning: {line}")
        elif not self.config.run.quiet:
            sys.stderr.write(f"scpl: Warning: {line}\n")

    def _introduce(self, recorder: Recorder, stages: list[str]) -> None:
        config, data, pipeline = self.config, self.data, self.pipeline
        if config.run.resume is not None:
            recorder.restore(pipeline.step, pipeline.epoch)
        recorder.begin(pipeline.step)
        say, processes = recorder.progress.say, config.run.processes
        say(
            f"{config.method.method}: {config.network.model} on {data.name}, "
            f"{data.train_samples:,} {data.noun} to train, {data.valid_samples:,} to validate, "
            f"{data.test_samples:,} to test; {processes} process{'es' * (processes > 1)} "
            f"on {pipeline.device}, {config.optimizer.precision}"
        )
        for line in (*data.notes, *self.told, *stages):
            say(line)
        if self.plan is not None:
            for line in str(self.plan).splitlines():
                say(line)
            waits = ", ".join(f"{100 * share:.0f} %" for share in self.plan.wait_shares)
            say(f"Cut by measurement: processes are expected to wait {waits} of the time")
        if pipeline.step:
            say(f"Continuing after step {pipeline.step}")
        elif config.run.resume is not None:
            say("No checkpoint yet: beginning with the first step")

    def _notify(self, received: signal.Signals) -> None:
        if self.recorder is not None and not self.config.run.quiet:
            say = self.recorder.progress.say
            say(f"{received.name}: finishing this step and saving; once more to end at once")

    def _train_epoch(self) -> None:
        pipeline, recorder = self.pipeline, self.recorder
        epoch = pipeline.epoch + 1
        if recorder is not None:
            recorder.progress.begin_epoch(epoch, pipeline.batch)
        self.clock.begin_epoch()
        self.meter.begin_epoch()
        self._flushed = time.perf_counter()
        pipeline.train(self.loaders.train if self.loaders else (), self._after_step)
        seconds = self.clock.end_epoch()
        self.meter.end_epoch(epoch)
        scores = None
        if self.data.valid_samples:
            scores = pipeline.evaluate(self.loaders.valid or () if self.loaders else ())
        best = self._is_best(scores)
        if recorder is not None:
            usage = self.meter.collect(epoch)
            rate = _learning_rate(pipeline, self.config.chosen.lr)
            recorder.end_epoch(epoch, self.clock, seconds, rate, scores, usage, best=best)
        if not pipeline.mesh.is_first:
            return
        if self.config.run.checkpoint_every is None or best:
            self._save(in_epoch=False)
        self._end_if_asked(in_epoch=False)

    def _is_best(self, scores: Scores | None) -> bool:
        """Whether the epoch that has just ended is the best so far; all ranks learn it."""
        if self.watch is None or scores is None:
            return False
        found, name = scores.peek(), self.watch.metric.name
        value = None if found is None else {**found.metrics, "loss": found.loss}[name]
        # The line runs dry here: nobody knows what comes next before the last rank has told.
        value = self.pipeline.ranks.exchange("validation", value)[-1]
        return self.watch.see(Best(self.pipeline.epoch, self.pipeline.step, value))

    def _after_step(self, report: Report) -> None:
        if self.recorder is not None:
            self.recorder.add(self.clock.now(), report)
            if time.perf_counter() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
                self.recorder.flush(self.meter.live())
                self._flushed = time.perf_counter()
        if self.pipeline.mesh.is_first:
            self._end_if_asked(in_epoch=True)

    def _tested_on(self) -> Iterator[Any]:
        """The batches of the final test, as long as nobody asks for an end; on the first rank."""
        assert self.loaders is not None
        for batch in self.loaders.test:
            yield batch
            self._end_if_asked(in_epoch=False)

    def _end_if_asked(self, *, in_epoch: bool) -> None:
        """Save and end the run if a signal came, to this rank or to another one."""
        number = self.stop.received or self.pipeline.ranks.asked_to_stop
        if not number:
            return
        step = self._save(in_epoch=in_epoch)
        self.pipeline.stop(f"after step {step}", number)
        error = Interrupted(
            f"Interrupted after step {step}; everything is saved",
            fix=to_go_on(self.folder.path),
        )
        error.signal = number
        raise error

    def _save(self, *, in_epoch: bool) -> int:
        """Save what was reached, unless that is done; returns the step."""
        place = self.pipeline.step, self.pipeline.epoch
        if self._saved is None or place > self._saved:  # before it, if the best was restored
            self.pipeline.checkpoint(**self.note(in_epoch=in_epoch))
            self._saved = place
        return self._saved[0]

    def _finish(self) -> dict[str, Any] | None:
        """Test, export, write; every rank calls it. On the last one it returns the summary."""
        config, pipeline, folder, clock = self.config, self.pipeline, self.folder, self.clock
        wall, trained = clock.now(), pipeline.epoch
        best = self.watch.best if self.watch is not None else None
        last = self._export() if self.watch is not None else None
        if best is not None and best.epoch != trained:
            if pipeline.mesh.is_first:  # an interruption of the test must find the last one saved
                self._save(in_epoch=False)
            pipeline.restore(best.step)
        scores = pipeline.evaluate(self._tested_on() if self.loaders else ())
        test, details = scores.peek(), scores.details(self.data.classes)
        # The last rank knows the mistakes, the first one has the samples.
        if details is not None:
            places = [mistake["sample"] for mistake in details["mistakes"]]
            pipeline.ranks.share("mistakes", places)
        shown = (
            shown_samples(self.loaders.test, pipeline.ranks.fetch("mistakes"))
            if self.loaders
            else []
        )
        network, exits = self._export()
        mine = {
            "memory": peak_memory(pipeline.device),
            "wait": pipeline.timeline.wait_share(),
            "events": pipeline.timeline.events(),
            "stages": len(pipeline.stages),
            "bytes": pipeline.bytes_per_step,
            "shown": shown,
        }
        ranks = pipeline.ranks.exchange("finish", mine)
        pipeline.close()
        if self.recorder is None:
            return None
        assert test is not None, "the last rank has the result"
        assert details is not None, "and what it is made of"
        folder.write_test(with_samples(details, ranks[0]["shown"]))
        self._write(network, exits, folder)
        events = [event for rank in ranks for event in rank["events"]]
        folder.write_json(folder.timeline, events)
        if config.run.trace:
            folder.write_json(folder.trace, chrome_trace(events))
        speed = self.data.train_samples * trained / clock.train_seconds()
        summary = {
            "method": config.method.method,
            "data": config.data.data,
            "model": config.network.model,
            "stages": pipeline.parts.num_stages,
            "processes": config.run.processes,
            "epochs": config.chosen.epochs,
            "seed": config.run.seed,
            "task": self.data.task.kind,
            "metric": self.data.task.metrics[0],
            **measured(test),
            **self._chosen_epoch(trained),
            **self.recorder.validation(pipeline.epoch),
            "samples_per_second": speed,
            "train_seconds": clock.train_seconds(),
            "wall_seconds": wall,
            "peak_memory_bytes": [rank["memory"] for rank in ranks],
            "wait_share": [rank["wait"] for rank in ranks for _ in range(rank["stages"])],
            "bytes_per_step": [rank["bytes"] for rank in ranks],
            "notes": [*_notes(pipeline, config.rows), *self._ended(trained)],
            "run": str(folder.path),
        }
        if last is not None:
            self._save_last(*last, {**summary, "weights_epoch": trained})
        self.recorder.finish(summary)
        folder.write_json(folder.summary, summary)
        for line in self._ended(trained):
            self.recorder.progress.say(line)
        noun = self.data.noun
        found = ((metric_of(name), value) for name, value in test.metrics.items())
        told = ", ".join(
            f"{metric.title} {metric.write(value, bounds=test.intervals.get(metric.name))}"
            for metric, value in found
        )
        self.recorder.progress.say(
            f"test {told} on {test.num_samples:,} {noun}; {speed:,.0f} {noun}/s"
        )
        return summary

    def _export(self) -> tuple[nn.Module, ExitNetwork | None]:
        """The network as it is now, and the one with exits if there are any; all ranks call it."""
        pipeline = self.pipeline
        return pipeline.export(), pipeline.export_exits() if pipeline.has_exits else None

    def _write(self, network: nn.Module, exits: ExitNetwork | None, folder: RunFolder) -> None:
        save_network(network, folder, self.data.classes, self.data.task)
        if exits is not None:
            save_exits(exits, network, folder)

    def _save_last(
        self, network: nn.Module, exits: ExitNetwork | None, summary: Mapping[str, Any]
    ) -> None:
        """Leave the last epoch as a finished run of its own, in a folder of this one."""
        assert self.recorder is not None, "it is called where results are written"
        last = self.folder.last
        last.complete_about(self.folder.read_about(self.data.inputs.files))
        self._write(network, exits, last)
        # What was measured of the best epoch says nothing of this one.
        known = {k: v for k, v in summary.items() if not k.startswith(("test_", "valid_", "notes"))}
        validation = self.recorder.validation(summary["weights_epoch"])
        last.write_json(last.summary, {**known, **validation, "run": str(last.path)})

    def _chosen_epoch(self, trained: int) -> dict[str, Any]:
        """How many epochs there were, and of which one the network is."""
        watched = {"best_by": self.watch.metric.name} if self.watch is not None else {}
        return {"trained_epochs": trained, "weights_epoch": self.pipeline.epoch, **watched}

    def _ended(self, trained: int) -> list[str]:
        """Say why it ended early, and of which epoch the network is, where one was chosen."""
        watch = self.watch
        if watch is None:
            return []
        title, told = watch.metric.title, []
        if watch.is_over(trained) and trained < self.config.chosen.epochs:
            told.append(
                f"Stopped early, after epoch {trained} of {self.config.chosen.epochs}: validation "
                f"{title} has not been better for {watch.patience} epoch"
                + "s"
                * (watch.patience != 1)
            )
        if watch.best is None:
            return [
                *told,
                f"Weights of epoch {trained}, the last: no validation {title} is a number",
            ]
        value = watch.metric.write(watch.best.value)
        return [*told, f"Weights of epoch {watch.best.epoch}, the best: validation {title} {value}"]


def _learning_rate(pipeline: Pipeline, highest: float) -> float:
    """The rate of layers now, without factors of stages: the same on all ranks."""
    for stage in pipeline.stages:
        if stage.optimizer is not None:
            group = stage.optimizer.param_groups[0]
            return highest * float(group["lr"]) / float(group["initial_lr"])
    return 0.0


def _notes(pipeline: Pipeline, rows: int) -> list[str]:
    """What a reader must know to compare this run, of mini-batches of so many rows, with others."""
    method, found = pipeline.method, []
    seen = rows
    if isinstance(method, CutBackpropagation):
        seen = rows // method.slices
        if method.slices > 1:
            found.append(f"{method.slices} micro-batches of {seen} rows")
    elif method.layout == "replicas":
        seen = rows // pipeline.mesh.num_ranks
        found.append(f"{seen} rows of each mini-batch on each replica")
    if isinstance(method, DataParallel):
        if method.compress_gradients != "none":
            found.append(f"gradients averaged in {method.compress_gradients}")
        if method.accumulation > 1:
            together = method.accumulation * rows
            found.append(f"{method.accumulation} mini-batches to an update: {together} rows")
    normalises = any(isinstance(m, _BatchNorm) for m in pipeline.parts.model.modules())
    if normalises and seen < rows:
        found.append(f"BatchNorm sees {seen} rows instead of {rows}, so the numbers differ from bp")
    return found


MICROSECONDS = 1e6


def chrome_trace(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn events of `scpl.engine.timeline` into a trace: a process per rank, a track per stage."""
    listed = list(events)
    origin = min((event["begin"] for event in listed), default=0.0)
    names = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({event["rank"] for event in listed})
    ]
    spans = [
        {
            "ph": "X",
            "name": event["activity"],
            "cat": event["activity"],
            "pid": event["rank"],
            # What goes on behind the worker's back gets a track of its own.
            "tid": f"stage {event['stage']}"
            + (" (link)" if event["activity"] == "receive" else ""),
            "ts": (event["begin"] - origin) * MICROSECONDS,
            "dur": (event["end"] - event["begin"]) * MICROSECONDS,
            "args": {"step": event["step"]},
        }
        for event in listed
    ]
    return {"traceEvents": names + spans, "displayTimeUnit": "ms"}


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Build everything, train one step, write nothing.

    Returns:
        What would be trained: samples, steps, and a line per stage.
    """
    config.check()
    set_threads(config.run.threads, config.run.processes)
    method = build_method(config.suited, config.rows)
    loaders = build_loaders(config)
    data = DataSummary.of(loaders)
    watch_of(config, data)
    import_tools(config.run.log)
    notes = list(data.notes)
    ranks = OneRank(choose_device(config.run.device))
    config, _ = balanced(config, ranks, data, loaders)
    parts = build_partition(
        config, data.inputs, data.num_classes, loaders.initial(), notes.append, data.task
    )
    total_steps = config.chosen.epochs * len(loaders.train)
    pipeline = build_pipeline(config, parts, method, total_steps, ranks=ranks)
    report = next(pipeline.steps(loaders.train))
    return {
        "method": config.method.method,
        "data": config.data.data,
        "model": config.network.model,
        f"train_{data.noun}": data.train_samples,
        f"valid_{data.noun}": data.valid_samples,
        f"test_{data.noun}": data.test_samples,
        **({"notes": notes} if notes else {}),
        "steps": total_steps,
        "first_losses": report.values(),
        "stages": describe_stages(pipeline),
    }


def describe_stages(pipeline: Pipeline) -> list[str]:
    """One line per stage of this rank: layers, output, parameters; of replicas the first has it."""
    lines, mesh = [], pipeline.mesh
    if mesh.replica > 0:
        return []
    several = f"; {mesh.num_replicas} replicas" if mesh.num_replicas > 1 else ""
    for stage in pipeline.stages:
        names = pipeline.parts.names[stage.index]
        span = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" if names else "-"
        body = sum(p.numel() for p in stage.body.parameters())
        extra = sum(p.numel() for p in stage.objective.parameters())
        shape = " x ".join(map(str, pipeline.parts.feature_shapes[stage.index]))
        lines.append(
            f"  stage {stage.index}: {span} -> {shape}; {body:,} parameters, "
            f"{extra:,} in its objective{several}"
        )
    if pipeline.mesh.is_last:
        replaced = pipeline.method.replaces_readout
        own = ", ".join(pipeline.parts.readout_names)
        lines.append(f"  readout: {f'that of {pipeline.method.name}' if replaced else own}")
    return lines
