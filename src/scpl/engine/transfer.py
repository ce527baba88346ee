"""Moves values between the host and an accelerator so that neither waits for the other in vain.

An accelerator works behind the host: whoever looks at one of its values waits until all that was
asked of it before is done, and meanwhile nothing new is asked. A copy waits as well if it touches
memory of the host that is not pinned, whatever it was told.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "LOOK_EVERY",
    "answers_at_once",
    "numbers",
    "on_host",
    "own_stream",
    "upload",
    "use_device",
]

LOOK_EVERY = 64
"""Steps between two looks at values of an accelerator that may be wrong."""


def answers_at_once(device: torch.device) -> bool:
    """Whether looking at a value of this device costs nothing; else it waits for the device."""
    return device.type == "cpu"


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Read scalars as numbers, with one transfer for all that share a device and a type."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, scalar in enumerate(scalars):
        places.setdefault((scalar.device, scalar.dtype), []).append(place)
    found = [0.0] * len(scalars)
    for alike in places.values():
        values = torch.stack([scalars[place] for place in alike]).cpu().double().tolist()
        for place, value in zip(alike, values, strict=True):
            found[place] = value
    return found


def upload(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Put a tensor on a device, without waiting for a CUDA device.

    What is pinned and contiguous is read while the caller goes on, so it must not be overwritten;
    everything else is copied first.

    Args:
        tensor: Of any device.
        device: Where it is wanted.
        dtype: The type in which it is wanted; default: its own.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        # A copy towards the CPU that does not block would be read before it is there.
        return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")
    tensor = tensor.to(dtype or tensor.dtype)  # on the way it would need memory that is not pinned
    if not (tensor.is_contiguous() and tensor.is_pinned()):
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def on_host(like: Tensor) -> Tensor:
    """Make an empty tensor on the CPU, pinned if it is for what lies on a CUDA device."""
    pinned = like.device.type == "cuda"
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)


def use_device(device: torch.device) -> None:
    """Let this thread use a CUDA device: every thread begins with the first one.

    It would make a context there, which costs memory, if it only chose streams of another device.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Make a stream for copies that computing need not wait for; None where there are none."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
