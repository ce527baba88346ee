"""benchmarks/gpu/speed.py on a CPU: every variant is measured; one that fails stops no other."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu" / "speed.py"


@pytest.fixture
def script(monkeypatch):
    """The script, with its own networks."""
    spec = importlib.util.spec_from_file_location("gpu_speed", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_speed", module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def speed(script, monkeypatch):
    """The script, with one small network."""

    def build(small):
        layers = [layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(6, script.CLASSES))

    tiny = script.Network(build, lambda small: torch.randn(20, 6), maps=False)
    monkeypatch.setattr(script, "NETWORKS", {"tiny": tiny})
    return script


def rows(speed, folder, *arguments):
    file = folder / "rows.json"
    options = ["--device", "cpu", "--quick", "--ranks", "0", "--json", str(file), *arguments]
    status = speed.main(options)
    return status, {row.get("variant", "ranks"): row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("name", ["vgg8", "resnet18", "vit", "bert"])
def test_its_networks_can_be_cut_into_four_stages_and_take_its_batches(script, name):
    parts = script.cut(name, 4, small=True)
    assert parts.num_stages == 4
    assert parts.model(script.NETWORKS[name].batch(True)).shape == (8, script.CLASSES)


def test_every_variant_is_measured_against_bp_in_the_same_mode(speed, tmp_path, capsys):
    status, found = rows(speed, tmp_path)
    assert status == 0
    assert set(found) == {"loop", "bp", "early-exit 4", "scpl 4"}
    told = capsys.readouterr().out
    for name, row in found.items():
        assert row["ms"] > 0
        assert row["device_ms"] > 0
        assert row["to_bp"][0] == pytest.approx(row["ms"] / found["bp"]["ms"])
        assert name in told
    # Heads and losses are kernels more, whatever the clock says.
    assert found["loop"]["kernels"] <= found["bp"]["kernels"] < found["scpl 4"]["kernels"]


def test_a_variant_that_fails_is_told_and_the_others_go_on(speed, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(speed.METHODS, "early-exit", lambda: 1 / 0)
    status, found = rows(speed, tmp_path)
    assert status == 1
    assert found["early-exit 4"]["failed"] == "ZeroDivisionError: division by zero"
    assert found["scpl 4"]["ms"] > 0
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_what_does_not_fit_into_the_time_is_told(speed, tmp_path):
    status, found = rows(speed, tmp_path, "--seconds", "0")
    assert status == 0
    assert {row["failed"] for row in found.values()} == {"no time left"}


def test_several_ranks_go_to_scpl_bench_and_its_failures_count(
    speed, tmp_path, monkeypatch, capsys
):
    spread = {"median": 10.0, "min": 9.0, "max": 11.0}
    answer = {
        "results": [{"method": "scpl", "samples_per_second": spread}],
        "failures": {"ddp": "a link broke"},
    }
    asked = []

    def bench(command, **options):
        asked.extend(command)
        return speed.subprocess.CompletedProcess(command, 0, json.dumps(answer))

    monkeypatch.setattr(speed.subprocess, "run", bench)
    status, found = rows(speed, tmp_path, "--seconds", "0", "--ranks", "2")
    assert status == 1
    assert asked[asked.index("--processes") + 1] == "2"
    assert found["ranks"]["failures"] == {"ddp": "a link broke"}
    told = capsys.readouterr().out
    assert "10 (9 .. 11)" in told
    assert "a link broke" in told
