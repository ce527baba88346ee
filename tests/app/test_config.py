import re
import subprocess
import sys

import pytest

from cli_runs import TINY, refused, scpl, train
from scpl.app.bench.bench import config_for
from scpl.app.build import build_method
from scpl.app.commands import BenchConfig, CompareConfig
from scpl.app.config import (
    FREE_IN_A_COMPARISON,
    MethodConfig,
    TrainConfig,
    changed_settings,
    flag,
    in_flags,
    method_options,
    write_toml,
)
from scpl.errors import InputError
from scpl.methods import METHODS
from scpl.methods.options import options_of


def test_what_is_written_is_read_back(tmp_path):
    config = TrainConfig.of(
        data="x", lr=3e-4, cuts=("a", "b"), stages=3, clip_norm=1.0, views=2,
        stages_per_process=(2, 1), data_dir=tmp_path, temperature=0.2,
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(write_toml(config))
    assert TrainConfig.read(path) == config


def test_hyphens_and_whole_numbers_are_understood():
    config = TrainConfig.from_dict({"batch-size": 8, "lr": 1}, "x")
    assert config.data.batch_size == 8
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)


def test_an_unknown_key_is_answered_with_the_closest():
    with pytest.raises(InputError, match=r"mine\.toml must be one of: lr, .* Did you mean 'lr'\?"):
        TrainConfig.from_dict({"lrr": 1.0}, "mine.toml")


@pytest.mark.parametrize(
    "values",
    [
        {"lr": "1e-3"}, {"epochs": 1.5}, {"epochs": True}, {"force": 1}, {"cuts": "layer1"},
        {"cuts": [1]}, {"stages_per_process": [1.5]}, {"head": "mpl"}, {"views": True},
        {"views": 3}, {"data": 3}, {"out": 3}, {"clip_norm": "x"},
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
        *((name, bad) for name in ("lr", "timeout", "width")
          for bad in (0.0, -1.0, float("nan"), float("inf"))),
        *((name, bad) for name in ("weight_decay", "end_lr", "clip_norm")
          for bad in (-1.0, float("nan"), float("inf"))),
        *((name, bad) for name in ("validation", "label_smoothing")
          for bad in (-0.1, 1.0, float("nan"))),
        *(("test_share", bad) for bad in (0.0, 1.0, float("nan"))),
        ("seed", -1), ("seed", 2**63), ("max_restarts", -1), ("depth", 0), ("depth", 1),
        ("stages_per_process", (4, 0)), ("stages_per_process", (1, 1)), ("processes", 5),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_its_flag_and_itself(name, value):
    with pytest.raises(InputError) as caught:
        TrainConfig.of(**{name: value}).check()
    assert f"--{name.replace('_', '-')}" in str(caught.value)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert f"Got {shown}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, bad) for name in ("temperature", "head_width")
          for bad in (0.0, -1.0, float("nan"), float("inf"))),
        *(("cross_entropy", bad) for bad in (-0.1, 1.1, float("nan"))), ("head_depth", -1),
    ],
)  # fmt: skip
def test_an_option_out_of_range_names_its_flag_and_itself(name, value):
    with pytest.raises(InputError) as caught:
        build_method(MethodConfig("scpl", {name: value}))
    assert in_flags(str(caught.value)).startswith(f"--{name.replace('_', '-')} must")
    assert f"Got {value}" in str(caught.value)


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
    assert TrainConfig.of(**settings).network.num_stages == stages


def test_cuts_and_stages_must_agree():
    TrainConfig.of(cuts=("a",)).check()  # 4 is the default, not a wish
    with pytest.raises(InputError, match="Got 1 cuts and --stages 3"):
        TrainConfig.of(cuts=("a",), stages=3).check()


def test_spread_and_processes_must_agree():
    TrainConfig.of(stages_per_process=(3, 1)).check()  # torchrun says how many processes
    with pytest.raises(InputError, match="Got 2 numbers for 3 processes"):
        TrainConfig.of(stages_per_process=(3, 1), processes=3).check()


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
        (["--lrr", "1"], "--lr "),
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


