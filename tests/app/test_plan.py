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


def test_many_machines_are_simulated():
    """Every method on 2 and on 64, one half as fast; the answer follows from the numbers."""
    flags = ["--machines", "2", "3", "--link", "1gbit,2ms", "--speeds", "1", "0.5", "1"]
    done = scpl("plan", *TINY, "--batch-size", "8", *flags, "--json")
    assert done.status == 0, done.err
    two, three = json.loads(done.out)["simulated"]
    assert two["speeds"] == [1.0, 0.5]
    assert three["machines"] == 3
    found = {each["method"]: each for each in three["forecasts"]}
    assert list(found) == ["scpl", "gpipe", "1f1b", "zero-bubble", "ddp", "bp"]
    own = found["scpl"]
    assert own["num_machines"] == len(own["memory"]) == len(own["wait_shares"]) == 3
    assert own["ratio"] * found["bp"]["samples_per_second"] == pytest.approx(
        own["samples_per_second"]
    )
    assert three["flags"] == f"--cuts {' '.join(own['cuts'])} --processes 3"
    assert three["answer"].startswith(
        "3 machines of speeds 1 0.5 1 on 1gbit,2ms, simulated: "
        f"scpl {own['ratio']:.2f} x one machine with bp, gpipe "
    )
    assert own["memory"][0].keys() == {"parameters", "gradients", "optimizer", "activations"}
    # The all-reduce of two machines is two rounds, of 2 ms at least.
    ddp = {each["method"]: each for each in two["forecasts"]}["ddp"]
    assert ddp["samples_per_second"] < 8 / 4e-3


@pytest.mark.parametrize(("cores", "costs"), [(1, True), (2, False)])
def test_messages_cost_the_processor_if_no_core_is_spare(monkeypatch, cores, costs):
    """What a core does that computes nothing is for free."""
    monkeypatch.setattr(planning, "share_of_cores", lambda processes: cores // processes)
    kept = []

    def simulated(config, links, measured):
        kept.append(measured.messages.byte)
        return {"simulated": []}

    monkeypatch.setattr(planning, "simulated", simulated)
    done = scpl("plan", *SMALL, "--machines", "2", "--threads", "1", "--json")
    assert done.status == 0, done.err
    assert (kept[0] > 0) == costs


def test_a_simulation_as_a_table():
    done = scpl("plan", *SMALL, "--machines", "64")
    assert done.status == 0, done.err
    first, _, head, *rows = done.out.splitlines()
    assert first == "Simulated from times that were measured on this machine alone:"
    assert head.split()[:4] == ["method", "machines", "micro-batches", "samples/s"]
    used = dict(row.split()[:2] for row in rows)
    assert (used["scpl"], used["bp"]) == ("3", "1")
    assert rows[-2].startswith("64 machines on loopback, simulated: scpl ")


@pytest.mark.parametrize(
    ("text", "rate", "latency"),
    [("200mbit", 25e6, 1e-4), ("1.5gbit,2ms", 187.5e6, 2e-3), ("8kbit,50us", 1e3, 5e-5)],
)
def test_links(text, rate, latency):
    """Of the bits on a cable some are headers of frames."""
    link = planning.read_link(text)
    assert 0.95 * rate < link.rate < rate
    assert link.latency == pytest.approx(latency)


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
        (["plan", "--link", "1gbit"], "--link must go with --machines"),
        (["plan", *SMALL, "--machines", "2", "--link", "fast"], "or loopback. Got 'fast'"),
        (["plan", *SMALL, "--machines", "2", "--link", "0gbit"], "or loopback. Got '0gbit'"),
        (
            ["plan", "--machines", "3", "--link", "1gbit", "2gbit"],
            "--link must say it for each of the 3 machines. Got 1gbit 2gbit",
        ),
        (["plan", "--machines", "2", "--speeds", "1"], "--speeds must say it for each of the 2"),
        (["plan", "--machines", "2", "--speeds", "1", "0"], "--speeds must be above 0. Got 1 0"),
        (["plan", "--machines", "0"], "--machines must be more than 0 and at most 1,024. Got 0"),
        (["plan", "--machines", "4", "--processes", "2"], "Got --processes, too"),
        (["plan", "--machines", "2", "--method", "gpipe"], "Got --method gpipe"),
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
    monkeypatch.setattr(planning, "measure_parts", None)
    resumed = scpl("train", "--resume", "run", "--processes", "1")
    assert resumed.status == 0, resumed.err
    assert read("run")["test_loss"] == read("again")["test_loss"]
    # A launcher that starts lost processes again gives them the flags that it got.
    restarted = TrainConfig.of(balance="measured", stages=3, resume=tmp_path / "run")
    config, plan = planning.balanced(restarted, OneRank(), None, object())
    assert config.network == replace(kept.network, model="small-cnn")
    assert config.run.stages_per_process == kept.run.stages_per_process
    assert plan is None
