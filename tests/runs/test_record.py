"""Run folders are read back as they were written, or the damage is named."""

import pytest

from run_folders import make_run
from scpl.errors import InputError
from scpl.runs import RunRecord


def test_reading_gives_back_what_was_written(tmp_path):
    run = RunRecord.read(make_run(tmp_path / "run", num_steps=7))
    assert run.finished
    assert run.num_stages == 4
    assert run.command.startswith("scpl train")
    assert run.column("epoch") == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in run.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert run.stage_columns("train") == {"loss": {k: f"train_loss_stage{k}" for k in range(4)}}
    assert sorted(run.score_columns()) == [1, 2, 3]
    assert {event.activity for event in run.timeline} == {"forward", "learn", "wait", "receive"}


def test_half_written_last_lines_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", epochs=3, num_steps=4)
    for name in ("metrics.csv", "steps.jsonl"):
        path = folder / name
        path.write_text(path.read_text()[:-9])
    run = RunRecord.read(folder)
    assert run.column("epoch") == [1, 2]
    assert [row.step for row in run.steps] == [1, 2, 3]


def test_the_later_of_two_rows_counts(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / "metrics.csv").write_text("epoch,valid_accuracy\n1,0.5\n2,0.6\n2,0.7\n")
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 2, "epoch": 1, "seconds": 0.5, "losses": [{"a": 9}]}\n')
    run = RunRecord.read(folder)
    assert run.column("valid_accuracy") == [0.5, 0.7]
    assert run.steps[1].losses == ({"a": 9.0},)


@pytest.mark.parametrize("where", ["missing", "."])
def test_not_a_run_folder(tmp_path, where):
    with pytest.raises(InputError, match=r"summary\.json or metrics\.csv.*scpl train"):
        RunRecord.read(tmp_path / where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "valid JSON"),
        ("summary.json", "[]", "a JSON object"),
        ("metrics.csv", "a,b\n1,2\n", "epoch"),
        ("metrics.csv", "epoch,b\n1,2\n3\n4,5\n", "line 3"),
        ("metrics.csv", "epoch,b\n1,x\n2,3\n", "line 2"),
        ("steps.jsonl", 'oops\n{"step": 1, "losses": []}\n', "line 1"),
        ("steps.jsonl", '{"step": 1}\n', "line 1"),
        ("timeline.json", "{}", "list of events"),
        ("timeline.json", '[{"rank": 0}]', "event 0"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        RunRecord.read(folder)
    assert str(caught.value).startswith(name)


def test_binary_rubbish_is_named(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config\.toml must hold readable UTF-8"):
        RunRecord.read(folder)
