"""The Transformer text classifier of the paper."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scpl.errors import InputError
from scpl.models.text import (
    Embedding,
    MaskedMean,
    TextFeatures,
    check_text_sizes,
    classifier,
    masked_mean,
    sinusoids,
)

__all__ = ["Transformer"]

_HEADS = (6, 5, 4, 3, 2, 1)  # the paper's 6 where they share the width equally


class Transformer(nn.Sequential):
    """Token embedding, ``depth`` encoder layers, and a classifier on the mean of a text's tokens.

    Children: ``embedding``, ``layer1`` to ``layer<depth>``, ``pool``, ``classifier``.

    Args:
        num_classes: Number of logits.
        vocab_size: Number of token ids.
        depth: Number of encoder layers.
        width: Entries of a token's vector.
        heads: Attention heads; they share the width equally. Default: the most of up to 6 that can.
        feed_forward: Width of a layer's hidden linear layer.
        dropout: Share of entries (attention weights, hidden layer, residual branches) that are
            dropped while training.
        vectors: Initial token vectors ``[vocab_size, width]``.

    Raises:
        InputError: A size out of range, or vectors of another shape.

    Source:
        arXiv 2602.00062, text experiments; the defaults are its sizes. The published code has no
        positions, so its attention cannot tell the order of words; this network has.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        *,
        depth: int = 3,
        width: int = 300,
        heads: int | None = None,
        feed_forward: int = 300,
        dropout: float = 0.1,
        vectors: Tensor | None = None,
    ) -> None:
        if heads is None:
            heads = next(count for count in _HEADS if width % count == 0)
        sizes = {"num_classes": num_classes, "depth": depth, "width": width, "heads": heads}
        check_text_sizes("Transformer", vocab_size, dropout, feed_forward=feed_forward, **sizes)
        if width % heads:
            raise InputError(
                "The heads of a Transformer must share its width equally",
                f"Got width={width} and heads={heads}",
                f"Make the width a multiple of {heads}",
            )
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["embedding"] = Embedding(vocab_size, width, vectors)
        for number in range(1, depth + 1):
            children[f"layer{number}"] = EncoderLayer(
                width, heads, feed_forward, dropout, positions=number == 1
            )
        children["pool"] = MaskedMean()
        children["classifier"] = classifier(width, num_classes)
        super().__init__(children)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each normalised before and added to its input.

    A last normalisation makes every layer's output a fit input for a local objective. The first
    layer adds sinusoids of the positions to its input: not the embedding, for the mean of its
    vectors is what its own stage learns from, and not learned ones, which have a longest text.
    """

    def __init__(
        self, width: int, heads: int, feed_forward: int, dropout: float, *, positions: bool
    ) -> None:
        super().__init__()
        self.positions = positions
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(feed_forward, width),
        )
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: TextFeatures) -> TextFeatures:
        """Let the tokens of each text see each other."""
        hidden, mask = features
        if self.positions:
            _, length, width = hidden.shape
            hidden = hidden + sinusoids(length, width, hidden.device).to(hidden.dtype)
        hidden = hidden + self.dropout(self.attention(self.norm1(hidden), mask))
        hidden = hidden + self.dropout(self.feed_forward(self.norm2(hidden)))
        return self.norm3(hidden), mask

    def summarize(self, features: TextFeatures) -> Tensor:
        """Average the vectors of a text: ``[N, C]``."""
        return masked_mean(*features)


class SelfAttention(nn.Module):
    """Multi-head attention of a text's tokens to each other, never to padding."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Attend: ``[N, L, C]`` and ``[N, L]`` to ``[N, L, C]``."""
        split = self.query_key_value(hidden).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, L, C / heads]
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, mask[:, None, None, :], dropout)
        merged: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return merged
