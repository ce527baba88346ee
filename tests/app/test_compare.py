import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from test_report import check_page

from cli_runs import NUM_STEPS, TINY, refused, result, scpl, train, tree
from data_files import write_folder
from scpl.app import compare as module
from scpl.app.config import TrainConfig
from scpl.errors import Interrupted
from scpl.report import write_run_report

TINY_CONFIG = TrainConfig.of(
    model="mlp", limit_train=200, batch_size=20, epochs=1, threads=1, device="cpu", out=Path("all")
)


@pytest.fixture
def draw(monkeypatch):
    """Decides whether reports have pictures, which take longer to draw than runs to train."""

    def decide(wanted):
        for place in ("scpl.report", "scpl.report.pages"):
            monkeypatch.setattr(f"{place}.can_draw", lambda: wanted)

    return decide


@pytest.fixture
def here(monkeypatch, tmp_path, draw):
    """Runs are trained in this process, which takes no time to start; returns their commands."""
    started = []
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    draw(False)

    def child(command):
        assert command[:4] == [sys.executable, "-m", "scpl", "train"]
        started.append(command[4:])
        found = scpl(*command[3:])
        if found.status >= 128:
            error = Interrupted("interrupted")
            error.signal = found.status - 128
            raise error
        return found.status, found.err.strip().rpartition("scpl: ")[2]

    monkeypatch.setattr(module, "_run_child", child)
    monkeypatch.chdir(tmp_path)
    return started


def compare(*arguments):
    return scpl("compare", *TINY, "--out", "all", *arguments)


def test_three_methods_one_table_one_report(here, draw, tmp_path):
    draw(True)
    found = compare("--methods", "scpl,early-exit,bp", "--json")
    assert found.status == 0, found.err
    assert found.out.count("\n") == 1
    answer = json.loads(found.out)
    assert [result["method"] for result in answer["results"]] == ["scpl", "early-exit", "bp"]
    for one in answer["results"]:
        (run,) = one["runs"]
        assert run == json.loads((tmp_path / run["run"] / "summary.json").read_text()) | {
            "seconds_to_target": run["seconds_to_target"]
        }
        assert one["test_accuracy"]["median"] == run["test_accuracy"]
        assert one["test_accuracy"]["n"] == 1
        others = {"scpl", "early-exit", "bp"} - {one["method"]}
        assert set(one["ratio_to"]) == others
    assert answer["failures"] == answer["not_runnable"] == {}
    assert 0 < answer["target"]["accuracy"] < 1
    assert "versions" in answer["environment"]
    assert [Path(name).name for name in answer["report"]] == ["results.png", "report.html"]
    for name in answer["report"]:
        assert (tmp_path / name).stat().st_size > 0
    for method in ("scpl", "early-exit", "bp"):
        assert method in found.err
        assert (tmp_path / "all" / f"{method}-seed0" / "summary.json").exists()
    assert not list((tmp_path / "all").glob(".*"))

    before = tree(tmp_path / "all" / "bp-seed0")
    here.clear()
    draw(False)
    assert compare("--methods", "scpl,early-exit,bp").status == 0
    assert here == []
    assert tree(tmp_path / "all" / "bp-seed0") == before


def test_read_outs_by_depth_are_added_once_and_drawn(here, draw, tmp_path):
    plain = json.loads(compare("--methods", "scpl,al,bp", "--json").out)
    assert all("readout_accuracy" not in one for one in plain["results"])
    draw(True)
    found = compare("--methods", "scpl,al,bp", "--json", "--probe")
    draw(False)
    assert found.status == 0, found.err
    for one in json.loads(found.out)["results"]:
        run = one["runs"][0]
        alone = json.loads(scpl("eval", run["run"], "--probe", "--json").out)["readout_accuracy"]
        assert run["readout_accuracy"] == alone
        assert [stage["mean"] for stage in one["readout_accuracy"]] == alone
        assert f"linear probes of {Path(run['run']).name}: {100 * alone[0]:.1f} | " in found.err
    page = (tmp_path / "all" / "report.html").read_text()
    assert "What a linear read-out finds after every stage" in page
    assert "linear probes" not in compare("--methods", "scpl,al,bp", "--probe").err


