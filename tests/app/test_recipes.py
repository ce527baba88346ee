import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import scpl
from scpl import models
from scpl.app.cli import run as cli
from scpl.app.commands import CompareConfig, method_names
from scpl.app.config import FINE_TUNING, TrainConfig
from scpl.app.recipes import find_recipe, recipes, shipped
from scpl.app.settings import read_toml
from scpl.app.train.run import train
from scpl.data.text import TEXT_SETS
from scpl.errors import InputError

PAPER_IMAGES = [
    f"paper/{model}-{data}"
    for model in ("resnet18", "vgg8")
    for data in ("cifar10", "cifar100", "tiny-imagenet")
]
PAPER_TEXTS = [
    f"paper/{model}-{data}"
    for model in ("lstm", "transformer")
    for data in ("ag_news", "dbpedia_14", "imdb", "sst2")
]
TEXT_METHODS = "scpl,early-exit,al,bp,gpipe,1f1b,ddp"
FINE_TUNED = [f"quick/fine-tune-{data}" for data in ("ag_news", "imdb", "sst2")]
METHODS_OF = {
    "quick/ag_news": TEXT_METHODS,
    "quick/all-methods": "all",
    "quick/imdb": TEXT_METHODS,
    "quick/sst2": TEXT_METHODS,
    "quick/vgg8-cifar10": "scpl,early-exit,al,bp,bp-wide,bp-cut,gpipe,1f1b,ddp",
    "quick/vgg8-fashion-mnist": "scpl,early-exit,al,bp,bp-wide,bp-cut,gpipe,1f1b,ddp",
}
QUICK = ["quick/cifar10", "quick/demo", "quick/digits", "quick/fashion-mnist", *METHODS_OF]
NAMES = sorted([*PAPER_IMAGES, *PAPER_TEXTS, *QUICK, *FINE_TUNED])
EACH = pytest.mark.parametrize("name", NAMES)


def test_these_are_shipped():
    assert list(shipped()) == NAMES


class TestEachRecipe:
    @EACH
    def test_it_is_a_valid_configuration(self, name):
        config = CompareConfig.from_recipe(shipped()[name])
        config.train.check(method_names(config.methods))
        assert config.methods == METHODS_OF.get(name, "scpl,early-exit,bp")
        assert config.seeds.split(",")[0] == "0"

    @EACH
    def test_its_names_are_known(self, name):
        from scpl import heads, models
        from scpl.data import images as data

        config = CompareConfig.from_recipe(shipped()[name]).train
        texts = name in [*PAPER_TEXTS, *FINE_TUNED] or METHODS_OF.get(name) == TEXT_METHODS
        assert config.data.data in (TEXT_SETS if texts else data.known())
        if name in FINE_TUNED:
            assert config.network.model == "hf:sentence-transformers/all-MiniLM-L6-v2"
        else:
            assert config.network.model in (models.known_text() if texts else models.known())
        assert config.method.options.get("head", "conv") in {"conv", *heads.known()}

    @EACH
    def test_it_is_listed_with_what_it_is(self, name):
        lines = dict(line.split(maxsplit=1) for line in recipes(["ls"]).splitlines())
        assert list(lines) == NAMES
        assert lines[name].endswith(".")
        assert f"# {lines[name]}\n" in recipes(["show", name])

    @EACH
    def test_it_leaves_to_the_user_what_is_the_users(self, name):
        own = {"out", "data_dir", "device", "json", "quiet", "force", "resume", "processes"}
        assert not own & set(read_toml(shipped()[name]))

    @pytest.mark.parametrize("name", FINE_TUNED)
    def test_fine_tuning_keeps_the_defaults_and_takes_another_folder(self, name, monkeypatch):
        seen = []
        monkeypatch.setattr("scpl.app.cli._launch", lambda config, arguments: seen.append(config))
        cli(["train", name, "--processes", "2", "--model", "hf:mine"])
        (config,) = seen
        assert config.network.model == "hf:mine"
        assert config.network.num_stages == 2
        assert config.chosen == replace(FINE_TUNING, max_tokens=config.data.max_tokens)

    @pytest.mark.parametrize("name", PAPER_IMAGES)
    def test_the_paper_recipes_have_the_settings_of_the_published_code(self, name):
        config = CompareConfig.from_recipe(shipped()[name]).train
        model, _, data = name.removeprefix("paper/").partition("-")
        expected = TrainConfig.of(
            data=data,
            image_size=32 if data == "tiny-imagenet" else None,
            validation=0.0,
            augmentation="strong",
            views=2,
            model={"vgg8": "vgg8", "resnet18": "resnet18-3x3"}[model],
            stages=4,
            cuts=models.paper_cuts(model),
            method="scpl",
            temperature=0.1,
            normalization="paper",
            head="mlp",
            cross_entropy=0.0,
            standardise=False,
            classifier_gradient=False,
            epochs=200,
            batch_size=1024,
            optimizer="adam",
            lr=1e-3,
            warmup=0.0,
            end_lr=1e-5,
        )
        assert config == expected

    @pytest.mark.parametrize("name", PAPER_TEXTS)
    def test_the_paper_text_recipes_have_the_settings_of_the_published_code(self, name):
        config = CompareConfig.from_recipe(shipped()[name]).train
        model, _, data = name.removeprefix("paper/").partition("-")
        expected = TrainConfig.of(
            data=data,
            validation=0.0,
            tokens="paper-words",
            vocab_size=30_000,
            max_tokens={"ag_news": 60, "dbpedia_14": 400, "imdb": 350, "sst2": 15}[data],
            model=model,
            hand_over=model == "lstm",
            stages=4,
            cuts=models.paper_cuts(model),
            method="scpl",
            temperature=0.1,
            normalization="paper",
            head="identity",
            cross_entropy=0.0,
            standardise=False,
            classifier_gradient=False,
            epochs=50,
            batch_size=1024,
            optimizer="adam",
            lr=1e-3,
            warmup=0.0,
            end_lr=1e-3,
        )
        assert config == expected


