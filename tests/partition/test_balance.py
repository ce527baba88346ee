from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from networks import mlp
from scpl import SCPL, models, split
from scpl.engine.build import assign
from scpl.engine.mesh import Mesh
from scpl.errors import PartitionError
from scpl.partition.balance import (
    balanced_cuts,
    minmax_partition,
    share_out,
    stages_per_rank,
)


def largest(costs, starts):
    edges = [*starts, len(costs)]
    return max(sum(costs[a:b]) for a, b in pairwise(edges))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_the_largest_part_is_as_small_as_it_can_be(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    starts = minmax_partition(costs, parts)
    assert starts[0] == 0
    assert len(starts) == parts
    assert sorted(set(starts)) == starts
    best = min(
        largest(costs, [0, *inner]) for inner in combinations(range(1, len(costs)), parts - 1)
    )
    assert largest(costs, starts) == best


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.data())
def test_the_slowest_part_is_as_fast_as_it_can_be(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.lists(st.integers(1, 4), min_size=parts, max_size=parts))

    def slowest(starts):
        edges = pairwise([*starts, len(costs)])
        return max(sum(costs[a:b]) / speed for (a, b), speed in zip(edges, speeds, strict=True))

    ways = combinations(range(1, len(costs)), parts - 1)
    assert slowest(minmax_partition(costs, parts, speeds)) == min(slowest([0, *w]) for w in ways)


@pytest.mark.parametrize(("name", "num_stages"), [("resnet18", 8), ("vgg8", 6), ("resnet18", 1)])
def test_the_papers_networks_can_be_cut_fine(name, num_stages):
    model = models.build(name, num_classes=4, image_size=16)
    example = torch.zeros(1, 3, 16, 16)
    parts = split(model, num_stages=num_stages, readout=models.readout(name), example=example)
    assert parts.num_stages == num_stages
    assert all(any(True for _ in body.parameters()) for body in parts.bodies)
    assert list(parts.cuts) == balanced_cuts(model, num_stages, models.readout(name), example)


@pytest.mark.parametrize(
    ("name", "num_stages", "cuts"),
    [
        ("vgg8", 2, ["block2.3"]),
        ("vgg8", 4, ["block2.0", "block2.3", "block3.0"]),
        ("resnet18", 4, ["layer2", "layer3", "layer4"]),
        ("resnet34", 4, ["layer2.1", "layer3.1", "layer3.5"]),
    ],
)
def test_blocks_are_opened_only_where_that_makes_the_line_faster(name, num_stages, cuts):
    """Half of VGG8's operations lie in its second block; ResNet-18's four layers cost the same."""
    model = models.build(name, num_classes=10)
    readout, example = models.readout(name), torch.zeros(1, 3, 32, 32)
    found = balanced_cuts(model, num_stages, readout, example)
    assert found == cuts
    parts = split(model, num_stages=num_stages, readout=readout, example=example)
    assert list(parts.cuts) == cuts
    assert max(parts.costs) < 1.4 * sum(parts.costs) / num_stages


def test_the_dearest_layer_stands_alone():
    widths = [4, 4, 256, 256, 4, 3]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    assert balanced_cuts(model, 3, None, torch.zeros(1, 4)) == ["2", "3"]


def test_what_does_not_compute_stays_with_the_layer_before():
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 4),
        nn.Linear(4, 3),
    )
    parts = split(model, num_stages=2, example=torch.zeros(2, 4))
    assert parts.names == (("0", "1", "2", "3"), ("4",))


def test_a_network_that_is_one_inner_row_can_be_cut():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(4)

        def forward(self, rows):
            return self.net(rows)

    parts = split(Wrapped(), num_stages=3, example=torch.zeros(2, 5))
    assert parts.cuts == ("net.linear1", "net.linear2")
    assert parts.readout_names == ("net.classifier",)


def test_too_many_stages_are_refused_with_the_number_possible():
    with pytest.raises(PartitionError, match=r"Got 3: linear0, linear1, linear2.*at most 3 stages"):
        balanced_cuts(mlp(4), 4, None, torch.zeros(1, 5))


def test_the_same_cuts_every_time_whatever_the_mode():
    model = models.build("vgg8", num_classes=4, image_size=16)
    example = torch.zeros(2, 3, 16, 16)
    found = {tuple(balanced_cuts(model.train(m), 4, None, example)) for m in (True, False, True)}
    assert len(found) == 1


