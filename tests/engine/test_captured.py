"""Recorded steps against plain ones, on a lane of the CPU that records by running."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import ClassVar

import numpy
import pytest
import torch
from torch import nn

import scpl
from scpl.app.build import graphs_of
from scpl.app.config import TrainConfig
from scpl.engine import build
from scpl.engine.messages import LocalLoss
from scpl.engine.stage import Stage
from scpl.engine.trainers import captured
from scpl.engine.trainers.captured import KEPT_SHAPES, WARM_UP, CapturedTrainer, CudaLane
from scpl.errors import InputError, NonFiniteError, StageError
from scpl.partition.values import tensors_of

CLASSES = 3


class CpuLane:
    """Records work by doing it and taking its effects back; replays it into the same tensors."""

    told: ClassVar[list[tuple[str, int]]] = []
    """What was put on lanes, in order: "waits" (for the stage before) and "replays", by stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.recordings = stage, 0

    def use(self):
        return nullcontext()

    def after(self, other):
        if other.stage.index == self.stage.index - 1:
            self.told.append(("waits", self.stage.index))

    def record(self, work):
        self.recordings += 1
        return CpuRecording(work, self.stage)


class CpuRecording:
    def __init__(self, work, stage: Stage) -> None:
        self._work, self._stage = work, stage
        kept = [*stage.body.state_dict().values(), *stage.objective.state_dict().values()]
        moments = stage.optimizer.state.values() if stage.optimizer else ()
        kept += [value for state in moments for value in state.values() if value is not None]
        before, random = [value.clone() for value in kept], torch.get_rng_state()
        self.results = work()
        # A real recording does nothing; work on the device draws from a generator of its own.
        with torch.no_grad():
            for now, was in zip(kept, before, strict=True):
                if not torch.equal(now, was):
                    now.data.copy_(was)  # backward looks at version counters
        torch.set_rng_state(random)

    def replay(self) -> None:
        CpuLane.told.append(("replays", self._stage.index))
        parameters = self._stage.parameters
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            again = _tensors(self._work())
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for mine, new in zip(_tensors(self.results), again, strict=True):
                mine.copy_(new)


def _tensors(results):
    head, *rest = results
    # The first result of learning names the losses; the numbers come beside it.
    return tensors_of([None if isinstance(head, LocalLoss) else head, *rest])


@pytest.fixture
def recorded(monkeypatch):
    """Let pipelines record on the CPU."""
    made = []

    def trainer_of(stages, outbox, timeline, *, lane, new_lane, may_fail):
        following = iter(stages)
        trainer = CapturedTrainer(
            stages, outbox, timeline,
            lane=lambda: CpuLane(stages[0]),
            new_lane=lambda: CpuLane(next(following)),
            may_fail=may_fail,
        )  # fmt: skip
        made.append(trainer)
        return trainer

    monkeypatch.setattr(captured, "CapturedTrainer", trainer_of)
    monkeypatch.setattr(build, "_no_graphs", lambda method, ranks: None)
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(6 * 36, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def batches(count: int, *, rows: int = 8, ragged: bool = True):
    draws = torch.Generator().manual_seed(1)
    sizes = [3 if ragged and index % 4 == 3 else rows for index in range(count)]
    return [
        (
            torch.randn(size, 1, 6, 6, generator=draws),
            torch.randint(0, CLASSES, (size,), generator=draws),
        )
        for size in sizes
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2**-8, fused=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def pipeline(method=None, optimizer=adam, *, graphs: bool, model=None, **options) -> scpl.Pipeline:
    model = model or network()
    example = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    parts = scpl.split(model, num_stages=3, example=example)
    return scpl.Pipeline(
        parts, method or scpl.SCPL(), optimizer, cuda_graphs=graphs, clip_norm=1.0, **options
    )


def trained(steps: int = 14, **options):
    with pipeline(**options) as made:
        reports = []
        made.train(batches(steps), reports.append)
        scores = made.evaluate(batches(2))
        return [r.read() for r in reports], made.export().state_dict(), scores.result()


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[2] == other[2]
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize(
    "method",
    [scpl.SCPL(), scpl.EarlyExit(), scpl.PredSim(), scpl.AssociatedLearning(), scpl.DGL(),
     scpl.SCPL(cross_entropy=0, classifier_gradient=False), scpl.Backpropagation()],
    ids=lambda method: method.name,
)  # fmt: skip
def test_recorded_steps_give_the_bits_of_plain_ones(recorded, method, optimizer):
    plain = trained(method=method, optimizer=optimizer, graphs=False)
    assert not recorded
    assert_same(trained(method=method, optimizer=optimizer, graphs=True), plain)
    (trainer,) = recorded
    assert all(lane.recordings == 2 for lane in trainer._lanes)  # forward and learn, once


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_learning_rates_that_change_are_followed(recorded, optimizer):
    options = {"optimizer": optimizer, "scheduler": halving}
    assert_same(trained(graphs=True, **options), trained(graphs=False, **options))
    assert all(lane.recordings == 2 for lane in recorded[0]._lanes)
    assert not any(group["capturable"] for stage in recorded[0].stages if optimizer is adam
                   for group in stage.optimizer.param_groups)  # fmt: skip


def test_an_option_that_a_schedule_changes_takes_the_optimizer_out_of_the_recording(recorded):
    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 2**-8, total_steps=20)

    graphed, plain = (trained(graphs=graphs, scheduler=cycle) for graphs in (True, False))
    for (terms, _), (expected, _) in zip(graphed[0], plain[0], strict=True):
        for one, other in zip(terms, expected, strict=True):
            # One step read its rate in float32.
            assert one == pytest.approx(other, rel=0.01, abs=1e-3)
    assert all(lane.recordings == 4 for lane in recorded[0]._lanes)


def test_a_checkpoint_in_the_middle(recorded, tmp_path):
    def run(graphs, folder):
        with pipeline(graphs=graphs, checkpoints=folder) as made:
            made.train(batches(9, ragged=False))
            made.checkpoint()
            made.train(batches(9, ragged=False))
            made.restore(9)
            made.train(batches(9, ragged=False))
            return made.export().state_dict()

    plain, graphed = run(False, tmp_path / "a"), run(True, tmp_path / "b")
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)
    assert all(lane.recordings == 4 for lane in recorded[0]._lanes)


