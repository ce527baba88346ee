"""Resumable state on disk: one file per stage, written in the background.

A checkpoint of step s is the folder ``step-<s>`` with, for every stage k, a part: ``stage-<k>.pt``
(tensors and plain values; read with ``weights_only``, so nothing in it can run) and
``stage-<k>.json``, its manifest. One checksum covers what the manifest says and the bytes of the
file. A checkpoint counts when every part is there and intact, lies where its manifest says, and
all are of one run, and of one attempt at it: each start of a run is one. What an attempt that ended
early has left may fit what the next one writes, but neither was there at that step as a whole.

The manifest is written first, the file takes its name last. So a file without a manifest has lost
it, which is damage, and a manifest without a file is a part that was never finished, which is not.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from scpl import __version__
from scpl.engine.messages import CheckpointMark
from scpl.engine.ranks import Ranks
from scpl.engine.stage import Stage, is_state
from scpl.errors import CheckpointError, InputError
from scpl.files import free_space, reason, replacing, sync_folder, write_whole

__all__ = [
    "BEST_STEP",
    "CheckpointWriter",
    "Checkpoints",
    "Finding",
    "read_manifest",
    "read_part",
    "recover",
    "survey",
]

FORMAT = 3
MANIFEST: Mapping[str, type] = {
    "format": int,
    "run": str,
    "attempt": str,
    "step": int,
    "stage": int,
    "num_stages": int,
    "epoch": int,
    "batch": int,
    "versions": dict,
    "bytes": int,
    "sha256": str,
}
"""What every manifest says, and of which type; a note comes beside it."""
LARGEST_MANIFEST = 1 << 20
BEST_STEP = "best_step"
"""A note of this name is the step of another checkpoint, which is kept as long as this one."""


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


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
        run: Which run they are of: parts of no other are restored. None: a run gets a name of its
            own when it begins, and keeps it when it is restored.
        tell: Called with a sentence where something is to be known but no error: that an older
            checkpoint is used, and why; that other versions wrote it; that the disk will be full.
            Default: a warning.

    Raises:
        InputError: for numbers below 1.
    """

    folder: Path | str
    every: int | None = None
    keep: int = 2
    note: Callable[[], Mapping[str, float | str]] = dict
    before_saving: Callable[[], object] = lambda: None
    run: str | None = None
    tell: Callable[[str], object] = _warn

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
        self._sizes: dict[int, int] = {}  # bytes of the last part of each stage
        self._told_full = False

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
            self._look_ahead(BEST_STEP in mark.note)
        self._raise_failures()
        self._step = mark.step
        _check_note(mark.note)
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

    def _look_ahead(self, best: bool) -> None:
        """Say once if there is no room for as many checkpoints as are kept, and for the best."""
        size, free = sum(self._sizes.values()), free_space(self._directory)
        # One more than is kept is there while the newest is being written, and the best may be.
        missing = self._checkpoints.keep + 1 + best - len(_step_folders(self._directory))
        if free is None or free >= missing * size or self._told_full:
            return
        self._told_full = True
        self._checkpoints.tell(
            f"The disk of {self._directory} is nearly full: before one is removed it must "
            f"hold {missing} more of {size:,} bytes, and {free:,} bytes are free"
        )

    def _write(self, index: int, mark: CheckpointMark, state: dict[str, Any]) -> None:
        data = _part(self._directory, mark.step, index)
        needed = _size_of(state)
        try:
            free = free_space(self._directory)
            if free is not None and free < needed:  # so no half of it is ever written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with replacing(data, durable=True) as draft:
                _save(state, draft)
                manifest = {
                    "format": FORMAT,
                    "run": mark.run,
                    "attempt": mark.attempt,
                    "step": mark.step,
                    "stage": index,
                    "num_stages": self._num_stages,
                    "epoch": mark.epoch,
                    "batch": mark.batch,
                    "versions": _versions(),
                    "bytes": draft.stat().st_size,
                    **json.loads(json.dumps(mark.note)),  # as it will be read
                }
                manifest["sha256"] = _checksum(manifest, draft)
                data.unlink(missing_ok=True)  # of a run that went back: it never gets this manifest
                write_whole(data.with_suffix(".json"), json.dumps(manifest), durable=True)
            for name in (data.name, data.with_suffix(".json").name):
                for stale in data.parent.glob(f".{name}.*.tmp"):
                    stale.unlink(missing_ok=True)  # of a process that was killed while it wrote
            sync_folder(self._directory)
            if index not in self._sizes:  # it may have been made just now
                sync_folder(self._directory.parent)
            self._sizes[index] = manifest["bytes"]
            self._prune(mark)
        except (OSError, RuntimeError) as error:  # torch tells a full disk by a RuntimeError
            with suppress(OSError):
                data.parent.rmdir()  # if there is nothing else in it
            raise CheckpointError(
                "A checkpoint must be written completely",
                f"{data}: {reason(error, data, needed)}",
                "Free some space or choose another folder; earlier checkpoints are kept",
            ) from error

    def _prune(self, mark: CheckpointMark) -> None:
        """Remove a checkpoint once `keep` newer ones of this run hold at least the same parts.

        So a part never goes before those that replace all of it are there, written by one attempt,
        whatever this process is killed between. Folders of later steps (of a run that went back)
        do not count. What a checkpoint that stays names as the best stays with it: so whoever goes
        on from one finds its best, too, on every machine.
        """
        folders = [f for f in _step_folders(self._directory) if _step_of(f) <= mark.step]
        parts = [_parts(folder) for folder in folders]
        ours = [_together(folder, parts[place], mark.run) for place, folder in enumerate(folders)]
        old: list[tuple[Path, set[str]]] = []
        stay: list[tuple[Path, set[str]]] = []
        for place, folder in enumerate(folders):
            newer = [other for other in ours[place + 1 :] if other >= parts[place]]
            is_old = parts[place] and len(newer) >= self._checkpoints.keep
            (old if is_old else stay).append((folder, parts[place]))
        named = set().union(*(_bests(folder, there) for folder, there in stay))
        for folder, there in old:
            if _step_of(folder) not in named:
                _remove(folder, there)


