"""Seeds: every draw has a purpose, and depends on nothing but the user's seed and that purpose.

The global random state belongs to the network (dropout, initial weights). Code that drew from it
for anything else would change the network's numbers whenever it runs earlier or later.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, *names: str | int) -> int:
    """Derive an independent 63-bit seed for a named purpose."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Make a CPU generator for a named purpose.

    Args:
        seed: The user's seed.
        names: What is drawn, and any further numbers, for example epoch and batch.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *names))