@pytest.mark.parametrize("change", ["freeze", "replace"])
def test_weights_that_change_behind_the_recording_are_noticed(recorded, change):
    def run(graphs):
        with pipeline(graphs=graphs) as made:
            made.train(batches(8))
            for stage in made.stages:
                for weight in list(stage.body.parameters())[:1]:
                    if change == "freeze":
                        weight.requires_grad_(False)
                    else:
                        weight.data = torch.zeros_like(weight)
            made.train(batches(8))
            return made.export().state_dict()

    plain, graphed = run(False), run(True)
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)


def test_many_shapes_are_told(recorded):
    sizes = range(4, 4 + KEPT_SHAPES + 1)
    mixed = [batch for rows in sizes for batch in batches(WARM_UP + 2, rows=rows, ragged=False)]
    with pipeline(graphs=True) as made, pytest.warns(UserWarning, match="same shape"):
        made.train(mixed)
    assert all(lane.recordings == 2 * KEPT_SHAPES for lane in recorded[0]._lanes)


def test_a_loss_that_is_not_finite_is_told(recorded):
    with pipeline(graphs=True) as made:
        made.train(batches(6, ragged=False))
        inputs, target = batches(1)[0]
        with pytest.raises(NonFiniteError, match="batch of step 7"):
            made.train([(inputs * math.nan, target)])


@pytest.mark.parametrize("draws", [False, True])
def test_a_stage_computes_while_the_one_before_learns_unless_they_draw(recorded, draws):
    """Recorded work on CUDA reads where random numbers begin from one place of the device."""
    model = network()
    if draws:
        model[2] = nn.Dropout(0.5)
    with pipeline(graphs=True, model=model) as made:
        made.train(batches(WARM_UP + 1, ragged=False))
        CpuLane.told.clear()
        made.train(batches(1))
    forward_0, *rest = CpuLane.told
    assert forward_0 == ("replays", 0)
    learn_0 = rest.index(("replays", 0))
    assert (rest.index(("waits", 1)) < learn_0) is not draws


class DrawsOnCpu(nn.Module):
    def forward(self, features):
        return features + torch.rand(features.shape)


def test_numbers_drawn_on_the_cpu_would_be_frozen_and_are_refused(recorded):
    model = network()
    model[2] = DrawsOnCpu()
    made = pipeline(graphs=True, model=model)
    # The lane of this test draws on the CPU like all work there; it hides that by design.
    for stage, lane in zip(made.stages, recorded[0]._lanes, strict=True):
        lane.record = lambda work, stage=stage: _careless(work, stage)
    with pytest.raises(InputError, match="Stage 0 draws on the CPU"):
        made.train(batches(6, ragged=False))


def _careless(work, stage):
    recording = CpuRecording(work, stage)
    work()
    return recording


