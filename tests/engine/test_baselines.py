"""End-to-end training over several ranks: the gradients of backpropagation, on our stream."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, PrefixStore

import baseline_job
import scpl
from networks import data
from processes import run_forked
from scpl.engine.build import build_trainer
from scpl.engine.channel import NoChannel
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import ManyRanks
from scpl.engine.shares import shares
from scpl.engine.stage import StageOptions
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.schedule import fits, micro_batches
from scpl.errors import InputError
from scpl.methods import METHODS, CutBackpropagation, DataParallel, GPipe

pytestmark = pytest.mark.timeout(400)
JOB = Path(__file__).parents[1] / "baseline_job.py"
SEVERAL = ["bp-cut", "gpipe", "1f1b", "zero-bubble", "ddp"]


def train(out, num_ranks, *arguments):
    """Train in turns with several methods; returns what every rank found."""
    out.mkdir(exist_ok=True)
    done = run_forked(num_ranks, JOB, out, *arguments, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def assert_same_gradients(expected, ranks, method):
    """After eight steps of plain SGD with momentum weights can only agree if gradients do."""
    last = ranks[-1][method]
    for rank in ranks:
        for key, value in expected["exported"].items():
            torch.testing.assert_close(rank[method]["exported"][key], value, atol=2e-6, rtol=0)
        assert rank[method]["evaluations"] == last["evaluations"]
    assert last["losses"].keys() == expected["losses"].keys()
    for step, (loss,) in expected["losses"].items():
        assert last["losses"][step][-1] == pytest.approx(loss, abs=1e-5)
    for mine, other in zip(expected["evaluations"], last["evaluations"], strict=True):
        assert mine["num_samples"] == other["num_samples"]
        assert mine["metrics"] == pytest.approx(other["metrics"], abs=1e-5)
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    # A replica sees a share of each batch, and still every sample is found at its place among all.
    assert last["details"].get("confusion") == expected["details"].get("confusion")
    for mine, other in zip(
        expected["details"]["mistakes"], last["details"]["mistakes"], strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-4)
    torch.testing.assert_close(last["logits"], expected["logits"], atol=1e-5, rtol=0)
    assert all(rank[method]["logits"] is None for rank in ranks[:-1])


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_backpropagation(tmp_path):
    """All schedules and replicas, with a last batch of six rows that four do not divide."""
    expected = train(tmp_path / "alone", 1, "bp")[0]["bp"]
    ranks = train(tmp_path / "two", 2, *SEVERAL)
    for method in SEVERAL:
        assert_same_gradients(expected, ranks, method)
    bits = ranks[1]["bp-cut"]["exported"]
    assert all(torch.equal(value, bits[key]) for key, value in expected["exported"].items())
    # What goes down is what comes back up, in each schedule the same; replicas send gradients.
    sent = {method: [rank[method]["bytes"] for rank in ranks] for method in SEVERAL}
    assert sent["gpipe"] == sent["1f1b"] == sent["bp-cut"]
    assert sent["gpipe"][0] > sent["gpipe"][1] > 0
    size = 4 * sum(value.numel() for value in expected["exported"].values())
    assert sent["ddp"][1] == pytest.approx(size, rel=0.01)
    for method in SEVERAL:
        seen = {event["activity"] for rank in ranks for event in rank[method]["events"]}
        assert seen >= {"forward", "backward", "update", "wait", "evaluate"}


@pytest.mark.slow
def test_maps_with_channels_last_are_scheduled_as_well(tmp_path):
    """As the command line lays them out on a CPU: zero-bubble's gradients of maps were, too."""
    methods = ["gpipe", "zero-bubble"]
    ranks = train(tmp_path / "two", 2, *methods, "--channels-last", "--norm")
    one, other = (ranks[0][method]["exported"] for method in methods)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_schedules_may_send_in_16_bits(tmp_path):
    """Down and up: half the bytes, and gradients near those of backpropagation. Masks survive."""
    wide = train(tmp_path / "wide", 2, "gpipe", "--text", "--micro-batches", "2")
    narrow = train(tmp_path / "narrow", 2, "gpipe", "--text", "--micro-batches", "2", "--narrow")
    # The last rank sends gradients, and nothing else; there are no headers or targets among them.
    assert narrow[1]["gpipe"]["bytes"] == wide[1]["gpipe"]["bytes"] / 2
    losses = [ranks[1]["gpipe"]["losses"] for ranks in (wide, narrow)]
    for step, (loss,) in losses[0].items():
        assert losses[1][step][0] != loss
        assert losses[1][step][0] == pytest.approx(loss, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["0", "0,2,3", "6,9"])
