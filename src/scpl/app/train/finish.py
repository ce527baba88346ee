"""The end of a run: test once, gather the weights, write what remains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from scpl.app.config import TrainConfig
from scpl.app.environment import peak_memory
from scpl.app.kinds.base import Facts, Loaders
from scpl.app.network import save_exits, save_network
from scpl.app.train.clock import Clock
from scpl.app.train.recorder import Recorder
from scpl.engine.scores import Evaluation
from scpl.methods import CutBackpropagation
from scpl.pipeline import Pipeline
from scpl.runs import RunFolder

__all__ = ["chrome_trace", "finish"]


def finish(
    config: TrainConfig,
    facts: Facts,
    folder: RunFolder,
    loaders: Loaders | None,
    pipeline: Pipeline,
    clock: Clock,
    recorder: Recorder | None,
) -> dict[str, Any] | None:
    """Test, export, write; every rank calls it.

    Returns:
        On the last rank the summary; None elsewhere.
    """
    wall = clock.now()
    test = pipeline.evaluate(loaders.test if loaders else ()).peek()
    network = pipeline.export()
    exits = pipeline.export_exits() if pipeline.has_exits else None
    mine = {
        "memory": peak_memory(pipeline.device),
        "wait": pipeline.timeline.wait_share(),
        "events": pipeline.timeline.events(),
        "stages": len(pipeline.stages),
        "bytes": pipeline.bytes_per_step,
    }
    ranks = pipeline.ranks.exchange("finish", mine)
    pipeline.close()
    if recorder is None:
        return None
    assert test is not None, "the last rank has the result"
    save_network(network, folder)
    if exits is not None:
        save_exits(exits, network, folder)
    events = [event for rank in ranks for event in rank["events"]]
    folder.write_json(folder.timeline, events)
    if config.trace:
        folder.write_json(folder.trace, chrome_trace(events))
    summary = {
        "method": config.method,
        "data": config.data,
        "model": config.model,
        "stages": pipeline.parts.num_stages,
        "processes": config.processes,
        "epochs": config.epochs,
        "seed": config.seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "valid_accuracy": recorder.valid_accuracy,
        "samples_per_second": facts.train_samples * config.epochs / clock.train_seconds(),
        "train_seconds": clock.train_seconds(),
        "wall_seconds": wall,
        "peak_memory_bytes": [rank["memory"] for rank in ranks],
        "wait_share": [rank["wait"] for rank in ranks for _ in range(rank["stages"])],
        "bytes_per_step": [rank["bytes"] for rank in ranks],
        "notes": notes(pipeline, config.batch_size * config.views),
        "run": str(folder.path),
    }
    folder.write_json(folder.summary, summary)
    recorder.progress.say(_verdict(test, summary, facts.noun))
    return summary


def notes(pipeline: Pipeline, rows: int) -> list[str]:
    """What a reader must know to compare this run with those of other methods.

    Args:
        pipeline: The pipeline that trained.
        rows: Rows of a mini-batch.
    """
    method, found = pipeline.method, []
    seen = rows
    if isinstance(method, CutBackpropagation):
        seen = rows // method.slices
        if method.slices > 1:
            found.append(f"{method.slices} micro-batches of {seen} rows")
    elif method.layout == "replicas":
        seen = rows // pipeline.mesh.num_ranks
        found.append(f"{seen} rows of each mini-batch on each replica")
    normalises = any(isinstance(m, _BatchNorm) for m in pipeline.parts.model.modules())
    if normalises and seen < rows:
        found.append(f"BatchNorm sees {seen} rows instead of {rows}, so the numbers differ from bp")
    return found


def _verdict(test: Evaluation, summary: dict[str, Any], noun: str) -> str:
    return (
        f"test accuracy {100 * test.accuracy:.2f} % on {test.num_samples:,} {noun}; "
        f"{summary['samples_per_second']:,.0f} {noun}/s"
    )


MICROSECONDS = 1e6


def chrome_trace(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn events into a trace: a process per rank, a track per stage.

    Args:
        events: As `scpl.engine.timeline.Timeline.events` gives them.
    """
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
