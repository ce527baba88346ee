"""From a pipeline back to plain modules, under every method; several ranks: test_stream.py."""

import pytest
import torch
from torch.optim import Adam

from networks import UNEVEN_CUTS, assert_same_state, cnn, images
from scpl import (
    DASCPL,
    DGL,
    SCPL,
    AssociatedLearning,
    Backpropagation,
    DeInfoReg,
    EarlyExit,
    Pipeline,
    PredSim,
    split,
)
from scpl.errors import InputError

INPUTS = torch.cat([inputs for inputs, _ in images(seed=3)])
WITH_EXITS = {
    "al": AssociatedLearning(label_features=12),
    "predsim": PredSim(),
    "deinforeg": DeInfoReg(),
    "dascpl": DASCPL(hidden_features=8),
    "dgl": DGL(auxiliary="cnn"),
    "early-exit": EarlyExit(hidden_features=8),
}
EACH = pytest.mark.parametrize("name", WITH_EXITS)


@pytest.fixture(scope="module")
def trained():
    known = {}

    def get(name):
        if name not in known:
            parts = split(cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
            known[name] = Pipeline(parts, WITH_EXITS[name], lambda p: Adam(p, lr=3e-3))
            for _ in range(2):
                list(known[name].steps(images()))
        return known[name]

    return get


@EACH
def test_the_exported_network_predicts_as_the_stages_do(name, trained):
    pipeline = trained(name)
    with torch.no_grad():
        exported, exits = pipeline.export(), pipeline.export_exits()
        logits = pipeline.predict(INPUTS)
        assert torch.equal(exported(INPUTS), logits)
        assert torch.equal(exits(INPUTS), logits)
    assert not any(module.training for module in exported.modules())
    assert not any(module.training for module in exits.modules())


@EACH
def test_every_exit_is_the_read_out_of_its_stage(name, trained):
    """Accuracy per stage in the stream, and that of all samples leaving at that exit."""
    pipeline, target = trained(name), torch.cat([target for _, target in images(seed=3)])
    found = pipeline.evaluate(images(seed=3)).result().stage_accuracy
    exits = pipeline.export_exits()
    for stage, accuracy in enumerate(found):
        features = INPUTS
        with torch.no_grad():
            for body in exits._bodies[: stage + 1]:
                features = body(features)
            logits = exits._exits[stage](features)
        assert (logits.argmax(1) == target).double().mean().item() == accuracy


@EACH
def test_keys(name, trained):
    keys, exports = list(cnn().state_dict()), trained(name)
    found = list(exports.export().state_dict())
    if name == "al":
        assert [key for key in found if key.startswith("exits.3.")] == found[len(keys) - 2 :]
        keys = keys[:-2]  # the user's classifier is not used
        found = found[: len(keys)]
    assert found == keys
    state = exports.export_exits().state_dict()
    assert list(state)[: len(keys)] == keys
    assert {key.split(".")[1] for key in state if key.startswith("exits.")} == set(
        "0123" if name == "al" else "012"
    )
    # No tensor has two keys, as files of tensors allow none.
    assert len({value.data_ptr() for value in state.values() if value.numel()}) == len(
        [value for value in state.values() if value.numel()]
    )


@EACH
def test_exports_are_copies(name, trained):
    pipeline = trained(name)
    before = [dict(stage.state_dict()["body"]) for stage in pipeline.stages]
    again = pipeline.predict(INPUTS)
    for exported in (pipeline.export(), pipeline.export_exits()):
        with torch.no_grad():
            for parameter in exported.parameters():
                parameter.zero_()
    assert torch.equal(pipeline.predict(INPUTS), again)
    assert_same_state([dict(stage.state_dict()["body"]) for stage in pipeline.stages], before)


def test_exporting_leaves_the_random_state_alone(trained):
    pipeline = trained("al")
    before = torch.get_rng_state()
    pipeline.export_exits()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [SCPL(cross_entropy=0.0), Backpropagation()])
def test_exits_come_from_what_the_stages_can_do(method):
    parts = split(cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
    with_exits = Pipeline(parts, SCPL(), Adam)
    assert with_exits.has_exits
    assert with_exits.export_exits().num_stages == len(UNEVEN_CUTS) + 1
    assert not Pipeline(parts, method, Adam).has_exits


def test_a_stage_that_does_not_predict_is_named():
    parts = split(cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
    pipeline = Pipeline(parts, SCPL(cross_entropy=0.0), Adam)
    with pytest.raises(InputError, match=r"method scpl.*Stage 0 does not.*`cross_entropy` above 0"):
        pipeline.export_exits()
