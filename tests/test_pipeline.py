import gc
import inspect

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import scpl
from networks import NUM_CLASSES, Indexed, assert_same_state, cnn, data, mlp, rows, states
from scpl import SCPL, Backpropagation, EarlyExit, Pipeline, split
from scpl.engine.stage import copy_to_cpu
from scpl.errors import CheckpointError, DataError, InputError, NonFiniteError, StageError


def adam(parameters):
    return Adam(parameters, lr=1e-2)


def build(model=None, method=None, before=("linear1", "linear2"), **options):
    model = mlp() if model is None else model
    parts = split(model, before=list(before), example=rows()[0][0])
    return Pipeline(parts, method or SCPL(), adam, **options)


def train(pipeline, batches):
    return list(pipeline.steps(batches))


def with_target(target):
    return [rows()[0], (rows()[1][0], target)]


# Reports and scores


def test_reports_come_one_per_step_with_every_stages_losses():
    pipeline = build()
    reports = train(pipeline, rows()) + train(pipeline, rows())
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.num_samples for report in reports] == [8, 8, 5] * 2
    values = reports[-1].values()
    assert [list(terms) for terms in values] == [
        ["contrastive", "local_cross_entropy"],
        ["contrastive", "local_cross_entropy"],
        ["contrastive", "cross_entropy"],
    ]
    assert all(isinstance(v, float) for terms in values for v in terms.values())
    assert not any(t.requires_grad for one in reports[0].stages for t in one.terms.values())
    assert (pipeline.step, pipeline.epoch, pipeline.batch) == (6, 2, 0)


def test_the_network_learns():
    generator = torch.Generator().manual_seed(2)
    centres = 3 * torch.randn(NUM_CLASSES, 5, generator=generator)
    target = torch.arange(60) % NUM_CLASSES
    inputs = centres[target] + torch.randn(60, 5, generator=generator)
    batches = list(zip(inputs.split(20), target.split(20), strict=True))
    for method in (SCPL(), EarlyExit(), Backpropagation()):
        pipeline = build(method=method)
        for _ in range(25):
            train(pipeline, batches)
        assert pipeline.evaluate(batches).result().accuracy > 0.9


def test_scores_count_samples_not_batches():
    pipeline = build()
    inputs, target = (torch.cat(part) for part in zip(*rows(), strict=True))
    ragged = [(inputs[:1], target[:1]), (inputs[1:], target[1:])]
    one, other = (pipeline.evaluate(b).result() for b in (ragged, [(inputs, target)]))
    assert (
        (one.accuracy, one.num_samples)
        == (other.accuracy, other.num_samples)
        == (
            other.accuracy,
            21,
        )
    )
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.stage_accuracy[-1] == one.accuracy
    assert one.stage_accuracy == other.stage_accuracy


def test_a_second_evaluation_begins_at_zero():
    pipeline = build(method=EarlyExit())
    first = pipeline.evaluate(rows())
    second = pipeline.evaluate(rows())
    assert first.result() == second.result() == first.result()
    assert None not in first.result().stage_accuracy


def test_predictions_keep_the_order_of_the_rows():
    pipeline = build()
    batches = [inputs for inputs, _ in rows()]
    whole = pipeline.predict(torch.cat(batches))
    assert whole.shape == (21, NUM_CLASSES)
    assert whole.dtype == torch.float32
    assert torch.equal(
        pipeline.predict(iter(batches)), torch.cat([pipeline.predict(b) for b in batches])
    )
    assert not whole.requires_grad


def test_batches_may_come_from_a_generator():
    assert len(train(build(), iter(rows()))) == 3
    assert build().evaluate(iter(rows())).result().num_samples == 21


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_of_any_integer_type_give_the_same_numbers(dtype):
    pipeline, other = build(), build()
    train(pipeline, rows())
    train(other, [(inputs, target.to(dtype)) for inputs, target in rows()])
    assert_same_state(states(pipeline), states(other))


def test_a_loader_is_told_the_epoch():
    loader, pipeline = Indexed(rows()), build()
    seen = []
    for _ in range(3):
        train(pipeline, loader)
        seen.append(loader.epoch)
    assert seen == [0, 1, 2]


