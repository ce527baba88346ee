"""Random generators that depend on nothing but their keys.

The global random state belongs to the network (dropout, initial weights). Data code that drew from
it would change the network's numbers whenever a batch is prepared earlier or later, for example by
the prefetching thread. So each draw of this package has a generator of its own.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(purpose: str, seed: int, *keys: int) -> torch.Generator:
    """Make a CPU generator from a purpose, a seed and any further numbers.

    Args:
        purpose: Keeps the streams of different uses apart, e.g. ``"order"``.
        seed: The user's seed; any integer.
        keys: For example epoch and batch index.
    """
    text = ":".join([purpose, str(int(seed)), *(str(int(key)) for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
