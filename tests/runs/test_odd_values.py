"""Files of a run folder with one odd value: an error that names the file, at once; or no number."""

import csv
import json

import pytest

from run_folders import make_run
from scpl.errors import CheckpointError
from scpl.runs import RunFolder, RunRecord

EVENT = {"rank": 0, "stage": 0, "step": 0, "activity": "learn", "begin": 0, "end": 1}


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("steps.jsonl", {"step": 1, "losses": [{}] * 1_000_000}),  # minutes of the report
        ("steps.jsonl", {"step": 1, "epoch": float("inf"), "losses": []}),  # an OverflowError
        ("steps.jsonl", {"step": 1, "losses": 5}),
        ("steps.jsonl", {"step": 1, "losses": ["x"]}),
        ("timeline.json", [{**EVENT, "rank": float("inf")}]),
        ("timeline.json", [{**EVENT, "stage": 10**6}]),
        ("timeline.json", [7]),
        ("summary.json", {"stages": 10**9}),
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_an_odd_value_is_an_error_at_once(tmp_path, file, line):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(json.dumps(line) + "\n")
    with pytest.raises(CheckpointError, match=file):
        RunRecord.read(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": ' + "9" * 400 + "}"])
def test_json_that_python_itself_gives_up_on_is_named(tmp_path, text):
    folder = make_run(tmp_path / "run")
    (folder / "env.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"env\.json must hold valid JSON"):
        RunRecord.read(folder)


def test_immense_numbers_are_infinite_ones(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = folder / "metrics.csv"
    header = "epoch,seconds,train_loss_stage0,train_loss_stage" + "9" * 5000
    metrics.write_text(f"{header}\n1,1e300,-1e999,1\n")
    record = RunRecord.read(folder)
    assert record.column("seconds") == [float("inf")]
    assert record.column("train_loss_stage0") == [float("-inf")]
    assert RunFolder(folder).read_metrics(2) != []


def test_a_cell_longer_than_python_reads_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("epoch\n" + "1" * 200_000 + "\n")
    before = csv.field_size_limit(1 << 17)  # Python's own, which readers of tables raise
    try:
        with pytest.raises(CheckpointError, match=r"metrics\.csv must hold comma-separated values"):
            RunRecord.read(folder)
    finally:
        csv.field_size_limit(before)
