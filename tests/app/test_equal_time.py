import json

import pytest
from test_bench import actors  # noqa: F401  (a fixture)
from test_compare import compare, draw, here  # noqa: F401  (fixtures)

from cli_runs import refused, scpl
from scpl.app import compare as module
from scpl.app.compare import epochs_in_equal_time
from scpl.app.config import TrainConfig
from scpl.errors import InputError

BASE = TrainConfig.of(model="mlp", limit_train=200, batch_size=20, epochs=10, quiet=True)
RATIOS = {"scpl": 1.37, "early-exit": 0.04, "bp": 1.0}


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the benchmark; returns the methods that it was asked for, call by call."""
    asked = []

    def bench(config):
        config.check()
        asked.append(config.methods.split(","))
        return {
            "results": [
                {"method": method, "ratio_to": {} if method == "bp" else
                 {"bp": {"median": RATIOS[method]}}}
                for method in asked[-1] if method in RATIOS
            ]
        }  # fmt: skip

    monkeypatch.setattr(module, "bench", bench)
    return asked


def test_a_faster_method_gets_more_epochs_whole_ones_and_at_least_one(measured, tmp_path):
    found = epochs_in_equal_time(BASE, ["scpl", "early-exit", "bp"], tmp_path)
    assert found == {"scpl": 13, "early-exit": 1, "bp": 10}
    assert measured == [["scpl", "early-exit", "bp"]]


def test_what_was_measured_is_kept(measured, tmp_path, monkeypatch):
    epochs_in_equal_time(BASE, ["scpl", "bp"], tmp_path)
    monkeypatch.setitem(RATIOS, "scpl", 2.0)
    kept = epochs_in_equal_time(BASE.changed(keep=7), ["scpl", "bp"], tmp_path)
    assert kept == {"scpl": 13, "bp": 10}
    assert len(measured) == 1
    again = epochs_in_equal_time(BASE, ["scpl", "early-exit", "bp"], tmp_path)
    assert again == {"scpl": 13, "early-exit": 1, "bp": 10}
    assert measured[1:] == [["early-exit", "bp"]]
    assert epochs_in_equal_time(BASE, ["bp"], tmp_path) == {"bp": 10}
    anew = epochs_in_equal_time(BASE.changed(force=True), ["scpl", "bp"], tmp_path)
    assert anew == {"scpl": 20, "bp": 10}


def test_a_method_that_cannot_run_is_left_out(measured, tmp_path):
    assert epochs_in_equal_time(BASE, ["gpipe", "bp"], tmp_path) == {"bp": 10}


def test_other_settings_are_refused(measured, tmp_path):
    epochs_in_equal_time(BASE, ["scpl", "bp"], tmp_path)
    with pytest.raises(InputError, match=r"--width 0.5 \(was 1.0\).*--force"):
        epochs_in_equal_time(BASE.changed(width=0.5), ["scpl", "bp"], tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"ratio_to_bp": {"scpl": 0}}', '{"ratio_to_bp": 3}',
                                  '{"ratio_to_bp": {"scpl": 1}}'])  # fmt: skip
def test_a_damaged_file_is_named(measured, tmp_path, text):
    (tmp_path / "equal_time.json").write_text(text)
    with pytest.raises(InputError, match=r"equal_time\.json.*Delete it"):
        epochs_in_equal_time(BASE, ["scpl", "bp"], tmp_path)
    assert measured == []


def test_nothing_is_measured_where_the_data_is_missing(measured, tmp_path):
    base = BASE.changed(data="cifar10", data_dir=tmp_path)
    assert epochs_in_equal_time(base, ["scpl", "bp"], tmp_path) == {}
    assert measured == []


def test_every_run_gets_its_epochs(here, measured, tmp_path):  # noqa: F811
    arguments = ("--methods", "scpl,bp", "--equal", "time", "--epochs", "3", "--json")
    found = compare(*arguments)
    assert found.status == 0, found.err
    answer = json.loads(found.out)
    assert answer["equal"] == "time"
    assert {one["method"]: one["epochs"] for one in answer["results"]} == {"scpl": 4, "bp": 3}
    assert "epochs" in found.err
    assert "in equal time" in (tmp_path / "all" / "report.html").read_text()
    here.clear()
    assert compare(*arguments).status == 0
    assert here == []


def test_without_bp_there_is_no_time_to_share(here):  # noqa: F811
    refused(compare("--methods", "scpl", "--equal", "time"), "--equal time", "Add bp")
    assert here == []


def test_a_recipe_may_say_so(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('methods = "scpl"\nequal = "time"\n')
    refused(scpl("compare", str(recipe)), "--equal time", "Add bp")
    recipe.write_text('equal = "tiem"\n')
    refused(scpl("compare", str(recipe)), "'equal'", "tiem", "time")


def test_measured_by_the_benchmark(actors, tmp_path):  # noqa: F811
    """Its processes only pretend to train; `test_bench.py` has real ones."""
    base = BASE.changed(epochs=100, threads=1, device="cpu")
    actors(early_exit=[1, *[25] * 99], bp=[1, *[20] * 99])
    assert epochs_in_equal_time(base, ["early-exit", "bp"], tmp_path) == {
        "early-exit": 125, "bp": 100,
    }  # fmt: skip
    kept = json.loads((tmp_path / "equal_time.json").read_text())["ratio_to_bp"]
    assert kept == {"early-exit": 1.25, "bp": 1.0}


def test_accumulated_batches_are_measured_in_whole_groups(measured, tmp_path):
    base = BASE.changed(accumulation=4)
    assert epochs_in_equal_time(base, ["scpl", "bp"], tmp_path)["scpl"] == 13
