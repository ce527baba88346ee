"""Plans by measurement: who is charged for what, and that measuring leaves no trace."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, PrefixStore

import scpl
from networks import assert_same_state, cnn, images, mlp, rows
from scpl.engine import ranks as ranks_module
from scpl.engine.costs import Costs, Plan, Unit
from scpl.engine.mesh import Mesh
from scpl.engine.planning import measure, relative_speeds, seconds_of_a_piece
from scpl.engine.precision import Precision
from scpl.engine.ranks import ManyRanks
from scpl.engine.stage import StageOptions
from scpl.errors import InputError, PartitionError
from scpl.methods import METHODS
from scpl.methods.base import CrossEntropy, Method, Objective

CPU = torch.device("cpu")
PLAIN = Unit(
    layers=("layer",), parameters=10, forward=1.0, backward=3.0, forward_first=1.5,
    backward_first=2.0, update=0.25, objective=4.0, objective_parameters=5, bytes_out=100,
)  # fmt: skip


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def measured(model, method, batch, **options):
    given = StageOptions(adam, **options)
    return measure(model, method, given, num_stages=2, batch=batch, device=CPU, repeats=1)


def row(*objectives, **changes):
    """Costs of equal units whose ends cost this much."""
    units = tuple(
        replace(PLAIN, layers=(f"layer{i}",), objective=cost, **changes)
        for i, cost in enumerate(objectives)
    )
    return Costs(tuple(f"layer{i}" for i in range(1, len(units))), units, num_samples=8)


class TestWhatAStageCosts:
    def test_only_its_first_unit_needs_no_gradient_of_what_comes_in(self):
        [stage] = row(4.0, 4.0, 4.0).plan(1).stages
        assert stage.forward == 1.5 + 1.0 + 1.0
        assert stage.backward == 2.0 + 3.0 + 3.0
        assert stage.update == 0.75
        assert stage.objective == 4.0  # that of its end, once
        assert stage.seconds == 3.5 + 8.0 + 0.75 + 4.0
        assert (stage.parameters, stage.objective_parameters) == (30, 5)

    def test_a_cut_moves_away_from_where_a_head_is_dear(self):
        assert row(1.0, 1.0, 1.0, 1.0).plan(2).cuts == ("layer2",)
        assert row(1.0, 90.0, 1.0, 1.0).plan(2).cuts != ("layer2",)

    def test_only_what_crosses_a_cut_is_handed_on(self):
        assert [stage.bytes_out for stage in row(1.0, 1.0, 1.0).plan(2).stages] == [100, 0]

    def test_ranks_that_host_several_stages(self):
        plan = row(20.0, 1.0, 1.0, 1.0).plan(4, num_ranks=2)
        assert plan.stages_per_rank == (1, 3)
        slow, fast = plan.rank_seconds
        assert plan.rank_seconds == (sum(plan.costs[:1]), sum(plan.costs[1:]))
        assert plan.wait_shares == (0.0, 1 - fast / slow)
        assert plan.samples_per_second == 8 / slow

    def test_given_cuts_are_found_by_the_module_that_holds_them(self):
        """A run cuts before ``block``; the place that was measured is its first layer."""
        costs = replace(row(1.0, 1.0, 1.0), cuts=("block.0", "block.1"))
        plan = costs.at(["block"], [2])
        assert plan.cuts == ("block.0",)
        assert plan.stages_per_rank == (2,)
        assert costs.at(plan.cuts).costs == plan.costs
        with pytest.raises(InputError, match=r"Got 'blocks'.*They are: block\.0, block\.1"):
            costs.at(["blocks"])

    @pytest.mark.parametrize(("stages", "ranks"), [(4, 1), (2, 3), (0, 0), (2, 0)])
    def test_impossible_plans_are_refused(self, stages, ranks):
        with pytest.raises(InputError, match=f"Got {stages} stages and {ranks} ranks"):
            row(1.0, 1.0, 1.0).plan(stages, ranks)

    def test_a_rank_of_half_the_speed_gets_half_as_much(self):
        """Units of 1 second and ends that cost nothing: 6 of them are shared out 4 and 2."""
        ones = {"forward": 1.0, "backward": 0.0, "forward_first": 1.0, "backward_first": 0.0}
        costs = row(*[0.0] * 6, **ones, update=0.0)
        assert costs.plan(2).costs == (3.0, 3.0)
        plan = costs.plan(2, speeds=(1.0, 0.5))
        assert plan.costs == (4.0, 2.0)
        assert plan.rank_seconds == (4.0, 4.0)
        assert plan.wait_shares == (0.0, 0.0)
        assert costs.plan(2, speeds=(0.5, 1.0)).costs == (2.0, 4.0)
        assert str(plan).endswith("on 2 ranks of speeds 1 0.5")
        assert costs.at(["layer3"], speeds=(1.0, 0.5)).rank_seconds == (3.0, 6.0)

    @pytest.mark.parametrize("speeds", [(1.0,), (1.0, 0.0), (1.0, 1.0, 1.0), (1.0, float("nan"))])
    def test_wrong_speeds_are_refused(self, speeds):
        with pytest.raises(
            InputError, match="must be numbers above 0, one for each rank, of which there are 2"
        ):
            row(1.0, 1.0).plan(2, speeds=speeds)

    def test_a_plan_survives_json_and_can_be_read(self):
        plan = row(20.0, 1.0, 1.0, 1.0).plan(4, num_ranks=2, speeds=(1.0, 0.5))
        assert Plan.from_json(plan.to_json()) == plan
        lines = str(plan).splitlines()
        assert len(lines) == 1 + 4 + 1
        assert len({len(line) for line in lines[:-1]}) == 1
        assert "layer0" in lines[1]
        assert lines[-1].endswith("on 2 ranks of speeds 1 0.5")


@dataclass(frozen=True)
class SlowAt(Method):
    """A head that takes a nap where features have this width."""

    name: ClassVar[str] = "slow-at"
    width: int = 7

    def objective(self, site):
        classifier = site.readout or site.head(lambda shape: nn.Linear(shape[0], 3))
        naps = 0.05 if site.feature_shape == (self.width,) else 0.0
        return Napping(classifier, naps)


class Napping(Objective):
    def __init__(self, classifier, seconds):
        super().__init__()
        self.inner, self.seconds = CrossEntropy(classifier), seconds

    def forward(self, features, target, carry):
        time.sleep(self.seconds)
        return self.inner(features, target, carry)


def test_heads_count():
    """Operations are counted in layers only: they cut in the middle, before the slow head."""
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 3)
    )
    [batch] = rows((8,))
    plan = scpl.plan(model, SlowAt(), sgd, num_stages=2, batch=batch)
    assert plan.cuts in (("1",), ("2",))
    other = scpl.plan(model, SlowAt(8), sgd, num_stages=2, batch=batch)
    assert other.cuts == ("3",)
    parts = scpl.split(model, plan.cuts, costs=plan.costs, example=batch[0])
    assert parts.costs == plan.costs


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].layout == "stages"])
def test_every_method_can_be_measured_and_nothing_is_left(method):
    model = cnn(inplace=True)
    model.conv1.weight.requires_grad_(False)
    model.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    [batch] = images((6,))
    costs = measured(
        model, METHODS[method](), batch, clip_norm=1.0, precision=Precision(torch.bfloat16)
    )
    assert_same_state(model.state_dict(), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    assert costs.cuts == ("conv2", "conv3", "hidden")
    assert [unit.parameters for unit in costs.units] == [80, 234, 440, 330]
    for unit in costs.units:
        assert unit.forward > 0
        assert unit.backward > 0
        assert unit.update >= 0
        assert unit.objective > 0


def test_a_network_along_its_graph():
    """A skip crosses one place, a layer is used twice at another: no stage can begin there."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice, self.inner, self.last = (nn.Linear(6, 6) for _ in range(4))
            self.classifier = nn.Linear(6, 3)

        def forward(self, x):
            x = self.twice(torch.relu(self.twice(self.first(x))))
            x = x + self.last(torch.relu(self.inner(x)))
            return self.classifier(x)

    batch = torch.randn(4, 6), torch.arange(4) % 3
    costs = measured(Skips(), scpl.SCPL(), batch)
    assert costs.cuts == ("twice", "inner")
    plan = costs.plan(2)
    assert scpl.split(Skips(), plan.cuts, example=batch[0]).num_stages == 2


