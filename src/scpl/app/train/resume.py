"""Go on with an interrupted run: check that it is the same run, and find where it stood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scpl.app.config import TrainConfig, changed_settings
from scpl.engine.checkpoint import intact_steps
from scpl.errors import CheckpointError, InputError
from scpl.pipeline import Pipeline
from scpl.runs import RunFolder

__all__ = [
    "check_same_data",
    "restore",
    "resumed_config",
]


def resumed_config(config: TrainConfig, run: Path) -> TrainConfig:
    """Check that the flags given now fit the run, and keep them.

    Args:
        config: The flags given now, over the run's own configuration.
        run: The run folder.

    Raises:
        InputError: if a flag would change the numbers of the run.
    """
    folder = RunFolder.open(run)
    changed = changed_settings(TrainConfig.read(folder.config), config)
    if changed:
        raise InputError(
            "A resumed run must keep the settings that decide its numbers",
            f"Changed: {', '.join(changed)}",
            "Drop these flags, or start a new run",
        )
    return config.changed(resume=run)


def check_same_data(
    folder: RunFolder, description: Mapping[str, Any], files: Mapping[str, str]
) -> None:
    """Check that a resumed run finds the data that it began with.

    Args:
        folder: The run folder.
        description: The network and its inputs, as the data makes them now.
        files: What lies beside them in the folder, by name.

    Raises:
        CheckpointError: naming what differs.
    """
    if not folder.description.is_file():
        return
    now, before = json.loads(json.dumps(description)), folder.read_json(folder.description)
    # What only one version of scpl writes down says nothing of the data.
    changed = [key for key in sorted(now.keys() & before.keys()) if now[key] != before[key]]
    changed += [name for name, text in files.items() if text.encode() != folder.read_bytes(name)]
    if changed:
        raise CheckpointError(
            "A resumed run must find the data as it was when it began",
            f"Changed: {', '.join(changed)}",
            "Put the old data back, or start a new run",
        )


def restore(pipeline: Pipeline, folder: RunFolder) -> dict[str, Any] | None:
    """Load the newest intact checkpoint; all ranks call it.

    Returns:
        What it says of itself; None if the run was interrupted before its first checkpoint.

    Raises:
        CheckpointError: if there are checkpoints, but none is intact: to begin anew is not what
            ``--resume`` asks for.
    """
    note = pipeline.restore()
    if note is not None:
        return note
    stages = [stage.index for stage in pipeline.stages]
    intact = set(intact_steps(folder.checkpoints, stages, pipeline.parts.num_stages))
    complete = {
        path
        for path in folder.checkpoints.glob("step-*")
        if all((path / f"stage-{stage}.json").exists() for stage in stages)
    }
    damaged = sorted(path for path in complete if int(path.name[len("step-") :]) not in intact)
    if damaged:
        raise CheckpointError(
            "A run must have an intact checkpoint to go on from",
            f"Damaged: {', '.join(map(str, damaged))}",
            "Put the files back, or start a new run",
        )
    return None
