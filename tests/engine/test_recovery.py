"""Where a run continues: the newest checkpoint that every rank can read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from networks import assert_same_state, mlp, rows, states
from scpl import SCPL, Pipeline, split
from scpl.engine import checkpoint
from scpl.engine.checkpoint import Checkpoints, CheckpointWriter, read_part, recover
from scpl.engine.mesh import Mesh
from scpl.engine.messages import CheckpointMark
from scpl.engine.ranks import OneRank
from scpl.errors import CheckpointError

STEPS = (1, 2, 3)


class Told(OneRank):
    """The last of several ranks, which hears what the others can read.

    They were written together with its own, unless another attempt is named.
    """

    def __init__(self, *others, run, attempt=None):
        super().__init__(mesh=Mesh(1, 2))
        self.steps, self.run, self.attempt = others, run, attempt

    def exchange(self, key, value):
        if key == "read":
            return ["", value]
        own = {step: attempt for step, *_, attempt in value}
        attempts = {step: self.attempt or own.get(step, "") for step in self.steps}
        return [[(step, self.run, "", False, attempts[step]) for step in self.steps], value]


def build(folder=None):
    parts = split(mlp(), before=["linear1", "linear2"], example=rows()[0][0])
    return Pipeline(parts, SCPL(), torch.optim.Adam, checkpoints=folder)


@pytest.fixture
def saved(tmp_path):
    """Three checkpoints, and the state at each."""
    found = {}
    with build(tmp_path) as pipeline:
        pipeline._writer._checkpoints = pipeline._checkpoints.__class__(tmp_path, keep=9)
        for report in pipeline.steps(rows()):
            pipeline.checkpoint(mark=float(report.step))
            found[report.step] = [
                {k: v.clone() for k, v in one["body"].items()} for one in states(pipeline)
            ]
    return found


def bodies(pipeline):
    return [one["body"] for one in states(pipeline)]


@pytest.fixture
def heard():
    return []


@pytest.fixture
def restore(tmp_path, heard):
    """Recover what was saved, into these stages of a fresh pipeline or a given one."""

    def call(pipeline, step=None, ranks=None, stages=slice(None), run=None):
        ranks = ranks or OneRank()
        owners = [0, 0, 0] if ranks.mesh.num_ranks == 1 else [0, 0, 1]
        kept = Checkpoints(tmp_path, run=run, tell=heard.append)
        return recover(pipeline.stages[stages], kept, owners, ranks, step)

    return call


def part(folder, step, stage, suffix=".pt"):
    return folder / f"step-{step:09d}" / f"stage-{stage}{suffix}"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def names(folder):
    """Of the run that was saved, and of the last mark in its attempt."""
    manifest = json.loads(part(folder, 3, 0, ".json").read_text())
    return {name: manifest[name] for name in ("run", "attempt")}


def test_the_newest_is_taken(saved, restore, heard):
    pipeline = build()
    note = restore(pipeline)
    assert (note["step"], note["mark"]) == (3, 3.0)
    assert_same_state(bodies(pipeline), saved[3])
    assert heard == []


@pytest.mark.parametrize(("others", "step"), [([1, 2], 2), ([1], 1), ([2, 9], 2)])
def test_ranks_agree_on_the_newest_that_all_can_read(tmp_path, saved, restore, heard, others, step):
    """Each machine has a disk of its own, and one of them may be ahead of another."""
    pipeline = build()
    ranks = Told(*others, run=names(tmp_path)["run"])
    note = restore(pipeline, ranks=ranks, stages=slice(2, 3))
    assert note["step"] == step
    assert_same_state(bodies(pipeline)[2:], saved[step][2:])
    assert len(heard) == 1
    assert "step 3: is not on all machines" in heard[0]


def test_nothing_in_common_is_nothing_to_go_on_from(tmp_path, saved, restore, heard):
    pipeline = build()
    before = [{k: v.clone() for k, v in one.items()} for one in bodies(pipeline)]
    ranks = Told(7, run=names(tmp_path)["run"])
    assert restore(pipeline, ranks=ranks, stages=slice(2, 3)) is None
    assert_same_state(bodies(pipeline), before)
    assert "begins with the first step" in heard[0]


def test_a_disk_that_was_not_brought_is_no_beginning(tmp_path, saved, restore):
    """The run began anew and wrote over the parts of the other machines."""
    with pytest.raises(CheckpointError, match=r"intact checkpoint.*step 3: is not on all machines"):
        restore(build(), ranks=Told(run=names(tmp_path)["run"]), stages=slice(2, 3))


def test_parts_of_another_run_on_another_machine_are_not_mixed_with_ours(saved, restore):
    with pytest.raises(CheckpointError, match=r"step 3: has parts of several runs"):
        restore(build(), ranks=Told(*STEPS, run="another"), stages=slice(2, 3))


def test_parts_of_two_attempts_on_two_machines_are_no_checkpoint(tmp_path, saved, restore, heard):
    ranks = Told(*STEPS, run=names(tmp_path)["run"], attempt="another")
    assert restore(build(), ranks=ranks, stages=slice(2, 3)) is None
    assert "parts of several attempts" in heard[0]


def test_a_step_that_is_saved_again_when_its_epoch_has_ended_is_whole_or_not_there(
    tmp_path, restore, heard
):
    """As the best of all, after a checkpoint was due at its last step, elsewhere in the data."""
    first = part(tmp_path, 3, 0)
    with build(Checkpoints(tmp_path, every=1)) as pipeline:
        pipeline.train(rows())
        pipeline._writer.wait()
        kept = {path: path.read_bytes() for path in (first, first.with_suffix(".json"))}
        pipeline.checkpoint(best_step=3)
    again = restore(build())
    assert (again["step"], again["epoch"], again["batch"]) == (3, 1, 0)
    for path, content in kept.items():
        path.write_bytes(content)
    assert restore(build())["step"] == 2
    assert "step 3: has parts of several attempts" in heard[-1]


def test_a_damaged_part_sends_everyone_back_and_is_told_once(tmp_path, saved, restore, heard):
    cut(part(tmp_path, 3, 1))
    pipeline = build()
    assert restore(pipeline)["step"] == 2
    assert_same_state(bodies(pipeline), saved[2])
    assert len(heard) == 1
    assert heard[0].startswith("Going on from step 2")
    assert f"step 3: stage 1 is damaged, {part(tmp_path, 3, 1)}: it has" in heard[0]


def test_an_unfinished_step_is_passed_over_and_told(tmp_path, saved, restore, heard):
    for suffix in (".json", ".pt"):
        part(tmp_path, 3, 2, suffix).unlink()
    assert restore(build())["step"] == 2
    assert "step 3: stage 2 is missing" in heard[0]


def test_a_part_that_misleads_sends_everyone_back(tmp_path, saved, restore, heard):
    """Its checksum is right: somebody has made it, so only reading it tells."""
    writer = CheckpointWriter(Checkpoints(tmp_path, keep=9), 3)
    writer.write(1, CheckpointMark(3, 0, 3, **names(tmp_path)), {"body": 3})
    writer.close()
    pipeline = build()
    assert restore(pipeline)["step"] == 2
    assert_same_state(bodies(pipeline), saved[2])
    assert "step 3: a part holds no state of a stage" in heard[0]


def test_values_that_an_optimizer_refuses_are_told(tmp_path, saved, restore):
    state = read_part(tmp_path, 3, 1)
    state["optimizer"]["state"] = {0: {"exp_avg": "x"}, "y": {"step": []}}
    state["scheduler"], state["optimizer"]["param_groups"][0]["params"] = None, [{}]
    writer = CheckpointWriter(Checkpoints(tmp_path, keep=9), 3)
    writer.write(1, CheckpointMark(3, 0, 3, **names(tmp_path)), state)
    writer.close()
    with pytest.raises(CheckpointError, match="stage 1"):
        restore(build())


@pytest.mark.parametrize(
    ("suffix", "harm"), [(".pt", cut), (".pt", Path.unlink), (".json", Path.unlink)]
)
def test_damage_in_all_steps_is_an_error_not_a_beginning(tmp_path, saved, restore, suffix, harm):
    """All files or manifests of a stage are gone, or damaged; of gone files was thought that no
    checkpoint had ever been finished, and the run began anew."""
    for step in STEPS:
        harm(part(tmp_path, step, 1, suffix))
    with pytest.raises(CheckpointError, match=r"intact checkpoint.*step 3: stage 1.*step 2: stage"):
        restore(build())


def test_a_first_checkpoint_that_was_never_finished_is_told(tmp_path, saved, restore, heard):
    for step in STEPS:
        for suffix in (".json", ".pt"):
            part(tmp_path, step, 2, suffix).unlink()
    assert restore(build()) is None
    assert len(heard) == 1
    assert "all begins with the first step" in heard[0]
    assert "stage 2 is missing" in heard[0]


def test_no_checkpoint_at_all_is_nothing_to_tell(restore, heard):
    assert restore(build()) is None
    assert heard == []


def test_a_step_that_is_asked_for_must_be_there(tmp_path, saved, restore):
    shutil.rmtree(tmp_path / "step-000000002")
    with pytest.raises(CheckpointError, match="step-000000002"):
        restore(build(), step=2)
    cut(part(tmp_path, 3, 1))
    with pytest.raises(CheckpointError, match=r"must be there and intact.*stage 1 is dam"):
        restore(build(), step=3)


def test_an_older_step_that_is_asked_for_is_taken_without_a_word(saved, restore, heard):
    assert restore(build(), step=1)["step"] == 1
    assert heard == []


def test_steps_of_several_runs_in_one_folder_are_refused(tmp_path, saved, restore, heard):
    """Which one goes on is for the user to say: the newest step may be of the older run."""
    first = names(tmp_path)["run"]
    with build(tmp_path) as pipeline:
        next(pipeline.steps(rows()))
        pipeline.checkpoint()
    with pytest.raises(CheckpointError, match=r"of one run.*2 runs: steps 1, 2, 3"):
        restore(build())
    assert restore(build(), run=first)["step"] == 3
    assert restore(build(), step=1)["run"] != first


def test_a_run_keeps_its_name_when_it_goes_on(tmp_path, saved):
    first = names(tmp_path)["run"]
    with build(tmp_path) as pipeline:
        pipeline.restore()
        pipeline.checkpoint()
    assert names(tmp_path)["run"] == first


def test_other_versions_are_named_in_one_line(tmp_path, saved, restore, heard, monkeypatch):
    versions = {"scpl": "9.9.9", "torch": str(torch.__version__)}
    monkeypatch.setattr(checkpoint, "_versions", lambda: versions)
    assert restore(build())["step"] == 3
    assert len(heard) == 1
    assert re.search(r"was written by scpl \S+; this is scpl 9\.9\.9: .*bits may differ", heard[0])
    assert "torch" not in heard[0]


def test_without_a_listener_it_is_a_warning(tmp_path, saved):
    cut(part(tmp_path, 3, 1))
    with pytest.warns(UserWarning, match="Going on from step 2"), build(tmp_path) as pipeline:
        pipeline.restore()


def test_all_stages_change_or_none(saved, restore):
    """The last stage's part does not fit: the first stages must not have been loaded by then."""
    parts = split(mlp(), before=["linear1", "relu1"], example=rows()[0][0])
    pipeline = Pipeline(parts, SCPL(), torch.optim.Adam)
    before = [{k: v.clone() for k, v in one.items()} for one in bodies(pipeline)]
    with pytest.raises(CheckpointError, match="same network, cuts and method"):
        restore(pipeline)
    assert_same_state(bodies(pipeline), before)
