"""Stages compiled by torch.compile."""

import copy
import inspect

import pytest
import torch
from torch import nn

import scpl
from scpl.methods import METHODS

# Inductor's own modules use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


class Skip(nn.Module):
    """Not a chain, so that it is traced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.classifier = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.first(inputs).relu()
        hidden = hidden + self.norm(self.second(hidden))
        return self.classifier(hidden + self.third(hidden).relu())


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )


NETWORKS = {"traced": (Skip, ["second"]), "chain": (chain, ["2"])}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (10, 10, 10, 4)
    ]


def trained(build, cuts, method, **options):
    parts = scpl.split(build(), before=cuts, example=batches()[0][0])
    pipeline = scpl.Pipeline(parts, method, lambda p: torch.optim.SGD(p, lr=0.1))
    if options:
        assert pipeline.parts.compiled(**options) is pipeline.parts
    for _ in range(2):
        pipeline.train(batches())
        scores = pipeline.evaluate(batches()).result()
    return pipeline, scores


@pytest.mark.parametrize("name", ["scpl", "bp"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_compiled_stages_learn_the_same_and_keep_their_keys(kind, name):
    build, cuts = NETWORKS[kind]
    plain, expected = trained(build, cuts, METHODS[name]())
    compiled, found = trained(build, cuts, METHODS[name](), backend="aot_eager")
    one, other = plain.export().state_dict(), compiled.export().state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy)


def test_every_stage_is_compiled_and_stays_so():
    """Six stages, two modes, three sizes of batches: more than torch recompiles of one function."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    parts = scpl.split(model, before=["2", "4", "6", "8", "10"], example=torch.randn(4, 8))
    pipeline = scpl.Pipeline(
        parts.compiled(backend=backend, dynamic=False),
        scpl.SCPL(),
        lambda p: torch.optim.SGD(p, lr=0.1),
    )
    for _ in range(2):
        pipeline.train(batches()[2:])
        pipeline.evaluate(batches()[2:]).result()
    # Where torch knows no isolation, stages of one form share what is compiled.
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    assert len(graphs) == (6 if isolates else 1) * 2 * 2


def test_copies_are_plain_again():
    parts = scpl.split(chain(), before=["2"], example=torch.randn(4, 8)).compiled()
    assert all(body._compiled_call_impl is not None for body in parts.bodies)
    assert all(body._compiled_call_impl is None for body in copy.deepcopy(parts).bodies)