def test_a_run_that_cannot_be_read_out_does_not_end_the_comparison(here, tmp_path):
    compare("--methods", "scpl,bp")
    (tmp_path / "all" / "scpl-seed0" / "model.safetensors").write_bytes(b"damaged")
    found = compare("--methods", "scpl,bp", "--probe")
    assert found.status == 0
    assert "no linear probes of scpl-seed0: " in found.err
    assert "linear probes of bp-seed0: " in found.err


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


NET = """
from torch import nn


def build(num_classes, in_channels, image_size):
    features = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def test_a_function_named_to_it_is_named_to_its_runs(here, tmp_path, monkeypatch):
    """A run folder alone must not run code: neither to continue a run nor to probe it."""
    from test_train import signal_at

    (tmp_path / "own_net.py").write_text(NET)
    own = ["--model", "own_net:build", "--stages", "1", "--methods", "bp", "--probe"]
    with monkeypatch.context() as patch:
        signal_at(patch, 4, 2)
        assert compare(*own).status == 130
    found = compare(*own)
    assert found.status == 0, found.err
    assert here[1][:4] == ["--resume", "all/bp-seed0", "--model", "own_net:build"]
    assert "linear probes of bp-seed0: " in found.err


def test_one_that_fails_is_reported_and_the_others_go_on(here, monkeypatch, tmp_path):
    child = module._run_child

    def failing(command):
        return (1, "exit status 1: it broke") if ".scpl" in command[4] else child(command)

    monkeypatch.setattr(module, "_run_child", failing)
    found = compare("--methods", "scpl,bp", "--json")
    assert found.status == 1
    answer = json.loads(found.out)
    assert answer["failures"] == {"scpl-seed0": "exit status 1: it broke"}
    assert answer["not_runnable"] == {}
    assert [result["method"] for result in answer["results"]] == ["bp"]
    assert "it broke" in (tmp_path / "all" / "report.html").read_text()
    assert "scpl-seed0 failed: exit status 1: it broke" in found.err


def test_when_all_fail_there_is_no_table(here, monkeypatch):
    monkeypatch.setattr(module, "_run_child", lambda command: (1, "exit status 1: it broke"))
    refused(compare("--methods", "scpl,bp"), "at least one run", "it broke")


def test_other_settings_are_refused(here, tmp_path):
    assert compare("--methods", "bp").status == 0
    before = tree(tmp_path)
    here.clear()
    refused(compare("--methods", "bp", "--lr", "0.5"), "--lr 0.5 (was 0.003)", "--out", "--force")
    assert here == []
    assert tree(tmp_path) == before
    assert compare("--methods", "bp", "--lr", "0.5", "--force").status == 0


def test_other_processes_are_other_settings_too(here):
    """They change no number of a run, but its speed."""
    assert compare("--methods", "bp").status == 0
    refused(compare("--methods", "bp", "--depth", "3"), "--depth 3 (was 2)")
    assert compare("--methods", "bp", "--keep", "1").status == 0


def test_a_method_that_cannot_run_here_is_left_out_and_named(here, monkeypatch, tmp_path):
    """That is no failure: it is said in the table, in the JSON and in the report."""
    child, asked = module._run_child, []

    def refusing(command):
        if ".early-exit" in command[4]:
            asked.append(command)
            return 2, "The batch must be divisible. Got 20."
        return child(command)

    monkeypatch.setattr(module, "_run_child", refusing)
    found = compare("--methods", "bp,early-exit", "--seeds", "0,1", "--json")
    assert found.status == 0, found.err
    answer = json.loads(found.out)
    assert answer["failures"] == {}
    assert answer["not_runnable"] == {"early-exit": "The batch must be divisible. Got 20."}
    assert len(asked) == 1, "another seed would change nothing"
    said = "cannot run here: The batch must be divisible. Got 20."
    assert f"early-exit  {said}" in found.err
    assert said in (tmp_path / "all" / "report.html").read_text()


def test_what_breaks_after_its_first_steps_has_failed(here, tmp_path):
    """A loss that explodes also ends a run with status 2."""
    found = compare("--methods", "bp,scpl", "--optimizer", "sgd", "--lr", "1e30", "--json")
    assert found.status in (1, 2)
    words = "bp-seed0 failed: The loss of every stage must be finite"
    assert words in found.err
    assert "cannot run here" not in found.err


@pytest.mark.parametrize("target", ["0", "85", "-1", "nan"])
def test_a_target_is_a_share(here, target):
    refused(compare("--methods", "bp", "--target", target), "--target", "85 % as 0.85")
    assert here == []


def test_a_target_that_was_asked_for(here):
    answer = json.loads(compare("--methods", "bp", "--target", "0.01", "--json").out)
    assert answer["target"] == {"accuracy": 0.01, "origin": "as asked for"}
    (result,) = answer["results"]
    assert 0 < result["seconds_to_target"]["median"] <= result["wall_seconds"]["median"]


def test_a_narrow_terminal_gets_several_tables(here, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "70")
    assert compare("--methods", "bp").status == 0
    err = Terminal()
    with contextlib.redirect_stderr(err):
        module.compare(module.CompareConfig(TINY_CONFIG, methods="bp"))
    table = err.getvalue().partition("method")[2].partition("Accuracy:")[0]
    assert table.count("method") >= 1
    assert max(map(len, table.splitlines())) <= 70


def test_no_name_of_the_user_becomes_markup(here, draw, tmp_path):
    """Class folders, the data's path and --out may hold what a browser would run."""
    evil = """<script>alert('x')<"b">"""
    draw(True)
    write_folder(tmp_path / evil, classes=(evil, "a & b"), n=10)
    found = scpl("compare", *TINY, "--data", evil, "--out", f"all {evil}", "--methods", "bp",
                 "--batch-size", "4")  # fmt: skip
    assert found.status == 0, found.err
    folder = tmp_path / f"all {evil}"
    for page in (folder / "report.html", write_run_report(folder / "bp-seed0")[-1]):
        assert evil in "".join(check_page(page).texts)
        assert "<script" not in page.read_text()


