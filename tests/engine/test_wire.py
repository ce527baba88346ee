"""What is sent is what arrives, for any mix of sizes and types."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.engine.channel import (
    HEADER_BYTES,
    SMALL_BYTES,
    as_bytes,
    divide,
    make_frames,
    missing_bytes,
    read_frames,
    size_of,
    unpack,
)
from scpl.engine.messages import Kind, Message, decode, encode
from scpl.partition.values import TensorSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.sampled_from([0, 1, 3, 40]), max_size=3)),
        max_size=6,
    )
)
def test_any_message_survives_the_wire(parts):
    """Small tensors travel packed, large ones by themselves; the receiver knows only the frame."""
    sent = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in parts]
    header, tensors = encode(Message(Kind.TRAIN, 3, features=sent))
    small, large = divide(tensors)
    (frame,) = make_frames(header)
    assert frame.shape == (HEADER_BYTES,)

    specs, build = decode(read_frames([frame]))
    packed, waiting, offset, received = (small or [None])[0], iter(large), 0, []
    for spec in specs:
        if size_of(spec) > SMALL_BYTES:
            tensor = spec.empty()
            as_bytes(tensor).copy_(next(waiting))
        else:
            tensor, offset = unpack(packed, spec, offset, torch.device("cpu"))
        received.append(tensor)
    message = build(received)
    assert message.step == 3
    assert [TensorSpec.of(t) for t in message.features] == [TensorSpec.of(t) for t in sent]
    assert all(torch.equal(a, b) for a, b in zip(message.features, sent, strict=True))


def test_large_tensors_are_not_copied():
    tensor = torch.zeros(SMALL_BYTES)
    small, (large,) = divide([tensor])
    assert small == []
    assert large.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("size", [0, 5, HEADER_BYTES - 4, HEADER_BYTES - 3, 9000, 100_000])
def test_a_header_of_any_length_travels(size):
    """The losses and observations of 32 stages make a header of 9,121 bytes, and were refused."""
    header = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    frames = make_frames(header)
    assert [frame.numel() for frame in frames[1:]] == [size + 4 - HEADER_BYTES] * (
        size + 4 > HEADER_BYTES
    )
    assert missing_bytes(frames[0]) == sum(frame.numel() for frame in frames[1:])
    assert read_frames(frames) == header
