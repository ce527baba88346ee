"""Columns that are written are found again by the same names."""

from types import SimpleNamespace

from scpl.runs import RunFolder, RunRecord
from scpl.runs.columns import OBSERVED, TRAIN, epoch_row, mean_values, stage_scores

PLAIN = {"step": 9, "seconds": 2.5, "train_seconds": 2.0, "samples_per_second": 100.0, "lr": 0.1}


def row_of(epoch=1, validation=None):
    losses = [{"contrastive": 1.5}, {"contrastive": 1.0, "cross_entropy": 0.25}]
    observed = [{"above_chance": -0.5}, {}]
    return epoch_row(
        epoch=epoch, losses=losses, observed=observed, validation=validation,
        metrics=["accuracy"], **PLAIN
    )  # fmt: skip


def test_losses_are_summed_up_and_listed_where_a_stage_has_several():
    assert row_of() == {
        "epoch": 1, **PLAIN, "train_loss_stage0": 1.5, "train_loss_stage1": 1.25,
        "train_contrastive_stage1": 1.0, "train_cross_entropy_stage1": 0.25,
        "observed_above_chance_stage0": -0.5, "valid_loss": "", "valid_accuracy": "",
    }  # fmt: skip


def test_a_run_that_was_written_is_read_by_stage(tmp_path):
    scores = SimpleNamespace(loss=0.5, metrics={"accuracy": 0.75}, stage_scores=(None, 0.75))
    RunFolder(tmp_path).write_metrics([row_of(), row_of(2, scores)])
    run = RunRecord.read(tmp_path)
    assert run.stage_columns(TRAIN) == {
        "loss": {0: "train_loss_stage0", 1: "train_loss_stage1"},
        "contrastive": {1: "train_contrastive_stage1"},
        "cross_entropy": {1: "train_cross_entropy_stage1"},
    }
    assert run.stage_columns(OBSERVED) == {"above_chance": {0: "observed_above_chance_stage0"}}
    assert run.score_columns() == {1: "valid_accuracy_stage1"}
    assert run.column("valid_accuracy")[1] == 0.75
    assert stage_scores(row_of(2, scores), "accuracy", 2) == ["", 0.75]


def test_means_count_every_sample_once():
    steps = [
        {"samples": 3, "losses": [{"a": 1.0}, {"a": 2.0, "b": 0.0}]},
        {"samples": 1, "losses": [{"a": 5.0}, {"a": 2.0, "b": 4.0}]},
    ]
    assert mean_values(steps, "losses") == [{"a": 2.0}, {"a": 2.0, "b": 1.0}]
    assert mean_values(steps, "observed") == []
