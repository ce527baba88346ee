"""The end of a run: test once, gather the weights, write what remains."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from scpl.methods import MicroBatched
from scpl.pipeline import Pipeline
from scpl.run.clock import Clock
from scpl.run.config import TrainConfig
from scpl.run.environment import peak_memory
from scpl.run.facts import Facts
from scpl.run.folder import RunFolder
from scpl.run.loaders import Loaders
from scpl.run.recorder import Recorder
from scpl.run.trace import chrome_trace
from scpl.run.trained import save_exits, save_network
from scpl.scores import Evaluation

__all__ = ["finish"]


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
    exits = pipeline.export_exits() if pipeline.method.has_exits else None
    mine = {
        "memory": peak_memory(pipeline.device),
        "wait": pipeline.timeline.wait_share(),
        "events": pipeline.timeline.events(),
        "stages": len(pipeline.stages),
        "bytes": pipeline.bytes_per_step,
    }
    ranks = pipeline.control.exchange("finish", mine)
    pipeline.close()
    if recorder is None:
        return None
    assert test is not None, "the last rank has the result"
    save_network(network, folder)
    if exits is not None:
        save_exits(exits, network, folder)
    events = [event for rank in ranks for event in rank["events"]]
    folder.write_json(folder.path / "timeline.json", events)
    if config.trace:
        folder.write_json(folder.path / "trace.json", chrome_trace(events))
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
    if isinstance(method, MicroBatched):
        seen = rows // method.num_micro_batches
        if method.num_micro_batches > 1:
            found.append(f"{method.num_micro_batches} micro-batches of {seen} rows")
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
