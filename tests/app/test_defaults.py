"""What a newcomer gets who names nothing but the data."""

import json
import math

import pytest
import torch

from cli_runs import scpl
from scpl.app import config as settings
from scpl.app.build import schedule
from scpl.app.config import FINE_TUNING, FROM_SCRATCH, Chosen, TrainConfig, changed_settings
from scpl.methods.options import help_of


def rates(steps, warmup, lr=0.1, end_lr=0.001, shape="cosine"):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, steps, warmup, end_lr, shape)
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


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_or_it_falls_in_a_straight_line(warmup):
    found = rates(100, warmup, end_lr=0.0, shape="linear")
    highest = round(100 * warmup)
    assert found[highest] == max(found) == pytest.approx(0.1)
    falls = [a - b for a, b in zip(found[highest:], found[highest + 1 :], strict=False)]
    assert falls == pytest.approx([0.1 / (100 - highest)] * (100 - highest))
    assert found[100] == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (2, 0.5), (3, 0.9), (1, 0.9)])
def test_short_runs_have_a_schedule_too(steps, warmup, shape):
    assert all(0 < rate <= 0.1 for rate in rates(steps, warmup, shape=shape))


class TestFineTuning:
    """What a network of transformers gets where nothing is said, and what all others keep."""

    def test_the_defaults(self):
        found = TrainConfig.of(model="hf:folder", data="tickets.csv").chosen
        assert found == FINE_TUNING
        assert found == Chosen(
            epochs=3, batch_size=32, max_tokens=512, optimizer="adamw", lr=1e-4, head_lr=1e-3,
            schedule="linear", warmup=0.1, end_lr=0.0, weight_decay=0.01, exempt_norms=True,
            clip_norm=1.0,
        )  # fmt: skip

    @pytest.mark.parametrize("model", ["small-cnn", "lstm", "module:function", "timm:name"])
    def test_other_networks_keep_theirs(self, model):
        found = TrainConfig.of(model=model).chosen
        assert (found.epochs, found.batch_size, found.optimizer) == (10, 64, "adam")
        assert (found.schedule, found.warmup, found.end_lr) == ("cosine", 0.05, 1e-5)
        assert (found.weight_decay, found.exempt_norms, found.clip_norm) == (0.0, False, 0.0)
        assert found.head_lr == found.lr

    @pytest.mark.parametrize("model", ["small-cnn", "hf:folder"])
    def test_the_users_word_counts_also_where_it_is_the_default_of_others(self, model):
        said = {
            "epochs": 10, "batch_size": 64, "optimizer": "adam", "lr": 1e-3, "head_lr": 2e-3,
            "schedule": "cosine", "warmup": 0.05, "end_lr": 1e-5, "weight_decay": 0.5,
            "exempt_norms": False, "clip_norm": 0.0, "max_tokens": 350,
        }  # fmt: skip
        assert TrainConfig.of(model=model, **said).chosen == Chosen(**said)

    def test_weight_decay_is_not_for_adam_and_sgd_unless_it_is_asked_for(self):
        """In adam it would be part of the gradient, and another thing."""
        for optimizer in ("adam", "sgd"):
            found = TrainConfig.of(model="hf:folder", optimizer=optimizer).chosen
            assert (found.weight_decay, found.exempt_norms) == (0.0, False)
        assert TrainConfig.of(model="hf:folder", optimizer="sgd").chosen.head_lr == 0.05

    @pytest.mark.parametrize("model", ["small-cnn", "hf:folder"])
    @pytest.mark.parametrize("more", [{}, {"weight_decay": 0.0}, {"optimizer": "sgd"}], ids=str)
    def test_what_a_run_folder_says_means_the_same_when_it_is_read_again(self, model, more):
        config = TrainConfig.of(model=model, **more)
        written = TrainConfig.from_dict(config.resolved().to_dict(), "config.toml")
        assert written.chosen == config.chosen
        assert changed_settings(written, config) == []
        written.check()
        assert changed_settings(written, config.changed(schedule="cosine")) == (
            ["--schedule cosine (was linear)"] if model == "hf:folder" else []
        )

    def test_a_switch_on_the_command_line(self, monkeypatch):
        seen = []
        monkeypatch.setattr("scpl.app.train.run.train", lambda config: seen.append(config))
        for flags in ([], ["--exempt-norms"], ["--no-exempt-norms"], ["--exempt_norms"]):
            scpl("train", "--model", "hf:folder", *flags)
        assert [each.optimizer.exempt_norms for each in seen] == [None, True, False, True]

    def test_the_help_says_them(self):
        texts = {
            name: text
            for part in (settings.DataConfig, settings.OptimizerConfig)
            for name, text in help_of(part).items()
        }
        for name in Chosen.__dataclass_fields__:
            for usual in (FROM_SCRATCH, FINE_TUNING):
                value = getattr(usual, name)
                if name == "exempt_norms":
                    said = "so for hf:..., not for others"
                elif name == "head_lr" and not value:
                    said = "as --lr"
                else:
                    number = not isinstance(value, str)
                    said = f"{value:.5f}".rstrip("0").rstrip(".") if number else value
                assert said in texts[name], name


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
    assert config.chosen.lr == pytest.approx(rate)
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
