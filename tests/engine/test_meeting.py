"""Ranks of one start of a run find each other, whatever earlier starts left in the store."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, PrefixStore

from processes import Forked, environment
from scpl.engine.local import local_ranks
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


def test_a_rank_that_is_started_again_meanwhile_is_heard_again(store):
    """The first one had it on its list, and waited for others alone."""
    notes = [Notes(PrefixStore("scpl", store), "secret") for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(agree_on_name, notes[0], Mesh(0, 3), 20.0)
        killed = pool.submit(agree_on_name, notes[1], Mesh(1, 3), 20.0)
        while not any("heard/" in key for key in store.list_keys()):
            assert not first.done()
        before = store.get("scpl/hello/1")
        fresh = Notes(PrefixStore("scpl", store), "secret")
        again = pool.submit(agree_on_name, fresh, Mesh(1, 3), 20.0)
        while store.get("scpl/hello/1") == before:
            assert not first.done()
        last = pool.submit(agree_on_name, notes[2], Mesh(2, 3), 20.0)
        assert first.result() == again.result() == last.result()
        with pytest.raises(TimeoutError, match="another process is rank 1 now"):
            killed.result()


def test_a_start_that_never_came_about_misleads_nobody(store):
    """Ranks of it said hello, and were answered or not; then all were started again."""
    for number in range(3):
        left = Notes(PrefixStore("scpl", store), "secret")
        left.write(f"hello/{number}", "a word of before")
    assert len(set(names(store, 3))) == 1


@pytest.mark.timeout(90)
def test_ranks_that_are_started_again_meet_in_the_same_store(tmp_path):
    """More of them than before, and fewer, as no count of restarts tells."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import scpl\nranks = scpl.connect()\n"
        'print(ranks.exchange("rank", ranks.mesh.rank))\nranks.close()\n'
    )
    with local_ranks(3) as places:
        for count in (2, 3, 2):
            ranks = [
                Forked([script], environment(**{**place, "WORLD_SIZE": str(count)}))
                for place in places[:count]
            ]
            try:
                ends = [rank.communicate(timeout=60) for rank in ranks]
            finally:
                for rank in ranks:
                    rank.end()
            assert [out for out, _ in ends] == [f"{list(range(count))}\n"] * count, ends


def test_who_is_missing_is_named(store):
    notes = Notes(PrefixStore("scpl", store), "secret")
    with pytest.raises(TimeoutError, match="no sign of rank 1, 2"):
        agree_on_name(notes, Mesh(0, 3), 0.1)
    with pytest.raises(TimeoutError, match="first rank did not answer"):
        agree_on_name(notes, Mesh(1, 3), 0.1)


def test_another_secret_is_told_by_both(store):
    """The second one waited for an answer, and blamed the firewall."""
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(agree_on_name, Notes(PrefixStore("scpl", store), word), Mesh(rank, 2), 20.0)
            for rank, word in enumerate(["secret", "another"])
        ]
        for end in ends:
            with pytest.raises(InputError, match="same secret"):
                end.result()