def test_an_error_of_the_network_is_told_as_everywhere():
    [batch] = images((6,))
    with pytest.raises(PartitionError, match="must accept the example"):
        measured(mlp(4), scpl.SCPL(), batch)


@pytest.fixture
def two_ranks(monkeypatch):
    """Two ranks in one process, each for a thread of its own."""
    monkeypatch.setattr(ranks_module.dist, "new_group", lambda **_: object())
    store = HashStore()
    ranks = [
        ManyRanks(Mesh(rank, 2), CPU, 2, lambda: PrefixStore("test", store), 60.0)
        for rank in range(2)
    ]
    yield ranks
    for one in ranks:
        one._watchdog.close()


def on_both(two_ranks, work):
    """What `work` returns on each rank."""
    with ThreadPoolExecutor(2) as threads:
        return [done.result(20) for done in [threads.submit(work, rank) for rank in two_ranks]]


def test_all_ranks_get_the_plan_of_the_first(two_ranks):
    """Each would measure something else: only one may, and the others need no batch for it."""

    def work(rank):
        batch = rows((8,))[0] if rank.mesh.is_first else None
        return scpl.plan(mlp(5), scpl.SCPL(), adam, num_stages=3, batch=batch, ranks=rank)

    first, last = on_both(two_ranks, work)
    assert last == first
    assert first.num_ranks == 2


@pytest.mark.parametrize(("seconds", "speeds"), [((2.0, 4.0), (1.0, 0.5)), ((2.0, 2.2), ())])
def test_ranks_time_the_same_piece(two_ranks, seconds, speeds):
    """A difference that a processor has from itself is none."""
    work = lambda rank: relative_speeds(rank, lambda device: seconds[rank.mesh.rank])  # noqa: E731
    assert on_both(two_ranks, work) == [speeds, speeds]


def test_the_piece_takes_time():
    assert seconds_of_a_piece(CPU) > 0
