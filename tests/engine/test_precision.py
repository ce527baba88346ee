"""Types: of the forward pass, of what is handed on, and of networks that are not float32."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import scpl
from scpl.engine.build import build_stages
from scpl.engine.precision import Precision, narrowed, widened
from scpl.engine.stage import StageOptions
from scpl.errors import CheckpointError, InputError
from scpl.methods import METHODS
from scpl.partition.values import tensors_of

LOCAL = [name for name in METHODS if METHODS[name].cuts_gradients]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(),
        nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip


def batches(dtype=torch.float32, count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(10, 8, generator=generator, dtype=dtype),
            torch.randint(0, 3, (10,), generator=generator),
        )
        for _ in range(count)
    ]


def pipeline_of(model, method=None, *, dtype=torch.float32, lr=1e-2, **options):
    parts = scpl.split(model, before=["3", "5"], example=batches(dtype)[0][0])
    return scpl.Pipeline(
        parts, method or scpl.SCPL(), lambda p: torch.optim.Adam(p, lr=lr), **options
    )


class TestWhatIsHandedOn:
    def test_values_that_learn_are_rounded_and_masks_are_not(self):
        """The mask of an attention layer holds -inf, or the lowest float32: no bfloat16 is that."""
        hidden = torch.randn(4, 5, requires_grad=True) * 1
        mask = torch.full((4, 5), torch.finfo(torch.float32).min)
        ids = torch.arange(4)
        output = (hidden, {"mask": mask, "ids": ids})
        detached = (hidden.detach(), {"mask": mask, "ids": ids})
        sent = narrowed(output, detached, torch.bfloat16)
        assert sent["values"][0].dtype == torch.bfloat16
        read, others = widened(sent)
        assert torch.equal(read, hidden.detach().bfloat16().float())
        assert torch.equal(others["mask"], mask)
        assert others["ids"].dtype == torch.int64

    def test_the_main_value_of_a_frozen_stage_is_rounded(self):
        values = (torch.randn(4, 5), torch.full((4, 5), -torch.inf))
        sent = narrowed(values, values, torch.bfloat16)
        assert [value.dtype for value in sent["values"]] == [torch.bfloat16, torch.float32]

    def test_types_come_back_as_they_were(self):
        values = tuple(
            torch.randn(3, requires_grad=True).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        )
        read = widened(narrowed(values, values, torch.bfloat16))
        assert [value.dtype for value in read] == [torch.float64, torch.float32, torch.bfloat16]

    @given(rows=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
    def test_int8_is_at_most_half_a_step_off(self, rows):
        """A step is a 127th of the largest value of a row."""
        values = torch.tensor([rows, [0.0] * len(rows)])
        sent = narrowed(values.clone().requires_grad_(), values, torch.int8)
        assert sent["values"].dtype == torch.int8
        read = widened(sent)
        step = values.abs().amax(1, keepdim=True) / 127
        assert ((read - values).abs() <= 0.5001 * step).all()
        assert read.dtype == torch.float32

    def test_int8_takes_a_quarter_of_the_bytes_of_maps_and_of_tokens(self):
        for shape, scales in (((4, 8, 16, 16), 4 * 8), ((4, 12, 64), 4 * 12)):
            values = torch.randn(shape, requires_grad=True)
            sent = narrowed(values, values.detach(), torch.int8)
            assert sum(t.nbytes for t in tensors_of(sent)) == values.numel() + 4 * scales

    @pytest.mark.parametrize("broken", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_not_hidden_by_int8(self, broken):
        values = torch.tensor([[1.0, broken], [1.0, 2.0]])
        read = widened(narrowed(values.clone().requires_grad_(), values, torch.int8))
        assert not read[0].isfinite().any()
        assert read[1].isfinite().all()

    def test_schedules_have_no_int8(self):
        parts = scpl.split(network(), before=["3", "5"], example=batches()[0][0])
        options = StageOptions(torch.optim.Adam, precision=Precision(send_as=torch.int8))
        with pytest.raises(InputError, match=re.escape("Got torch.int8 for gpipe")):
            build_stages(parts, METHODS["gpipe"](), options, [], seed=0, device=torch.device("cpu"))

    def test_stages_of_one_rank_learn_from_rounded_values(self):
        pipeline = pipeline_of(network(), precision=Precision(send_as=torch.bfloat16))
        seen = []
        pipeline.stages[1].body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        pipeline.train(batches())
        assert all(value.dtype == torch.float32 for value in seen)
        assert all(torch.equal(value, value.bfloat16().float()) for value in seen)

    def test_evaluation_is_that_of_the_exported_network(self):
        pipeline = pipeline_of(network(), precision=Precision(send_as=torch.bfloat16))
        pipeline.train(batches())
        inputs = batches()[0][0]
        assert torch.equal(pipeline.predict(inputs), pipeline.export()(inputs).detach())

    def test_end_to_end_methods_hand_nothing_on(self):
        with pytest.raises(InputError, match="send_as"):
            pipeline_of(
                network(), scpl.Backpropagation(), precision=Precision(send_as=torch.bfloat16)
            )

    @pytest.mark.parametrize("wrong", [{"compute": torch.float64}, {"send_as": torch.float32}])
    def test_other_types_are_refused(self, wrong):
        with pytest.raises(InputError):
            Precision(**wrong)


class TestFloat16:
    def test_a_step_equals_that_of_torchs_own_recipe(self):
        """GradScaler by the book: scale, backward, unscale, clip, step, update."""
        model = network()
        by_hand = copy.deepcopy(model)
        pipeline = pipeline_of(
            model, scpl.Backpropagation(), precision=torch.float16, clip_norm=0.5
        )
        pipeline.train(batches())
        optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu")
        for inputs, target in batches():
            with torch.autocast("cpu", torch.float16):
                logits = by_hand(inputs)
            loss = nn.functional.cross_entropy(logits.float(), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        mine = pipeline.export().state_dict()
        assert all(torch.equal(value, mine[key]) for key, value in by_hand.state_dict().items())

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_overflow_skips_the_step_and_its_schedule(self, fused):
        model = network()
        parts = scpl.split(model, before=["3", "5"], example=batches()[0][0])
        pipeline = scpl.Pipeline(
            parts,
            scpl.SCPL(),
            lambda p: torch.optim.Adam(p, lr=1e-2, fused=fused),
            scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1),
            precision=torch.float16,
        )
        stage = pipeline.stages[1]
        stage.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        before = copy.deepcopy(stage.body.state_dict())
        pipeline.train(batches(count=1))
        assert all(
            torch.equal(value, before[key]) for key, value in stage.body.state_dict().items()
        )
        assert stage.scaler.get_scale() == 2.0**59
        assert stage.scheduler.last_epoch == 0
        assert pipeline.stages[0].scheduler.last_epoch == 1

    def test_the_scale_is_part_of_a_checkpoint(self, tmp_path):
        first = pipeline_of(network(), precision=torch.float16, checkpoints=tmp_path)
        first.stages[0].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        first.train(batches(count=2))
        first.checkpoint()
        first.close()
        second = pipeline_of(network(), precision=torch.float16, checkpoints=tmp_path)
        second.restore()
        assert second.stages[0].scaler.get_scale() == first.stages[0].scaler.get_scale() == 2.0**58
        with pytest.raises(CheckpointError, match="scaled there and not scaled here"):
            pipeline_of(network(), checkpoints=tmp_path).restore()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_networks_of_other_types_are_refused(self, dtype):
        """Torch would leave float64 as it is, and cannot unscale gradients that are float16."""
        with pytest.raises(InputError, match="must be float32"):
            pipeline_of(network().to(dtype), dtype=dtype, precision=torch.float16)


class TestOtherNetworks:
    @pytest.mark.parametrize("name", LOCAL)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_heads_and_losses_follow_the_network(self, name, dtype):
        model = network().to(dtype)
        pipeline = pipeline_of(model, METHODS[name](), dtype=dtype)
        losses = [report.losses for report in pipeline.steps(batches(dtype))]
        precise = torch.promote_types(dtype, torch.float32)
        assert {term.dtype for step in losses for stage in step for term in stage.values()} == {
            precise
        }
        assert {p.dtype for stage in pipeline.stages for p in stage.parameters} == {dtype}
        assert pipeline.evaluate(batches(dtype)).result().num_samples == 60
        assert pipeline.predict(batches(dtype)[0][0]).dtype == precise

    def test_float64_end_to_end(self):
        pipeline = pipeline_of(network().double(), scpl.Backpropagation(), dtype=torch.float64)
        pipeline.train(batches(torch.float64))
        assert pipeline.predict(batches(torch.float64)[0][0]).dtype == torch.float64

    def test_float64_goes_on_as_bfloat16(self):
        pipeline = pipeline_of(
            network().double(), dtype=torch.float64, precision=Precision(send_as=torch.bfloat16)
        )
        pipeline.train(batches(torch.float64))
        assert torch.get_default_dtype() == torch.float32

    def test_a_float64_loss_is_reported_in_full(self):
        pipeline = pipeline_of(network().double(), dtype=torch.float64)
        (report, *_) = pipeline.steps(batches(torch.float64))
        stage = report.losses[0]
        assert report.values()[0] == {name: value.item() for name, value in stage.items()}
