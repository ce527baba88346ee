import pytest
import torch

from scpl.app.bench.bench import synthetic_batches, synthetic_data
from scpl.app.build import build_method, build_partition, build_pipeline, laid_out
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device
from scpl.errors import InputError

LAST = torch.channels_last


def maps(network):
    found = [p for p in network.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert found
    return found


def test_on_a_cpu_convolutions_are_channels_last_with_the_same_values():
    config = TrainConfig.of(model="small-cnn", device="cpu")
    data = synthetic_data(config)
    parts = build_partition(config, data.inputs, data.num_classes)
    assert all(p.is_contiguous(memory_format=LAST) for p in maps(parts.model))
    plain = torch.nn.Conv2d(3, 4, 3)
    before = plain.weight.detach().clone()
    last = laid_out(plain, torch.device("cpu"))
    assert torch.equal(last.weight, before)
    inputs = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(last(inputs), torch.nn.functional.conv2d(inputs, before, plain.bias))


def test_on_an_accelerator_the_type_decides():
    plain = torch.nn.Conv2d(3, 4, 3)
    laid_out(plain, torch.device("meta"))
    assert plain.weight.is_contiguous()
    laid_out(plain, torch.device("meta"), torch.bfloat16)
    assert plain.weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(("model", "largest"), [("vgg8", 0.34), ("resnet18", 0.29)])
def test_without_cuts_no_stage_is_much_larger_than_it_must_be(model, largest):
    config = TrainConfig.of(model=model, data="cifar10", device="cpu", width=0.25)
    data = synthetic_data(config)
    parts = build_partition(config, data.inputs, data.num_classes)
    assert parts.num_stages == 4
    assert max(parts.costs) < largest * sum(parts.costs)


def small(**settings):
    """A pipeline of two stages, and mini-batches for it."""
    config = TrainConfig.of(model="mlp", stages=2, batch_size=20, device="cpu", **settings)
    data = synthetic_data(config)
    parts = build_partition(config, data.inputs, data.num_classes)
    method = build_method(config.method, config.rows)
    return build_pipeline(config, parts, method, 100), list(synthetic_batches(config, data))


class TestLearning:
    def test_factors_scale_the_whole_schedule(self):
        pipeline, _ = small(lr=0.1, end_lr=0.01, warmup=0.0, lr_factors=(0.5, 2.0))
        rates = [stage.optimizer.param_groups[0]["lr"] for stage in pipeline.stages]
        assert rates == pytest.approx([0.05, 0.2])
        for stage in pipeline.stages:
            for _ in range(100):
                stage.optimizer.step()
                stage.scheduler.step()
        rates = [stage.optimizer.param_groups[0]["lr"] for stage in pipeline.stages]
        assert rates == pytest.approx([0.005, 0.02])

    @pytest.mark.parametrize("warmup", [0.0, 0.1])
    def test_heads_may_have_a_higher_rate_along_the_same_schedule(self, warmup):
        pipeline, _ = small(lr=0.1, head_lr=0.4, end_lr=0.001, warmup=warmup, lr_factors=(0.5, 1.0))
        for stage, factor in zip(pipeline.stages, (0.5, 1.0), strict=True):
            layers, heads = stage.optimizer.param_groups
            assert {id(p) for p in layers["params"]} == {id(p) for p in stage.body.parameters()}
            for _ in range(50):
                stage.optimizer.step()
                stage.scheduler.step()
                assert heads["lr"] == pytest.approx(4 * layers["lr"])
            assert 0 < layers["lr"] < 0.09 * factor

    def test_where_rates_are_equal_there_is_one_group(self):
        pipeline, _ = small(lr=0.1, head_lr=0.1)
        assert [len(stage.optimizer.param_groups) for stage in pipeline.stages] == [1, 1]

    def test_layers_that_are_trained_already_learn_slower_than_what_is_new(self):
        fine_tuned = TrainConfig.of(model="hf:folder", data="sst2").resolved().optimizer
        assert (fine_tuned.lr, fine_tuned.head_lr, fine_tuned.end_lr) == (1e-4, 1e-3, 0.0)
        faster = TrainConfig.of(model="hf:folder", data="sst2", lr=0.01).resolved().optimizer
        assert faster.head_lr == 0.01
        new = TrainConfig.of(model="vgg8").resolved().optimizer
        assert (new.lr, new.head_lr, new.end_lr) == (3e-3, 3e-3, 1e-5)

    def test_decay_is_kept_off_norms_on_request(self):
        everything, _ = small(weight_decay=0.1)
        exempt, _ = small(weight_decay=0.1, exempt_norms=True)
        for stage in everything.stages:
            assert [group["weight_decay"] for group in stage.optimizer.param_groups] == [0.1]
        for stage in exempt.stages:
            decays = {
                parameter.ndim > 1: group["weight_decay"]
                for group in stage.optimizer.param_groups
                for parameter in group["params"]
            }
            assert decays == {True: 0.1, False: 0.0}

    def test_frozen_layers_keep_their_weights(self):
        pipeline, batches = small(freeze=("layer1",))
        before = {key: value.clone() for key, value in pipeline.parts.model.state_dict().items()}
        pipeline.train(batches)
        after = pipeline.parts.model.state_dict()
        same = {key for key, value in before.items() if torch.equal(value, after[key])}
        assert same == {"layer1.0.weight", "layer1.0.bias"}

    def test_an_unknown_layer_is_answered_with_the_known_ones(self):
        with pytest.raises(InputError, match="--freeze must be one of: "):
            small(freeze=("encoder",))

    def test_types_reach_the_stages(self):
        half, _ = small(precision="float16")
        assert half.stages[0].scaler is not None
        pipeline, batches = small(send_as="bfloat16")
        assert pipeline.stages[0].forward(batches[0][0])["values"].dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("cuda:0", 0), ("auto", 1)])
def test_processes_of_a_machine_take_its_gpus_in_turn(monkeypatch, name, index):
    """Also where there are more of them than GPUs."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    there = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: there)
    assert choose_device(name) == torch.device("cuda", index)
