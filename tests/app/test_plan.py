"""`scpl plan`, and training with the cuts that were measured."""

import json
from dataclasses import replace

import pytest

from cli_runs import TINY, scpl, train
from processes import run_forked
from scpl.app import planning
from scpl.app.config import TrainConfig
from scpl.engine.ranks import OneRank

SMALL = [*TINY, "--stages", "3"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_plan_for_two_processes(tmp_path):
    done = scpl("plan", *SMALL, "--processes", "2", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    plan = found["plan"]
    assert len(plan["stages"]) == 3
    assert len(plan["cuts"]) == 2
    assert sum(plan["stages_per_process"]) == 3
    assert len(plan["wait_share"]) == 2
    assert min(plan["wait_share"]) == 0
    assert plan["num_samples"] == 20
    assert not found["synthetic"]
    assert found["operations"]["samples_per_second"] > 0
    counts = " ".join(map(str, plan["stages_per_process"]))
    cuts = " ".join(plan["cuts"])
    assert found["flags"] == f"--cuts {cuts} --processes 2 --stages-per-process {counts}"
    assert list(tmp_path.iterdir()) == []
    # The flags are those of a run that is as planned.
    assert train(*found["flags"].split(), "--dry-run").status == 0


def test_what_given_cuts_cost_is_told_as_a_table():
    found = json.loads(scpl("plan", *SMALL, "--json").out)["operations"]
    done = scpl("plan", *TINY, "--cuts", *found["cuts"])
    assert done.status == 0, done.err
    first, *_, speed, flags = done.out.splitlines()
    assert first.split()[:3] == ["stage", "layers", "parameters"]
    assert speed.endswith("samples/s on one rank")
    assert flags == f"Use it with: --cuts {' '.join(found['cuts'])}"


def test_data_that_is_not_here_is_drawn_and_that_is_said(monkeypatch):
    monkeypatch.delenv("SCPL_DATA", raising=False)
    done = scpl("plan", *SMALL, "--data", "fashion-mnist")
    assert done.status == 0, done.err
    assert "Measured on random data" in done.out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["plan", "--method", "bp"], "A plan is for methods that train stages. Got bp"),
        (["plan", "--dry-run"], "A plan is made anew and writes nothing. Got --dry-run"),
        (["train", "--speeds", "1", "0.5"], "--speeds must go with --balance measured"),
        (
            [
                "train",
                "--balance",
                "measured",
                "--speeds",
                "1",
                "0.5",
                "2",
                "--dry-run",
                "--threads",
                "1",
            ],
            "one for each rank, of which there are 1. Got 1 0.5 2",
        ),
        (["plan", "--batch-size", "0"], "--batch-size must be more than 0"),
        (["train", "--balance", "measured", "--cuts", "layer2"], "Got --cuts"),
        (
            ["train", "--balance", "measured", "--stages-per-process", "3", "1"],
            "Got --stages-per-process",
        ),
        (["train", "--balance", "measured", "--method", "bp"], "methods that train stages. Got bp"),
        (["bench", "--balance", "measured"], "Methods that are compared must have the same cuts"),
        (["compare", "--balance", "measured"], "Methods that are compared must have the same cuts"),
    ],
)
def test_what_is_refused(arguments, why):
    done = scpl(*arguments)
    assert done.status == 2
    assert why in done.err
    assert "Traceback" not in done.err


def test_a_run_keeps_the_cuts_that_were_measured(tmp_path, monkeypatch):
    """Two processes agree on them; resumed, it goes on with them and measures nothing."""
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    arguments = ["--out", "run", "--balance", "measured", "--speeds", "1", "0.01"]
    first = run_forked(2, "-m", "scpl", "train", *SMALL, *arguments, timeout=100)
    assert first.returncode == 0, first.stderr
    assert "Cut by measurement: processes are expected to wait" in first.stderr
    kept = TrainConfig.read(tmp_path / "run" / "config.toml")
    assert kept.network.balance == "operations"
    assert len(kept.network.cuts) == 2
    assert kept.run.stages_per_process == (2, 1)  # the slow one gets as little as it can
    assert kept.run.speeds == ()
    assert "on 2 ranks of speeds 1 0.01" in first.stderr
    again = train("--stages", "3", "--out", "again", "--cuts", *kept.network.cuts)
    assert again.status == 0, again.err
    read = lambda name: json.loads((tmp_path / name / "summary.json").read_text())  # noqa: E731
    assert read("again")["test_loss"] == read("run")["test_loss"]
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been interrupted at its very end
    monkeypatch.setattr(planning, "measure", None)
    resumed = scpl("train", "--resume", "run", "--processes", "1")
    assert resumed.status == 0, resumed.err
    assert read("run")["test_loss"] == read("again")["test_loss"]
    # A launcher that starts lost processes again gives them the flags that it got.
    restarted = TrainConfig.of(balance="measured", stages=3, resume=tmp_path / "run")
    config, plan = planning.balanced(restarted, OneRank(), None, object())
    assert config.network == replace(kept.network, model="small-cnn")
    assert config.run.stages_per_process == kept.run.stages_per_process
    assert plan is None
