"""What an optimizer is told of the parameters of its stage, and what a frozen stage does."""

import copy

import pytest
import torch
from torch import nn

import scpl
from scpl.errors import CheckpointError, InputError
from scpl.methods import METHODS

LOCAL = [name for name in METHODS if METHODS[name].cuts_gradients]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.LayerNorm(12),
        nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 8, generator=generator), torch.randint(0, 3, (10,), generator=generator))
        for _ in range(count)
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def pipeline_of(model, method=None, optimizer=adam, **options):
    parts = scpl.split(model, before=["3", "6"], example=batches()[0][0])
    return scpl.Pipeline(parts, method or scpl.SCPL(), optimizer, **options)


class TestParameters:
    def test_they_know_their_stage_and_their_names(self):
        seen = []

        def optimizer(parameters):
            seen.append(parameters)
            return adam(parameters)

        model = network()
        pipeline_of(model, scpl.EarlyExit(), optimizer)
        assert [parameters.stage for parameters in seen] == [0, 1, 2]
        known = dict(model.named_parameters())
        named = [dict(zip(each.names, each, strict=True)) for each in seen]
        assert {n for each in named for n in each if not n.startswith("objective.")} == set(known)
        assert all(each[n] is known[n] for each in named for n in each if n in known)
        assert any(name.startswith("objective.") for name in named[0])
        assert "8.weight" in named[2]  # of the classifier, which the last objective trains

    def test_names_are_the_users_own_when_stages_are_joined(self):
        seen = []

        def optimizer(parameters):
            seen.extend(parameters.names)
            return adam(parameters)

        model = network()
        pipeline_of(model, scpl.Backpropagation(), optimizer)
        assert sorted(seen) == sorted(dict(model.named_parameters()))

    def test_groups_keep_decay_off_norms_and_biases(self):
        """Decay of weights alone: with a rate of 1 and no gradient they halve, others stay."""
        pipeline = pipeline_of(
            network(), optimizer=lambda p: torch.optim.SGD(p.groups(weight_decay=0.5), lr=1.0)
        )
        stage = pipeline.stages[1]
        before = {name: value.clone() for name, value in stage.body.named_parameters()}
        for parameter in stage.parameters:
            parameter.grad = torch.zeros_like(parameter)
        stage.update(None)
        for name, value in stage.body.named_parameters():
            factor = 0.5 if value.ndim > 1 else 1.0
            assert torch.equal(value, before[name] * factor), name

    def test_every_parameter_is_in_one_group(self):
        pipeline = pipeline_of(
            network(), optimizer=lambda p: torch.optim.SGD(p.groups(weight_decay=0.5), lr=1.0)
        )
        for stage in pipeline.stages:
            grouped = [p for group in stage.optimizer.param_groups for p in group["params"]]
            assert {id(p) for p in grouped} == {id(p) for p in stage.parameters}

    def test_heads_and_the_classifier_get_a_rate_of_their_own(self):
        model = network()
        pipeline = pipeline_of(
            model, optimizer=lambda p: torch.optim.SGD(p.groups(0.1, head_lr=0.5), lr=0.01)
        )
        for stage in pipeline.stages:
            body = {id(p) for p in stage.body.parameters()}
            rates = {
                id(p): group["lr"]
                for group in stage.optimizer.param_groups
                for p in group["params"]
            }
            assert rates == {id(p): 0.01 if id(p) in body else 0.5 for p in stage.parameters}
        last = pipeline.stages[-1].optimizer.param_groups
        assert any(p is model[8].weight for group in last[1:] for p in group["params"])

    def test_decay_is_for_everything_where_norms_are_not_exempt(self):
        pipeline = pipeline_of(
            network(),
            optimizer=lambda p: torch.optim.SGD(p.groups(0.1, exempt_norms=False), lr=0.01),
        )
        groups = [stage.optimizer.param_groups for stage in pipeline.stages]
        assert [[group["weight_decay"] for group in each] for each in groups] == [[0.1]] * 3

    def test_rates_and_schedules_differ_by_stage(self):
        rates = [0.1, 0.2, 0.3]

        def scheduler(optimizer):
            stage = optimizer.param_groups[0]["stage"]
            return torch.optim.lr_scheduler.ExponentialLR(optimizer, [1.0, 0.5, 0.25][stage])

        pipeline = pipeline_of(
            network(),
            optimizer=lambda p: torch.optim.SGD(p.groups(0.0), lr=rates[p.stage]),
            scheduler=scheduler,
        )
        pipeline.train(batches(1))
        found = [stage.optimizer.param_groups[0]["lr"] for stage in pipeline.stages]
        assert found == pytest.approx([0.1, 0.1, 0.075])

    def test_groups_must_be_those_of_the_checkpoint(self, tmp_path):
        grouped = pipeline_of(
            network(), optimizer=lambda p: torch.optim.Adam(p.groups(0.1)), checkpoints=tmp_path
        )
        grouped.train(batches())
        grouped.checkpoint()
        grouped.close()
        with pytest.raises(CheckpointError, match="the optimizer trains"):
            pipeline_of(network(), checkpoints=tmp_path).restore()


class TestFrozenStages:
    @pytest.mark.parametrize("name", LOCAL)
    def test_the_first_stage_may_be_frozen(self, name):
        model = network()
        model[:3].requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        pipeline = pipeline_of(model, METHODS[name]())
        losses = [report.losses for report in pipeline.steps(batches())]
        after = pipeline.export().state_dict()
        assert all(torch.equal(before[key], after[key]) for key in ("0.weight", "1.weight"))
        assert not torch.equal(before["3.weight"], after["3.weight"])
        # Only where stages pass codes on does its objective learn.
        assert bool(losses[-1][0]) == METHODS[name].links_objectives
        assert pipeline.evaluate(batches()).result().num_samples == 60

    def test_it_has_no_exit(self):
        model = network()
        model[3:6].requires_grad_(False)
        pipeline = pipeline_of(model, scpl.EarlyExit())
        assert not pipeline.has_exits
        pipeline.train(batches())
        scores = pipeline.evaluate(batches()).result()
        assert [accuracy is None for accuracy in scores.stage_accuracy] == [False, True, False]

    def test_the_last_one_trains_the_classifier(self):
        model = network()
        model[6:8].requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        pipeline_of(model, scpl.EarlyExit()).train(batches())
        after = model.state_dict()
        assert torch.equal(before["6.weight"], after["6.weight"])
        assert not torch.equal(before["8.weight"], after["8.weight"])

    def test_its_batch_norm_goes_on_counting(self):
        """As in plain torch: what is frozen are weights; statistics follow the data."""
        model = network()
        model[:3].requires_grad_(False)
        pipeline_of(model).train(batches())
        assert model[1].num_batches_tracked == 6

    def test_other_stages_learn_as_without_its_head(self):
        """Its head drew and learned from its own random state: the rest is bit for bit the same."""
        frozen, plain = network(), network()
        frozen[:3].requires_grad_(False)
        first = pipeline_of(frozen)
        second = pipeline_of(
            plain, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2 if p.stage else 0.0)
        )
        first.train(batches())
        second.train(batches())
        one, other = first.export().state_dict(), second.export().state_dict()
        assert all(torch.equal(value, other[key]) for key, value in one.items())

    def test_a_network_of_nothing_but_frozen_layers_is_refused(self):
        with pytest.raises(InputError, match="All of them are frozen"):
            pipeline_of(network().requires_grad_(False))
