"""If any rank fails, all ranks end within seconds with the first cause named once."""

import re
import time
from functools import partial

import pytest
import torch
from test_stream import JOB, joined, train

from networks import flat
from processes import run_forked, run_started

pytestmark = pytest.mark.timeout(400)
VERDICT = re.compile(r"^(?:VERDICT|scpl: Every rank).*$", re.MULTILINE)


def fail(tmp_path, rank, how, *options, num_ranks, run):
    """Run until a rank breaks at step 8; returns what people read, and the seconds it took."""
    out = tmp_path / "run"
    out.mkdir()
    begin = time.monotonic()
    done = run(num_ranks, JOB, "transformer", out, "--fail", rank, how, *options, timeout=100)
    assert done.returncode != 0
    return VERDICT.findall(done.stderr), time.monotonic() - begin


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), 1, "transformer")


def assert_resumes_to_the_same_bits(tmp_path, expected):
    ranks = train(tmp_path, 2, "transformer", "--resume", name="run")
    found = joined(ranks)
    different = [
        key
        for key, value in joined(expected).items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, found[key])
    ]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "num_ranks", "stage", "width", "run"),
    [(0, 3, 0, 4, run_forked), (2, 3, 3, 16, run_forked), (1, 2, 3, 16, run_started)],
)
def test_a_stage_that_raises_is_named_with_step_shape_and_cause(
    tmp_path, undisturbed, rank, num_ranks, stage, width, run
):
    """The last rank hosts the last of four stages; its error must reach the user, once."""
    verdicts, _ = fail(tmp_path, rank, "raise", num_ranks=num_ranks, run=run)
    assert len(verdicts) == 1, verdicts
    assert f"Stage {stage} (" in verdicts[0]
    assert re.search(r"failed at step (8|9|10)\b", verdicts[0])
    assert f"(9, 7, {width}) float32" in verdicts[0]
    assert "ValueError: broken on purpose" in verdicts[0]
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_nothing_is_lost(tmp_path, undisturbed, rank):
    verdicts, _ = fail(tmp_path, rank, "kill", num_ranks=2, run=run_forked)
    assert len(verdicts) == 1, verdicts
    assert f"Rank {rank} (process" in verdicts[0]
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_where_tensors_are_staged(tmp_path, undisturbed, rank):
    """The neighbour's sending thread, or its receiving one, is what finds out."""
    verdicts, _ = fail(tmp_path, rank, "kill", "--staged", num_ranks=2, run=run_forked)
    assert len(verdicts) == 1, verdicts
    assert f"Rank {rank} (process" in verdicts[0]
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_ended(tmp_path, undisturbed):
    """SIGSTOP: no error, no closed connection, only silence; four seconds of it are too long."""
    # As a launcher does; torch's gives it half a minute.
    run = partial(run_forked, to_end=1)
    verdicts, seconds = fail(tmp_path, 1, "stop", num_ranks=2, run=run)
    assert len(verdicts) == 1, verdicts
    assert "sign of life within 4 s. Rank 1" in verdicts[0]
    assert seconds < 60  # on a busy machine
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


def test_flat_sees_a_changed_tensor():
    """The comparison above can fail."""
    state = {"a": {"b": torch.zeros(2)}}
    other = {"a": {"b": torch.ones(2)}}
    assert not torch.equal(flat(state)["/a/b"], flat(other)["/a/b"])