def test_transformer_layers_are_counted():
    """In evaluation mode torch fuses such a layer, and its operations used to count as none."""
    block = lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)  # noqa: E731
    model = nn.Sequential(*(block() for _ in range(6)), nn.Flatten(), nn.Linear(16 * 5, 3))
    cuts = balanced_cuts(model, 3, None, torch.randn(2, 5, 16))
    assert cuts == ["2", "4"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_ranks_get_stages_of_about_equal_cost():
    assert stages_per_rank([3, 5, 2, 0], 2) == (1, 3)
    assert stages_per_rank([1, 1, 1, 1], 2, (1, 3)) == (1, 3)
    assert stages_per_rank([0, 0, 0], 2) == (1, 2)  # nothing is known: each rank gets a stage
    model = models.build("vgg8", num_classes=4, image_size=16, width=0.125)
    example = torch.zeros(1, 3, 16, 16)
    parts = split(model, models.paper_cuts("vgg8"), readout="classifier", example=example)
    assert parts.costs[1] > parts.costs[0] > parts.costs[2] > parts.costs[3] > 0
    assert parts.merged().costs == (sum(parts.costs),)
    hosted, owners = assign(SCPL(), Mesh(1, 2), parts)
    assert (list(hosted), owners) == ([1, 2, 3], [0, 1, 1, 1])
    hosted, _ = assign(SCPL(), Mesh(1, 2, (3, 1)), parts)  # who chooses gets what they choose
    assert list(hosted) == [3]


def spans(size, num_parts):
    """All ways to cut ``range(size)`` into contiguous parts."""
    for inner in combinations(range(1, size), num_parts - 1):
        yield list(pairwise([0, *inner, size]))


@given(st.integers(1, 6), st.data())
def test_the_slowest_rank_is_as_fast_as_it_can_be(size, data):
    """Against all ways; costs are no sums, because a stage's end has a cost of its own."""
    num_stages = data.draw(st.integers(1, size))
    num_ranks = data.draw(st.integers(2, num_stages)) if num_stages > 1 else 1
    costs = torch.full((size + 1, size + 1), torch.inf, dtype=torch.float64)
    for begin in range(size):
        for end in range(begin + 1, size + 1):
            costs[begin, end] = data.draw(st.integers(0, 50))
    speeds = [data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(num_ranks)]
    if num_ranks == 1:
        speeds = []
    shares = share_out(costs, num_stages, num_ranks, speeds)
    found = [stage for stages in shares for stage in stages]
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == size
    assert len(found) == num_stages
    assert len(shares) == num_ranks
    speeds = speeds or [1.0]

    def seconds(shares):
        return max(
            sum(costs[stage].item() for stage in stages) / speed
            for stages, speed in zip(shares, speeds, strict=True)
        )

    slowest = seconds(shares)
    best = min(
        seconds([stages[a:b] for a, b in ranks])
        for stages in spans(size, num_stages)
        for ranks in spans(num_stages, num_ranks)
    )
    assert best <= slowest <= 1.02 * best


def test_equal_shares_are_told_apart_by_their_largest_stage():
    """Each rank has 8 either way; stages of 4 and 4 need less memory than those of 3 and 5."""
    units = [3, 1, 4, 4, 4]
    costs = torch.full((6, 6), torch.inf, dtype=torch.float64)
    for begin, end in combinations(range(6), 2):
        costs[begin, end] = sum(units[begin:end])
    assert share_out(costs, 4, 2) == [[(0, 2), (2, 3)], [(3, 4), (4, 5)]]


def test_one_rank_gets_stages_as_equal_as_four_would():
    """The least sum would put all cuts where heads are cheap, and leave one stage almost alone."""
    costs = torch.full((7, 7), torch.inf, dtype=torch.float64)
    for begin, end in combinations(range(7), 2):
        costs[begin, end] = 10 * (end - begin) + (1 if end > 3 else 3)
    assert share_out(costs, 3, 1) == [[(0, 2), (2, 4), (4, 6)]]


def test_measured_costs_decide_who_hosts_what():
    parts = split(mlp(5), num_stages=4, example=torch.zeros(2, 5))
    assert assign(SCPL(), Mesh(0, 2), parts)[1] == [0, 0, 1, 1]
    measured = split(mlp(5), parts.cuts, costs=[9, 1, 1, 1], example=torch.zeros(2, 5))
    assert measured.costs == (9, 1, 1, 1)
    assert assign(SCPL(), Mesh(0, 2), measured)[1] == [0, 1, 1, 1]


@pytest.mark.parametrize("costs", [[1], [1, 2, 3, -1], [1, 2, 3, float("nan")]])
def test_wrong_costs_are_refused(costs):
    with pytest.raises(PartitionError, match="one finite number for each of the 4 stages"):
        split(mlp(5), num_stages=4, costs=costs, example=torch.zeros(2, 5))
