"""Resumable state on disk: one file per stage, written in the background.

A checkpoint of step s is the folder ``step-<s>`` with, for every stage k, ``stage-<k>.pt`` (tensors
and plain values; read with ``weights_only``, so nothing in it can run) and ``stage-<k>.json``, its
manifest, written last. It counts when every manifest is there and every file has the size and
checksum that its manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from scpl.errors import CheckpointError

__all__ = ["CheckpointWriter", "intact_steps", "read_manifest", "read_part"]

FORMAT = 1


class CheckpointWriter:
    """Writes the parts of this rank's stages, in the background, and removes old ones.

    Args:
        directory: Where the ``step-...`` folders go.
        num_stages: Stages of the whole line.
        keep: How many of its own newest parts each stage keeps.
    """

    def __init__(self, directory: Path, num_stages: int, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError("At least one checkpoint must be kept", f"Got keep={keep}")
        self._directory = directory
        self._num_stages = num_stages
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._waiting: list[Future[None]] = []

    def write(self, index: int, step: int, state: dict[str, Any], note: dict[str, Any]) -> None:
        """Write one stage's part; returns at once.

        Args:
            index: The stage.
            step: Training steps done.
            state: Tensors on the CPU that nobody changes any more, and plain values.
            note: JSON values for the manifest: where in the data the run stands.

        Raises:
            CheckpointError: if an earlier part could not be written.
        """
        self._raise_failures()
        self._waiting.append(self._pool.submit(self._write, index, step, state, note))

    def close(self) -> None:
        """Wait until all is written.

        Raises:
            CheckpointError: if a part could not be written.
        """
        self._pool.shutdown(wait=True)
        self._raise_failures()

    def _raise_failures(self) -> None:
        done = [future for future in self._waiting if future.done()]
        self._waiting = [future for future in self._waiting if not future.done()]
        for future in done:
            future.result()

    def _write(self, index: int, step: int, state: dict[str, Any], note: dict[str, Any]) -> None:
        folder = self._directory / f"step-{step:09d}"
        data = folder / f"stage-{index}.pt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft = data.with_suffix(".pt.tmp")
            torch.save(state, draft)
            manifest = {
                "format": FORMAT,
                "step": step,
                "stage": index,
                "num_stages": self._num_stages,
                "bytes": draft.stat().st_size,
                "sha256": _checksum(draft),
                **note,
            }
            _replace(draft, data)
            text = data.with_suffix(".json.tmp")
            text.write_text(json.dumps(manifest))
            _replace(text, data.with_suffix(".json"))
            self._prune(index)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                "A checkpoint must be written completely",
                f"{data}: {error}",
                "Free some space or choose another folder; earlier checkpoints are kept",
            ) from error

    def _prune(self, index: int) -> None:
        own = [
            folder
            for folder in _step_folders(self._directory)
            if (folder / f"stage-{index}.json").exists()
        ]
        for folder in own[: -self._keep]:
            for suffix in (".json", ".pt"):  # manifest first: half a checkpoint never counts
                (folder / f"stage-{index}{suffix}").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def intact_steps(directory: Path, stages: Iterable[int], num_stages: int) -> list[int]:
    """Find the steps of which the parts of these stages are all there and intact.

    Args:
        directory: Where the ``step-...`` folders are.
        stages: The stages whose parts are needed here.
        num_stages: Stages of the whole line.

    Raises:
        CheckpointError: if parts are of a line with another number of stages.
    """
    wanted = list(stages)
    found = []
    for folder in _step_folders(directory):
        if all(_is_intact(folder / f"stage-{k}.pt") for k in wanted):
            step = int(folder.name.removeprefix("step-"))
            saved = read_manifest(directory, step, wanted[0])["num_stages"]
            if saved != num_stages:
                raise CheckpointError(
                    "A checkpoint must have as many stages as the network is cut into",
                    f"Got {saved} in {folder}, {num_stages} here",
                    "Resume with the configuration the run was started with",
                )
            found.append(step)
    return found


def read_manifest(directory: Path, step: int, index: int = 0) -> dict[str, Any]:
    """Read what a part's manifest says."""
    path = directory / f"step-{step:09d}" / f"stage-{index}.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "A checkpoint must have a readable manifest", f"{path}: {error}"
        ) from error
    return manifest


def read_part(directory: Path, step: int, index: int) -> dict[str, Any]:
    """Read one stage's state.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    path = directory / f"step-{step:09d}" / f"stage-{index}.pt"
    if not _is_intact(path):
        raise CheckpointError(
            "A checkpoint must be intact", f"{path} is missing or damaged", "Resume from another"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _step_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(f for f in directory.iterdir() if re.fullmatch(r"step-\d{9,}", f.name))


def _is_intact(path: Path) -> bool:
    try:
        manifest = json.loads(path.with_suffix(".json").read_text())
        return bool(
            manifest["format"] == FORMAT
            and path.stat().st_size == manifest["bytes"]
            and _checksum(path) == manifest["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _replace(draft: Path, final: Path) -> None:
    """Make a file durable before it gets its name: a name never stands for half a file."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, final)
