"""Replicas of stages: the numbers of one, whatever the shares; the same bits wherever they live."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stream import JOB, joined, train

from processes import run_forked
from scpl.app.config import TrainConfig
from scpl.engine.mesh import Mesh
from scpl.engine.shares import held, join_rows, own, take_rows
from scpl.errors import InputError

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs in one process, each case once."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def run(case):
        if case not in known:
            known[case] = train(folder, 1, case)
        return known[case]

    return run


def several(tmp_path, case, replicas, *options, name="several"):
    """Train with so many replicas of each group of ranks."""
    num_ranks = sum(map(int, replicas.split()))
    return train(tmp_path, num_ranks, case, "--replicas", *replicas.split(), *options, name=name)


def assert_near(alone, ranks):
    """Equal but for the order in which float64 numbers are added; replicas draw on their own."""
    expected, found = joined(alone), joined(ranks)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor) and "/random/" not in key:
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=key)
    assert ranks[-1]["losses"].keys() == alone[0]["losses"].keys()
    for step, losses in alone[0]["losses"].items():
        for one, other in zip(losses, ranks[-1]["losses"][step], strict=True):
            assert other == pytest.approx(one, rel=1e-6)
    for one, other in zip(alone[0]["evaluations"], ranks[-1]["evaluations"], strict=True):
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
        assert other["num_samples"] == one["num_samples"]


def assert_same_bits(some, others):
    for one, other in zip((some[0], some[-1]), (others[0], others[-1]), strict=True):
        assert other["evaluations"][-1] == one["evaluations"][-1]
        assert all(
            torch.equal(other["exported"][key], one["exported"][key]) for key in one["exported"]
        )
    expected, found = joined(some), joined(others)
    different = [
        key
        for key, value in expected.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, found[key])
    ]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "replicas"),
    [
        ("still", "3"),
        ("still", "2 2"),
        ("still", "2 3"),
        ("still", "1 2 1"),
        ("still-al", "2 1"),
        ("still-predsim", "1 2"),
        ("still-deinforeg", "2"),
        ("still-labels", "1 2"),
        ("still-int8", "2 1"),
    ],
)
def test_replicas_learn_what_one_learns(tmp_path, alone, case, replicas):
    """Shares of a ragged epoch: batches of 9, 4, 1 and 3 rows, so some replicas have none."""
    ranks = several(tmp_path, case, replicas)
    assert_near(alone(case), ranks)
    for rank in ranks:  # replicas stay the same, to the last bit
        for index, state in rank["stages"].items():
            body = joined(ranks)
            for name, value in state["body"].items():
                assert torch.equal(value, body[f"/{index}/body/{name}"])


@pytest.mark.slow
def test_the_same_bits_on_any_placement(tmp_path):
    """Two replicas of every stage: on two processes, or each half of the stages on two.

    With dropout and BatchNorm, and continued from a checkpoint by another number of processes.
    """
    on_two = several(tmp_path, "transformer-weighted", "2", name="two")
    on_four = several(tmp_path, "transformer-weighted", "2 2", name="four")
    assert_same_bits(on_two, on_four)
    images = several(tmp_path, "vgg-partial", "2", name="images")
    assert_same_bits(images, several(tmp_path, "vgg-partial", "2 2", name="images-four"))
    resumed = several(tmp_path, "vgg-partial", "2 2", "--resume", name="images")
    assert_same_bits(images, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(0, "kill"), (2, "kill"), (2, "raise")])
def test_a_replica_that_is_gone_is_named(tmp_path, rank, how):
    """Its sibling waits for what it gathers: that this ends is a symptom, and nobody's fault."""
    done = run_forked(
        3, JOB, "transformer", tmp_path, "--replicas", 1, 2, "--fail", rank, how, timeout=100
    )
    assert done.returncode != 0
    (verdict,) = re.findall(r"^(?:VERDICT|scpl: Every rank).*$", done.stderr, re.MULTILINE)
    assert ("ValueError: broken on purpose" if how == "raise" else f"Rank {rank} (") in verdict


OWN = """
import sys
import torch
from torch import nn
import scpl
from scpl.methods import METHODS

class Own(scpl.Objective):
    def __init__(self, head, whole):
        super().__init__()
        self.head, self.makes_whole = head, whole

    def forward(self, features, target, carry):
        logits = self.head(features)
        logits = self.whole(logits) if "loss" in self.makes_whole else logits
        if "mean" in self.makes_whole:
            return {"loss": logits.square().mean()}
        return {"loss": nn.functional.cross_entropy(logits, target)}

    def predict(self, features):
        logits = self.head(features)
        return self.whole(logits) if "predict" in self.makes_whole else logits

class Method(scpl.Method):
    name = "own"

    def objective(self, site):
        return Own(site.readout or nn.LazyLinear(3), sys.argv[1])

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
batches = [(torch.randn(7, 4), torch.arange(7) % 3)] * 2
parts = scpl.split(network, num_stages=1, example=batches[0][0])
with scpl.Pipeline(parts, Method(), torch.optim.SGD, ranks=scpl.connect(replicas=2)) as pipeline:
    pipeline.train(batches)
    print(pipeline.evaluate(batches).peek() is not None)
"""


