"""Resumable state on disk: one file per stage, written in the background.

A checkpoint of step s is the folder ``step-<s>`` with, for every stage k, ``stage-<k>.pt`` (tensors
and plain values; read with ``weights_only``, so nothing in it can run) and ``stage-<k>.json``, its
manifest, written last. It counts when every manifest is there and every file has the size and
checksum that its manifest says.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scpl.engine.messages import CheckpointMark
from scpl.engine.ranks import Ranks
from scpl.engine.stage import Stage
from scpl.errors import CheckpointError, InputError
from scpl.files import replacing, write_whole

__all__ = [
    "CheckpointWriter",
    "Checkpoints",
    "intact_steps",
    "read_manifest",
    "read_part",
    "recover",
]

FORMAT = 1
MANIFEST = frozenset({"format", "step", "stage", "num_stages", "bytes", "sha256", "epoch", "batch"})


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go, and when they are made.

    Attributes:
        folder: Where the ``step-...`` folders go.
        every: Steps between two checkpoints; None: only where `Pipeline.checkpoint` is called.
        keep: How many are kept.
        note: Gives numbers and text to remember with each that is made after `every` steps;
            `Pipeline.restore` returns them.
        before_saving: Called on every rank where a checkpoint is due, before its stages are saved.

    Raises:
        InputError: for numbers below 1.
    """

    folder: Path | str
    every: int | None = None
    keep: int = 2
    note: Callable[[], Mapping[str, float | str]] = dict
    before_saving: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise InputError(
                "`every` and `keep` of checkpoints must be at least 1",
                f"Got every={self.every} and keep={self.keep}",
            )

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after this step."""
        return self.every is not None and step % self.every == 0


class CheckpointWriter:
    """Writes the parts of this rank's stages, in the background, and removes old ones.

    Args:
        checkpoints: Where, and how many are kept.
        num_stages: Stages of the whole network.
    """

    def __init__(self, checkpoints: Checkpoints, num_stages: int) -> None:
        self._checkpoints = checkpoints
        self._directory = Path(checkpoints.folder)
        self._num_stages = num_stages
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._waiting: list[Future[None]] = []
        self._step: int | None = None

    def announce(self) -> None:
        """Tell who wants to know that the stages are about to be saved."""
        self._checkpoints.before_saving()

    def write(self, index: int, mark: CheckpointMark, state: dict[str, Any]) -> None:
        """Write one stage's part; returns at once.

        Args:
            index: The stage.
            mark: Where in the data the run stands, and what else to remember.
            state: Tensors on the CPU that nobody changes any more, and plain values.

        Raises:
            CheckpointError: if an earlier part could not be written.
        """
        # One checkpoint under way at most: a slow disk must slow the stream, not fill the memory.
        if self._step not in (None, mark.step):
            self.wait()
        self._raise_failures()
        self._step = mark.step
        reserved = MANIFEST.intersection(mark.note)
        if reserved:
            raise CheckpointError(
                f"A note must not be called {', '.join(sorted(MANIFEST))}",
                f"Got {', '.join(sorted(reserved))}",
            )
        self._waiting.append(self._pool.submit(self._write, index, mark, state))

    def wait(self) -> None:
        """Wait until all that was handed over is written.

        Raises:
            CheckpointError: if a part could not be written.
        """
        concurrent.futures.wait(self._waiting)
        self._raise_failures()

    def close(self) -> None:
        """Wait until all is written, and end.

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

    def _write(self, index: int, mark: CheckpointMark, state: dict[str, Any]) -> None:
        data = self._directory / f"step-{mark.step:09d}" / f"stage-{index}.pt"
        try:
            with replacing(data, durable=True) as draft:
                _save(state, draft)
                manifest = {
                    "format": FORMAT,
                    "step": mark.step,
                    "stage": index,
                    "num_stages": self._num_stages,
                    "bytes": draft.stat().st_size,
                    "sha256": _checksum(draft),
                    "epoch": mark.epoch,
                    "batch": mark.batch,
                    **mark.note,
                }
            for stale in data.parent.glob(f".{data.name}.*.tmp"):
                stale.unlink(missing_ok=True)  # of a process that was killed while it wrote
            write_whole(data.with_suffix(".json"), json.dumps(manifest), durable=True)
            self._prune(mark.step)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                "A checkpoint must be written completely",
                f"{data}: {error}",
                "Free some space or choose another folder; earlier checkpoints are kept",
            ) from error

    def _prune(self, step: int) -> None:
        """Remove a checkpoint once `keep` newer ones hold at least the same parts.

        So a part never goes before those that replace all of it are there, whatever this process
        is killed between. Folders of later steps (of a run that went back) do not count.
        """
        folders = [f for f in _step_folders(self._directory) if _step_of(f) <= step]
        parts = [_manifests(folder) for folder in folders]
        for place, folder in enumerate(folders):
            newer = [other for other in parts[place + 1 :] if other >= parts[place]]
            if parts[place] and len(newer) >= self._checkpoints.keep:
                _remove(folder, parts[place])