_MIXED = "has parts of several attempts, none of which finished it"


@dataclass(frozen=True)
class Finding:
    """What one rank finds of a step: the parts of its stages are all intact, or they are not.

    Attributes:
        step: The step.
        run: Whose parts they are, if they are intact.
        fault: What keeps them from being used; empty if nothing does.
        damaged: Whether that is damage; else they were never finished, as a kill leaves them.
        attempt: Whose attempt at the run, if they are intact.
    """

    step: int
    run: str = ""
    fault: str = ""
    damaged: bool = False
    attempt: str = ""


def survey(
    directory: Path, stages: Iterable[int], num_stages: int, run: str | None = None
) -> list[Finding]:
    """Look at the parts of these stages in every step that is there.

    Args:
        directory: Where the ``step-...`` folders are.
        stages: The stages whose parts are needed here.
        num_stages: Stages of the whole network.
        run: Whose parts count; None: those of any one run.

    Returns:
        A finding per step, oldest first.

    Raises:
        CheckpointError: if intact parts are of a network with another number of stages.
    """
    wanted = list(stages)
    try:
        folders = _step_folders(directory)
    except OSError as error:
        raise CheckpointError("Checkpoints must be readable", f"{directory}: {error}") from error
    steps = [_step_of(folder) for folder in folders]
    # A stage begins a part when its earlier ones are written, so only its newest may be unfinished.
    newest = {
        index: max((s for s in steps if _manifest(directory, s, index).exists()), default=-1)
        for index in wanted
    }
    return [_find(directory, step, newest, num_stages, run) for step in steps]


def _find(
    directory: Path, step: int, newest: Mapping[int, int], num_stages: int, run: str | None
) -> Finding:
    runs, attempts = set(), set()
    for index in newest:
        try:
            manifest = _verified(directory, step, index)
        except CheckpointError as error:
            damaged = not isinstance(error, _Unfinished) or step < newest[index]
            return Finding(step, fault=f"stage {index} {error.got}", damaged=damaged)
        except OSError as error:
            return Finding(step, fault=f"stage {index} cannot be read: {error}", damaged=True)
        runs.add(manifest["run"])
        attempts.add(manifest["attempt"])
        if len(runs) > 1 or (run is not None and manifest["run"] != run):
            return Finding(step, fault=f"stage {index} is of another run", damaged=True)
        if manifest["num_stages"] != num_stages:
            raise CheckpointError(
                "A checkpoint must have as many stages as the network is cut into",
                f"Got {manifest['num_stages']} in {_folder(directory, step)}, {num_stages} here",
                "Resume with the configuration the run was started with",
            )
    if len(attempts) > 1:
        return Finding(step, fault=_MIXED)
    return Finding(step, run=runs.pop(), attempt=attempts.pop())


