"""How a message lies on the wire.

First a frame of fixed size with the header, so that it can be received without knowing what comes,
and the rest of the header if it is longer; then the small tensors packed into one; then each large
tensor by itself, from its own memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scpl.message import TensorSpec

__all__ = [
    "HEADER_BYTES",
    "SMALL_BYTES",
    "as_bytes",
    "divide",
    "make_frames",
    "missing_bytes",
    "read_frames",
    "size_of",
    "unpack",
]

HEADER_BYTES = 8192
SMALL_BYTES = 4096
_LENGTH = 4  # bytes at the start of a frame that hold the header's length


def divide(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pack the small tensors into one buffer of bytes; leave the large ones where they are."""
    small = [t for t in tensors if t.nbytes <= SMALL_BYTES and t.numel()]
    large = [as_bytes(t) for t in tensors if t.nbytes > SMALL_BYTES]
    return ([torch.cat([as_bytes(t) for t in small])] if small else []), large


def as_bytes(tensor: Tensor | None) -> Tensor:
    """See a tensor as bytes: gloo and NCCL do not know every type."""
    assert tensor is not None
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def unpack(
    packed: Tensor | None, spec: TensorSpec, offset: int, device: torch.device
) -> tuple[Tensor, int]:
    """Take one small tensor out of the packed ones; returns it and where the next begins."""
    tensor = spec.empty(device)
    size = tensor.nbytes
    if size:
        assert packed is not None
        as_bytes(tensor).copy_(packed[offset : offset + size])
    return tensor, offset + size


def size_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    size = spec.dtype.itemsize
    for length in spec.shape:
        size *= length
    return size


def make_frames(header: bytes) -> list[Tensor]:
    """Put a header into a frame, ``uint8 [HEADER_BYTES]``; what does not fit follows in a second.

    The losses of every stage travel with each message, so a line of many stages has long headers.
    """
    raw = len(header).to_bytes(_LENGTH, "little") + header
    frame = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    first = bytearray(raw[:HEADER_BYTES])
    frame[: len(first)] = torch.frombuffer(first, dtype=torch.uint8)
    rest = bytearray(raw[HEADER_BYTES:])
    return [frame, torch.frombuffer(rest, dtype=torch.uint8)] if rest else [frame]


def missing_bytes(frame: Tensor) -> int:
    """How many bytes of the header follow in a second frame."""
    length = int.from_bytes(frame[:_LENGTH].numpy().tobytes(), "little")
    return max(0, length - (HEADER_BYTES - _LENGTH))


def read_frames(frames: list[Tensor]) -> bytes:
    """Take the header out of its frames."""
    raw = b"".join(frame.numpy().tobytes() for frame in frames)
    return raw[_LENGTH : _LENGTH + int.from_bytes(raw[:_LENGTH], "little")]
