import io

import pytest

from scpl.app.progress import Count, format_seconds
from scpl.app.train.progress import (
    Progress,
    Usage,
    format_exits,
    format_losses,
    format_usage,
)

USAGE = Usage((300 * 2**20, 338 * 2**20), (0.314, 0.05))
LOSSES = [{"contrastive": 1.25}, {"contrastive": 0.5, "cross_entropy": 2.0}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def row(accuracy=None, seconds=10.0):
    return {"valid_accuracy": accuracy, "samples_per_second": 1234.5, "seconds": seconds}


@pytest.fixture
def clock(monkeypatch):
    """Time that only tests move."""
    now = [100.0]
    monkeypatch.setattr("scpl.app.train.progress.time.perf_counter", lambda: now[0])
    return now


def progress(log, quiet=False):
    return Progress(epochs=4, steps=10, samples=100, log=log.append, quiet=quiet)


def test_an_epoch_is_one_plain_line(monkeypatch, clock):
    err, log = io.StringIO(), []
    monkeypatch.setattr("sys.stderr", err)
    shown = progress(log)
    shown.begin_epoch(1, 0)
    for batch in range(1, 11):
        clock[0] += 1
        shown.update(batch, LOSSES)
    shown.end_epoch(row(0.5), LOSSES)
    assert err.getvalue() == (
        "epoch 1/4  loss 1.250 | 0.500+2.000  valid 50.00 %  1,234 images/s  10 s so far, "
        "30 s to go\n"
    )
    assert log == err.getvalue().splitlines()


def test_memory_and_waiting_end_the_line(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    log = []
    shown = progress(log)
    shown.begin_epoch(1, 0)
    clock[0] += 10
    shown.end_epoch(row(0.5), LOSSES, USAGE)
    assert log[0].endswith("10 s so far, 30 s to go  338 MiB  waits 31 | 5 %")


def test_a_live_line_shows_rate_rest_losses_accuracy_memory_and_waiting(monkeypatch, clock):
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("COLUMNS", "200")
    shown = progress([])
    shown.begin_epoch(1, 0)
    clock[0] += 20
    shown.end_epoch(row(0.5), LOSSES)
    shown.begin_epoch(2, 0)
    clock[0] += 6
    shown.update(3, LOSSES, USAGE)
    shown._bar.refresh()
    live = err.getvalue().rpartition("\r")[2]
    assert live.rstrip().endswith(
        " epoch 2/4  step 3/10  5 images/s  54 s to go  loss 1.250 | 0.500+2.000  valid 50.00 %  "
        "338 MiB  waits 31 | 5 %"
    )
    shown.close()


def test_a_live_line_never_wraps(monkeypatch, clock):
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    shown = progress([])
    shown.begin_epoch(1, 0)
    shown._bar.ncols, shown._bar.dynamic_ncols = 60, None
    clock[0] += 1
    shown.update(3, LOSSES * 4, USAGE)
    shown._bar.refresh()
    assert max(map(len, err.getvalue().split("\r"))) <= 60
    shown.close()


def test_a_long_epoch_says_something_now_and_then(monkeypatch, clock):
    err, log = io.StringIO(), []
    monkeypatch.setattr("sys.stderr", err)
    shown = progress(log)
    shown.begin_epoch(2, 0)
    for batch in range(1, 11):
        clock[0] += 11
        shown.update(batch, LOSSES)
    assert [line.split("  ")[1] for line in log] == ["step 3/10", "step 6/10", "step 9/10"]


@pytest.mark.parametrize("accuracy", [None, ""])
def test_without_validation_there_is_no_accuracy(monkeypatch, clock, accuracy):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    log = []
    shown = progress(log)
    shown.begin_epoch(1, 0)
    clock[0] += 1
    shown.end_epoch(row(accuracy), LOSSES)
    assert "valid" not in log[0]


def test_what_is_left_is_judged_by_what_was_done_since_a_resume(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    log = []
    shown = progress(log)
    shown.begin_epoch(3, 5)
    clock[0] += 5  # five steps of one second; an epoch of ten is left
    shown.end_epoch(row(seconds=1000.0), LOSSES)
    assert log[0].endswith("17 min so far, 10 s to go")


def test_quiet_only_logs(monkeypatch, clock):
    err, log = Terminal(), []
    monkeypatch.setattr("sys.stderr", err)
    shown = progress(log, quiet=True)
    shown.begin_epoch(1, 0)
    clock[0] += 1
    shown.update(1, LOSSES)
    shown.end_epoch(row(), LOSSES)
    shown.say("bye")
    shown.close()
    assert err.getvalue() == ""
    assert len(log) == 2


def test_a_terminal_gets_a_live_line_that_goes_away(monkeypatch):
    err, log = Terminal(), []
    monkeypatch.setattr("sys.stderr", err)
    shown = progress(log)
    shown.begin_epoch(1, 0)
    shown.update(3, LOSSES)
    shown.say("hello")
    shown.end_epoch(row(), LOSSES)
    shown.begin_epoch(2, 0)
    shown.close()
    shown.close()
    assert "epoch 1/4" in err.getvalue()
    assert "hello\n" in err.getvalue()
    assert log[0] == "hello"
    assert not any("\r" in line or "\x1b" in line for line in log)
    last = err.getvalue().rpartition("\n")[2]
    assert last.endswith("\r")  # the live line is wiped


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_usage():
    assert format_usage(Usage()) == ""
    assert format_usage(Usage((2**30,))) == "  1 GiB"


def test_losses():
    assert format_losses(LOSSES) == "1.250 | 0.500+2.000"
    assert format_losses([]) == ""


def test_accuracies_of_stages_are_shown_where_earlier_ones_predict():
    row = {"valid_accuracy_stage0": 0.5, "valid_accuracy_stage1": "", "valid_accuracy_stage2": 0.75}
    assert format_exits(row, 3) == " (stages 50.0 | - | 75.0)"
    assert format_exits({**row, "valid_accuracy_stage0": ""}, 3) == ""
    assert format_exits({"valid_accuracy_stage0": 0.5}, 1) == ""
    assert format_exits({}, 4) == ""


def counted(total, out=None):
    return Count("images", total, out)


def test_a_count_says_something_now_and_then(monkeypatch, clock):
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    with counted(1200) as count:
        for _ in range(8):
            clock[0] += 11
            count.add(100)
    assert err.getvalue().splitlines() == [
        "300/1,200 images  25 %  9 images/s  99 s to go",
        "600/1,200 images  50 %  9 images/s  66 s to go",
    ]
    assert count.summary() == "800 images in 88 s"


def test_a_count_on_a_terminal_is_one_live_line_below_what_is_said(monkeypatch, clock):
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("COLUMNS", "100")
    with counted(None) as count:
        clock[0] += 2
        count.add(100)
        count.say("a.png: bad")
        live = err.getvalue().rpartition("\r")[2].rstrip()
    assert live == "100 images  50 images/s"
    assert "a.png: bad\n" in err.getvalue()


def test_no_live_line_among_results(monkeypatch, clock):
    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    with counted(10, out=Terminal()) as count:
        count.add(5)
    assert err.getvalue() == ""