def read_manifest(directory: Path, step: int, index: int = 0) -> dict[str, Any]:
    """Read what a part's manifest says.

    Raises:
        CheckpointError: if it is missing or damaged, or that of another part.
    """
    path = _manifest(directory, step, index)
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_MANIFEST + 1)
        if len(text) > LARGEST_MANIFEST:
            raise ValueError("it is too large")
        manifest = json.loads(text)
        fault = _manifest_fault(manifest, step, index)
        if fault:
            raise ValueError(fault)
    except (OSError, ValueError, RecursionError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            "A checkpoint must have a readable manifest", f"has a damaged manifest, {path}: {told}"
        ) from error
    return dict(manifest)


def _manifest_fault(manifest: Any, step: int, index: int) -> str:
    """Say what is wrong with a manifest; nothing if it may be that of this part."""
    if not isinstance(manifest, dict):
        return "it holds no table"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, not {FORMAT}"
    wrong = [name for name, kind in MANIFEST.items() if type(manifest.get(name)) is not kind]
    if wrong:
        return f"{wrong[0]} is no {MANIFEST[wrong[0]].__name__}"
    if not all(isinstance(version, str) for version in manifest["versions"].values()):
        return "versions are no text"
    if (manifest["step"], manifest["stage"]) != (step, index):
        return f"it is that of stage {manifest['stage']} at step {manifest['step']}"
    if min(manifest["epoch"], manifest["batch"]) < 0 or index >= manifest["num_stages"]:
        return "its numbers are out of range"
    return ""


