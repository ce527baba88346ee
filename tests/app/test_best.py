"""The best epoch: which it is, that it is kept, and when training ends without a better one."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from cli_runs import NUM_STEPS, TINY, finish, fork, refused, result, scpl
from processes import Forked, environment
from scpl.app.config import TrainConfig
from scpl.app.train.best import Best, Watch, watch_of
from scpl.app.train.recorder import Recorder
from scpl.engine.checkpoint import read_part
from scpl.errors import InputError
from scpl.runs.metrics import WATCHED
from scpl.tasks import Classes, Regression

nan = math.nan


def followed(metric, patience, values):
    """The epoch that is the best in the end, and the one after which training ends."""
    watch = Watch(WATCHED[metric], patience)
    for epoch, value in enumerate(values, 1):
        watch.see(Best(epoch, 10 * epoch, value))
        again = Watch(WATCHED[metric], patience)
        again.restore(json.loads(json.dumps(watch.note())))
        assert (again.best, again.is_over(epoch)) == (watch.best, watch.is_over(epoch))
        watch = again  # as if every epoch were another start
        if watch.is_over(epoch):
            break
    return watch.best and watch.best.epoch, epoch


@pytest.mark.parametrize(
    ("metric", "patience", "values", "best", "end"),
    [
        ("accuracy", None, [0.1, 0.5, 0.4, 0.3, 0.2], 2, 5),
        ("accuracy", 2, [0.1, 0.5, 0.4, 0.3, 0.9], 2, 4),
        ("accuracy", 2, [0.5, 0.5, 0.5, 0.5], 1, 3),  # equal is not better
        ("loss", 2, [3.0, 2.0, 2.5, 1.0, 1.5], 4, 5),
        ("mean_absolute_error", 1, [3.0, 2.0, 2.5, 1.0], 2, 3),
        ("r2", 2, [nan, -1.0, nan, nan], 2, 4),
        ("r2", 2, [nan, nan, 1.0], None, 2),
    ],
)
def test_the_best_epoch_and_when_it_is_over(metric, patience, values, best, end):
    assert followed(metric, patience, values) == (best, end)


def test_what_can_be_watched():
    def watched(task=Classes(), valid=20, **settings):  # noqa: B008
        data = SimpleNamespace(task=task, valid_samples=valid, train_samples=180, noun="images")
        return watch_of(TrainConfig.of(**settings), data)

    assert watched() is None
    assert watched(patience=3).metric.name == "accuracy"
    assert watched(keep_best="main", task=Regression()).metric.name == "r2"
    assert watched(keep_best="loss").metric.falls
    for wanted in ({"keep_best": "main"}, {"patience": 1}):
        with pytest.raises(InputError, match=r"samples held out\. Got none of 180 .*Raise --valid"):
            watched(valid=0, **wanted)
    with pytest.raises(InputError, match=r"accuracy, macro_f1, loss\. Got r2\. Choose"):
        watched(keep_best="r2")
    with pytest.raises(InputError, match=r"--keep-best must be one of: .* 'accuracy'"):
        TrainConfig.of(keep_best="acuracy").check()


def test_the_flag_may_stand_alone(monkeypatch):
    seen = []
    monkeypatch.setattr("scpl.app.train.run.dry_run", lambda config: seen.append(config) or {"": 0})
    for words in (["--keep-best"], ["--keep-best", "loss"], ["--keep_best", "--seed", "1"]):
        assert scpl("train", *words, "--dry-run").status == 0
    assert [config.optimizer.keep_best for config in seen] == ["main", "loss", "main"]


def test_without_a_validation_nothing_can_be_best(tmp_path):
    refused(
        scpl("train", *TINY, "--validation", 0, "--patience", 2, "--out", tmp_path / "run"),
        "--patience compares epochs", "Got none of 200 images: --validation 0", "Raise",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_killed_keeps_the_same_best_and_stops_at_the_same_epoch(
    tmp_path, monkeypatch
):
    """Elsewhere, too: one process stops in the epoch after the best, two go on."""
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = [*TINY, "--stages", 2, "--epochs", 12, "--keep-best", "--patience", 1, "--keep", 1]
    found = scpl("train", *flags, "--out", whole)
    assert found.status == 0, found.err
    summary = json.loads((whole / "summary.json").read_text())
    best, trained = summary["weights_epoch"], summary["trained_epochs"]
    assert best == trained - 1 < 11
    assert f"Stopped early, after epoch {trained} of 12" in found.err
    assert f"Weights of epoch {best}, the best: validation accuracy" in found.err
    assert found.err.count("best so far") == best

    # The weights are those of one moment in all stages, and the last ones are there, too.
    kept = {}
    for stage in range(2):
        kept |= read_part(whole / "checkpoints", best * NUM_STEPS, stage)["body"]
    for name, value in load_file(whole / "model.safetensors").items():
        assert name.startswith("classifier") or (value == kept[name]).all()
    tested = [json.loads(scpl("eval", each, "--json").out) for each in (whole, whole / "last")]
    assert [each["weights_epoch"] for each in tested] == [best, trained]
    assert tested[0]["test_loss"] == summary["test_loss"] != tested[1]["test_loss"]

    add = Recorder.add

    def interrupted(self, seconds, report):
        add(self, seconds, report)
        if report.step == best * NUM_STEPS + 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", interrupted)
        assert scpl("train", *flags, "--checkpoint-every", 3, "--out", part).status == 143
    done = finish(fork("train", "--resume", part, "--processes", 2), timeout=120)
    assert done.status == 0, done.err
    assert result(part) == result(whole)
    for name in ("model.safetensors", "last/model.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


ALARM = """
import os
import signal
from collections import OrderedDict
from pathlib import Path

from torch import nn


class Alarm(nn.Module):
    count = 0

    def forward(self, images):
        self.count = 0 if self.training else self.count + 1
        # One batch validates, a few find out shapes: ten in a row are of the test.
        if self.count == 10 and (once := os.environ.get("ALARM")) and not Path(once).exists():
            Path(once).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return images


def network(num_classes):
    layers = {
        "alarm": Alarm(), "flatten": nn.Flatten(), "first": nn.Linear(64, 32), "act": nn.ReLU(),
        "second": nn.Linear(32, 32), "last": nn.ReLU(), "classifier": nn.Linear(32, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))
"""


def test_its_final_test_is_interrupted_after_it_went_back_to_the_best(tmp_path, monkeypatch):
    """Asked late, the other ranks would save the best epoch as the last one."""
    (tmp_path / "nets.py").write_text(ALARM)
    monkeypatch.chdir(tmp_path)
    flags = [
        *TINY, "--model", "nets:network", "--image-size", 8, "--stages", 2, "--cuts", "second",
        "--epochs", 12, "--patience", 1, "--checkpoint-every", 4, "--processes", 2,
    ]  # fmt: skip

    def trained(*arguments, **variables):
        words = ["-m", "scpl", "train", *map(str, arguments)]
        return finish(Forked(words, environment(**variables)), timeout=120)

    done = trained(*flags, "--out", "whole")
    assert done.status == 0, done.err
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert json.loads((whole / "summary.json").read_text())["weights_epoch"] < 12
    done = trained(*flags, "--out", "part", ALARM=str(tmp_path / "rung"))
    assert done.status == 143, done.err
    assert (tmp_path / "rung").exists()
    assert not (part / "summary.json").exists()
    done = trained("--resume", "part", "--model", "nets:network", "--processes", 2)
    assert done.status == 0, done.err
    assert result(part) == result(whole)
    for name in ("model.safetensors", "last/model.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
