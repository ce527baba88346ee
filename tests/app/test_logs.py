"""Live logs in tools of others: TensorBoard itself, and one that is pretended."""

import json
import sys
from types import SimpleNamespace

import pytest

from cli_runs import refused, train
from scpl.app.config import TrainConfig
from scpl.app.train import logs
from scpl.app.train.logs import Logs, TensorBoard, Tool
from scpl.runs import RunFolder


class Pretended(Tool):
    """Keeps what it is told in a list that all starts of a run share."""

    module = "json"
    heard = []  # noqa: RUF012
    fails_at = None

    def __init__(self, folder, config, step, known):
        self.heard.append(("start", config, step, known))

    def log(self, step, numbers):
        if step == self.fails_at:
            raise OSError("no room\nat all")
        self.heard.append((step, numbers))

    def end(self, *, finished):
        self.heard.append(("end", finished))

    def known(self):
        return {"run": 7}


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(Pretended, "heard", [])
    monkeypatch.setattr(logs, "TOOLS", {**logs.TOOLS, "wandb": Pretended})
    return Pretended


def started(folder, names, step, told=None):
    made = Logs(names, RunFolder(folder), {"lr": 0.1}, (told if told is not None else []).append)
    made.start(step)
    return made


def test_a_resumed_run_goes_on_in_the_same_log_without_doubled_steps(tmp_path, pretended):
    first = started(tmp_path, ["wandb"], 0)
    for step in (5, 10, 15):
        first.log(step, {"loss": step / 10, "empty": "", "text": "x"})
    # It is killed here, goes on from step 8, is killed again, and goes on to its end.
    for steps in ([9, 10], [9, 15, 20]):
        again = started(tmp_path, ["wandb"], 8)
        for step in steps:
            again.log(step, {"loss": step / 10})
    again.end(20, {"test_accuracy": 0.5})
    again.end()
    logged = [each for each in pretended.heard if isinstance(each[0], int)]
    assert logged == [(5, {"loss": 0.5}), (10, {"loss": 1.0}), (15, {"loss": 1.5}),
                      (20, {"loss": 2.0}), (20, {"test_accuracy": 0.5})]  # fmt: skip
    starts = [each for each in pretended.heard if each[0] == "start"]
    assert starts == [("start", {"lr": 0.1}, step, known)
                      for step, known in ((0, {}), (8, {"run": 7}), (8, {"run": 7}))]  # fmt: skip
    assert pretended.heard[-1] == ("end", True)


def test_a_tool_that_fails_says_so_once_and_others_go_on(tmp_path, pretended, monkeypatch):
    told = []
    monkeypatch.setattr(pretended, "fails_at", 2)
    made = started(tmp_path, ["tensorboard", "wandb"], 0, told)
    for step in (1, 2, 3):
        made.log(step, {"loss": 1.0})
    made.end()
    assert told == ["--log wandb failed and is left out from here on: OSError: no room"]
    assert pretended.heard[1:] == [(1, {"loss": 1.0})]
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0)]


def scalars(folder):
    """What TensorBoard itself reads."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        name: [(each.step, each.value) for each in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def test_tensorboard_forgets_what_a_killed_run_had_logged_too_much(tmp_path):
    pytest.importorskip("tensorboard")
    assert TensorBoard.takes_back
    first = started(tmp_path, ["tensorboard"], 0)
    for step in (2, 4, 6):
        first.log(step, {"loss": float(step)})
    first.end()
    again = started(tmp_path, ["tensorboard"], 3)
    for step in (4, 6, 8):
        again.log(step, {"loss": 10.0 * step})
    again.end()
    assert scalars(tmp_path) == {"loss": [(2, 2.0), (4, 40.0), (6, 60.0), (8, 80.0)]}


def test_a_run_logs_its_epochs_and_ends(tmp_path, pretended, monkeypatch):
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    run = tmp_path / "run"
    done = train("--stages", 2, "--epochs", 2, "--log", "tensorboard", "wandb", "--out", run)
    assert done.status == 0, done.err
    summary = json.loads((run / "summary.json").read_text())
    read = scalars(run)
    assert [step for step, _ in read["valid_accuracy"]] == [9, 18]
    assert read["test_accuracy"] == [(18, pytest.approx(summary["test_accuracy"]))]
    (_, config, step, known), *heard = pretended.heard
    assert (config["lr"], config["epochs"], step, known) == (0.003, 2, 0, {})
    assert heard[-1] == ("end", True)
    assert TrainConfig.read(run / "config.toml").run.log == ("tensorboard", "wandb")


def test_a_tool_that_is_not_there_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    found = train("--log", "mlflow", "--out", tmp_path / "run")
    refused(found, "--log mlflow needs the package 'mlflow'", "pip install 'scpl[mlflow]'")
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_is_offline_and_of_one_name_in_all_starts(tmp_path, monkeypatch):
    asked, heard = [], []
    run = SimpleNamespace(log=lambda *each, **more: heard.append((each, more)),
                          finish=lambda **more: heard.append(more))  # fmt: skip
    fake = SimpleNamespace(init=lambda **more: asked.append(more) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = RunFolder(tmp_path)
    folder.write_json(folder.environment, {"run": "abc"})
    made = started(tmp_path, ["wandb"], 0)
    made.log(3, {"loss": 1.0})
    made.end()
    (asked,) = asked
    assert (asked["mode"], asked["id"], asked["resume"]) == ("offline", "abc", "allow")
    assert asked["config"] == {"lr": 0.1}
    assert heard == [(({"loss": 1.0},), {"step": 3}), {"exit_code": 1}]