def intact_steps(directory: Path, stages: Iterable[int], num_stages: int) -> list[int]:
    """Find the steps of which the parts of these stages are all there and intact.

    Args:
        directory: Where the ``step-...`` folders are.
        stages: The stages whose parts are needed here.
        num_stages: Stages of the whole network.

    Raises:
        CheckpointError: if parts are of a network with another number of stages.
    """
    wanted = list(stages)
    found = []
    for folder in _step_folders(directory):
        if all(_is_intact(folder / f"stage-{k}.pt") for k in wanted):
            step = _step_of(folder)
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
        if not isinstance(manifest, dict):
            raise ValueError("it holds no table")
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
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            "A checkpoint must hold tensors and plain values only",
            f"{path}: {str(error).splitlines()[0]}",
            "Resume from another",
        ) from error
    return state


def _save(state: dict[str, Any], path: Path) -> None:
    for again in (True, False):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Into an open file: torch would write the file's name, a draft's, into the archive, and
            # the same state would not give the same bytes.
            with path.open("wb") as file:
                torch.save(state, file)
            return
        except (RuntimeError, OSError):
            # Another rank, far ahead, may have removed the folder in this moment.
            if path.parent.is_dir() or not again:
                raise


def _manifests(folder: Path) -> set[str]:
    try:
        return {name for name in os.listdir(folder) if re.fullmatch(r"stage-\d+\.json", name)}
    except OSError:  # another rank removed it
        return set()


def _remove(folder: Path, manifests: set[str]) -> None:
    """Remove these parts of a checkpoint, manifests first: half of one never counts.

    What another rank is writing there stays. Other ranks may be removing, too.
    """
    with suppress(OSError):
        for name in manifests:
            (folder / name).unlink(missing_ok=True)
        for name in manifests:
            (folder / name).with_suffix(".pt").unlink(missing_ok=True)
        folder.rmdir()


def _step_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    folders = [f for f in directory.iterdir() if re.fullmatch(r"step-\d{9,}", f.name)]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


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


def recover(
    stages: Sequence[Stage],
    folder: Path,
    owners: Sequence[int],
    ranks: Ranks,
    step: int | None,
) -> dict[str, Any] | None:
    """Load a checkpoint into this rank's stages; all ranks must call it.

    Args:
        stages: The stages of this rank.
        folder: Where checkpoints are.
        owners: The rank that saves each stage of the network. Ranks that save none are replicas
            of the first.
        ranks: The ranks.
        step: Which checkpoint; None: the newest that all ranks can read.

    Returns:
        What the checkpoint says of itself; None if there is none.

    Raises:
        CheckpointError: if it is damaged or of another network; no stage has changed.
    """
    replicated = len(set(owners)) < ranks.mesh.num_ranks
    reads = not replicated or ranks.mesh.is_first
    hosted = [stage.index for stage in stages]
    readable = intact_steps(folder, hosted, len(owners)) if reads else None
    everyone = ranks.exchange("restore", readable)
    agreed = set.intersection(*(set(steps) for steps in everyone if steps is not None))
    step = max(agreed, default=None) if step is None else step
    if step is None:
        return None
    manifest = read_manifest(folder, step, hosted[0]) if reads else None
    states = [read_part(folder, step, index) for index in hosted] if reads else []
    if replicated:
        (manifest, states) = _from_first((manifest, states), ranks)
    assert manifest is not None
    parts = list(zip(stages, states, strict=True))
    for stage, state in parts:
        stage.check_state_dict(state)  # all of them first: all stages change, or none
    for stage, state in parts:
        stage.load_state_dict(state)
    return manifest


def _from_first(value: Any, ranks: Ranks) -> Any:
    """Hand the first rank's tensors and plain values to all ranks."""
    buffer = io.BytesIO()
    if ranks.mesh.is_first:
        torch.save(value, buffer)
    size = ranks.exchange("replica", buffer.tell())[0]
    content = torch.zeros(size, dtype=torch.uint8)
    if ranks.mesh.is_first:
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    ranks.broadcast(content, 0)
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
