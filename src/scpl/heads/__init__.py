"""Between a stage and its loss: projection heads, local classifiers and auxiliary networks.

May import: errors.
"""

from scpl.heads.projection import (
    MLP,
    Head,
    Identity,
    Linear,
    PooledMLP,
    by_name,
    known,
    local_classifier,
    pooled,
)

__all__ = [
    "MLP",
    "Head",
    "Identity",
    "Linear",
    "PooledMLP",
    "by_name",
    "known",
    "local_classifier",
    "pooled",
]