class TestFind:
    @pytest.mark.parametrize("name", ["quick/digits", "quick/digits.toml"])
    def test_a_shipped_recipe_by_name(self, name):
        assert find_recipe(name).read_text() == (shipped()["quick/digits"]).read_text()

    def test_an_existing_file_wins(self, tmp_path, monkeypatch):
        (tmp_path / "quick").mkdir()
        (tmp_path / "quick" / "digits").write_text("epochs = 1")
        monkeypatch.chdir(tmp_path)
        assert find_recipe("quick/digits") == Path("quick/digits")
        assert find_recipe("quick/digits.toml") == shipped()["quick/digits"]
        assert find_recipe(str(tmp_path / "quick" / "digits")).read_text() == "epochs = 1"

    @pytest.mark.parametrize("name", ["quick/digit", "", ".", "x" * 5000, "a\0b", "quick"])
    def test_an_unknown_name_lists_the_known_ones(self, name):
        with pytest.raises(InputError, match=r"must be one of: .*quick/digits"):
            find_recipe(name)

    def test_the_closest_name_is_offered(self):
        with pytest.raises(InputError, match="Did you mean 'quick/digits'"):
            find_recipe("quick/digit")


class TestCommand:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["ls", "-h"]], ids=str)
    def test_help_has_examples(self, arguments):
        text = recipes(arguments)
        assert "usage: scpl recipes" in text
        assert "scpl train quick/digits" in text

    def test_help_names_recipes_that_exist(self):
        words = {word for word in recipes([]).split() if word.startswith(("quick/", "paper/"))}
        assert words
        assert words <= set(NAMES)

    def test_ls_as_json(self):
        listed = json.loads(recipes(["ls", "--json"]))
        assert list(listed) == NAMES

    def test_cp_makes_a_recipe_of_ones_own(self, tmp_path):
        target = tmp_path / "mine.toml"
        assert str(target) in recipes(["cp", "quick/digits", str(target)])
        assert target.read_text() == recipes(["show", "quick/digits"])
        assert find_recipe(str(target)) == target

    def test_cp_into_a_folder(self, tmp_path):
        recipes(["cp", "quick/digits", str(tmp_path)])
        assert (tmp_path / "digits.toml").is_file()

    def test_cp_never_overwrites(self, tmp_path):
        target = tmp_path / "mine.toml"
        target.write_text("precious")
        with pytest.raises(InputError, match=r"mine\.toml exists"):
            recipes(["cp", "quick/digits", str(target)])
        assert target.read_text() == "precious"

    def test_cp_to_a_place_that_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match="must be writable"):
            recipes(["cp", "quick/digits", str(tmp_path / "gone" / "mine.toml")])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["list"], "must be one of: .*ls"),
            (["show"], "scpl recipes show NAME"),
            (["show", "a", "b"], "scpl recipes show NAME"),
            (["cp", "quick/digits"], "scpl recipes cp NAME FILE"),
            (["ls", "quick"], "scpl recipes ls"),
            (["show", "quick/digit"], "Did you mean"),
        ],
        ids=str,
    )
    def test_bad_usage(self, arguments, message, capsys):
        with pytest.raises(InputError, match=message):
            recipes(arguments)
        assert cli(["recipes", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_show_a_file_that_is_no_text(self, tmp_path):
        (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="readable text file"):
            recipes(["show", str(tmp_path / "a.toml")])

    def test_it_does_not_load_torch(self):
        code = (
            "import sys; from scpl.app.cli import run; run(['recipes', 'ls']); "
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0


class TestPackage:
    ROOT = Path(scpl.__file__).parents[2]

    def test_a_wheel_holds_the_recipes(self, tmp_path):
        wheel = pytest.importorskip("hatchling.builders.wheel")
        if not (self.ROOT / "pyproject.toml").is_file():
            pytest.skip("not a checkout")
        built = next(wheel.WheelBuilder(str(self.ROOT)).build(directory=str(tmp_path)))
        names = zipfile.ZipFile(built).namelist()
        assert {f"scpl/recipes/{name}.toml" for name in NAMES} <= set(names)

    def test_git_ignores_none_of_them(self):
        """The wheel holds what git does not ignore, so this is checked even without hatchling."""
        if not (self.ROOT / ".git").exists():
            pytest.skip("not a checkout")
        done = subprocess.run(
            ["git", "check-ignore", *map(str, shipped().values())],
            cwd=self.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.slow
def test_the_demo_reaches_the_accuracy_it_promises(tmp_path, monkeypatch):
    """It does so after two of its five epochs."""
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    config = CompareConfig.from_recipe(shipped()["quick/demo"]).train
    config = config.changed(epochs=2, out=tmp_path / "run", quiet=True, device="cpu")
    assert train(config)["test_accuracy"] >= 0.97
