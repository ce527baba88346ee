"""A rank that nobody is linked to at the moment must be missed all the same."""

import json
import socket
import time

import pytest
from torch.distributed import DistNetworkError, HashStore, PrefixStore

from scpl.engine import watchdog as module
from scpl.engine.notes import Notes
from scpl.engine.watchdog import Watchdog


def notes(store=None):
    return Notes(PrefixStore("test", store or HashStore()), "secret")


@pytest.fixture
def ended(monkeypatch):
    """Exit statuses that a watchdog wanted, instead of the end of this process."""
    statuses = []
    monkeypatch.setattr(module.os, "_exit", statuses.append)
    monkeypatch.setattr(module, "GRACE", 0.1)
    monkeypatch.setattr(module, "PERIOD", 0.05)
    return statuses


def wait_for(event, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not event() and time.monotonic() < deadline:
        time.sleep(0.02)
    return event()


def test_a_silent_rank_is_missed_sooner_in_a_hurry(monkeypatch, ended, capsys):
    """While the last rank was killed, the first one waited for a fact: it stood for 30 seconds."""
    monkeypatch.setattr(module, "HURRIED_SILENCE", 0.2)
    watchdog = Watchdog(0, 2, notes(), silence=30.0)
    time.sleep(0.5)
    assert not watchdog.failed.is_set()
    watchdog.hurry()
    assert wait_for(lambda: ended == [1])
    assert watchdog.failed.is_set()
    assert "Rank 1" in watchdog.failure["text"]
    assert "sign of life within 0.2 s" in capsys.readouterr().err
    watchdog.close()


class Looking:
    """A store without notes that keeps what it is asked for."""

    def __init__(self, names):
        self._names = names

    def set_timeout(self, timeout):
        pass

    def set(self, name, note):
        pass

    def check(self, names):
        self._names += names
        return False


def test_each_rank_watches_two_and_only_in_a_hurry_all(monkeypatch, ended):
    """All looked at all others: 64 ranks asked the store 32,000 times a second."""
    monkeypatch.setattr(module, "HURRIED_SILENCE", 0.3)
    store = HashStore()
    asked = []
    for num_ranks in (2, 3, 64):
        own = Notes(Looking(names := []), "secret")
        watchdog = Watchdog(0, num_ranks, own, silence=30.0)
        assert wait_for(lambda names=names: names.count("failure") > 5)
        watchdog.close()
        asked.append({name for name in names if name.startswith("beat/")})
    assert asked == [{"beat/1"}, *[{"beat/1", "beat/2"}] * 2], "as many of 64 ranks as of 3"
    alive = [Watchdog(rank, 5, notes(store), silence=30.0) for rank in (0, 1, 2, 4)]
    time.sleep(0.3)
    assert not ended
    alive[-1].hurry()  # it watches 0 and 1; the lost one is another
    assert wait_for(lambda: len(ended) == 4)
    assert "Rank 3" in alive[0].failure["text"]
    for watchdog in alive:
        watchdog.close()


def test_the_last_rank_watches_the_first(ended, capsys):
    watchdog = Watchdog(3, 4, notes(), silence=0.3)
    assert wait_for(lambda: ended == [1])
    assert "Rank 0" in capsys.readouterr().err
    watchdog.close()


def test_the_first_cause_wins(ended):
    own = notes()
    watchdog = Watchdog(0, 1, own, silence=30.0)
    assert watchdog.claim(own, "the cause")
    assert not watchdog.claim(own, "a consequence")
    assert watchdog.failure["text"] == "the cause"
    watchdog.close()


def test_a_rank_that_ends_well_is_not_ended(ended):
    watchdog = Watchdog(0, 1, notes(), silence=30.0)
    time.sleep(0.2)
    watchdog.close()
    time.sleep(0.2)
    assert ended == []


class LostStore:
    """A store at the other end of a cable that was cut."""

    def set_timeout(self, timeout):
        self.timeout = timeout

    def set(self, key, value):
        raise DistNetworkError("timed out\nwith a long story")


def test_a_lost_store_is_told(ended, capsys):
    """Two machines, the cable cut: the far rank ended without a word, and late."""
    store = LostStore()
    watchdog = Watchdog(1, 2, Notes(store, "secret"), silence=6.0)
    assert wait_for(lambda: ended == [1])
    assert store.timeout.total_seconds() == 6.0
    told = capsys.readouterr().err
    assert told.count("store must stay reachable") == 1
    assert "(timed out)" in told
    assert "long story" not in told
    watchdog.close()


def test_strangers_decide_neither_who_failed_nor_who_is_killed(ended, monkeypatch, capsys):
    """Whoever reached the store's port named a process there, and had it killed within a second."""
    killed = []
    monkeypatch.setattr("os.kill", lambda *of: killed.append(of))
    store = HashStore()
    written = PrefixStore("test", store)
    written.set("host/1", json.dumps([socket.gethostname(), 1]))
    for text in ("{}", "x" * 1000, "\0", json.dumps({"rank": 1, "text": "gone", "silent": 1})):
        written.set("failure", text)
    watchdog = Watchdog(0, 2, notes(store), silence=0.4)
    time.sleep(0.2)
    assert not watchdog.failed.is_set()
    assert wait_for(lambda: ended == [1])  # for rank 1 is silent indeed
    assert "(process ? on ?)" in capsys.readouterr().err
    assert killed == []
    watchdog.close()


def test_a_signal_to_any_rank_reaches_the_first(ended):
    """A second machine that was to be switched off promised to save, and trained to the end."""
    store = HashStore()
    first, last = (Watchdog(rank, 2, notes(store), silence=30.0) for rank in range(2))
    assert first.asked_to_stop is None
    last.ask_to_stop(15)
    assert wait_for(lambda: first.asked_to_stop == 15)
    for watchdog in (first, last):
        watchdog.close()
    assert ended == []
