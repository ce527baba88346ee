import json
import os
import signal
import sys
import threading
import time

import pytest

from cli_runs import NUM_STEPS, TINY, refused, result, scpl, train, tree
from scpl.errors import Interrupted
from scpl.methods import METHODS
from scpl.run import compare as module


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Runs are trained in this process, which takes no time to start; returns their commands."""
    started = []
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])

    def child(command):
        assert command[:4] == [sys.executable, "-m", "scpl", "train"]
        started.append(command[4:])
        found = scpl(*command[3:])
        if found.status >= 128:
            error = Interrupted("interrupted")
            error.signal = found.status - 128
            raise error
        return f"exit status {found.status}: {found.err}" if found.status else ""

    monkeypatch.setattr(module, "_run_child", child)
    monkeypatch.chdir(tmp_path)
    return started


def compare(*arguments):
    return scpl("compare", *TINY, "--out", "all", *arguments)


def test_three_methods_one_table_one_report(here, tmp_path):
    found = compare("--methods", "scpl,early-exit,bp", "--json")
    assert found.status == 0, found.err
    assert found.out.count("\n") == 1
    answer = json.loads(found.out)
    assert [run["method"] for run in answer["results"]] == ["scpl", "early-exit", "bp"]
    assert answer["failures"] == {}
    assert "versions" in answer["environment"]
    for name in answer["report"]:
        assert (tmp_path / name).stat().st_size > 0
    for method in METHODS:
        assert method in found.err
        assert (tmp_path / "all" / f"{method}-seed0" / "summary.json").exists()
    assert not list((tmp_path / "all").glob(".*"))

    before = tree(tmp_path / "all" / "bp-seed0")
    here.clear()
    assert compare("--methods", "scpl,early-exit,bp").status == 0
    assert here == []
    assert tree(tmp_path / "all" / "bp-seed0") == before


def test_a_run_of_a_comparison_is_the_run_alone(here, tmp_path):
    compare("--methods", "scpl", "--seeds", "3")
    train("--seed", "3", "--out", "alone")
    assert result(tmp_path / "all" / "scpl-seed3") == result(tmp_path / "alone")


def test_methods_alternate(here):
    compare("--methods", "scpl,bp", "--seeds", "0,1")
    names = [arguments[0].rpartition("/")[2] for arguments in here]
    assert names == [".scpl-seed0.toml", ".bp-seed0.toml", ".scpl-seed1.toml", ".bp-seed1.toml"]


def test_an_interrupted_one_continues(here, tmp_path, monkeypatch):
    from test_train import signal_at

    with monkeypatch.context() as patch:
        signal_at(patch, 4, 2)
        found = compare("--methods", "scpl,bp")
    assert found.status == 130
    assert len(here) == 1
    assert compare("--methods", "scpl,bp").status == 0
    assert here[1:][0] == ["--resume", "all/scpl-seed0"]
    train("--out", "alone")
    assert result(tmp_path / "all" / "scpl-seed0") == result(tmp_path / "alone")
    assert len(result(tmp_path / "all" / "bp-seed0")["steps"]) == NUM_STEPS


def test_one_that_fails_is_reported_and_the_others_go_on(here, monkeypatch, tmp_path):
    child = module._run_child

    def failing(command):
        return "exit status 1: it broke" if ".scpl" in command[4] else child(command)

    monkeypatch.setattr(module, "_run_child", failing)
    found = compare("--methods", "scpl,bp", "--json")
    assert found.status == 1
    answer = json.loads(found.out)
    assert answer["failures"] == {"scpl-seed0": "exit status 1: it broke"}
    assert [run["method"] for run in answer["results"]] == ["bp"]
    assert "scpl-seed0 failed: exit status 1: it broke" in found.err


def test_when_all_fail_there_is_no_table(here, monkeypatch):
    monkeypatch.setattr(module, "_run_child", lambda command: "exit status 1: it broke")
    refused(compare("--methods", "scpl,bp"), "at least one run", "it broke")


def test_other_settings_are_refused(here, tmp_path):
    assert compare("--methods", "bp").status == 0
    before = tree(tmp_path)
    here.clear()
    refused(compare("--methods", "bp", "--lr", "0.5"), "--lr 0.5 (was 0.001)", "--out", "--force")
    assert here == []
    assert tree(tmp_path) == before
    assert compare("--methods", "bp", "--lr", "0.5", "--force").status == 0


def test_a_folder_that_cannot_be_made(here, tmp_path):
    (tmp_path / "all").write_text("mine")
    refused(compare("--methods", "bp"), "must be writable")
    assert (tmp_path / "all").read_text() == "mine"


class TestChildren:
    def test_what_a_child_says_last_is_why_it_failed(self, capsys):
        code = "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)"
        assert module._run_child([sys.executable, "-c", code]) == "exit status 3: two"
        assert capsys.readouterr().err == "    one\n    two\n"

    def test_a_child_that_was_interrupted_ends_the_comparison(self):
        with pytest.raises(Interrupted, match="The same command continues it") as caught:
            module._run_child([sys.executable, "-c", "raise SystemExit(143)"])
        assert caught.value.signal == 15

    def test_a_child_that_was_killed_failed(self):
        code = "import os; os.kill(os.getpid(), 9)"
        assert module._run_child([sys.executable, "-c", code]) == "killed by signal 9 (SIGKILL)"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_reaches_the_child(self, tmp_path, number):
        """Or it would go on training behind the user's back."""
        mark, ready = tmp_path / "mark", tmp_path / "ready"
        code = (
            "import signal, sys, time, pathlib\n"
            "def end(n, f):\n"
            f"    pathlib.Path({str(mark)!r}).write_text(str(n))\n"
            "    sys.exit(128 + n)\n"
            "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
            f"pathlib.Path({str(ready)!r}).touch()\n"
            "time.sleep(60)\n"
        )

        def press():
            while not ready.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        timer = threading.Thread(target=press, daemon=True)
        before = signal.getsignal(number)
        timer.start()
        with pytest.raises(Interrupted) as caught:
            module._run_child([sys.executable, "-c", code])
        timer.join()
        assert caught.value.signal == number
        assert mark.read_text() == str(int(number))
        assert signal.getsignal(number) is before
