"""The benchmarks run, and what they claim holds; equal bits they check by themselves."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import scpl
from processes import environment, run_forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CABLE = BENCHMARKS / "fine-tune" / "cable.py"


def found_by(name, *arguments):
    path = BENCHMARKS / name / "main.py"
    done = run_forked(1, path, "--quick", "--json", *arguments, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*/main.py")), ids=lambda p: p.parent.name)
def test_every_benchmark_has_a_description_and_answers_help(path):
    assert path.with_name("README.md").is_file()
    done = run_forked(1, path, "--help", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def results_of(name, *arguments):
    return found_by(name, *arguments)["results"]


@pytest.mark.slow
def test_memory_of_a_step_is_that_of_its_largest_stage_and_nothing_is_left():
    bp, plain, *ours = results_of("memory", "--model", "transformer", "--stages", "4")
    assert plain["peak_bytes"] == pytest.approx(bp["peak_bytes"], rel=0.02)
    for row in ours:
        stages = [max(s["forward_bytes"], s["learn_bytes"]) for s in row["per_stage"]]
        assert row["peak_bytes"] == pytest.approx(max(stages), rel=0.02)
        assert row["peak_bytes"] < 0.5 * bp["peak_bytes"]
        assert row["left_bytes"] < 0.02 * row["peak_bytes"]


def test_a_hand_written_loop_ends_with_the_same_bits_as_the_pipeline():
    clocks = results_of("overhead", "--model", "mlp")["mlp"]
    assert clocks["wall"]["pairs"] == clocks["processor"]["pairs"] == 10
    assert clocks["wall"]["ratio"]["median"] > 0


@pytest.mark.slow
def test_throughput_of_rivals_and_the_same_losses_on_one_and_two_processes():
    names = ["one", "line", "ddp", "limit"]
    found = found_by("throughput", "--variants", *names, "--repeats", "1", "--steps", "2")
    assert found["failures"] == {}
    assert set(found["variants"]) == set(names)
    assert found["equal_losses"] == 5  # of the warm and timed steps of `one`
    one, line = (found["variants"][name]["rates"][0] for name in ("one", "line"))
    assert found["ratios"]["line/one"]["median"] == line / one
    assert found["ratios"]["line/ddp"]["target"] == 1.0


PRETENDED = """
import json, sys
assert sys.argv[1:3] == ["bench", "--model"]
result = {"samples_per_second": {"median": 0.5}, "other_load": {"median": 9.0}}
json.dump({"results": [result]}, sys.stdout)
"""


def test_two_versions_of_the_source_are_compared_in_turns(tmp_path):
    """The old one only pretends to train, at half an image per second."""
    (tmp_path / "scpl").mkdir()
    (tmp_path / "scpl" / "__init__.py").touch()
    (tmp_path / "scpl" / "__main__.py").write_text(PRETENDED)
    found = results_of(
        "compare_versions", "--old", tmp_path, "--new", Path(scpl.__file__).parents[1],
        "--settings", "vgg8 bp 1", "--rounds", "1", "--blocks", "1", "--steps", "1",
    )["vgg8 bp 1"]  # fmt: skip
    assert found["old"] == 0.5
    assert found["ratio"]["rounds"] == [found["new"] / found["old"]]
    assert found["ratio"]["quartiles"] == [found["ratio"]["median"]] * 2
    assert found["ratio"]["median"] > 1
    assert found["other_load"] == 9.0
    assert found["slower"] is False


@pytest.mark.slow
def test_networks_are_the_same_after_they_are_cut_or_refused_with_a_reason():
    found = {row["network"]: row["cuts"]["2"] for row in results_of("networks")}
    assert "torch.export must be able" in found.pop("data-dependent branch")["refused"]
    assert len(found) == 2
    assert all(row["traced"] and row["faults"] == [] for row in found.values())


def network_namespaces():
    """Those that a process is in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            found.add(os.readlink(process / "ns" / "net"))
    return found


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