def test_work_that_cannot_be_recorded_is_told(recorded):
    made = pipeline(graphs=True)

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded[0]._lanes[1].record = refuse
    with pytest.raises(InputError, match="Stage 1 cannot be recorded: operation not permitted"):
        made.train(batches(6, ragged=False))


def test_where_recording_may_fail_steps_run_as_they_are(recorded):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, made = (pipeline(graphs=graphs) for graphs in (False, "auto"))
    recorded[0]._lanes[1].record = refuse
    plain.train(batches(9))
    with pytest.warns(UserWarning, match="Stage 1 cannot be recorded"):
        made.train(batches(9))
    one, other = plain.export().state_dict(), made.export().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, "auto"), ({"cuda_graphs": "on"}, True), ({"cuda_graphs": "off"}, False),
     ({"processes": 2}, False), ({"data": "sst2", "model": "lstm"}, False),
     ({"model": "package.module:function"}, False)],
)  # fmt: skip
def test_what_the_command_line_records_by_itself(flags, expected):
    assert graphs_of(TrainConfig.of(**flags)) == expected


def test_elsewhere_auto_is_off():
    with pipeline(graphs="auto") as made:
        made.train(batches(5))


def test_graphs_need_a_device_that_has_them():
    with pytest.raises(InputError, match="need a CUDA device"):
        pipeline(graphs=True)


def test_a_recording_that_fails_leaves_no_gradients_behind(recorded):
    """The loss of stage 1 drew on the CPU: the next plain step added to what was recorded."""
    plain, made = (pipeline(graphs=graphs) for graphs in (False, "auto"))
    lane = recorded[0]._lanes[1]

    def careless_learning(work):
        recording = CpuRecording(work, made.stages[1])
        lane.recordings += 1
        if lane.recordings == 2:
            torch.rand(1)
        return recording

    lane.record = careless_learning
    plain.train(batches(9))
    with pytest.warns(UserWarning, match="Stage 1 draws on the CPU"):
        made.train(batches(9))
    one, other = plain.export().state_dict(), made.export().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("story", ["thawed", "restored"])
def test_what_an_optimizer_keeps_is_never_made_in_a_recording(recorded, story, tmp_path):
    """Replays would make Adam's averages anew: of a layer thawed later, or after a restart."""

    def run(graphs):
        with pipeline(graphs=graphs, checkpoints=tmp_path / str(graphs)) as made:
            late = list(made.stages[1].body.parameters())
            for weight in late:
                weight.requires_grad_(story != "thawed")
            made.checkpoint()
            made.train(batches(8, ragged=False))
            if story == "restored":
                made.restore(0)
            for weight in late:
                weight.requires_grad_(True)
            made.train(batches(8, ragged=False))
            return made.export().state_dict()

    plain, graphed = run(False), run(True)
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)
    assert all(lane.recordings == 4 for lane in recorded[0]._lanes)


def test_a_second_recording_may_fail_as_the_first_one_may(recorded):
    made = pipeline(graphs="auto")
    made.train(batches(8, ragged=False))

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded[0]._lanes[1].record = refuse
    next(made.stages[0].body.parameters()).requires_grad_(False)
    with pytest.warns(UserWarning, match="Stage 1 cannot be recorded"):
        made.train(batches(8, ragged=False))


def test_a_stage_that_learns_nothing_any_more_keeps_its_rate(recorded):
    def run(graphs):
        with pipeline(graphs=graphs, scheduler=halving) as made:
            made.train(batches(6, ragged=False))
            for weight in made.stages[1].parameters:
                weight.requires_grad_(False)
            made.train(batches(8, ragged=False))
            return [group["lr"] for stage in made.stages for group in stage.optimizer.param_groups]

    assert run(True) == run(False)


def test_an_error_between_recordings_names_its_stage(recorded):
    """For instance that of a schedule that has come to its end."""

    def short(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2**-8, total_steps=6, cycle_momentum=False
        )

    with (
        pytest.raises(StageError, match=r"Stage 0 .* failed at step 7.*number of total steps"),
        pipeline(graphs=True, scheduler=short) as made,
    ):
        made.train(batches(9, ragged=False))


def test_rates_on_the_device_are_float32_whatever_the_type_they_came_in(recorded):
    """Torch's fused Adam on CUDA reads no others; numpy's numbers would make float64."""

    def of_numpy(parameters):
        return torch.optim.Adam(parameters, lr=numpy.float64(2**-8), fused=True)

    with pipeline(graphs=True, optimizer=of_numpy) as made:
        made.train(batches(WARM_UP + 1, ragged=False))
    (step,) = recorded[0]._recorded.values()
    assert {rate.dtype for one in step.stages for rate in one._rates} == {torch.float32}


