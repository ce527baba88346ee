import json
import math
from contextlib import suppress
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from networks import assert_same_state
from scpl.engine import messages as module
from scpl.engine.messages import LocalLoss, Message, Stop, TrainBatch, decode, encode
from scpl.errors import InputError
from scpl.partition.values import TensorSpec, tensors_of, tree_map

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    values = torch.arange(math.prod(shape)).reshape(shape) % 2
    if len(shape) == 4 and draw(st.booleans()):
        values = values.to(memory_format=torch.channels_last)
    return values.to(draw(st.sampled_from(DTYPES)))


NAMES = st.text(max_size=5) | st.sampled_from(["t", "u", "d"])
TREES = st.recursive(
    st.none() | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(NAMES, inner, max_size=3)
    ),
    max_leaves=8,
)
NOTES = st.dictionaries(
    NAMES, st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
)
SCALARS = st.dictionaries(NAMES, tensors(), max_size=2)
LOSSES = st.lists(st.builds(LocalLoss, SCALARS, SCALARS), max_size=3).map(tuple)
SPECS = st.lists(tensors().map(TensorSpec.of), max_size=2).map(tuple)
FIELDS = {
    "step": st.integers(0, 10**12),
    "features": TREES,
    "target": st.none() | tensors(),
    "carry": TREES,
    "shared": TREES,
    "losses": LOSSES,
    "counts": st.lists(SCALARS, max_size=3).map(tuple),
    "specs": SPECS,
    "whole_size": st.none() | st.integers(1, 99),
    "keep_logits": st.booleans(),
    "epoch": st.integers(0, 99),
    "batch": st.integers(0, 99),
    "note": NOTES,
    "run": st.text(max_size=40),
    "attempt": st.text(max_size=40),
    "reason": st.text(),
    "signal": st.integers(0, 64),
}
KINDS = tuple(module._KINDS.values())


@st.composite
def any_message(draw):
    kind = draw(st.sampled_from(KINDS))
    return kind(**{each.name: draw(FIELDS[each.name]) for each in fields(kind)})


def kinds_of(tree):
    """The structure of a tree, in which lists, tuples and dicts differ."""
    if isinstance(tree, dict):
        return {key: kinds_of(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [kinds_of(item) for item in tree]
    return type(tree)


@given(any_message())
def test_a_message_survives_the_way(message):
    header, sent = encode(message)
    specs, build = decode(header)
    assert specs == [TensorSpec.of(tensor) for tensor in sent]
    found = build([tensor.clone() for tensor in sent])
    assert type(found) is type(message)
    for each in fields(message):
        ours, theirs = getattr(message, each.name), getattr(found, each.name)
        if each.name == "losses":
            ours, theirs = [[(o.terms, o.observed) for o in losses] for losses in (ours, theirs)]
        assert kinds_of(theirs) == kinds_of(ours)
        if each.name in ("features", "target", "carry", "shared", "losses", "counts"):
            assert_same_state(theirs, ours)
        else:
            assert theirs == ours


def test_every_kind_of_message_can_be_sent():
    defined = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    assert set(KINDS) == defined


@given(TREES)
def test_tensors_are_listed_in_the_order_they_are_mapped(tree):
    order = []
    mapped = tree_map(lambda tensor: order.append(tensor) or tensor + tensor, tree)
    assert [id(t) for t in tensors_of(tree)] == [id(t) for t in order]
    assert kinds_of(mapped) == kinds_of(tree)


def test_the_header_is_small_and_sizes_buffers():
    header, _ = encode(TrainBatch(3, torch.zeros(128, 64, 8, 8), torch.zeros(128).long()))
    assert len(header) < 200
    specs, _ = decode(header)
    assert str(specs[0]) == "(128, 64, 8, 8) float32"
    empty = specs[0].empty()
    assert (empty.shape, empty.dtype) == ((128, 64, 8, 8), torch.float32)


def read(header):
    """What a receiver does with a header: size buffers, build the message."""
    specs, build = decode(header)
    return build([spec.empty() for spec in specs])


GOOD = encode(TrainBatch(1, {"a": (torch.zeros(2), [None])}, torch.zeros(2)))[0]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from("tudls"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("tudls"), inner),
    max_leaves=6,
)


@given(st.binary(max_size=40))
def test_noise_is_no_header(noise):
    with pytest.raises(InputError, match="readable header"):
        read(noise)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_harmless(place, change):
    damaged = bytearray(GOOD)
    damaged[place] ^= change
    with suppress(InputError):
        specs, build = decode(bytes(damaged))  # not `read`: a size may have become huge
        assert isinstance(build([torch.zeros(1)] * len(specs)), Message)


@given(st.sampled_from(["kind", "values"]), JSON)
def test_a_field_of_the_wrong_kind_is_only_ever_an_input_error(name, value):
    header = json.loads(GOOD)
    header[name] = value
    try:
        message = read(json.dumps(header).encode())
    except InputError:
        return
    assert isinstance(message, Message)


@given(st.integers(0, 5), JSON)
def test_a_value_of_the_wrong_kind_is_only_ever_an_input_error(place, value):
    header = json.loads(GOOD)
    header["values"][place] = value
    try:
        message = read(json.dumps(header).encode())
    except InputError:
        return
    assert isinstance(message, Message)


@pytest.mark.parametrize(
    "header",
    [
        GOOD[:-1],
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        GOOD.replace(b"float32", b"load"),
        GOOD.replace(b"float32", b"nn"),
        GOOD.replace(b'"t":["float32",false,2]', b'"t":["float32",false,-2]'),
        GOOD.replace(b'"t":["float32",false,2]', b'"t":["float32",false,"2"]'),
        GOOD.replace(b'"t":["float32",false,2]', b'"t":["float32",true,2]'),
        GOOD.replace(b"TrainBatch", b"Message"),
        b'{"kind":"TrainBatch","values":' + b"[" * 100_000,
    ],
    ids=range(12),
)
def test_a_damaged_header_is_an_input_error(header):
    with pytest.raises(InputError, match="must begin with a readable header"):
        read(header)


@pytest.mark.parametrize(
    "value",
    [3.0, "text", {1: torch.zeros(1)}, torch.return_types.max((torch.zeros(1), torch.zeros(1)))],
    ids=["number", "string", "keys", "named tuple"],
)
def test_only_plain_trees_cross_a_cut(value):
    with pytest.raises(InputError, match="must be a tensor, None, or plain lists"):
        tree_map(torch.clone, {"ok": (value,)})


def test_a_message_cannot_be_changed():
    message = Stop(1)
    with pytest.raises(AttributeError):
        message.step = 2
