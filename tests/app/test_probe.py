import json

import pytest
import torch
from torch import nn

from cli_runs import refused, scpl
from networks import NUM_CLASSES, mlp, rows
from scpl import split
from scpl.app.probe import probe_partition

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


def test_a_linear_read_out_finds_what_is_there_and_not_what_is_lost():
    """Classes at three corners; the second stage forgets everything."""
    torch.manual_seed(0)
    target = torch.arange(90) % NUM_CLASSES
    inputs = torch.eye(3)[target] + 0.1 * torch.randn(90, 3)
    forget = nn.Linear(3, 4)
    nn.init.zeros_(forget.weight)
    model = nn.Sequential(nn.Linear(3, 3), forget, nn.Linear(4, NUM_CLASSES))
    parts = split(model, before=["1"], example=inputs[:2])
    batches = [(inputs[:50], target[:50]), (inputs[50:], target[50:])]
    assert probe_partition(parts, batches, batches, NUM_CLASSES, CPU) == [1.0, pytest.approx(1 / 3)]


def test_it_is_ridge_regression_on_standardised_features():
    model, batches = mlp(), rows()
    parts = split(model, before=["linear1"], example=batches[0][0])
    found = probe_partition(parts, batches, batches, NUM_CLASSES, CPU)
    with torch.no_grad():
        features = [parts.bodies[0](torch.cat([x for x, _ in batches])).double()]
        features.append(parts.bodies[1](features[0].float()).double())
    target = torch.cat([y for _, y in batches])
    for accuracy, x in zip(found, features, strict=True):
        wanted = nn.functional.one_hot(target, NUM_CLASSES).double()
        x = (x - x.mean(0)) / x.var(0, unbiased=False).clamp(min=1e-9).sqrt()
        size = len(x) * 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(x.T @ x + size, x.T @ (wanted - wanted.mean(0)))
        predicted = (x @ weights + wanted.mean(0)).argmax(1)
        assert accuracy == pytest.approx((predicted == target).double().mean().item())


@pytest.mark.timeout(60)
def test_every_stage_of_a_run_is_probed_also_where_one_was_trained(tmp_path):
    folder = tmp_path / "run"
    flags = ["--limit-train", 300, "--epochs", 1, "--threads", 1, "--method", "bp", "--quiet"]
    assert scpl("train", *flags, "--out", folder).status == 0
    found = scpl("eval", folder, "--probe", "--json")
    assert found.status == 0
    readouts = json.loads(found.out)["readout_accuracy"]
    assert len(readouts) == 4
    assert all(0.2 < accuracy <= 1 for accuracy in readouts)
    refused(scpl("eval", folder, "--probe", "--data", "mnist"), "--probe", "Got --data mnist")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_networks_for_texts_are_read_by_what_their_layers_summarise(tmp_path, model):
    table = tmp_path / "texts.csv"
    lines = [f'"{word} word {number}",{word}' for number in range(40) for word in ("good", "bad")]
    table.write_text("text,label\n" + "\n".join(lines) + "\n")
    folder = tmp_path / "run"
    flags = ["--model", model, "--hidden", 16, "--epochs", 2, "--threads", 1, "--quiet"]
    found = scpl("train", "--data", table, *flags, "--out", folder)
    assert found.status == 0, found.err
    found = scpl("eval", folder, "--probe", "--json")
    assert found.status == 0, found.err
    assert json.loads(found.out)["readout_accuracy"] == [1.0, 1.0, 1.0]