# Bad data


@pytest.mark.parametrize(("value", "shown"), [(-1, "Got -1"), (NUM_CLASSES, "Got 3"), (255, "255")])
@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_a_label_out_of_range_is_named(value, shown, action):
    target = rows()[1][1].clone()
    target[3] = value
    with pytest.raises(DataError, match=rf"Targets must lie in 0 \.\. 2.*{shown} in batch [12]"):
        list(getattr(build(), action)(with_target(target)) or ())


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(8, 1, dtype=torch.long),
        torch.zeros(7, dtype=torch.long),
        torch.zeros(8),
        torch.zeros(8, NUM_CLASSES, dtype=torch.long),
        torch.tensor(1),
    ],
    ids=["column", "short", "floats", "one-hot", "scalar"],
)
def test_a_target_of_the_wrong_shape_is_named(target):
    pipeline = build()
    with pytest.raises(DataError, match=r"one class index per row.* for 8 rows in batch 2"):
        train(pipeline, with_target(target))
    assert pipeline.step == 1


def test_bad_data_leaves_the_weights_of_the_step_before():
    pipeline, alone = build(), build()
    with pytest.raises(DataError):
        train(pipeline, with_target(torch.full((8,), 9)))
    train(alone, rows()[:1])
    assert_same_state(states(pipeline), states(alone))


@pytest.mark.parametrize("loader", [[], Indexed([])], ids=["list", "indexed"])
def test_an_empty_loader_is_told(loader):
    pipeline = build()
    with pytest.raises(DataError, match="at least one batch"):
        train(pipeline, loader)
    with pytest.raises(DataError, match="at least one sample"):
        pipeline.evaluate(loader).result()
    with pytest.raises(DataError, match="at least one batch"):
        pipeline.predict([])
    assert pipeline.epoch == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_named_as_the_cause(value):
    batches = rows()
    batches[1][0][2, 3] = value
    pipeline = build()
    with pytest.raises(NonFiniteError, match=r"data must be finite.*batch of step 2 holds 1 NaN"):
        train(pipeline, batches)
    assert pipeline.step == 1


def test_a_loss_that_explodes_is_not_blamed_on_the_data():
    parts = split(mlp(), before=["linear1"], example=rows()[0][0])
    pipeline = Pipeline(parts, EarlyExit(), lambda p: SGD(p, lr=1e30))
    with pytest.raises(NonFiniteError, match=r"Stage 0 got .* at step [23]") as caught:
        train(pipeline, rows() * 3)
    assert "data must be finite" not in str(caught.value)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.zeros(8, 5)],
        [{"inputs": torch.zeros(8, 5), "target": torch.zeros(8).long()}],
        [(torch.zeros(8, 5), [0] * 8)],
        [(None, torch.zeros(8).long())],
        [("text", torch.zeros(8).long())],
        [(torch.tensor(1.0), torch.zeros(1).long())],
    ],
    ids=["no target", "dictionary", "list target", "no inputs", "text", "scalar inputs"],
)
def test_a_batch_of_another_form_is_bad_input_not_a_traceback(batches):
    with pytest.raises(InputError):
        train(build(), batches)


# Bad set-up


def test_the_number_of_classes_is_that_of_the_networks_outputs():
    with pytest.raises(InputError, match=r"one output per class, at least two. Got 1\."):
        build(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 1)), before=("1",))