links = load(BENCHMARKS / "links.py")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_fine_tuning_over_a_cable():
    """A tiny network; where no cable can be made, which is told, loopback alone."""
    pytest.importorskip("transformers")
    reason = links.refusal()
    done = run_forked(
        1, CABLE, "--quick", "--json", "--rounds", "1", "--micro-batches", "2", "--epochs", "0",
        "--rate", "200mbit", timeout=450,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["no_cable"] == reason
    networks = ["loopback"] if reason else ["loopback", "200mbit"]
    assert list(dict.fromkeys(row["network"] for row in found["results"])) == networks
    rows = {(row["method"], row["network"]): row for row in found["results"]}
    methods = ["scpl", "gpipe", "1f1b", "ddp", "ddp bf16", "ddp x4", "ddp bf16 x4"]
    assert rows.keys() >= {(method, network) for method in methods for network in networks}
    assert all(row["samples_per_second"]["median"] > 0 for row in rows.values())
    assert max(found["equal"]["difference"].values()) < 1e-4
    ratio = next(
        row for row in found["ratios"] if (row["below"], row["network"]) == ("ddp", networks[-1])
    )
    rates = [rows[name, networks[-1]]["rates"][0] for name in ("scpl", "ddp")]
    assert ratio["median"] == pytest.approx(rates[0] / rates[1])
    assert ratio["target"] == (1.0 if reason else 3.0)
    if not reason:
        assert found["speeds"]["200mbit"] == pytest.approx(0.956 * 200e6, rel=0.05)
        sent = {name: rows[name, "200mbit"]["bytes_per_step"]["median"] for name in methods}
        assert sent["ddp"] > 1.5 * sent["ddp bf16"] > sent["ddp bf16 x4"]


def test_the_study_of_fine_tuning_compares_seeds_in_pairs(tmp_path):
    study = load(BENCHMARKS / "fine-tune" / "study.py")
    ends = {
        ("2 stages-seed0", "bp"): 0.80, ("2 stages-seed0", "scpl"): 0.81,
        ("2 stages-seed1", "bp"): 0.90, ("3 stages-seed1", "scpl"): 0.88,
        ("3 stages-seed2", "scpl"): 0.50, ("from scratch-seed0", "bp"): 0.60,
    }  # fmt: skip
    for (folder, method), accuracy in ends.items():
        run = tmp_path / "imdb" / folder / f"{method}-seed"
        run.mkdir(parents=True)
        found = {
            "method": method,
            "test_accuracy": accuracy,
            "valid_accuracy": 0,
            "train_seconds": 1,
        }
        (run / "summary.json").write_text(json.dumps(found))
    lines = study.table(study.collect(tmp_path)).splitlines()
    assert lines[0] == "| method | imdb | to bp |"
    assert lines[2:] == [
        "| `bp` | 85.00 ± 7.07 (2) |  |",
        "| `scpl`, 2 stages | 81.00 (1) | +1.00 |",
        "| `scpl`, 3 stages | 69.00 ± 26.87 (2) | -2.00 |",  # seed 2 has no partner
        "| `bp`, from scratch | 60.00 (1) |  |",
    ]


def test_time_to_the_accuracy_of_backpropagation(tmp_path, monkeypatch):
    """What has the numbers of backpropagation has its curve; another one may never get there."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds to it
    cable = load(CABLE)
    curves = {"bp": [0.5, 0.8], "scpl": [0.7, 0.9], "ddp x4": [0.4, 0.6]}
    rates = {"bp": 10.0, "gpipe": 15.0, "scpl": 20.0, "ddp": 18.0, "ddp x4": 19.0}
    rows = [
        {"method": name, "network": "loopback", "samples_per_second": {"median": rate}}
        for name, rate in rates.items()
    ]
    times = cable.times_of(rows, curves, 100)
    found = {row["method"]: row["times_sooner_than_bp"] for row in times}
    assert found.pop("ddp x4") is None
    # scpl is there in the middle of its second epoch, after 7.5 s; bp after 20 s.
    assert found == pytest.approx({"bp": 1.0, "gpipe": 1.5, "scpl": 20 / 7.5, "ddp": 1.8})
    pytest.importorskip("matplotlib")
    cable.draw(times, tmp_path / "cable.png")
    assert (tmp_path / "cable.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(bool(links.refusal()), reason="no network namespaces can be made here")
def test_a_cable_is_gone_however_its_benchmark_ends():
    pytest.importorskip("transformers")
    before = network_namespaces()
    command = [sys.executable, CABLE, "--quick", "--rate", "200mbit", "--epochs", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            lines = iter(process.stderr.readline, "")
            assert any(line.startswith("starting the process alone") for line in lines)
            made = network_namespaces() - before
            assert made
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while made & network_namespaces() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not made & network_namespaces()
