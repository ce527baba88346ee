"""Promise 1: one process or several, any spread of the stages, the same bits."""

from pathlib import Path

import pytest
import torch

from networks import flat
from processes import run_forked, run_started

pytestmark = pytest.mark.timeout(400)
JOB = Path(__file__).parents[1] / "stream_job.py"
TIMEOUT = 150
STARTED = ["vgg-views"]  # under torchrun, where ranks hash differently; all others are forked


def train(tmp_path, num_ranks, case, *options, name=None, run=run_forked):
    """Run a case to its end; returns what every rank saved."""
    out = tmp_path / (name or f"{case}-{num_ranks}")
    out.mkdir(exist_ok=True)
    done = run(num_ranks, JOB, case, out, *options, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-4000:]
    paths = [out / f"rank-{rank}.pt" for rank in range(num_ranks)]
    return [torch.load(path, weights_only=True) for path in paths if path.exists()]


def joined(ranks):
    """The state of all stages, from whichever rank hosted them."""
    stages = {}
    for rank in ranks:
        stages.update(rank["stages"])
    return flat({str(index): stages[index] for index in sorted(stages)})


def assert_same(alone, ranks):
    expected, found = joined(alone), joined(ranks)
    assert expected.keys() == found.keys()
    different = [
        key
        for key, value in expected.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, found[key])
    ]
    assert not different
    assert ranks[-1]["losses"] == alone[0]["losses"]
    assert ranks[-1]["details"] == alone[0]["details"]
    for rank in ranks:
        assert rank["evaluations"] == alone[0]["evaluations"]
        assert rank["exported"].keys() == alone[0]["exported"].keys()
        assert all(
            torch.equal(value, rank["exported"][key]) for key, value in alone[0]["exported"].items()
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs in one process, each case once."""
    folder = tmp_path_factory.mktemp("alone")
    known = {}

    def run(case):
        if case not in known:
            known[case] = train(folder, 1, case)
        return known[case], folder / f"{case}-1"

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_ranks"),
    [
        ("vgg", 2),
        ("vgg", 3),
        ("vgg", 4),
        ("vgg-uneven", 3),
        ("vgg-partial", 2),
        ("vgg-partial", 4),
        ("vgg-al", 2),
        ("vgg-al", 4),
        ("vgg-labels", 2),
        ("vgg-labels", 4),
        ("vgg-views", 2),
        ("vgg-rounded", 2),
        ("vgg-int8", 3),
        ("vgg-half", 3),
        ("vgg-mixed", 4),
        ("transformer", 2),
        ("transformer", 3),
        ("transformer", 4),
        ("transformer-predsim", 3),
        ("transformer-numbers", 2),
        ("transformer-numbers", 4),
        ("transformer-weighted", 2),
        ("transformer-ragged", 2),
        ("transformer-ragged", 4),
        ("lstm", 2),
        ("lstm", 4),
        ("transformer-masked", 2),
        ("transformer-masked", 4),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits(tmp_path, alone, case, num_ranks):
    """24 steps with evaluations and a checkpoint in the middle; every tensor is compared."""
    expected, folder = alone(case)
    ranks = train(tmp_path, num_ranks, case, run=run_started if case in STARTED else run_forked)
    assert len(ranks) == num_ranks
    assert_same(expected, ranks)
    assert len(ranks[-1]["losses"]) == 24
    middle = "checkpoints/step-000000010"
    for part in sorted((folder / middle).glob("*.pt")):
        other = tmp_path / f"{case}-{num_ranks}" / middle / part.name
        assert part.read_bytes() == other.read_bytes(), part.name


@pytest.mark.parametrize(("case", "num_ranks"), [("vgg-mixed", 2), ("transformer-masked", 3)])
def test_staged_tensors_give_the_same_bits(tmp_path, alone, case, num_ranks):
    """As on CUDA devices over gloo: by way of buffers of the host, sent by another thread."""
    expected, _ = alone(case)
    assert_same(expected, train(tmp_path, num_ranks, case, "--staged"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("transformer", 2, 4),
        ("transformer", 4, 1),
        ("transformer", 1, 3),
        ("vgg-mixed", 1, 2),
        ("vgg-half", 2, 1),
    ],
)
def test_resuming_on_another_number_of_ranks_gives_the_same_bits(
    tmp_path, alone, case, before, after
):
    """A run that stops after step 10's checkpoint, continued by another number of processes."""
    expected, _ = alone(case)
    train(tmp_path, before, case, name="run")
    ranks = train(tmp_path, after, case, "--resume", name="run")
    assert joined(ranks).keys() == joined(expected).keys()
    assert all(
        torch.equal(value, joined(ranks)[key])
        for key, value in joined(expected).items()
        if isinstance(value, torch.Tensor)
    )
    resumed = ranks[-1]["losses"]
    assert set(resumed) == set(range(11, 25))
    assert all(expected[0]["losses"][step] == resumed[step] for step in resumed)


def test_handing_on_as_bfloat16_sends_half(tmp_path):
    """Two stages per rank: 12 maps of 8 x 4 x 4 cross the cut, in two bytes instead of four."""
    (plain, _), (rounded, _) = (train(tmp_path, 2, case) for case in ("vgg", "vgg-rounded"))
    assert plain["bytes"] - rounded["bytes"] == 12 * 8 * 4 * 4 * 2


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A run on two ranks whose last stage sleeps: 6 epochs of 84 steps, each evaluated."""
    return train(tmp_path_factory.mktemp("slow"), 2, "vgg", "--slow")


def begun_and_learned(first, last):
    """When the first rank began each step, and when the last one had ended it."""
    begun = {e["step"]: e["begin"] for e in first["events"] if e["activity"] == "forward"}
    learned = {e["step"]: e["end"] for e in last["events"] if e["activity"] == "learn"}
    return begun, learned


@pytest.mark.slow
def test_a_slow_last_stage_holds_back_the_first(slow):
    """Back-pressure: memory of a fast first rank must not grow while the last one sleeps."""
    first, last = slow
    growth_kb = first["memory"][-1] - first["memory"][30]
    one_batch_kb = 12 * 8 * 8 * 8 * 4 / 1024
    assert len(first["memory"]) == 504
    assert growth_kb < 120 * one_batch_kb  # 474 further batches would be four times as much
    begun, learned = begun_and_learned(first, last)
    # Two messages in flight, and the ranks hold one each.
    assert all(begun[step + 5] > learned[step] for step in range(1, 500))
    # On a busy machine both ranks wait for a core as well.
    assert last["wait"] < 0.5
    assert first["wait"] > 0.05


def test_the_timeline_shows_an_undrained_line(slow):
    """Across an epoch's end and an evaluation, the first rank goes on before the last is done."""
    first, last = slow
    begun, learned = begun_and_learned(first, last)
    evaluated = [e["end"] for e in last["events"] if e["activity"] == "evaluate"]
    steps = [step for step in range(2, 504) if begun[step + 1] < learned[step]]
    epochs = [
        step
        for step in range(84, 504, 84)
        if any(begun[step + 1] < end < learned[step + 1] for end in evaluated)
    ]
    # On a drained line none of them would overlap. A busy machine may hold the first rank up for
    # longer than the last one sleeps: 20 ms in a step, but several times 100 ms when it evaluates.
    assert len(steps) > 50
    assert len(epochs) >= 3, epochs
