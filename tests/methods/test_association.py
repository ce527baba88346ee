import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scpl.errors import InputError
from scpl.methods.al import Association
from scpl.methods.base import CrossEntropy, Sum

TARGET = torch.tensor([0, 2, 1, 2])
C, D = 3, 6


def first():
    return Association(nn.Linear(5, D), nn.Linear(C, D), nn.Linear(D, C), C)


def second(before):
    return Association(nn.Linear(5, D), nn.Linear(D, D), nn.Linear(D, D), C, [nn.Linear(D, C)])


def features():
    return torch.randn(4, 5, requires_grad=True)


def test_the_first_stage_encodes_the_label_itself():
    objective, x = first(), features()
    terms = objective(x, TARGET, None)
    code = objective.encoder(torch.eye(C)[TARGET])
    assert torch.equal(objective.hand_on(TARGET, None), code)
    assert torch.equal(terms["association"], F.mse_loss(objective.bridge(x), code))
    wanted = F.cross_entropy(objective.decoder(code), TARGET)
    assert torch.equal(terms["reconstruction"], wanted)


def test_a_later_stage_encodes_the_code_it_gets():
    objective, x, code = second(first()), features(), torch.randn(4, D)
    terms = objective(x, TARGET, code)
    new = objective.encoder(code)
    assert torch.equal(objective.hand_on(TARGET, code), new)
    assert torch.equal(terms["association"], F.mse_loss(objective.bridge(x), new))
    assert torch.equal(terms["reconstruction"], F.mse_loss(objective.decoder(new), code))


def test_the_two_losses_meet_in_no_parameter():
    objective, x = second(first()), features()
    terms = objective(x, TARGET, torch.randn(4, D))
    terms["association"].backward(retain_graph=True)
    assert x.grad is not None
    assert {n.split(".")[0] for n, p in objective.named_parameters() if p.grad is not None} == {
        "bridge"
    }
    objective.zero_grad()
    x.grad = None
    terms["reconstruction"].backward()
    assert x.grad is None
    assert {n.split(".")[0] for n, p in objective.named_parameters() if p.grad is not None} == {
        "encoder",
        "decoder",
    }


def test_a_prediction_goes_through_the_decoders_that_were_shared():
    one, two, x = first(), second(None), features()
    assert one.share(None)[0].keys() == one.decoder.state_dict().keys()
    shared = two.share(one.share(None))
    assert len(shared) == 2
    assert torch.equal(one.predict(x), one.decoder(one.bridge(x)))
    assert torch.equal(two.predict(x), one.decoder(two.decoder(two.bridge(x))))
    assert torch.equal(two.exit_module([one])(x), two.predict(x))
    assert torch.equal(Sum(two).exit_module([Sum(one)])(x), two.predict(x))


def test_shared_decoders_are_none_of_its_own_parameters():
    objective = second(None)
    names = {name.split(".")[0] for name in objective.state_dict()}
    assert names == {"bridge", "encoder", "decoder"}
    objective.share([nn.Linear(D, C).state_dict()])
    assert {name.split(".")[0] for name in objective.state_dict()} == names


def test_every_stage_before_must_share():
    with pytest.raises(InputError, match=r"share its decoder. Got 0 of 1"):
        second(None).share(None)
    with pytest.raises(InputError, match="Got 1 of 0"):
        first().share([{}])


def test_a_sum_shares_what_its_parts_do():
    one = first()
    both = Sum(CrossEntropy(nn.Linear(5, C)), one)
    assert both.share(None)[0].keys() == one.decoder.state_dict().keys()
    assert both.exit_module([])[0] is one.bridge
    assert torch.equal(both.hand_on(TARGET, None), one.hand_on(TARGET, None))
