"""From a pipeline back to plain modules, under every method; several ranks: test_stream.py."""

import pytest
import torch
from torch.optim import Adam

from networks import NUM_CLASSES, UNEVEN_CUTS, assert_same_state, cnn, images
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
    "al": AssociatedLearning(NUM_CLASSES, label_features=12),
    "predsim": PredSim(NUM_CLASSES),
    "deinforeg": DeInfoReg(NUM_CLASSES),
    "dascpl": DASCPL(NUM_CLASSES, hidden_features=8),
    "dgl": DGL(NUM_CLASSES, auxiliary="cnn"),
    "early-exit": EarlyExit(NUM_CLASSES, hidden_features=8),
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
                list(known[name].train(images()))
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
    before = torch.get_rng_state()
    trained("al").export_exits()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [SCPL, Backpropagation])
def test_a_method_whose_stages_do_not_all_predict_has_no_exits(method):
    parts = split(cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
    pipeline = Pipeline(parts, method(NUM_CLASSES), Adam)
    with pytest.raises(InputError, match=rf"early exits. Got {method.name}. Train with"):
        pipeline.export_exits()


def test_a_claim_to_have_exits_must_be_true():
    class Claims(SCPL):
        name = "claims"
        has_exits = True

    contrast_alone = Claims(NUM_CLASSES, cross_entropy=0.0)
    parts = split(cnn(), before=UNEVEN_CUTS, example=INPUTS[:2])
    with pytest.raises(InputError, match=r"method claims.*Got none from stage 0.*`reader`"):
        Pipeline(parts, contrast_alone, Adam).export_exits()
