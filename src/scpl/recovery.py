"""Where a run continues: the newest checkpoint of which every stage's part can be read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scpl.checkpoint import intact_steps, read_manifest, read_part
from scpl.control import Control
from scpl.stage import Stage

__all__ = ["recover"]


def recover(
    stages: Sequence[Stage],
    folder: Path,
    owners: Sequence[int],
    control: Control,
    step: int | None,
) -> dict[str, Any] | None:
    """Load a checkpoint into this rank's stages; all ranks must call it.

    Args:
        stages: The stages of this rank.
        folder: Where checkpoints are.
        owners: The rank that saves each stage of the network. Ranks that save none are replicas
            of the first.
        control: The ranks.
        step: Which checkpoint; None: the newest that all ranks can read.

    Returns:
        What the checkpoint says of itself; None if there is none.

    Raises:
        CheckpointError: if it is damaged or of another network; no stage has changed.
    """
    replicated = len(set(owners)) < control.mesh.num_ranks
    reads = not replicated or control.mesh.is_first
    hosted = [stage.index for stage in stages]
    readable = intact_steps(folder, hosted, len(owners)) if reads else None
    everyone = control.exchange("restore", readable)
    agreed = set.intersection(*(set(steps) for steps in everyone if steps is not None))
    step = max(agreed, default=None) if step is None else step
    if step is None:
        return None
    manifest = read_manifest(folder, step, hosted[0]) if reads else None
    states = [read_part(folder, step, index) for index in hosted] if reads else []
    if replicated:
        (manifest, states) = _from_first((manifest, states), control)
    assert manifest is not None
    parts = list(zip(stages, states, strict=True))
    for stage, state in parts:
        stage.check_state_dict(state)  # all of them first: all stages change, or none
    for stage, state in parts:
        stage.load_state_dict(state)
    return manifest


def _from_first(value: Any, control: Control) -> Any:
    """Hand the first rank's tensors and plain values to all ranks."""
    buffer = io.BytesIO()
    if control.mesh.is_first:
        torch.save(value, buffer)
    size = control.exchange("replica", buffer.tell())[0]
    content = torch.zeros(size, dtype=torch.uint8)
    if control.mesh.is_first:
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    control.broadcast(content, 0)
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
