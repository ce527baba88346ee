"""The benchmarks run, and what they claim holds; equal bits they check by themselves."""

import json
from pathlib import Path

import pytest

import scpl
from processes import run_forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
