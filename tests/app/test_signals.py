"""Signals: the first one asks for an end, a later one ends at once."""

import os
import signal
import threading
import time

import pytest

from scpl.app.signals import SAME_EVENT, GracefulStop


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def test_the_first_signal_is_remembered_and_told():
    before = signal.getsignal(signal.SIGTERM)
    stop = GracefulStop()
    told = []
    stop.on_signal(told.append)
    with stop, stop:
        send()
        send(signal.SIGINT)  # a terminal and a launcher both send Ctrl-C on: one event
    assert stop.received is signal.SIGTERM
    assert told == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_later_signal_ends_at_once():
    with GracefulStop() as stop:
        send()
        stop._time -= SAME_EVENT + 1
        with pytest.raises(KeyboardInterrupt):
            send()


def test_a_signal_is_heard_while_the_main_thread_is_blocked():
    """A rank was killed while its neighbour's main thread waited in a send: it heard of the
    launcher's SIGTERM only after the timeout of 30 s (two of 33 random kills)."""
    heard = threading.Event()
    where = []

    def act():
        where.append(threading.current_thread().name)
        heard.set()

    with GracefulStop(act):
        send()
        assert heard.wait(2)
    assert set(where) == {"signals"}
    assert signal.set_wakeup_fd(-1) == -1
