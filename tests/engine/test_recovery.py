"""Where a run continues: the newest checkpoint that every rank can read."""

import shutil

import pytest
import torch

from networks import assert_same_state, mlp, rows, states
from scpl import SCPL, Pipeline, split
from scpl.engine.checkpoint import recover
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import OneRank
from scpl.errors import CheckpointError

STEPS = (1, 2, 3)


class Told(OneRank):
    """One of several ranks, which hears what the others can read."""

    def __init__(self, mesh, others):
        super().__init__(mesh=mesh)
        self.others = others

    def exchange(self, key, value):
        return [value, *self.others]


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


def test_the_newest_is_taken(tmp_path, saved):
    pipeline = build()
    note = recover(pipeline.stages, tmp_path, [0, 0, 0], OneRank(), None)
    assert (note["step"], note["mark"]) == (3, 3.0)
    assert_same_state(bodies(pipeline), saved[3])


@pytest.mark.parametrize(("others", "step"), [([1, 2], 2), ([1], 1), ([2, 9], 2)])
def test_ranks_agree_on_the_newest_that_all_can_read(tmp_path, saved, others, step):
    """Each machine has a disk of its own, and one of them may be ahead of another."""
    pipeline = build()
    ranks = Told(Mesh(0, 2), [others])
    note = recover(pipeline.stages[:2], tmp_path, [0, 0, 1], ranks, None)
    assert note["step"] == step
    assert_same_state(bodies(pipeline)[:2], saved[step][:2])


def test_nothing_in_common_is_nothing_to_go_on_from(tmp_path, saved):
    pipeline = build()
    before = [{k: v.clone() for k, v in one.items()} for one in bodies(pipeline)]
    assert recover(pipeline.stages, tmp_path, [0, 0, 0], Told(Mesh(0, 2), [[7]]), None) is None
    assert_same_state(bodies(pipeline), before)


def test_a_damaged_part_sends_everyone_back(tmp_path, saved):
    part = tmp_path / "step-000000003" / "stage-1.pt"
    part.write_bytes(part.read_bytes()[:-1])
    pipeline = build()
    assert recover(pipeline.stages, tmp_path, [0, 0, 0], OneRank(), None)["step"] == 2
    assert_same_state(bodies(pipeline), saved[2])


def test_a_step_that_is_asked_for_must_be_there(tmp_path, saved):
    shutil.rmtree(tmp_path / "step-000000002")
    with pytest.raises(CheckpointError, match="step-000000002"):
        recover(build().stages, tmp_path, [0, 0, 0], OneRank(), 2)


def test_all_stages_change_or_none(tmp_path, saved):
    """The last stage's part does not fit: the first stages must not have been loaded by then."""
    parts = split(mlp(), before=["linear1", "relu1"], example=rows()[0][0])
    pipeline = Pipeline(parts, SCPL(), torch.optim.Adam)
    before = [{k: v.clone() for k, v in one.items()} for one in bodies(pipeline)]
    with pytest.raises(CheckpointError, match="same network, cuts and method"):
        recover(pipeline.stages, tmp_path, [0, 0, 0], OneRank(), None)
    assert_same_state(bodies(pipeline), before)
