"""Go on with an interrupted run: check that it is the same run, and find where it stood."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from scpl.app.config import RUNTIME_FIELDS, TrainConfig, flag, read_toml
from scpl.engine.checkpoint import intact_steps
from scpl.engine.ranks import Ranks
from scpl.errors import CheckpointError, InputError
from scpl.pipeline import Pipeline
from scpl.runs import RunFolder

__all__ = [
    "after_restart",
    "changed_settings",
    "check_same_data",
    "launcher",
    "restore",
    "resumed_config",
]


def changed_settings(
    before: TrainConfig, now: TrainConfig, ignored: Set[str] = RUNTIME_FIELDS
) -> list[str]:
    """List the settings that differ; by default those that decide the numbers of a run."""
    old, new = before.to_dict(), now.to_dict()
    return [
        f"{flag(name)} {new.get(name)} (was {old.get(name)})"
        for name in sorted(new.keys() | old.keys())
        if name not in ignored
        and new.get(name) != old.get(name)
        # Without a wish for a number of threads, that of the run is as good as any.
        and not (name == "threads" and name not in new)
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
    before = TrainConfig.from_dict(read_toml(folder.config), str(folder.config))
    changed = changed_settings(before, config)
    if changed:
        raise InputError(
            "A resumed run must keep the settings that decide its numbers",
            f"Changed: {', '.join(changed)}",
            "Drop these flags, or start a new run",
        )
    return replace(config, resume=run)


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


def launcher() -> str:
    """The launcher of this process and its restarts; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name}/{os.getppid()}" if name else ""


def after_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """A run that torchrun restarts goes on where it was; every rank calls it.

    Raises:
        InputError: if the run has no name to find it by.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not restarted or config.resume is not None:
        return config
    if config.out is None:
        raise InputError("A run that may be restarted needs --out", "Got none")
    if ranks.mesh.is_first:
        # What another run left in a folder that is to be overwritten is nothing to go on from.
        folder = RunFolder(config.out)
        known = folder.environment.exists() and folder.config.exists()
        about = folder.read_json(folder.environment) if known else {}
        ranks.share("restarted", about.get("launcher") == launcher())
    return replace(config, resume=config.out) if ranks.fetch("restarted") else config
