import dataclasses

import pytest

from cli_runs import refused, scpl, train
from scpl import models
from scpl.app.config import TEXT_MODELS, TrainConfig, read_toml, write_toml
from scpl.errors import InputError


def test_what_is_written_is_read_back(tmp_path):
    config = TrainConfig(
        data="x", lr=3e-4, cuts=("a", "b"), stages=3, clip_norm=1.0, views=2, spread=(2, 1),
        data_dir=tmp_path,
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(write_toml(config))
    assert TrainConfig.from_dict(read_toml(path), "x") == config


def test_hyphens_and_whole_numbers_are_understood():
    config = TrainConfig.from_dict({"batch-size": 8, "lr": 1}, "x")
    assert config.batch_size == 8
    assert config.lr == 1.0
    assert isinstance(config.lr, float)


def test_an_unknown_key_is_answered_with_the_closest():
    with pytest.raises(InputError, match=r"mine\.toml must be one of: lr, .* Did you mean 'lr'\?"):
        TrainConfig.from_dict({"lrr": 1.0}, "mine.toml")


@pytest.mark.parametrize(
    "values",
    [
        {"lr": "1e-3"}, {"epochs": 1.5}, {"epochs": True}, {"force": 1}, {"cuts": "layer1"},
        {"cuts": [1]}, {"spread": [1.5]}, {"head": "mpl"}, {"views": True}, {"views": 3},
        {"data": 3}, {"out": 3}, {"clip_norm": "x"},
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(values):
    with pytest.raises(InputError, match=f"'{next(iter(values))}' in x must be"):
        TrainConfig.from_dict(values, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, bad) for name in ("epochs", "batch_size", "stages", "processes", "keep",
          "limit_train", "image_size", "threads", "checkpoint_every") for bad in (0, -1)),
        *((name, bad) for name in ("lr", "temperature", "timeout", "clip_norm", "width",
          "head_width")
          for bad in (0.0, -1.0, float("nan"), float("inf"))),
        *((name, bad) for name in ("weight_decay", "end_lr")
          for bad in (-1.0, float("nan"), float("inf"))),
        *((name, bad) for name in ("validation", "label_smoothing")
          for bad in (-0.1, 1.0, float("nan"))),
        *(("cross_entropy", bad) for bad in (-0.1, 1.1, float("nan"))), ("head_depth", -1),
        ("seed", -1), ("seed", 2**63), ("max_restarts", -1), ("depth", 0), ("depth", 1),
        ("spread", (4, 0)), ("spread", (1, 1)), ("processes", 5),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_its_flag_and_itself(name, value):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TrainConfig(), **{name: value}).check()
    assert f"--{name.replace('_', '-')}" in str(caught.value)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert f"Got {shown}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, 4),
        ({"stages": 2}, 2),
        ({"cuts": ("a", "b")}, 3),
        ({"model": "lstm"}, 3),
        ({"model": "transformer", "layers": 5}, 5),
        ({"model": "transformer", "stages": 4}, 4),
    ],
    ids=str,
)
def test_the_embedding_of_texts_is_no_stage_of_its_own_by_default(settings, stages):
    assert TrainConfig(**settings).num_stages == stages


def test_text_models_are_those_there_are():
    assert models.known_text() == TEXT_MODELS


def test_cuts_and_stages_must_agree():
    dataclasses.replace(TrainConfig(), cuts=("a",)).check()  # 4 is the default, not a wish
    with pytest.raises(InputError, match="Got 1 cuts and --stages 3"):
        dataclasses.replace(TrainConfig(), cuts=("a",), stages=3).check()


def test_spread_and_processes_must_agree():
    dataclasses.replace(TrainConfig(), spread=(3, 1)).check()  # torchrun says how many processes
    with pytest.raises(InputError, match="Got 2 numbers for 3 processes"):
        dataclasses.replace(TrainConfig(), spread=(3, 1), processes=3).check()


class TestRecipes:
    def test_flags_override_the_recipe_and_the_recipe_the_defaults(self, tmp_path):
        recipe = tmp_path / "mine.toml"
        recipe.write_text('model = "mlp"\nlimit_train = 100\nepochs = 3\nbatch_size = 45\n')
        found = scpl("train", recipe, "--epochs", 2, "--dry-run", "--threads", 1)
        assert found.status == 0
        assert "4" in next(line for line in found.out.splitlines() if line.startswith("steps"))

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("no toml", ["must be readable TOML", "line 1"]),
            ("\udcff\udcfe", ["must be readable TOML"]),
            ("epoch = 1", ["must be one of: epochs", "Did you mean 'epochs'?"]),
            ('lr = "1e-3"', ["'lr' in", "must be of type float", "'1e-3'"]),
            ('method = "scp"', ["must be one of: scpl", "'scp'"]),
            ("epochs = -1", ["--epochs must be more than 0", "-1"]),
            ("[train]\nlr = 1.0", ["must be one of", "'train'"]),
        ],
    )
    def test_a_bad_one_is_refused(self, tmp_path, text, words):
        recipe = tmp_path / "mine.toml"
        recipe.write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(scpl("train", recipe, "--threads", 1), *words)
        assert list(tmp_path.iterdir()) == [recipe]

    def test_an_unknown_one_is_answered_with_the_known(self):
        words = refused(scpl("train", "quick/digit"), "Did you mean 'quick/digits'?")
        assert "must be one of: quick/digits, " in words

    def test_a_folder_is_no_recipe(self, tmp_path):
        refused(scpl("train", tmp_path), "recipe", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lrr", "1"], "--lr FLOAT"),
        (["--epochs", "x"], "'x'"),
        (["--head", "pooled"], "pooled-mlp"),
        (["--views", "3"], "--views"),
        (["--lr"], "--lr"),
    ],
)
def test_flags_that_cannot_be_read(flags, words):
    found = train(*flags)
    assert found.status == 2
    assert words in found.err
    assert found.out == ""
    assert "Traceback" not in found.err