def test_a_folder_that_cannot_be_made(here, tmp_path):
    (tmp_path / "all").write_text("mine")
    refused(compare("--methods", "bp"), "must be writable")
    assert (tmp_path / "all").read_text() == "mine"


class TestChildren:
    def test_what_a_child_says_last_is_why_it_failed(self, capsys):
        code = "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)"
        assert module._run_child([sys.executable, "-c", code]) == (3, "exit status 3: two")
        assert capsys.readouterr().err == "    one\n    two\n"

    def test_the_verdict_counts_whatever_is_heard_after_it(self):
        said = "first\nscpl: A batch must be divisible. Got 65.\n[W] gloo lost a connection"
        code = f"import sys; print({said!r}, file=sys.stderr); sys.exit(2)"
        found = module._run_child([sys.executable, "-c", code])
        assert found == (2, "A batch must be divisible. Got 65.")

    def test_a_child_that_was_interrupted_ends_the_comparison(self):
        with pytest.raises(Interrupted, match="The same command continues it") as caught:
            module._run_child([sys.executable, "-c", "raise SystemExit(143)"])
        assert caught.value.signal == 15

    def test_a_child_that_was_killed_failed(self):
        code = "import os; os.kill(os.getpid(), 9)"
        assert module._run_child([sys.executable, "-c", code])[1] == "killed by signal 9 (SIGKILL)"

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
