"""Ranks of one start of a run find each other, whatever earlier starts left in the store."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, PrefixStore

from scpl.engine.meeting import agree_on_name
from scpl.engine.mesh import Mesh
from scpl.engine.notes import Notes
from scpl.errors import InputError


@pytest.fixture
def store():
    return HashStore()


def names(store, num_ranks, patience=20.0, order=None):
    """Let all ranks agree, those that `order` lists first a moment earlier."""

    def agree(rank):
        if order is not None:
            threading.Event().wait(0.05 * order.index(rank))
        notes = Notes(PrefixStore("scpl", store), "secret")
        return agree_on_name(notes, Mesh(rank, num_ranks), patience)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(agree, range(num_ranks)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_ranks_get_one_name(store, order):
    assert len(set(names(store, 3, order=order))) == 1


def test_every_start_has_a_name_of_its_own_with_more_ranks_and_fewer(store):
    """A machine that joined counted no restart, and met the notes of the ranks before it."""
    seen = [names(store, num_ranks) for num_ranks in (2, 4, 4, 3, 2)]
    assert [len(set(start)) for start in seen] == [1] * 5
    assert len({start[0] for start in seen}) == 5


def test_a_start_that_never_came_about_misleads_nobody(store):
    """Ranks of it said hello, and were answered or not; then all were started again."""
    for number in range(3):
        left = Notes(PrefixStore("scpl", store), "secret")
        left.write(f"hello/{number}", "a word of before")
    assert len(set(names(store, 3))) == 1


def test_who_is_missing_is_named(store):
    notes = Notes(PrefixStore("scpl", store), "secret")
    with pytest.raises(TimeoutError, match="no sign of rank 1, 2"):
        agree_on_name(notes, Mesh(0, 3), 0.1)
    with pytest.raises(TimeoutError, match="first rank did not answer"):
        agree_on_name(notes, Mesh(1, 3), 0.1)


def test_another_secret_is_told(store):
    stranger = Notes(PrefixStore("scpl", store), "another")
    stranger.write("hello/1", "word")
    notes = Notes(PrefixStore("scpl", store), "secret")
    with pytest.raises(InputError, match="same secret"):
        agree_on_name(notes, Mesh(0, 2), 5.0)
