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

    Each rank says hello with a word that was never used before, and the first one answers with the
    name. A hello of an earlier start is answered, too, but nobody is there to hear that.

    Args:
        notes: In the launcher's store.
        mesh: Which rank this is, and of how many.
        patience: Seconds to wait for the others.

    Raises:
        TimeoutError: if a rank does not come.
        InputError: if a note has another seal.
    """
    deadline = time.monotonic() + patience
    if mesh.is_first:
        return _invite(notes, mesh, deadline)
    word = uuid.uuid4().hex
    notes.write(_hello(mesh.rank), word)
    while not notes.exists(_answer(word)):
        _wait(deadline, "the first rank did not answer")
    name = str(believed(notes, _answer(word)))
    notes.remove(_answer(word))
    notes.write(_present(name, mesh.rank), True)
    return name


def _invite(notes: Notes, mesh: Mesh, deadline: float) -> str:
    name, heard = uuid.uuid4().hex, dict[int, str]()
    missing = list(range(1, mesh.num_ranks))
    while missing:
        for rank in missing:
            word = str(believed(notes, _hello(rank))) if notes.exists(_hello(rank)) else None
            if word is not None and word != heard.get(rank):
                notes.write(_answer(word), name)
                heard[rank] = word
        missing = [rank for rank in missing if not notes.exists(_present(name, rank))]
        if missing:
            _wait(deadline, f"no sign of rank {', '.join(map(str, missing))}")
    return name


def _wait(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(why)
    time.sleep(SECONDS_BETWEEN_LOOKS)


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _answer(word: str) -> str:
    return f"answer/{word}"


def _present(name: str, rank: int) -> str:
    return f"present/{name}/{rank}"
