"""What several tasks count and compute alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from scpl.errors import InputError
from scpl.measures import largest, precision_recall_f1
from scpl.tasks.base import WORST

__all__ = [
    "add",
    "add_worst",
    "check_smoothing",
    "constant",
    "in_float32",
    "macro_f1",
    "only_one",
    "precise",
    "precision_table",
]

# Shape suffixes: N = samples, C = outputs of the network.


def check_smoothing(share: float) -> None:
    """Check a share of label smoothing.

    Raises:
        InputError: if it is none.
    """
    if not 0 <= share < 1:
        raise InputError(
            "`label_smoothing` must be a share, from 0 to below 1",
            f"Got {share}",
        )


def add(details: dict[str, Tensor], name: str, counted: Tensor) -> None:
    """Add what was counted to what is there by that name, if there is anything."""
    details[name] = details[name] + counted if name in details else counted


def add_worst(details: dict[str, Tensor], sizes: Tensor, first: int, *columns: Tensor) -> None:
    """Add predictions to the worst ones so far.

    Args:
        details: Gets rows of size, place of the sample, output where there are several, columns.
        sizes: How bad each is, ``[N]`` or ``[N, C]``.
        first: Place of the first sample.
        columns: What else is told of each, of the same shape.
    """
    places = torch.arange(first, first + len(sizes), device=sizes.device)
    if sizes.ndim == 2:
        outputs = torch.arange(sizes.shape[1], device=sizes.device)
        places, columns = places[:, None].expand_as(sizes), (outputs.expand_as(sizes), *columns)
    values = [each.flatten().double() for each in (sizes, places, *columns)]
    rows = largest(torch.stack(values, dim=1))
    details[WORST] = largest(torch.cat([details[WORST], rows])) if WORST in details else rows


def precision_table(
    noun: str, tally: Mapping[str, Tensor], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Say of each class or label how well it is told from the others."""
    rows = []
    counts = (tally[name].tolist() for name in ("there", "found", "right"))
    for name, there, found, right in zip(names, *counts, strict=True):
        precision, recall, f1 = precision_recall_f1(right, found, there)
        sizes = {"samples": int(there), "predicted": int(found), "right": int(right)}
        rows.append({noun: name, **sizes, "precision": precision, "recall": recall, "f1": f1})
    return rows


def macro_f1(tally: Mapping[str, Tensor]) -> float:
    """Compute the mean of F1 over the outputs that are somewhere found or there."""
    either = (tally["found"] + tally["there"]).double()
    each = 2 * tally["right"].double()[either > 0] / either[either > 0]
    return float(each.mean()) if len(each) else 0.0


def only_one(top: int, does: str) -> None:
    """Check that only the best prediction is asked for; ``does`` says what there is instead.

    Raises:
        InputError: if more are.
    """
    if top != 1:
        raise InputError("--top is for classes", f"Got {top}, and this network {does}")


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def in_float32(like: Tensor) -> Iterator[None]:
    """Compute without autocast, on the device of a tensor."""
    with torch.autocast(like.device.type, enabled=False):
        yield


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return numbers ``[C]`` in the type and on the device of another tensor."""
    return _constants(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made once, for a copy to a device waits for it; and never as a tensor of inference alone.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=dtype, device=device)
