"""What the text networks share: token embedding, positions, pooling and classifier.

Between their layers travels a pair ``(hidden, mask)``: hidden vectors ``[N, L, C]`` and a mask
``[N, L]``, true where there is a token. L is that of the batch; texts end in padding (id 0). What
`hidden` holds at padding means nothing, and no layer here lets it reach a real position, a pool or
a gradient: a text's numbers do not depend on the batch it is in.

A layer that returns such a pair has a method ``summarize``: the one vector per text ``[N, C]`` that
a local objective and the classifier see of it.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from scpl.errors import InputError
from scpl.models.sizes import check_positive

__all__ = ["PAD", "Embedding", "MaskedMean", "TextFeatures", "classifier"]

PAD = 0
"""The id of padding; 1 stands for an unknown word, words begin at 2."""

TextFeatures: TypeAlias = tuple[Tensor, ...]
"""``(hidden [N, L, C], mask [N, L])``, and whatever else a layer hands to the next one."""


class Embedding(nn.Embedding):
    """Look up the vector of every token: ``[N, L]`` ids to ``(hidden [N, L, C], mask [N, L])``.

    Every vector is normalised: mean 0, variance 1. So vectors can be drawn small, where a step of
    the optimizer turns them further (drawn from N(0, 1) they hardly move in an epoch), and
    positions drown neither those nor ones from a file.

    The vector of padding is zero and stays so. A text without tokens reads as one token with that
    vector, so that nothing after it divides by zero.

    Args:
        vocab_size: Number of ids, with those of padding and of the unknown word.
        width: C, entries of a vector.
        vectors: Initial vectors ``[vocab_size, width]``; drawn from N(0, 0.02^2) otherwise.

    Raises:
        InputError: Vectors of another shape.
    """

    def __init__(self, vocab_size: int, width: int, vectors: Tensor | None = None) -> None:
        super().__init__(vocab_size, width, padding_idx=PAD)
        if vectors is None:
            with torch.no_grad():
                self.weight.mul_(0.02)  # as BERT's (Devlin et al. 2019)
            return
        if vectors.shape != self.weight.shape:
            raise InputError(
                f"Word vectors must be [{vocab_size}, {width}]: one per id, as wide as the network",
                f"Got {list(vectors.shape)}",
                "Build the network with the vectors' width, or use vectors of another width",
            )
        with torch.no_grad():
            self.weight.copy_(vectors)
            self.weight[PAD].zero_()

    def forward(self, tokens: Tensor) -> TextFeatures:  # type: ignore[override]
        """Look up ``tokens`` and mark which of them are real."""
        if tokens.shape[1] == 0:  # a batch of nothing but empty texts
            tokens = tokens.new_full((len(tokens), 1), PAD)
        mask = tokens != PAD
        mask[:, 0] = True
        return layer_norm(super().forward(tokens), (self.embedding_dim,)), mask

    def summarize(self, features: TextFeatures) -> Tensor:
        """Average the vectors of a text: ``[N, C]``."""
        return masked_mean(*features)


class MaskedMean(nn.Module):
    """Average the vectors of a text's real tokens: ``(hidden, mask)`` to ``[N, C]``."""

    def forward(self, features: TextFeatures) -> Tensor:
        """Average ``features``."""
        return masked_mean(*features)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``hidden [N, L, C]`` over the positions where ``mask [N, L]`` is true: ``[N, C]``."""
    total = hidden.masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Waves ``[length, width]`` that tell positions apart (Vaswani et al. 2017, section 3.5)."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    steps = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = positions[:, None] * torch.exp(steps * (-math.log(10_000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


def classifier(width: int, num_classes: int) -> nn.Sequential:
    """The paper's read-out: linear, Tanh, linear."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes))


def check_text_sizes(network: str, vocab_size: int, dropout: float, **sizes: int) -> None:
    """Raise InputError unless a text network can be built with these sizes."""
    check_positive(network, **sizes)
    if vocab_size < 2:
        raise InputError(
            f"{network} needs a vocabulary with ids for padding (0) and the unknown word (1)",
            f"Got vocab_size={vocab_size}",
            "Count both: two more than there are words",
        )
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout of {network} must lie in 0 .. below 1", f"Got {dropout}")
