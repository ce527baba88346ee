"""How the ranks of one start of a run meet in a store that may hold notes of earlier ones.

A launcher that starts ranks again (after a failure, or because a machine came or left) may give
them the store of the ranks before, and nothing tells the starts apart: torchrun's count of restarts
differs between machines, and does not change when machines come. So each start gets a name that no
other has, and all further notes lie under it.
"""

from __future__ import annotations

import time
import uuid

from scpl.engine.mesh import Mesh
from scpl.engine.notes import Notes, believed

__all__ = ["agree_on_name"]

SECONDS_BETWEEN_LOOKS = 0.02


def agree_on_name(notes: Notes, mesh: Mesh, patience: float) -> str:
    """Agree with all other ranks on a name for this start of the run; every rank calls it.

    Each rank says hello with a word that was never used before. The first one answers with the name
    whoever says so, until of every rank the one that spoke last has heard it, and then says whose
    words these were: a rank of an earlier start that is still there is not among them.

    Args:
        notes: In the launcher's store.
        mesh: Which rank this is, and of how many.
        patience: Seconds to wait for the others.

    Raises:
        TimeoutError: if a rank does not come, or another process has come in place of this one.
        InputError: if a note has another seal.
    """
    deadline = time.monotonic() + patience
    word = uuid.uuid4().hex
    notes.write(_hello(mesh.rank), word)
    if mesh.is_first:
        return _invite(notes, mesh, word, deadline)
    while not notes.exists(_answer(word)):
        if notes.exists(_hello(0)):
            believed(notes, _hello(0))  # or each of the two would wait for the other in vain
        _wait(deadline, "the first rank did not answer")
    name = str(believed(notes, _answer(word)))
    notes.remove(_answer(word))
    notes.write(_heard(name, mesh.rank), word)
    while not notes.exists(_members(name)):
        _wait(deadline, "some rank is missing")
    if believed(notes, _members(name))[mesh.rank] != word:
        raise TimeoutError(f"another process is rank {mesh.rank} now")
    return name


def _invite(notes: Notes, mesh: Mesh, name: str, deadline: float) -> str:
    """Let every rank know the name, which is the first one's word."""
    words = [name] + [""] * (mesh.num_ranks - 1)
    while True:
        missing = []
        for rank in range(1, mesh.num_ranks):
            word = str(believed(notes, _hello(rank))) if notes.exists(_hello(rank)) else ""
            if word != words[rank]:
                notes.write(_answer(word), name)
                words[rank] = word
            if not word or notes.read(_heard(name, rank)) != word:
                missing.append(rank)
        if not missing:
            notes.write(_members(name), words)
            return name
        _wait(deadline, f"no sign of rank {', '.join(map(str, missing))}")


def _wait(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(why)
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _answer(word: str) -> str:
    return f"answer/{word}"


def _heard(name: str, rank: int) -> str:
    return f"heard/{name}/{rank}"


def _members(name: str) -> str:
    return f"members/{name}"
