import pytest
import torch
from torch import nn

from networks import rows, seeded_layers
from scpl import SCPL, Pipeline, heads, split
from scpl.errors import PartitionError
from scpl.partition.layers import Summarizing, summary_of

ROWS = rows()[0][0]


class Pair(nn.Module):
    """Hands on two tensors; an objective sees their product, or whatever the test says."""

    def __init__(self, summary=torch.mul):
        super().__init__()
        self.linear, self.summary = nn.Linear(5, 4), summary

    def forward(self, features):
        return self.linear(features), features.sum(1, keepdim=True)

    def summarize(self, features):
        return self.summary(*features)


class Join(nn.Module):
    def forward(self, pair):
        return torch.cat(pair, dim=1)


def network(summary=torch.mul):
    return seeded_layers(nn.Sequential(Pair(summary), Join(), nn.Linear(5, 6), nn.Linear(6, 3)))


def test_the_last_layer_is_asked():
    pair = Pair()
    assert isinstance(pair, Summarizing)
    assert not isinstance(Join(), Summarizing)
    assert summary_of([("0", nn.Linear(5, 5)), ("1", pair)]) == pair.summarize
    inner = nn.Sequential(nn.ReLU(), pair)
    assert summary_of([("0", nn.ReLU()), ("1", inner)]) == pair.summarize
    assert summary_of([("0", pair), ("1", Join())]) is None
    assert summary_of([]) is None


def test_an_objective_sees_the_summary_and_the_next_stage_the_output():
    parts = split(network(), before=["1"], example=ROWS)
    assert parts.feature_shapes == ((4,), (6,))
    seen = []

    class Look(nn.Module):
        def forward(self, features):
            seen.append(features)
            return features

    pipeline = Pipeline(
        parts,
        SCPL(
            head=lambda shape: nn.Sequential(Look(), heads.Linear(2)(shape)),
            cross_entropy=0,  # else the head is tried once, to see how wide it is
        ),
        lambda p: torch.optim.SGD(p, lr=0.1),
    )
    hidden, total = parts.bodies[0](ROWS)
    for _ in pipeline.steps(rows()[:1]):
        pass
    assert torch.equal(seen[0], hidden * total)
    assert seen[1].shape == (8, 6)


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        (lambda hidden, total: (hidden, total), r"one tensor.*stage 0.*\(3, 4\) float32 and \(3"),
        (lambda hidden, total: hidden.sum(), r"one tensor.*Got \(\) float32 for 3 samples"),
        (lambda hidden, total: hidden[:2], r"row per sample.*\(2, 4\)"),
        (lambda hidden, total: hidden @ total, r"`summarize`.*it raised RuntimeError"),
    ],
)
def test_a_summary_that_is_none_is_refused(summary, told):
    with pytest.raises(PartitionError, match=told):
        split(network(summary), before=["1"], example=ROWS)


def test_a_readout_that_wants_the_output_itself_is_refused():
    with pytest.raises(PartitionError, match=r"`summarize`.*make the summary a layer"):
        split(network(), before=[], readout="1", example=ROWS)
