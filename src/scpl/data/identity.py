"""What a run learnt from and is tested on, so that other data are never taken for the same.

Digests are of the content, not of names and places: a folder that is moved is the same data.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Identities",
    "Identity",
    "changes",
    "identities_of",
    "identities_to_json",
    "of_samples",
    "shared",
    "short",
    "sizes_of",
]

_FEW = 5  # classes in a message


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which samples a split is made of.

    Attributes:
        digest: Of their content and targets.
        count: How many there are.
        sizes: How many of each class or label; empty where numbers are learnt.
    """

    digest: str
    count: int
    sizes: Mapping[str, int]


Identities = Mapping[str, Identity]
"""Those of the splits of a data set, by name: train, valid, test."""


def identities_to_json(identities: Identities) -> dict[str, Any]:
    """Return JSON values."""
    return {name: dataclasses.asdict(each) for name, each in identities.items()}


def identities_of(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Identity]:
    """Rebuild from `identities_to_json`.

    Raises:
        KeyError, TypeError: if the values are damaged.
    """
    return {
        name: Identity(each["digest"], each["count"], each["sizes"])
        for name, each in values.items()
    }


def of_samples(digests: Tensor, labels: Tensor, names: Sequence[str]) -> Identity:
    """Identify samples of one class each. Their order counts, as it does in training.

    Args:
        digests: ``int64 [N]``, of the content of each.
        labels: ``int64 [N]``.
        names: Of the classes; what other classes there are does not count.
    """
    of_names = torch.tensor([short(name.encode(errors="surrogateescape")) for name in names])
    rows = torch.stack([of_names[labels], digests], dim=1)
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return Identity(digest, len(labels), sizes_of(labels, names))


def short(content: bytes | memoryview) -> int:
    """Digest some bytes to 64 bits, which tell a billion samples apart that nobody has forged."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def sizes_of(targets: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Count the samples of each class (``int64 [N]``) or label (``uint8 [N, C]``)."""
    if targets.is_floating_point():
        return {}
    counts = targets.bincount(minlength=len(names)) if targets.ndim == 1 else targets.sum(0)
    return dict(zip(names, counts.tolist(), strict=True))


def changes(before: Identities, now: Identities, noun: str) -> list[str]:
    """Say which splits are not what they were, and in what; nothing if all are.

    Args:
        before: As they were.
        now: As they are.
        noun: What the samples are, in the plural.
    """
    found = []
    for split in dict.fromkeys([*before, *now]):
        old, new = before.get(split), now.get(split)
        if old is None or new is None:
            found.append(f"{split}: {'was not there' if old is None else 'is gone'}")
        elif old.digest != new.digest:
            found.append(f"{split}: {_difference(old, new, noun)}")
    return found


def _difference(old: Identity, new: Identity, noun: str) -> str:
    classes = dict.fromkeys([*old.sizes, *new.sizes])
    moved = {name: new.sizes.get(name, 0) - old.sizes.get(name, 0) for name in classes}
    each = [f"{name} {more:+,}" for name, more in moved.items() if more]
    if len(each) > _FEW:
        each[_FEW:] = [f"and {len(each) - _FEW} more classes"]
    if new.count == old.count and not each:
        return f"{new.count:,} {noun} as before, but others or in another order"
    told = f"{new.count:,} {noun}, {old.count:,} before"
    return f"{told} ({', '.join(each)})" if each else told


def shared(noun: str, train: Tensor, **others: Tensor | None) -> Iterator[str]:
    """Count what occurs in train as well: on it a network is only remembering.

    Args:
        noun: What the samples are, in the plural.
        train: Digests of the samples to train on, ``int64 [N]``; see `short`.
        others: The same of other splits, by their names.
    """
    for name, keys in others.items():
        there = 0 if keys is None else int(torch.isin(keys, train).sum())
        if keys is not None and there:
            yield f"{there:,} of the {len(keys):,} {name} {noun} occur in train as well"