def read_part(directory: Path, step: int, index: int) -> dict[str, Any]:
    """Read one stage's state.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = _part(directory, step, index)
    _verified(directory, step, index)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what was made to mislead can raise anything
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            "A checkpoint must hold tensors and plain values only",
            f"cannot be read, {path}: {told}",
            "Resume from another",
        ) from error
    if not is_state(state):
        raise CheckpointError(
            "A checkpoint must hold the state of a stage",
            f"holds no state of a stage, {path}",
            "Resume from another",
        )
    return dict(state)


class _Unfinished(CheckpointError):
    """A part that was never written to its end, or is not here."""


def _verified(directory: Path, step: int, index: int) -> dict[str, Any]:
    """Read the manifest of a part that is intact.

    Raises:
        CheckpointError: if it is not, or missing; what was found is a phrase that can follow the
            name of a stage.
    """
    path = _part(directory, step, index)
    rule, fix = "A checkpoint must be intact", "Resume from another"
    if not path.is_file():
        raise _Unfinished(rule, f"is missing, {path}", fix)
    if not (lost := _manifest(directory, step, index)).exists():
        raise CheckpointError(rule, f"has lost its manifest, {lost}", fix)
    manifest = read_manifest(directory, step, index)
    try:
        size, checksum = path.stat().st_size, _checksum(manifest, path)
    except OSError as error:
        raise CheckpointError(rule, f"cannot be read, {path}: {error.strerror}", fix) from error
    if size != manifest["bytes"]:
        got = f"is damaged, {path}: it has {size:,} bytes, not {manifest['bytes']:,}"
        raise CheckpointError(rule, got, fix)
    if checksum != manifest["sha256"]:
        raise CheckpointError(rule, f"is damaged, {path}: its checksum is another", fix)
    return manifest


def _check_note(note: Mapping[str, Any]) -> None:
    reserved = MANIFEST.keys() & note
    if reserved:
        raise CheckpointError(
            f"A note must not be called {', '.join(sorted(MANIFEST))}",
            f"Got {', '.join(sorted(reserved))}",
        )
    try:
        size = len(json.dumps(dict(note)))
    except (TypeError, ValueError) as error:
        raise CheckpointError("A note must hold numbers and text", f"Got {error}") from error
    if size > LARGEST_MANIFEST // 2:
        raise CheckpointError(
            "A note must be short", f"Got {size:,} characters, at most {LARGEST_MANIFEST // 2:,}"
        )


def _versions() -> dict[str, str]:
    """What may decide the last bit of a number."""
    return {"scpl": __version__, "torch": str(torch.__version__)}


def _size_of(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; a file of them has a little more."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        state = list(state.values())
    return sum(map(_size_of, state)) if isinstance(state, (list, tuple)) else 0


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


def _parts(folder: Path) -> set[str]:
    """Names of the parts in a folder of which both files are there."""
    try:
        names = set(os.listdir(folder))
    except OSError:  # another rank removed it
        return set()
    whole = {name for name in names if re.fullmatch(r"stage-\d+\.json", name)}
    return {
        stem for stem in (name.removesuffix(".json") for name in whole) if f"{stem}.pt" in names
    }


def _together(folder: Path, parts: Iterable[str], run: str) -> set[str]:
    """The most of these parts that one attempt at a run has written."""
    attempts: dict[str, set[str]] = {}
    for stem in parts:
        with suppress(CheckpointError):
            index = int(stem.removeprefix("stage-"))
            manifest = read_manifest(folder.parent, _step_of(folder), index)
            if manifest["run"] == run:
                attempts.setdefault(manifest["attempt"], set()).add(stem)
    return max(attempts.values(), key=len, default=set())


def _bests(folder: Path, parts: Iterable[str]) -> set[int]:
    """The steps that the parts of a checkpoint name as the best."""
    found = set()
    for stem in parts:
        with suppress(CheckpointError):
            index = int(stem.removeprefix("stage-"))
            found.add(read_manifest(folder.parent, _step_of(folder), index).get(BEST_STEP))
    return {step for step in found if isinstance(step, int)}


def _remove(folder: Path, parts: set[str]) -> None:
    """Remove these parts of a checkpoint, manifests last: a file is never without one.

    What another rank is writing there stays. Other ranks may be removing, too.
    """
    with suppress(OSError):
        for suffix in (".pt", ".json"):
            for stem in parts:
                (folder / f"{stem}{suffix}").unlink(missing_ok=True)
        folder.rmdir()


def _folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step:09d}"


def _part(directory: Path, step: int, index: int) -> Path:
    return _folder(directory, step) / f"stage-{index}.pt"


def _manifest(directory: Path, step: int, index: int) -> Path:
    return _part(directory, step, index).with_suffix(".json")


def _step_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    named = [f for f in directory.iterdir() if re.fullmatch(r"step-\d{9,}", f.name)]
    folders = [f for f in named if f == _folder(directory, _step_of(f)) and f.is_dir()]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _checksum(manifest: Mapping[str, Any], path: Path) -> str:
    """SHA-256 over what a manifest says but for this, and over the bytes of its part."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recover(
    stages: Sequence[Stage],
    checkpoints: Checkpoints,
    owners: Sequence[int],
    ranks: Ranks,
    step: int | None,
) -> dict[str, Any] | None:
    """Load a checkpoint into this rank's stages; all ranks must call it.

    Args:
        stages: The stages of this rank.
        checkpoints: Where checkpoints are, and of which run. The last rank tells what is to be
            known, once.
        owners: The rank that saves each stage of the network. Ranks that save none are replicas
            of the one that saves their stages.
        ranks: The ranks.
        step: Which checkpoint; None: the newest that all ranks can read.

    Returns:
        What the checkpoint says of itself; None if there is none, or the first was never finished.

    Raises:
        CheckpointError: if it is of another network, or none is intact though there are some; no
            stage has changed.
    """
    folder, tell = Path(checkpoints.folder), checkpoints.tell
    if not ranks.mesh.is_last:
        tell = _silent
    reads = ranks.mesh.rank in owners
    hosted = [stage.index for stage in stages]
    mine = survey(folder, hosted, len(owners), checkpoints.run) if reads else None
    told = ranks.exchange("restore", None if mine is None else [astuple(one) for one in mine])
    usable, faults = _agree([[Finding(*one) for one in each] for each in told if each is not None])
    if step is not None:
        usable = {one: run for one, run in usable.items() if one == step}
        faults = {one: fault for one, fault in faults.items() if one == step}
    if len(set(usable.values())) > 1:
        raise CheckpointError(
            "All checkpoints of a folder must be of one run",
            f"{folder} holds some of {len(set(usable.values()))} runs: steps "
            f"{', '.join(map(str, sorted(usable)))}",
            "Move those of other runs away, or name a step",
        )
    manifest: dict[str, Any] | None = None
    states: list[dict[str, Any]] = []
    while usable and manifest is None:
        chosen = max(usable)
        fault = ""
        try:
            manifest = read_manifest(folder, chosen, hosted[0]) if reads else {}
            states = [read_part(folder, chosen, index) for index in hosted] if reads else []
        except CheckpointError as error:
            fault = f"a part {error.got}"
        found = [one for one in ranks.exchange("read", fault) if one]
        if found:
            manifest, faults[chosen] = None, Finding(chosen, fault=found[0], damaged=True)
            del usable[chosen]
    if manifest is None:
        _tell_none(folder, faults, step, tell)
        return None
    if len(set(owners)) < ranks.mesh.num_ranks:
        manifest, states = _from_owners((manifest, states), owners, hosted, ranks)
    _tell_others(manifest, [faults[one] for one in sorted(faults, reverse=True)], tell)
    parts = list(zip(stages, states, strict=True))
    for stage, state in parts:
        stage.check_state_dict(state)  # all of them first: all stages change, or none
    for stage, state in parts:
        stage.load_state_dict(state)
    return manifest


