"""Between a stage and its loss: projection heads, and layers that local classifiers are made of.

May import: errors.
"""

from scpl.heads.projection import (
    MLP,
    Convolutional,
    Head,
    Identity,
    Linear,
    PooledMLP,
    by_name,
    known,
    pooled,
    projection_length,
)

__all__ = [
    "MLP",
    "Convolutional",
    "Head",
    "Identity",
    "Linear",
    "PooledMLP",
    "by_name",
    "known",
    "pooled",
    "projection_length",
]
