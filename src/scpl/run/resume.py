"""Join the configuration of an interrupted run with the flags given now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from scpl.errors import InputError
from scpl.run.config import RUNTIME_FIELDS, TrainConfig, flag, read_toml
from scpl.run.folder import RunFolder

__all__ = ["changed_settings", "resumed_config"]


def changed_settings(before: TrainConfig, now: TrainConfig) -> list[str]:
    """List the settings that differ and decide the numbers of a run."""
    old, new = before.to_dict(), now.to_dict()
    return [
        f"{flag(name)} {new.get(name)} (was {old.get(name)})"
        for name in sorted(new.keys() | old.keys())
        if name not in RUNTIME_FIELDS and new.get(name) != old.get(name)
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