def _agree(ranks: list[list[Finding]]) -> tuple[dict[int, str], dict[int, Finding]]:
    """Find the steps that all ranks can use, with their runs, and what keeps others from it."""
    tables = [{one.step: one for one in findings} for findings in ranks]
    # Who has nothing where others have several has lost a disk, or did not bring it.
    lost = not all(tables) and max(map(len, tables)) > 1
    usable, faults = {}, {}
    for step in sorted(set().union(*tables)):
        absent = Finding(step, fault="is not on all machines", damaged=lost)
        found = [table.get(step, absent) for table in tables]
        bad = [one for one in found if one.fault]
        bad.sort(key=lambda one: not one.damaged)  # what is damaged says more
        if bad:
            faults[step] = bad[0]
        elif len({one.run for one in found}) > 1:
            faults[step] = Finding(step, fault="has parts of several runs", damaged=True)
        elif len({one.attempt for one in found}) > 1:
            faults[step] = Finding(step, fault=_MIXED)
        else:
            usable[step] = found[0].run
    return usable, faults


def _tell_none(
    folder: Path, faults: Mapping[int, Finding], step: int | None, tell: Callable[[str], object]
) -> None:
    """Refuse to begin anew if that would lose something; else say so."""
    listed = [f"step {one}: {fault.fault}" for one, fault in sorted(faults.items(), reverse=True)]
    got = f"{folder}: " + "; ".join([*listed[:4], *(["..."] if len(listed) > 4 else [])])
    if step is not None:
        raise CheckpointError(
            "A checkpoint that is asked for must be there and intact",
            got if listed else f"{_folder(folder, step)} is missing",
            "Resume from another",
        )
    if any(fault.damaged for fault in faults.values()):
        raise CheckpointError(
            "A run must have an intact checkpoint to go on from",
            got,
            "Put the files back, or start a new run",
        )
    if listed:
        tell(f"No checkpoint was finished, so all begins with the first step. In {got}")


def _tell_others(
    manifest: Mapping[str, Any], faults: Sequence[Finding], tell: Callable[[str], object]
) -> None:
    """Say what is not as one would expect of the checkpoint that is used."""
    step, then, now = manifest["step"], manifest["versions"], _versions()
    newer = [f"step {one.step}: {one.fault}" for one in faults if one.step > step]
    if newer:
        tell(f"Going on from step {step}, for what is newer cannot be used: {'; '.join(newer)}")
    others = [name for name in now if then.get(name) != now[name]]
    if others:
        was = ", ".join(f"{name} {then.get(name, 'unknown')}" for name in others)
        is_now = ", ".join(f"{name} {now[name]}" for name in others)
        tell(f"This checkpoint was written by {was}; this is {is_now}: the last bits may differ")


def _silent(line: str) -> None:
    """For ranks that leave it to the last one."""


def _from_owners(
    value: tuple[dict[str, Any], list[dict[str, Any]]],
    owners: Sequence[int],
    hosted: Sequence[int],
    ranks: Ranks,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Hand what the ranks that save stages have read to replicas of theirs."""
    mine = owners[hosted[0]]
    firsts = ranks.exchange("owner", mine)
    for owner in sorted({one for one in firsts if firsts.count(one) > 1}):
        buffer = io.BytesIO()
        if ranks.mesh.rank == owner:
            torch.save(value, buffer)
        size = ranks.exchange("replica", buffer.tell())[owner]
        content = torch.zeros(size, dtype=torch.uint8)
        if ranks.mesh.rank == owner:
            content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        ranks.broadcast(content, owner)
        if mine == owner != ranks.mesh.rank:
            value = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
    return value