class Centred(nn.Module):
    """Keeps a running mean: in its place, or by putting another tensor there."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("centre", torch.zeros(4, 1, 1))

    def forward(self, features):
        mean = features.detach().mean((0, 2, 3))[:, None, None]
        if self.in_place:
            self.centre.lerp_(mean, 0.125)
        else:
            self.centre = self.centre.lerp(mean, 0.125)
        return features - self.centre


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_is_replaced_would_be_frozen_and_is_refused(recorded, in_place):
    def run(graphs):
        model = network()
        model[2] = Centred(in_place=in_place)
        made = pipeline(graphs=graphs, model=model)
        made.train(batches(9))
        return made.export().state_dict()

    plain = run(False)
    with nullcontext() if in_place else pytest.warns(UserWarning, match="replaces 'centre'"):
        graphed = run("auto")
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)
    if not in_place:
        with pytest.raises(InputError, match="Stage 0 replaces 'centre'"):
            run(True)


def test_a_buffer_put_elsewhere_is_noticed(recorded):
    def run(graphs):
        with pipeline(graphs=graphs) as made:
            made.train(batches(8))
            norm = made.stages[0].body.get_submodule("1")
            norm.running_mean = torch.ones_like(norm.running_mean)
            made.train(batches(8))
            return made.export().state_dict()

    plain, graphed = run(False), run(True)
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)


class PretendedCuda:
    """What a recording uses of CUDA: which stream is in use, and whether the generator records."""

    def __init__(self, monkeypatch, *, empty: bool = False) -> None:
        self.current, self.is_recording, self.empty = "default", False, empty
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, stream, **options):
        before, self.current, self.is_recording = self.current, stream, True
        yield  # where work fails, the end of a recording fails as well, and is not gone through
        if self.empty:
            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=2)
        self.current, self.is_recording = before, False


def test_after_a_recording_that_failed_other_work_goes_its_old_way(monkeypatch):
    """Everything later was put on the stream of the stage, and drawing failed with torch 2.11."""
    cuda = PretendedCuda(monkeypatch)

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    lane = CudaLane(SimpleNamespace(device="cpu"))
    with pytest.raises(RuntimeError, match="not permitted"):
        lane.record(waits)
    assert cuda.current == "default"
    assert not cuda.is_recording


def test_a_stage_without_kernels_is_nothing_to_warn_of(monkeypatch):
    """A frozen stage has no loss, and a layer that only reshapes computes nothing."""
    PretendedCuda(monkeypatch, empty=True)
    assert CudaLane(SimpleNamespace(device="cpu")).record(lambda: 3).results == 3


def test_ranks_that_torchrun_started_are_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert graphs_of(TrainConfig.of()) is False


class ComesLater(nn.Module):
    """A layer takes part from some step on, which Python counts."""

    def __init__(self):
        super().__init__()
        self.later, self.calls = nn.Linear(12, 12), 0

    def forward(self, features):
        if not self.training:
            return features
        self.calls += 1
        return self.later(features) if self.calls > WARM_UP else features


def test_what_learns_for_the_first_time_as_it_is_recorded_is_refused(recorded):
    """Its averages would be zero again in every replay."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Flatten(), nn.Linear(36, 12)), ComesLater(), nn.Linear(12, CLASSES)]
    example = torch.randn(4, 1, 6, 6)
    stages[1].calls = -100
    parts = scpl.split(stages, num_stages=2, example=example)
    stages[1].calls = 0
    made = scpl.Pipeline(parts, scpl.EarlyExit(), adam, cuda_graphs=True)
    with pytest.raises(InputError, match="2 of stage 1 learn for the first time"):
        made.train(batches(6, ragged=False))
    assert all(p not in made.stages[1].optimizer.state for p in stages[1].later.parameters())


def test_an_optimizer_that_is_loaded_by_hand_is_noticed(recorded):
    def run(graphs):
        with pipeline(graphs=graphs) as made:
            made.train(batches(8, ragged=False))
            for stage in made.stages:
                stage.optimizer.load_state_dict(copy.deepcopy(stage.optimizer.state_dict()))
            made.train(batches(8, ragged=False))
            return made.export().state_dict()

    plain, graphed = run(False), run(True)
    assert all(torch.equal(plain[name], graphed[name]) for name in plain)
    assert all(lane.recordings == 4 for lane in recorded[0]._lanes)