def test_frozen_layers_are_left_alone(tmp_path, frozen):
    """Nothing needs the gradient that comes back to a first rank whose layers are all frozen."""
    arguments = ["--frozen", frozen]
    expected = train(tmp_path / "alone", 1, "bp", *arguments)[0]["bp"]
    ranks = train(tmp_path / "two", 2, *SEVERAL, *arguments)
    for method in SEVERAL:
        assert_same_gradients(expected, ranks, method)


@pytest.mark.slow
def test_texts_of_different_lengths_give_the_same_gradients(tmp_path):
    """Masks are sliced, sent and given gradients' company; batches differ in length, too."""
    expected = train(tmp_path / "alone", 1, "bp", "--text")[0]["bp"]
    ranks = train(tmp_path / "two", 2, *SEVERAL, "--text", "--micro-batches", "2")
    for method in SEVERAL:
        assert_same_gradients(expected, ranks, method)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi-label", "regression", "weighted"])
def test_other_tasks_give_the_gradients_of_backpropagation(tmp_path, kind):
    """Schedules and replicas take the loss of the task, and its metrics need all predictions."""
    expected = train(tmp_path / "alone", 1, "bp", "--task", kind)[0]["bp"]
    ranks = train(tmp_path / "two", 2, *SEVERAL, "--task", kind)
    for method in SEVERAL:
        assert_same_gradients(expected, ranks, method)
    (terms,) = expected["losses"][1]
    assert len(terms) == 1
    assert len(expected["evaluations"][0]["metrics"]) == {"weighted": 2, "regression": 3}.get(
        kind, 4
    )


@pytest.mark.slow
def test_four_ranks_with_clipping_continue_from_a_checkpoint(tmp_path):
    """Clipping needs the norm of the whole network; the first four steps come from the disk."""
    methods = ["gpipe", "1f1b", "ddp"]
    expected = train(tmp_path / "alone", 1, "bp", "--clip")[0]["bp"]
    out = tmp_path / "four"
    first = train(out, 4, *methods, "--clip", "--micro-batches", "8")
    for method in methods:
        assert_same_gradients(expected, first, method)
    again = train(out, 4, *methods, "--clip", "--micro-batches", "8", "--resume")
    for method in methods:
        assert set(again[-1][method]["losses"]) == {5, 6, 7, 8}
        for key, value in first[0][method]["exported"].items():
            found = again[0][method]["exported"][key]
            # Torch groups gradients anew after its first step, and with the groups the order in
            # which more than two ranks are added up.
            exact = method != "ddp"
            assert torch.equal(found, value) if exact else torch.allclose(found, value, atol=1e-6)


@pytest.mark.slow
def test_replicas_evaluate_with_the_statistics_that_are_saved(tmp_path):
    """BatchNorm: ranks see different rows, but all must predict and export the same."""
    ranks = train(tmp_path / "two", 2, "ddp", "bp-cut", "--norm")
    expected = train(tmp_path / "alone", 1, "bp", "--norm")[0]["bp"]
    assert_same_gradients(expected, ranks, "bp-cut")
    network = baseline_job.network(True).eval()
    network.load_state_dict(ranks[0]["ddp"]["exported"])
    batches = data((2, 8, 8), [16, 16, 16, 6])
    with torch.no_grad():
        logits = torch.cat([network(inputs) for inputs, _ in batches])
    torch.testing.assert_close(ranks[1]["ddp"]["logits"], logits, atol=1e-5, rtol=0)
    right = sum(
        int((part.argmax(1) == target).sum())
        for part, (_, target) in zip(logits.split([16, 16, 16, 6]), batches, strict=True)
    )
    assert ranks[1]["ddp"]["evaluations"][-1]["metrics"]["accuracy"] == pytest.approx(right / 54)


