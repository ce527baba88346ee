import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

import scpl
from networks import assert_same_state, seeded_layers
from scpl.engine.stage import Stage, StageOptions, copy_to_cpu
from scpl.errors import CheckpointError, InputError, NonFiniteError, StageError
from scpl.heads import Linear
from scpl.methods.base import CrossEntropy, Objective, Sum
from scpl.methods.scpl import Contrastive
from scpl.partition.layers import ChainBody
from scpl.partition.values import is_channels_last

FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2])
CPU = torch.device("cpu")


def adam(parameters):
    return Adam(parameters, lr=1e-2)


def make(objective=None, *, body=None, names=("conv", "act"), optimizer=adam, **options):
    if body is None:
        body = seeded_layers(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    if objective is None:
        objective = Contrastive(seeded_layers(Linear(3)((5,))))
    if isinstance(body, nn.Sequential):
        body = ChainBody(list(zip(names, body, strict=True)))
    return Stage(
        2, body, names, objective, StageOptions(optimizer, **options), keys={}, seed=3, device=CPU
    )


def learn(stage, steps=1, features=FEATURES):
    for step in range(1, steps + 1):
        stage.forward(features)
        losses = stage.learn(TARGET, None, step).terms
    return losses


class Broken(Objective):
    """A loss that is not finite from the second step on."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, features, target, carry):
        self.calls += 1
        return {"broken": features.sum() * (self.value if self.calls > 1 else 1.0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_parameters_and_names_stage_and_step(value):
    stage = make(Broken(value))
    learn(stage)
    parameters = [p.clone() for p in stage.parameters]
    optimizer = copy_to_cpu(stage.optimizer.state_dict())
    stage.forward(FEATURES)
    with pytest.raises(NonFiniteError, match=r"Stage 2 got (nan|inf|-inf) at step 417"):
        stage.learn(TARGET, None, 417)
    assert all(torch.equal(a, b) for a, b in zip(parameters, stage.parameters, strict=True))
    assert_same_state(stage.optimizer.state_dict(), optimizer)
    assert all(p.grad is None for p in stage.parameters)


def test_features_that_are_not_finite_are_named_as_the_cause():
    stage = make()
    stage.forward(torch.full((6, 4), float("nan")))
    with pytest.raises(NonFiniteError, match="its features already were not finite"):
        stage.learn(TARGET, None, 1)


@pytest.mark.parametrize("how", ["relu", "add", "view"])
def test_an_objective_that_works_in_place_is_refused(how):
    class InPlace(Objective):
        def forward(self, features, target, carry):
            if how == "relu":
                nn.functional.relu_(features)
            elif how == "add":
                features.add_(1.0)
            else:
                features.view(-1)[0] = 0.0
            return {"x": features.sum()}

    stage = make(InPlace())
    stage.forward(FEATURES)
    with pytest.raises(StageError, match=r"The objective of stage 2 did\. Give .*inplace=False"):
        stage.learn(TARGET, None, 1)


def test_the_output_does_not_carry_gradients_and_shares_no_later_change():
    stage = make()
    output = stage.forward(FEATURES)
    assert not output.requires_grad
    kept = output.clone()
    stage.learn(TARGET, None, 1)
    assert torch.equal(output, kept)


def test_the_output_is_contiguous_when_it_is_sent():
    """Strides choose kernels, and a message between processes has none of its own."""

    class Transposed(nn.Module):
        def forward(self, features):
            return {"x": features.t()[:3].t()}

    class FromDict(Objective):
        def forward(self, features, target, carry):
            return {"x": features["x"].square().sum()}

    stage = make(FromDict(), body=nn.Sequential(nn.Linear(4, 5), Transposed()))
    assert stage.forward(FEATURES)["x"].is_contiguous()
    assert stage.infer(FEATURES)["x"].is_contiguous()


def test_what_an_objective_draws_comes_from_the_stage():
    class Drops(Objective):
        def forward(self, features, target, carry):
            return {"x": (features * torch.rand(5)).sum()}

    one, other, losses = make(Drops()), make(Drops()), []
    before = torch.get_rng_state()
    for stage in (one, other):
        losses.append([float(learn(stage)["x"]), float(learn(stage)["x"])])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert losses[0] == losses[1]


def test_evaluation_needs_no_gradient_and_restores_training():
    stage = make(CrossEntropy(seeded_layers(nn.Linear(5, 3))))
    learn(stage)
    running = stage.body.layers[1].running_mean.clone()
    output = stage.infer(FEATURES)
    logits = stage.predict(output)
    assert not output.requires_grad
    assert logits.shape == (6, 3)
    assert torch.equal(stage.body.layers[1].running_mean, running)
    learn(stage)
    assert stage.body.layers[1].training
    assert not torch.equal(stage.body.layers[1].running_mean, running)


def test_a_contrastive_stage_cannot_predict():
    stage = make()
    assert stage.predict(stage.infer(FEATURES)) is None


def test_what_is_handed_on_is_detached_plain_and_drawn_from_the_stages_own_generator():
    class HandsOn(Objective):
        def __init__(self, onward):
            super().__init__()
            self.weight, self.onward = nn.Parameter(torch.ones(2, 3)), onward

        def forward(self, features, target, carry):
            return {"x": features.sum()}

        def hand_on(self, target, carry):
            return self.onward(self.weight)

    stage = make(HandsOn(lambda w: (w, w.t() + torch.rand(2, 3).t())))
    before = torch.get_rng_state()
    found = stage.hand_on(TARGET, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not found[0].requires_grad
    assert found[1].is_contiguous()
    with pytest.raises(InputError, match="What crosses a cut"):
        make(HandsOn(lambda w: {1: w})).hand_on(TARGET, None)


def test_a_sum_hands_on_what_a_part_hands_on_and_keeps_every_term():
    class Passes(Objective):
        def forward(self, features, target, carry):
            return {"passes": features.sum()}

        def hand_on(self, target, carry):
            return target + 1

    both = Sum(Passes(), CrossEntropy(nn.Linear(5, 3)))
    assert torch.equal(both.hand_on(TARGET, None), TARGET + 1)
    assert list(both(torch.ones(6, 5), TARGET, None)) == ["passes", "cross_entropy"]
    with pytest.raises(InputError, match=r"different names. Got 'passes' twice"):
        Sum(Passes(), Passes())(torch.ones(6, 5), TARGET, None)


def test_an_error_is_explained_with_layers_step_and_shapes():
    error = make().explain(RuntimeError("boom"), (FEATURES, TARGET), 9)
    assert type(error) is StageError
    assert "Stage 2 (conv, act) failed at step 9" in str(error)
    assert "(6, 4) float32, (6,) int64; RuntimeError: boom" in str(error)


def test_clipping_limits_the_norm_of_all_gradients_together():
    norms = []

    class Watching(SGD):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(nn.utils.get_total_norm(gradients).item())

    learn(make(optimizer=lambda p: Watching(p, lr=0.1)))
    learn(make(optimizer=lambda p: Watching(p, lr=0.1), clip_norm=norms[0] / 4))
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-4)


# Saved state


SCHEDULES = {
    "none": None,
    "cosine": lambda opt: CosineAnnealingLR(opt, 20),
    "steps": lambda opt: MultiStepLR(opt, [3, 5]),
    "one cycle": lambda opt: OneCycleLR(opt, 0.1, total_steps=20),
    "warm-up": lambda opt: SequentialLR(
        opt, [LinearLR(opt, 0.1, total_iters=4), CosineAnnealingLR(opt, 16)], [4]
    ),
}
OPTIMIZERS = {
    "adam": adam,
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "numpy-lr": lambda p: Adam(p, lr=np.float64(1e-2)),
    "groups": lambda p: Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=1e-2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loaded_stage_continues_as_the_saved_one(schedule, optimizer, tmp_path):
    if (optimizer, schedule) == ("groups", "one cycle"):
        pytest.skip("OneCycleLR overwrites the groups' rates")

    def new():
        body = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3))
        return make(
            body=seeded_layers(body),
            optimizer=OPTIMIZERS[optimizer],
            scheduler=SCHEDULES[schedule],
        )

    whole, first, second = new(), new(), new()
    learn(whole, 9)
    learn(first, 4)
    torch.save(first.snapshot(4), tmp_path / "stage.pt")
    second.load_state_dict(torch.load(tmp_path / "stage.pt", weights_only=True))
    losses = learn(second, 5)
    assert losses.keys() == {"contrastive"}
    assert_same_state(second.snapshot(9), whole.snapshot(9))


def test_a_loaded_stage_continues_although_its_weights_lie_otherwise_in_memory():
    # Fused Adam on a CPU takes the n-th number of its averages for the n-th of the weights.
    def new(layout):
        body = seeded_layers(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()))
        return make(
            body=body.to(memory_format=layout),
            objective=Contrastive(Linear(3)((12,))),
            optimizer=OPTIMIZERS["adamw-fused"],
            names=("conv", "flat"),
        )

    def go_on(stage):
        for step in range(3):
            stage.forward(torch.linspace(-1, 1, 192).reshape(6, 2, 4, 4).sin())
            stage.learn(TARGET, None, step)

    first, second = new(torch.contiguous_format), new(torch.channels_last)
    go_on(first)
    second.load_state_dict(first.snapshot(3))
    go_on(first)
    go_on(second)
    for one, other in zip(first.body.parameters(), second.body.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_snapshot_does_not_change_while_training_goes_on():
    stage = make()
    learn(stage)
    snapshot = stage.snapshot(1)
    kept = copy.deepcopy(snapshot)
    learn(stage, 3)
    assert_same_state(snapshot, kept)


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"body": nn.Sequential(nn.Linear(4, 5), nn.ReLU())}, "act.running_mean is unknown here"),
        ({"body": nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7)),
          "objective": Contrastive(Linear(3)((7,)))}, r"conv.weight is \(5, 4\) there and \(7"),
        ({"names": ("stem", "act")}, "stem.weight is missing"),
        ({"objective": CrossEntropy(nn.Linear(5, 3))}, "objective.classifier.weight is missing"),
        ({"objective": Contrastive(Linear(9)((5,)))}, "objective.head.1.weight is"),
        ({"optimizer": lambda p: SGD(p, lr=1.0)}, "another kind"),
        ({"optimizer": lambda p: Adam([{"params": p[:1]}, {"params": p[1:]}])}, "optimizer trains"),
    ],
)  # fmt: skip
def test_the_state_of_another_network_is_refused_and_changes_nothing(other, fault):
    saved = make()
    learn(saved)
    state = saved.snapshot(1)
    stage = make(**other)
    before = copy_to_cpu(stage.state_dict())
    with pytest.raises(CheckpointError, match=fault) as caught:
        stage.load_state_dict(state)
    assert "stage 2" in str(caught.value)
    assert_same_state(copy_to_cpu(stage.state_dict()), before)


def test_a_stage_frozen_since_the_checkpoint_is_refused_and_changes_nothing():
    saved = make()
    learn(saved)
    stage = make(body=seeded_layers(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), 99))
    for p in stage.parameters[:2]:
        p.requires_grad_(False)
    frozen = Stage(
        2,
        stage.body,
        ("conv", "act"),
        stage.objective,
        StageOptions(adam),
        keys={},
        seed=1,
        device=CPU,
    )
    before = copy_to_cpu(frozen.state_dict())
    with pytest.raises(CheckpointError, match=r"trains \[6\] tensors there and \[4\] here"):
        frozen.load_state_dict(saved.snapshot(1))
    assert_same_state(copy_to_cpu(frozen.state_dict()), before)


@pytest.mark.parametrize("place", ["parameter", "head", "buffer"])
def test_weights_that_are_not_finite_are_not_saved(place):
    stage = make()
    value = {
        "parameter": stage.body.layers[0].weight,
        "head": stage.objective.head[1].bias,
        "buffer": stage.body.layers[1].running_var,
    }[place]
    with torch.no_grad():
        value.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match="of stage 2 is not, after step 8"):
        stage.snapshot(8)


def test_a_mask_of_infinities_may_be_saved():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

        def forward(self, features):
            return features

    stage = make(body=nn.Sequential(nn.Linear(4, 5), Masked()))
    assert stage.snapshot(1)["body"]["act.mask"][0, 1] == float("-inf")


def test_a_parameter_used_twice_is_trained_once():
    body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    class Shares(Objective):
        def __init__(self):
            super().__init__()
            self.layer = body[0]

        def forward(self, features, target, carry):
            return {"x": features.square().sum()}

    stage = make(Shares(), body=body)
    assert len(stage.parameters) == 4
    learn(stage)


def test_maps_with_channels_last_are_handed_on_so_and_heads_lie_like_the_body():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 3),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    parts = scpl.split(model, ["2"], example=torch.randn(2, 2, 6, 6))
    pipeline = scpl.Pipeline(parts, scpl.SCPL(), lambda p: torch.optim.SGD(p, lr=0.1))
    first = pipeline.stages[0]
    kernels = [p for p in first.objective.parameters() if p.ndim == 4]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    handed = first.forward(torch.randn(3, 2, 6, 6))
    assert is_channels_last(handed)
    assert is_channels_last(first.infer(torch.randn(3, 2, 6, 6)))