def test_under_torchrun_the_ranks_come_from_the_environment(monkeypatch):
    """Without a mesh every rank used to train the whole network alone, without a word."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"MASTER_ADDR and MASTER_PORT not set.*torchrun"):
        build()


def test_the_only_rank_may_not_be_told_to_host_something_else():
    with pytest.raises(InputError, match=r"add up to the 3 stages. Got 2 = 2"):
        build(ranks=scpl.connect(stages_per_rank=[2]))


def test_a_pipeline_takes_at_most_ten_arguments():
    parameters = inspect.signature(Pipeline).parameters
    assert len(parameters) <= 10


# Errors in the user's code


class Raises(nn.Module):
    """Fails once it has been told how many more calls are good."""

    def __init__(self, error):
        super().__init__()
        self.error, self.left = error, None

    def forward(self, features):
        if self.left == 0:
            raise self.error
        if self.left is not None:
            self.left -= 1
        return features


def faulty(error, after=0):
    layer = Raises(error)
    pipeline = build(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), layer, nn.Linear(6, 3)), before=("1",)
    )
    layer.left = after
    return pipeline


def test_an_error_of_the_network_names_stage_step_and_shapes_and_keeps_its_cause():
    cause = KeyError("no such thing")
    pipeline = faulty(cause, after=3)
    with pytest.raises(StageError) as caught:
        train(pipeline, rows((8, 8)) * 3)
    assert caught.value.__cause__ is cause
    text = str(caught.value)
    step = pipeline.step + 1
    assert f"Stage 1 (1, 2) failed at step {step}" in text
    assert "Its input was (8, 4) float32; KeyError: 'no such thing'" in text


def test_an_error_while_evaluating_is_explained_too():
    with pytest.raises(StageError, match=r"Stage 1 \(1, 2\) failed") as caught:
        faulty(ValueError("bad")).evaluate(rows())
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_the_library_is_not_wrapped_and_is_not_its_own_cause():
    error = InputError("Rule", "Got x")
    with pytest.raises(InputError) as caught:
        train(faulty(error), rows())
    assert caught.value is error
    assert caught.value.__cause__ is not caught.value
    batches = rows()
    pipeline = Pipeline(
        split(mlp(), before=[], example=rows()[0][0]),
        EarlyExit(),
        lambda p: SGD(p, lr=1e30),
    )
    with pytest.raises(NonFiniteError) as caught:
        train(pipeline, batches * 2)
    assert caught.value.__cause__ is not caught.value


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interruption_passes_unchanged(error):
    with pytest.raises(type(error)):
        train(faulty(error), rows())


def test_an_error_of_the_loader_passes_unchanged():
    def loader():
        yield rows()[0]
        raise LookupError("disk gone")

    with pytest.raises(LookupError, match="disk gone"):
        train(build(), loader())


def test_a_batch_of_another_width_is_explained():
    with pytest.raises(StageError, match=r"Stage 0 \(linear0, relu0\).*\(4, 9\) float32"):
        train(build(), data((9,), (4,)))


# Leaving early, closing, checkpoints


def test_leaving_the_loop_early_keeps_what_was_learned():
    pipeline, alone = build(), build()
    for report in pipeline.steps(rows()):
        if report.step == 2:
            break
    gc.collect()
    train(alone, rows()[:2])
    assert_same_state(states(pipeline), states(alone))
    assert pipeline.step == 2


def test_train_runs_and_tells_every_step():
    """`train` once was a generator: without a loop it trained nothing."""
    running, iterating = build(), build()
    steps = []
    assert running.train(rows(), on_step=lambda report: steps.append(report.step)) is None
    train(iterating, rows())
    assert steps == [1, 2, 3]
    assert_same_state(states(running), states(iterating))
    assert (running.step, running.epoch, running.batch) == (3, 1, 0)
    running.train(rows())
    assert steps == [1, 2, 3], "who is not asked is not told"


def test_an_error_of_who_is_told_ends_the_training():
    pipeline = build()

    def stop(report):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipeline.train(rows(), on_step=stop)
    assert pipeline.step == 1


def test_checkpoints_are_made_every_so_many_steps(tmp_path):
    told = []
    checkpoints = scpl.Checkpoints(
        tmp_path,
        every=2,
        keep=9,
        note=lambda: {"told": len(told)},
        before_saving=lambda: told.append("saving"),
    )
    with build(checkpoints=checkpoints) as pipeline:
        for _ in range(2):
            pipeline.train(rows(), on_step=lambda report: told.append(report.step))
    assert told == [1, 2, "saving", 3, 4, "saving", 5, 6, "saving"]
    note = build(checkpoints=tmp_path).restore(4)
    assert (note["step"], note["epoch"], note["batch"], note["told"]) == (4, 1, 1, 5)


def test_closing_twice_is_harmless(tmp_path):
    with build(checkpoints=tmp_path) as pipeline:
        train(pipeline, rows())
        pipeline.checkpoint()
        pipeline.close()
    pipeline.close()
    assert build(checkpoints=tmp_path).restore()["step"] == 3


def test_a_folder_is_needed_for_checkpoints():
    pipeline = build()
    with pytest.raises(InputError, match="must name a folder to save or restore"):
        pipeline.checkpoint()
    with pytest.raises(InputError, match="must name a folder to save or restore"):
        pipeline.restore()


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    pipeline = build(checkpoints=tmp_path / "none")
    assert pipeline.restore() is None
    assert pipeline.step == 0


def test_a_chosen_step_can_be_restored_and_a_missing_one_is_told(tmp_path):
    with build(checkpoints=scpl.Checkpoints(tmp_path, keep=3)) as pipeline:
        for _ in pipeline.steps(rows()):
            pipeline.checkpoint()
    assert build(checkpoints=tmp_path).restore(2)["batch"] == 2
    with pytest.raises(CheckpointError, match="step-000000009"):
        build(checkpoints=tmp_path).restore(9)


@pytest.mark.parametrize(
    "other",
    [
        {"before": ("linear1",)},
        {"before": ("relu0", "linear2")},
        {"method": EarlyExit()},
        {"method": Backpropagation()},
        {"model": mlp(width=7)},
    ],
    ids=["fewer stages", "other cuts", "early exit", "bp", "wider"],
)
def test_the_checkpoint_of_another_network_is_refused_and_changes_nothing(tmp_path, other):
    with build(checkpoints=tmp_path) as pipeline:
        train(pipeline, rows())
        pipeline.checkpoint()
    second = build(checkpoints=tmp_path, **other)
    before = [copy_to_cpu(stage.state_dict()) for stage in second.stages]
    with pytest.raises(CheckpointError):
        second.restore()
    assert_same_state([copy_to_cpu(stage.state_dict()) for stage in second.stages], before)
    assert second.step == 0


def test_a_checkpoint_that_fits_some_stages_only_changes_none(tmp_path):
    """The first stages fit, the last one does not."""
    with build(checkpoints=tmp_path) as pipeline:
        train(pipeline, rows())
        pipeline.checkpoint()
    wide = nn.Sequential(mlp()[:4], nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    model = mlp()
    model.linear2, model.classifier = wide[1], wide[3]
    second = build(model, checkpoints=tmp_path)
    before = [copy_to_cpu(stage.state_dict()) for stage in second.stages]
    with pytest.raises(CheckpointError, match="stage 2"):
        second.restore()
    assert_same_state([copy_to_cpu(stage.state_dict()) for stage in second.stages], before)


def test_a_checkpoint_can_be_restored_while_it_is_being_written(tmp_path):
    with build(checkpoints=tmp_path) as pipeline:
        train(pipeline, rows())
        pipeline.checkpoint()
        note = pipeline.restore()
        assert note is not None
        assert note["step"] == 3


def test_a_note_may_not_pose_as_the_manifest(tmp_path):
    with build(checkpoints=tmp_path) as pipeline:
        train(pipeline, rows())
        with pytest.raises(InputError):
            pipeline.checkpoint(bytes=3.0)
        pipeline.checkpoint(best=0.5)
    assert build(checkpoints=tmp_path).restore()["best"] == 0.5


def test_the_learning_rate_is_that_of_the_schedule():
    halving = lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)  # noqa: E731
    pipeline = build(scheduler=halving)
    rates = lambda: [s.optimizer.param_groups[0]["lr"] for s in pipeline.stages]  # noqa: E731
    assert set(rates()) == {1e-2}
    train(pipeline, rows())
    assert rates() == [pytest.approx(1e-2 / 8)] * len(pipeline.stages)


def test_a_cnn_with_a_last_batch_of_one_says_what_is_wrong():
    parts = split(cnn(), before=["conv2"], example=torch.zeros(2, 2, 8, 8))
    pipeline = Pipeline(parts, SCPL(), adam)
    losses = [r.values() for r in pipeline.steps(data((2, 8, 8), (4, 1)))]
    assert losses[1][0]["contrastive"] == 0.0