def by_hand(accumulation, compress):
    """What `baseline_job.py` shall do with two replicas, in the loop of a careful user."""
    network, batches = baseline_job.network(False), data((2, 8, 8), [16, 16, 16, 6])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = baseline_job.decaying(optimizer)
    parameters = list(network.parameters())
    for _ in range(baseline_job.EPOCHS):
        for begin in range(0, len(batches), accumulation):
            group = batches[begin : begin + accumulation]
            sums = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
            for inputs, target in group:
                for rank, (own, truth) in enumerate(
                    zip(inputs.chunk(2), target.chunk(2), strict=True)
                ):
                    loss = nn.functional.cross_entropy(network(own), truth)
                    found = torch.autograd.grad(loss, parameters)
                    sums[rank] = [old + new for old, new in zip(sums[rank], found, strict=True)]
            for parameter, *both in zip(parameters, *sums, strict=True):
                one, other = (each.to(compress) / (2 * len(group)) for each in both)
                parameter.grad = (one + other).to(torch.float32)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            for _ in group:
                schedule.step()
    return network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "compress"), [(1, "bfloat16"), (3, "none"), (3, "bfloat16"), (5, "none")]
)
def test_replicas_average_as_a_careful_user_would(tmp_path, accumulation, compress):
    """Of four mini-batches three make an update and one another, or all four make the only one."""
    settings = ["--accumulation", accumulation, "--compress", compress]
    ranks = train(tmp_path / "two", 2, "ddp", "--clip", "--decay", *settings)
    weights = ranks[0]["ddp"]["exported"]
    expected = by_hand(accumulation, getattr(torch, "float32" if compress == "none" else compress))
    others = by_hand(accumulation, torch.bfloat16 if compress == "none" else torch.float32)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-6, rtol=0)
        assert torch.equal(ranks[1]["ddp"]["exported"][key], weights[key])
    assert max((weights[k] - value).abs().max().item() for k, value in others.items()) > 1e-5
    size = sum(value.nbytes for value in weights.values()) // (1 if compress == "none" else 2)
    updates = 2 * -(-4 // accumulation)
    assert ranks[1]["ddp"]["bytes"] == pytest.approx(size * updates / 8, rel=0.01)
    assert len(ranks[1]["ddp"]["losses"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "begun"), [(7, 7), (6, 4), (3, 3), (2, 0)])
def test_a_run_goes_on_from_its_last_update(tmp_path, saved, begun):
    """A checkpoint amid three mini-batches that make an update is one of the moment before them."""
    out, settings = tmp_path / "two", ["--accumulation", "3", "--norm", "--clip", "--decay"]
    first = train(out, 2, "ddp", *settings, "--save-after", saved)
    again = train(out, 2, "ddp", *settings, "--save-after", 99, "--resume", begun)
    assert again[1]["ddp"]["losses"] == {
        step: loss for step, loss in first[1]["ddp"]["losses"].items() if step > begun
    }
    for key, value in first[0]["ddp"]["exported"].items():
        assert torch.equal(again[0]["ddp"]["exported"][key], value), key


@pytest.mark.parametrize(
    ("rows", "wanted", "count"), [(16, 4, 4), (6, 4, 3), (7, 4, 1), (1, 4, 1), (12, 8, 6)]
)
def test_micro_batches_are_equal(rows, wanted, count):
    assert micro_batches(rows, wanted) == count
    assert rows % count == 0


def test_schedules_know_what_they_can_run():
    assert [fits("1F1B", count, 4) for count in (1, 3, 4, 9)] == [False, False, True, True]
    assert [fits("InterleavedZeroBubble", count, 2) for count in (1, 3, 4, 5)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert fits("GPipe", 1, 8)


@pytest.mark.parametrize(("rows", "parts"), [(8, [4, 4]), (7, [4, 3]), (1, [1, 0])])
def test_replicas_share_rows(rows, parts):
    assert shares(rows, 2) == parts


@pytest.mark.parametrize("name", SEVERAL)
def test_one_process_is_refused(name):
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    parts = scpl.split(network, num_stages=1, example=torch.zeros(2, 4))
    with pytest.raises(InputError, match=rf"{name} needs at least two processes\. Got one"):
        scpl.Pipeline(parts, METHODS[name](), lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.mark.parametrize("name", [name for name in SEVERAL if name != "ddp"])
def test_schedules_send_no_tensors_of_cuda_over_gloo(monkeypatch, name):
    """They send by themselves, not by way of the channel, which would stage."""
    monkeypatch.setattr("scpl.engine.ranks.dist.new_group", lambda **_: object())
    store = HashStore()
    ranks = ManyRanks(
        Mesh(0, 2), torch.device("cuda"), 2, lambda: PrefixStore("test", store), 60.0, "gloo"
    )
    ranks._watchdog.close()
    options = StageOptions(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(InputError, match=rf"needs NCCL .* Got {name} over gloo\. Give every"):
        build_trainer(
            METHODS[name](),
            [],
            NoChannel(),
            Timeline(),
            ranks=ranks,
            options=options,
            task=scpl.Classes(),
            seed=0,
        )


def test_bad_settings_of_replicas_are_refused():
    with pytest.raises(InputError, match=r"`accumulation` must be at least 1\. Got 0"):
        DataParallel(accumulation=0)
    with pytest.raises(InputError, match=r"'none' or 'bfloat16'\. Got 'float16'"):
        DataParallel(compress_gradients="float16")


def test_bad_numbers_of_micro_batches_are_refused():
    with pytest.raises(InputError, match=r"must be at least 1\. Got 0"):
        GPipe(0)
    assert CutBackpropagation().slices == 1
    assert DataParallel().layout == "replicas"
