"""A rank that nobody is linked to at the moment must be missed all the same."""

import time

import pytest
from torch.distributed import DistNetworkError, HashStore, PrefixStore

from scpl.engine import watchdog as module
from scpl.engine.watchdog import Watchdog


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
    watchdog = Watchdog(0, 2, PrefixStore("test", HashStore()), silence=30.0)
    time.sleep(0.5)
    assert not watchdog.failed.is_set()
    watchdog.hurry()
    assert wait_for(lambda: ended == [1])
    assert watchdog.failed.is_set()
    assert "Rank 1" in watchdog.failure["text"]
    assert "sign of life within 0.2 s" in capsys.readouterr().err
    watchdog.close()


def test_the_first_cause_wins(ended):
    store = PrefixStore("test", HashStore())
    watchdog = Watchdog(0, 1, store, silence=30.0)
    assert watchdog.claim(store, "the cause")
    assert not watchdog.claim(store, "a consequence")
    assert watchdog.failure["text"] == "the cause"
    watchdog.close()


def test_a_rank_that_ends_well_is_not_ended(ended):
    watchdog = Watchdog(0, 1, PrefixStore("test", HashStore()), silence=30.0)
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
    watchdog = Watchdog(1, 2, store, silence=6.0)
    assert wait_for(lambda: ended == [1])
    assert store.timeout.total_seconds() == 6.0
    told = capsys.readouterr().err
    assert told.count("store must stay reachable") == 1
    assert "(timed out)" in told
    assert "long story" not in told
    watchdog.close()