class TestWhatCannotBeUsed:
    """A flag that the chosen method, network or data cannot use is an error, not silence."""

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--method", "bp", "--temperature", "0.2"], ["--temperature", "scpl, dascpl", "bp"]),
            # The same as the default: still nothing that bp could use.
            (["--method", "bp", "--temperature", "0.1"], ["--temperature", "scpl, dascpl", "bp"]),
            (["--method", "bp", "--no-standardise"], ["--standardise", "scpl, dascpl"]),
            (["--method", "bp", "--standardise"], ["--standardise", "scpl, dascpl"]),
            (["--micro-batches", "2"], ["--micro-batches", "gpipe, 1f1b, zero-bubble", "scpl"]),
            (["--method=dgl", "--cross-entropy=1"], ["--cross-entropy", "scpl", "dgl"]),
            (["--label", "queue"], ["--label must go with a table", "digits"]),
            (["--max-tokens", "9"], ["--max-tokens must go with a data set of texts"]),
            (["--layers", "2"], ["--layers must go with a data set of texts"]),
            (["--hand-over"], ["--hand-over must go with --model lstm", "mlp"]),
            (["--heads", "2"], ["--heads must go with --model transformer", "mlp"]),
        ],
        ids=" ".join,
    )
    def test_by_a_run(self, tmp_path, monkeypatch, flags, words):
        monkeypatch.chdir(tmp_path)
        refused(train(*[str(flag) for flag in flags]), *words, "Leave it out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("flags", [["--width", "2"], ["--views", "2"], ["--image-size", "9"]])
    def test_by_texts(self, tmp_path, flags):
        table = tmp_path / "texts.csv"
        table.write_text("text,label\n" + "good,a\nbad,b\n" * 30)
        found = scpl("train", "--data", table, "--model", "lstm", "--threads", 1, *flags)
        refused(found, f"{flags[0]} must go with a data set of images", "which holds texts")

    def test_by_the_method_of_a_recipe_of_one_run(self, tmp_path):
        recipe = tmp_path / "mine.toml"
        recipe.write_text('method = "bp"\ntemperature = 0.2\n')
        refused(scpl("train", recipe), "--temperature", "bp")

    def test_a_recipe_of_a_comparison_may_hold_options_of_each_method(self, tmp_path):
        recipe = tmp_path / "mine.toml"
        recipe.write_text('methods = "scpl,gpipe"\nmicro_batches = 2\ntemperature = 0.2\n')
        assert CompareConfig.one_run(recipe, None).method.options == {"temperature": 0.2}
        assert CompareConfig.one_run(recipe, "gpipe").method.options == {"micro_batches": 2}
        assert CompareConfig.one_run(recipe, "bp").method.options == {}
        recipe.write_text('methods = "scpl,bp"\nmicro_batches = 2\n')
        refused(scpl("train", recipe), "--micro-batches", "gpipe")
        refused(scpl("compare", recipe), "--micro-batches", "scpl, bp")

    @pytest.mark.parametrize("command", ["compare", "bench"])
    def test_by_any_method_of_a_comparison(self, command):
        flags = ["--methods", "scpl,bp", "--label-features", "8"]
        refused(scpl(command, *TINY, *flags), "--label-features is an option of: al", "scpl, bp")


class TestOptions:
    def test_the_help_of_an_option_says_whose_it_is_and_its_default(self):
        text = " ".join(re.sub("[│╭╰─╮╯]", " ", scpl("train", "--help").out).split())
        assert "scpl, dascpl: temperature of the contrastive loss; above 0 (default: 0.1)" in text
        assert "early-exit, dascpl: width of the hidden layer" in text
        assert "gpipe, 1f1b, zero-bubble: slices of a mini-batch" in text
        assert text.count("--temperature FLOAT") == 1

    @pytest.mark.parametrize("method", METHODS)
    def test_what_is_read_is_what_the_class_has(self, method):
        built = METHODS[method]()
        for option in options_of(method):
            assert getattr(built, option.field) == option.default
            assert option.help, option.name
        assert built == build_method(MethodConfig(method).resolved())

    def test_one_flag_of_two_methods_has_one_type_and_the_name_of_no_other_flag(self):
        settings = TrainConfig().settings()
        for name, owners in method_options().items():
            assert len({option.type for _, option in owners}) == 1, name
            assert name not in settings

    def test_one_flag_serves_both_methods_that_have_it(self):
        for method in ("scpl", "dascpl"):
            built = build_method(TrainConfig.of(method=method, temperature=0.3).method)
            assert built.temperature == 0.3

    def test_the_registry_and_the_classes_agree_on_names(self):
        assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}

    def test_a_new_method_is_its_own_file_and_a_line_in_the_registry(self, tmp_path, monkeypatch):
        (tmp_path / "patient.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "from typing import ClassVar, Literal\n"
            "from scpl.methods.early_exit import EarlyExit\n"
            "@dataclass(frozen=True)\n"
            "class Patient(EarlyExit):\n"
            "    name: ClassVar[str] = 'patient'\n"
            "    seen: ClassVar[list[object]] = []\n"
            "    num_naps: int = 3\n"
            "    '''Pauses of a stage.'''\n"
            "    mood: Literal['calm', 'glad'] = 'calm'\n"
            "    '''How it waits.'''\n"
            "    def objective(self, site):\n"
            "        self.seen.append((self.num_naps, self.mood, self.hidden_features))\n"
            "        return super().objective(site)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(METHODS.homes, "patient", "patient:Patient")
        monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
        text = " ".join(re.sub("[│╭╰─╮╯]", " ", scpl("train", "--help").out).split())
        assert "--naps INT patient: pauses of a stage (default: 3)" in text
        assert "early-exit, dascpl, patient: width of the hidden layer" in text
        flags = ["--method", "patient", "--naps", 5, "--hidden-features", 16]
        found = train(*flags, "--out", tmp_path / "run", "--quiet")
        assert found.status == 0, found.err
        import patient

        assert set(patient.Patient.seen) == {(5, "calm", 16)}
        assert "naps = 5\n" in (tmp_path / "run" / "config.toml").read_text()
        refused(train("--naps", 5), "--naps is an option of: patient")
        sys.modules.pop("patient")


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom scpl.app.cli import run\n"
        "try:\n    run(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False"


def test_messages_of_the_library_name_flags_in_the_app():
    assert in_flags("`num_micro_batches` and `end_lr`, not `scpl ls` or `nothing`") == (
        "--micro-batches and --end-lr, not `scpl ls` or `nothing`"
    )


class TestTraining:
    """Flags of how stages learn."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"timeout": 5.0}, "--timeout 5 for one process"),
            ({"max_restarts": 2, "timeout": 5.0}, "--timeout 5 and --max-restarts 2"),
            ({"backend": "gloo"}, "Got --backend gloo for one process"),
            ({"exempt_norms": True}, "--weight-decay above 0"),
            ({"lr_factors": (1.0, 0.5)}, "every one of the 4 stages"),
            ({"lr_factors": (1.0, 1.0, 0.0, 1.0)}, "a number above 0"),
            ({"lr_factors": (1.0,) * 4, "method": "bp"}, "Got bp, which train"),
            ({"send_as": "bfloat16", "method": "ddp"}, "--send-as bfloat16 for ddp"),
            ({"send_as": "int8", "method": "gpipe"}, "--send-as int8 for gpipe"),
        ],
    )
    def test_what_has_no_effect_is_refused(self, settings, message):
        """`--timeout` and `--max-restarts` once were ignored with one process."""
        with pytest.raises(InputError, match=re.escape(message)):
            TrainConfig.of(**settings).check()

    def test_what_has_one_is_taken(self, monkeypatch):
        several = {"timeout": 5.0, "max_restarts": 2}
        TrainConfig.of(**several, processes=2).check()
        TrainConfig.of(lr_factors=(1.0, 0.5), stages=2, method="gpipe").check()
        TrainConfig.of(send_as="bfloat16").check(["bp", "scpl"])
        monkeypatch.setenv("WORLD_SIZE", "2")
        TrainConfig.of(**several).check()

    def test_one_process_of_a_comparison_goes_without(self):
        base = TrainConfig.of(timeout=5.0, max_restarts=2, processes=2, send_as="bfloat16")
        assert config_for(base, "scpl").run.timeout == 5.0
        config_for(base, "bp").check()

    def test_rivals_send_as_narrowly_as_they_can(self):
        """Gradients come back over their cuts, for which int8 is too coarse."""
        base = TrainConfig.of(processes=2, send_as="int8")
        sent = {each: config_for(base, each).optimizer.send_as for each in ("scpl", "1f1b", "ddp")}
        assert sent == {"scpl": "int8", "1f1b": "bfloat16", "ddp": "unchanged"}

    def test_a_run_of_two_processes_may_go_on_with_one(self):
        before = TrainConfig.of(timeout=5.0, processes=2)
        config = before.changed(processes=1)
        config.check_together(before)
        with pytest.raises(InputError, match="--timeout 7 for one process"):
            config.changed(timeout=7.0).check_together(before)

    def test_factors_may_be_whole_numbers_in_a_recipe(self):
        config = TrainConfig.from_dict({"lr-factors": [1, 0.5]}, "x")
        assert config.optimizer.lr_factors == (1.0, 0.5)


def test_a_comparison_goes_on_without_a_wish_for_tokens():
    """A run keeps how many were read; whoever did not ask for a number has not changed it."""
    asked = TrainConfig.of(model="lstm", data="sst2")
    kept = asked.resolved().changed(max_tokens=350)
    assert changed_settings(kept, asked, FREE_IN_A_COMPARISON) == []
    other = changed_settings(kept, asked.changed(max_tokens=20), FREE_IN_A_COMPARISON)
    assert other == ["--max-tokens 20 (was 350)"]


def test_blocks_are_whole_groups_of_accumulated_batches():
    def check(accumulation):
        options = MethodConfig("ddp", {"accumulation": accumulation})
        BenchConfig(TrainConfig(method=options), "ddp").check()

    check(5)
    with pytest.raises(InputError, match="--steps must be a multiple of --accumulation"):
        check(4)
    check(0)  # which the method refuses


def test_trained_networks_get_the_options_for_them_unless_others_are_asked_for():
    def suited(**options):
        return TrainConfig.of(model="hf:x", data="sst2", **options).suited.options

    assert suited() == {"head": "next", "cross_entropy": 1.0}
    assert suited(method="bp") == {}
    assert suited(method="dascpl") == {"head": "next"}  # which has no share of cross-entropy
    assert suited(head="linear") == {"head": "linear", "cross_entropy": 1.0}
    assert suited(cross_entropy=0.8) == {"head": "next", "cross_entropy": 0.8}
    # Of the head that networks from scratch have.
    assert suited(head_depth=3) == {"head_depth": 3, "cross_entropy": 1.0}
    assert TrainConfig.of(model="vgg8").suited.options == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 100_000),  # a segmentation fault
        ("image_size", 1_000_000),  # an allocator's traceback
        ("processes", 10**6),  # as many processes
        ("batch_size", 10**12),
        ("depth", 10**9),
        ("hidden", 10**9),
        ("layers", 10**9),
        ("stages", 10**9),
        ("vocab_size", 10**12),
        ("max_tokens", 10**12),
        ("epochs", 10**12),
        ("timeout", 1e300),  # an OverflowError of timedelta
        ("width", float("nan")),
        ("dropout", float("nan")),
        ("head_width", 10**12),
    ],
)
def test_nothing_is_made_in_numbers_that_no_machine_has(name, value):
    with pytest.raises(InputError, match=f"{flag(name)} must"):
        TrainConfig.of(**{name: value}).check()
    with pytest.raises(InputError, match=f"{flag(name)} must"):  # as a run folder's is used
        TrainConfig.from_dict({name: value}, "a recipe")
