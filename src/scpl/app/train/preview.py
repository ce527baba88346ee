"""`scpl train --dry-run`: what would be trained, without writing anything."""

from __future__ import annotations

from typing import Any

from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    set_threads,
)
from scpl.app.config import TrainConfig
from scpl.app.kinds.base import Facts
from scpl.pipeline import Pipeline

__all__ = ["describe_stages", "dry_run"]


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Build everything, train one step, write nothing.

    Returns:
        What would be trained: samples, steps, and a line per stage.
    """
    config.check()
    set_threads(config.threads, config.processes)
    loaders = build_loaders(config)
    facts = Facts.of(loaders)
    parts = build_partition(config, facts, loaders.initial())
    method = build_method(config)
    total_steps = config.epochs * len(loaders.train)
    pipeline = build_pipeline(config, parts, method, total_steps)
    report = next(pipeline.steps(loaders.train))
    return {
        "method": config.method,
        "data": config.data,
        "model": config.model,
        f"train_{facts.noun}": facts.train_samples,
        f"valid_{facts.noun}": facts.valid_samples,
        f"test_{facts.noun}": facts.test_samples,
        **({"notes": list(facts.notes)} if facts.notes else {}),
        "steps": total_steps,
        "first_losses": report.values(),
        "stages": describe_stages(pipeline),
    }


def describe_stages(pipeline: Pipeline) -> list[str]:
    """One line per stage of this rank: layers, output, parameters."""
    lines = []
    for stage in pipeline.stages:
        names = pipeline.parts.names[stage.index]
        span = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" if names else "-"
        body = sum(p.numel() for p in stage.body.parameters())
        extra = sum(p.numel() for p in stage.objective.parameters())
        shape = " x ".join(map(str, pipeline.parts.feature_shapes[stage.index]))
        lines.append(
            f"  stage {stage.index}: {span} -> {shape}; {body:,} parameters, "
            f"{extra:,} in its objective"
        )
    if pipeline.mesh.is_last:
        replaced = pipeline.method.replaces_readout
        own = ", ".join(pipeline.parts.readout_names)
        lines.append(
            f"  read-out: that of {pipeline.method.name}" if replaced else f"  read-out: {own}"
        )
    return lines
