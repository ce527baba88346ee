"""What a newcomer gets who names nothing but the data."""

import json
import math

import pytest
import torch

from cli_runs import scpl
from scpl.app.build import schedule
from scpl.app.config import TrainConfig


def rates(steps, warmup, lr=0.1, end_lr=0.001):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, steps, warmup, end_lr)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_the_rate_rises_in_a_straight_line_and_falls_along_a_cosine():
    found = rates(100, 0.1)
    rises = [found[step + 1] - found[step] for step in range(9)]
    assert rises == pytest.approx([0.1 / 11] * 9)
    assert found[10] == max(found) == pytest.approx(0.1)
    assert found[55] == pytest.approx((0.1 + 0.001) / 2)
    assert found[100] == pytest.approx(0.001)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_without_a_warm_up_it_is_the_plain_cosine():
    expected = [0.001 + 0.099 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert rates(8, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (2, 0.5), (3, 0.9), (1, 0.9)])
def test_short_runs_have_a_schedule_too(steps, warmup):
    assert all(0 < rate <= 0.1 for rate in rates(steps, warmup))


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 5e-3),
        ({"model": "vgg8"}, 3e-3),
        ({"model": "mlp"}, 3e-3),
        ({"model": "lstm", "data": "sst2"}, 1e-3),
        ({"optimizer": "adamw"}, 5e-3),
        ({"optimizer": "sgd", "model": "lstm", "data": "sst2"}, 5e-2),
        ({"lr": 0.25, "optimizer": "sgd"}, 0.25),
    ],
)
def test_the_default_rate_suits_optimizer_and_network(settings, rate):
    config = TrainConfig.of(**settings)
    assert config.learning_rate == pytest.approx(rate)
    assert config.resolved().optimizer.lr == pytest.approx(rate), "the run folder names it"


def test_tiny_images_are_enlarged_for_networks_that_pool_and_it_is_said(tmp_path):
    flags = ["--limit-train", 64, "--epochs", 1, "--quiet", "--threads", 1, "--dry-run"]
    found = scpl("train", *flags)
    assert "Images of 8 x 8 pixels are enlarged to 16 x 16 (--image-size)" in found.out
    assert "enlarged" not in scpl("train", "--model", "mlp", *flags).out
    assert "enlarged" not in scpl("train", "--image-size", 8, *flags).out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scpl", "al"])
def test_the_digits_are_learned_without_a_recipe(tmp_path, monkeypatch, method):
    """The first thing a newcomer tries once gave 95.8 % with scpl and 84 % with al."""
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    flags = ["--out", tmp_path / "run", "--json", "--quiet", "--threads", 1]
    found = scpl("train", "--method", method, *flags)
    assert json.loads(found.out)["test_accuracy"] > 0.97


class TestPlainBench:
    """`scpl bench` with no other flags shows what the project is for."""

    def shown(self, monkeypatch, *flags):
        seen = []
        monkeypatch.setattr(
            "scpl.app.bench.bench.bench",
            lambda config: seen.append(config) or {"results": [], "failures": {}},
        )
        scpl("bench", *flags, "--json")
        (config,) = seen
        return config

    def test_two_processes_share_a_network_that_gains_from_it(self, monkeypatch):
        run = self.shown(monkeypatch).train
        assert (run.network.model, run.network.num_stages, run.run.processes) == ("vgg8", 2, 2)
        assert self.shown(monkeypatch, "--processes", 1).train.run.processes == 1
        more = self.shown(monkeypatch, "--processes", 3).train
        assert (more.run.processes, more.network.num_stages) == (3, 3)

    def test_who_names_data_or_network_gets_the_usual_defaults(self, monkeypatch):
        run = self.shown(monkeypatch, "--model", "mlp").train
        assert (run.network.model, run.run.processes) == ("mlp", 1)
        assert self.shown(monkeypatch, "quick/digits").train.network.model == "small-cnn"
