"""How a message lies on the wire.

First a frame of fixed size with the header, so that it can be received without knowing what comes;
then the small tensors packed into one; then each large tensor by itself, from its own memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scpl.errors import LinkError
from scpl.message import TensorSpec

__all__ = [
    "HEADER_BYTES",
    "SMALL_BYTES",
    "as_bytes",
    "divide",
    "make_frame",
    "read_frame",
    "size_of",
    "unpack",
]

HEADER_BYTES = 8192
SMALL_BYTES = 4096


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


def make_frame(header: bytes) -> Tensor:
    """Put a header into a frame, ``uint8 [HEADER_BYTES]``.

    Raises:
        LinkError: if it does not fit.
    """
    if len(header) > HEADER_BYTES - 4:
        raise LinkError(
            f"The header of a message must fit into {HEADER_BYTES} bytes",
            f"Got {len(header)} bytes",
            "Let fewer tensors cross this cut",
        )
    text = len(header).to_bytes(4, "little") + header
    frame = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    frame[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return frame


def read_frame(frame: Tensor) -> bytes:
    """Take the header out of a frame."""
    raw = frame.numpy().tobytes()
    return raw[4 : 4 + int.from_bytes(raw[:4], "little")]
