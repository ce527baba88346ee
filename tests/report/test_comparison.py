"""What runs came to: tables, ratios, time to a target, results as JSON."""

import json
import math

import pytest

from run_folders import make_run, make_summary
from scpl.errors import InputError
from scpl.report import Absent, Comparison
from scpl.report.comparison import (
    ComparisonTable,
    Target,
    choose_target,
    comparison_results,
    seconds_to,
)
from scpl.report.groups import Sample, baseline, group_runs, paired_ratio
from scpl.runs import RunRecord


def test_table_is_aligned_and_pairs_by_seed():
    summaries = [make_summary(m, seed) for m in ("bp", "scpl") for seed in (0, 1, 2)]
    table = ComparisonTable(summaries)
    lines = table.text().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "method"
    assert "91.90 ± 0.20 %" in lines[3]
    assert "1.35 (1.34-1.35)" in lines[3]
    assert "1 (reference)" in lines[2]
    assert "812 MiB (1.42 GiB)" in lines[3]
    assert "16 % (31 %)" in lines[3]
    assert len(table.header) == 9
    assert "standard deviation over the seeds" in table.footnote


def test_columns_that_no_run_has_are_left_out():
    bare = make_summary("scpl", wall_seconds=None, bytes_per_step=None, wait_share=None)
    table = ComparisonTable([bare])
    assert table.header == ("method", "runs", "test accuracy", "samples/s", "peak memory")
    assert table.rows == [("scpl", "1", "91.70 %", "5,400", "812 MiB (1.42 GiB)")]
    assert "Sent" not in table.footnote
    both = ComparisonTable([bare, make_summary("gpipe")])
    assert both.header[3:] == ("seconds", "samples/s", "peak memory", "sent per step", "waiting")
    assert both.rows[0][3] == "\N{EN DASH}"


def test_a_table_wider_than_the_terminal_becomes_several():
    summaries = [make_summary(m, seed) for m in ("bp", "scpl") for seed in (0, 1)]
    absent = [Absent("ddp", "It is not possible " * 9, failed=False)]
    table = ComparisonTable(summaries, absent=absent)
    text = table.text(width=70)
    assert max(map(len, text.splitlines())) <= 70
    blocks = [block.splitlines() for block in text.split("\n\n")[:-1]]
    assert len(blocks) > 1
    for block in blocks:
        assert [line.split()[0] for line in block if "--" not in line] == ["method", "bp", "scpl"]
    columns = [name for block in blocks for name in block[0].split("  ")[1:] if name]
    assert [name.strip() for name in columns] == list(table.header[1:])
    assert text.split("\n\n")[-1].startswith("ddp  cannot run here: It is not")


def test_names_cannot_break_the_table():
    table = ComparisonTable([make_summary("a\nb\x1b[31m|c")]).text()
    assert len(table.splitlines()) == 3
    assert "\x1b" not in table
    assert "a b [31m|c" in table


def with_curve(tmp_path, name, curve, method="scpl"):
    folder = make_run(tmp_path / name, method, epochs=1, num_steps=1, timeline=False)
    rows = "".join(f"{k},{x},{y}\n" for k, (x, y) in enumerate(curve, 1))
    (folder / "metrics.csv").write_text(f"epoch,seconds,valid_accuracy\n{rows}")
    return folder


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(0.4, 10.0), (0.5, 10.0), (0.6, 12.0), (0.7, 14.0), (0.75, 27.5), (0.9, 50.0), (0.91, None)],
)
def test_time_to_a_target_is_interpolated(tmp_path, target, seconds):
    """Before the end of the first epoch nothing is known; what is lost again was still reached."""
    curve = [(10, 0.5), (20, "nan"), (14, 0.7), (20, 0.6), (30, 0.8), (40, 0.8), (50, 0.9)]
    run = RunRecord.read(with_curve(tmp_path, "run", curve))
    found = seconds_to(run, target)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_the_target_is_what_every_run_of_bp_surely_reaches(tmp_path):
    folders = [
        with_curve(tmp_path, f"{method}{end}", [(1, 0.2), (3, end)], method)
        for method, end in (("bp", 0.9), ("bp", 0.8), ("scpl", 0.5), ("scpl", 0.85))
    ]
    comparison = Comparison.read(folders)
    assert comparison.target.score == pytest.approx(0.792)
    assert "99 % of the lowest validation accuracy that a run of bp" in comparison.target.origin
    table = comparison.table()
    column = table.header.index("seconds to 79.2 %")
    assert [row[column] for row in table.rows] == ["2.83 (2.69-2.97)", "2.82, 1 of 2"]
    assert choose_target([RunRecord.read(f) for f in folders[2:]]).score == pytest.approx(0.495)
    asked = Comparison.read(folders, target=0.95)
    assert asked.target == Target(0.95, "as asked for")
    assert [row[column] for row in asked.table().rows] == ["not reached", "not reached"]
    assert asked.results()[0]["seconds_to_target"]["n"] == 0