@pytest.mark.parametrize(
    ("makes_whole", "message"),
    [
        ("loss predict", None),
        ("predict", r"Expected input.*before the objective called `self\.whole.*of [34] of the 7"),
        ("mean predict", r"self\.whole.*stage 0 \(Own\) never called it\. Call it"),
        ("loss", r"a row for each sample.*stage 0 predicted [34] for 7"),
    ],
)
def test_an_objective_that_takes_its_share_for_the_whole_is_told(tmp_path, makes_whole, message):
    """torch spoke of sizes; where these did not matter, each replica learned from its own mean."""
    (tmp_path / "own.py").write_text(OWN)
    done = run_forked(2, tmp_path / "own.py", makes_whole, timeout=100)
    if message is None:
        assert done.returncode == 0, done.stderr
        assert "True" in done.stdout
    else:
        assert done.returncode != 0
        assert re.search(message, done.stderr, re.DOTALL), done.stderr


def test_rows_of_replicas_are_all_rows_once():
    for rows in range(1, 12):
        for count in range(1, 6):
            parts = [own(rows, count, rank) for rank in range(count)]
            assert [row for part in parts for row in part] == list(range(rows))
            assert all(held(rows, count, rank) for rank in range(count))


@given(rows=st.integers(1, 12), count=st.integers(1, 5), dim=st.integers(0, 2))
def test_values_that_are_taken_apart_come_together_again(rows, count, dim):
    """A value with rows in any dimension, beside one that has none."""
    shape = [2, 3]
    shape.insert(dim, rows)
    tree = (torch.arange(6.0 * rows).reshape(shape), {"scale": torch.tensor(3.0)})
    dims = (dim, None)
    parts = [take_rows(tree, dims, own(rows, count, rank)) for rank in range(count)]
    values, other = join_rows(parts, dims)
    assert torch.equal(values, tree[0])
    assert other["scale"] == 3.0


def test_a_mesh_of_groups():
    """Ranks 0; 1, 2; 3, 4; 5: groups of one size are linked rank by rank."""
    mesh = [Mesh(rank, 6, (1, 2, 1, 1), (1, 2, 2, 1)) for rank in range(6)]
    assert [one.group for one in mesh] == [0, 1, 1, 2, 2, 3]
    assert [one.replica for one in mesh] == [0, 0, 1, 0, 1, 0]
    assert [list(one.sources) for one in mesh] == [[], [0], [0], [1], [2], [3, 4]]
    assert [list(one.targets) for one in mesh] == [[1, 2], [3], [4], [5], [5], []]
    assert [list(one.hosted(5)) for one in mesh] == [[0], [1, 2], [1, 2], [3], [3], [4]]
    assert mesh[0].owners(5) == [0, 1, 1, 3, 5]


def test_a_group_is_as_fast_as_its_slowest_replica_times_their_number():
    mesh = Mesh(0, 4, replicas=(1, 2, 1))
    assert mesh.group_speeds((1.0, 0.5, 1.0, 0.25)) == (1.0, 1.0, 0.25)
    assert mesh.group_speeds(()) == (1.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("replicas", "got"),
    [((1, 2), r"1 \+ 2 = 3"), ((4, 0), r"4 \+ 0 = 4"), ((), "none = 0")],
)
def test_groups_that_do_not_fit_are_refused(replicas, got):
    with pytest.raises(InputError, match=rf"add up to the 4 ranks. Got {got}"):
        Mesh(0, 4, replicas=replicas)


def test_one_number_of_replicas_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Mesh.from_env(replicas=2).replicas == (2, 2)
    with pytest.raises(InputError, match=r"must divide the number of ranks. Got 3 for 4 ranks"):
        Mesh.from_env(replicas=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 4, "replicas": (3,)}, "must divide the number of ranks"),
        ({"processes": 4, "replicas": (1, 2)}, "add up to the 4 ranks"),
        ({"processes": 6, "replicas": (1, 1, 1, 1, 2)}, "Got 5 groups of processes for 4 stages"),
        ({"replicas": (2,)}, "must go with --processes 2 or more"),
        ({"processes": 2, "replicas": (2,), "method": "ddp"}, "objectives of their own"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_starts(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TrainConfig().changed(**settings).check()