def test_without_validation_there_is_no_target(tmp_path):
    folder = with_curve(tmp_path, "run", [(1, "")])
    comparison = Comparison.read([folder], target=0.5)
    assert comparison.target is None
    assert not [name for name in comparison.table().header if "to" in name.split()]


def test_results_hold_every_measured_key_with_its_spread():
    runs = [make_summary(m, seed, notes=["n"]) for seed in (0, 1, 2) for m in ("bp", "scpl")]
    bp, scpl = comparison_results(runs)
    json.dumps([bp, scpl], allow_nan=False)
    assert (scpl["label"], scpl["method"], scpl["seeds"]) == ("scpl", "scpl", [0, 1, 2])
    assert (scpl["processes"], scpl["notes"]) == (2, ["n"])
    assert scpl["test_accuracy"] == {
        "mean": pytest.approx(0.919), "sd": pytest.approx(0.002), "median": pytest.approx(0.919),
        "min": pytest.approx(0.917), "max": pytest.approx(0.921), "n": 3,
    }  # fmt: skip
    assert [part["n"] for part in scpl["peak_memory_bytes"]] == [3, 3]
    assert scpl["wait_share"][3]["median"] == 0.24
    assert scpl["bytes_per_step"][0]["max"] == 4_194_304
    assert [run["run"] for run in scpl["runs"]] == ["runs/scpl-0", "runs/scpl-1", "runs/scpl-2"]
    pairs = [(5400 + 37 * seed) / (4000 + 37 * seed) for seed in (0, 1, 2)]
    assert scpl["ratio_to"]["bp"]["median"] == pytest.approx(pairs[1])
    assert scpl["ratio_to"]["bp"]["max"] == pytest.approx(pairs[0])
    assert list(bp["ratio_to"]) == ["scpl"]


def test_one_run_has_no_deviation():
    (result,) = comparison_results([make_summary(valid_accuracy=None)])
    assert result["samples_per_second"]["sd"] is None
    assert result["samples_per_second"]["n"] == 1
    assert "valid_accuracy" not in result
    assert result["ratio_to"] == {}


def test_groups_are_named_by_what_differs():
    runs = [make_summary(stages=2), make_summary(stages=4), make_summary("bp"), make_summary("bp")]
    labels = {group.label: len(group.members) for group in group_runs(runs)}
    assert labels == {"scpl (2 stages)": 1, "scpl (4 stages)": 1, "bp": 2}


def test_repeated_runs_are_paired_in_order():
    rates = [("bp", 100), ("scpl", 150), ("bp", 50), ("scpl", 100), ("scpl", 7)]
    runs = [make_summary(method, samples_per_second=rate) for method, rate in rates]
    groups = group_runs(runs)
    assert paired_ratio(groups[1], baseline(groups)).values == (1.5, 2.0)


def test_other_data_is_not_paired():
    groups = group_runs([make_summary("bp", data="a"), make_summary("scpl", data="b")])
    assert len(paired_ratio(groups[1], baseline(groups))) == 0


def test_sample_of_few_values():
    assert Sample.of([math.nan]).values == ()
    assert math.isnan(Sample.of([]).mean)
    assert math.isnan(Sample.of([1.0]).sd)
    assert Sample.of([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))


def test_comparison_of_nothing():
    with pytest.raises(InputError, match="at least one run"):
        Comparison.read([])
