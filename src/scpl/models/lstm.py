"""The LSTM text classifier of the paper."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from scpl.models.text import Embedding, TextFeatures, check_text_sizes, classifier

__all__ = ["LSTM"]


class LSTM(nn.Sequential):
    """Token embedding, ``depth`` bidirectional LSTM layers, and a classifier on the final states.

    Unlike the published code, which runs over the padding, each direction of a layer reads exactly
    the text's own tokens.

    Children: ``embedding``, ``layer1`` to ``layer<depth>``, ``pool``, ``classifier``.

    Args:
        num_classes: Number of logits.
        vocab_size: Number of token ids.
        depth: Number of LSTM layers.
        width: Entries of a state, per direction.
        embedding_size: Entries of a token's vector; default: `width`.
        dropout: Share of a layer's input entries that are dropped while training.
        hand_over: Begin each layer but the first in the final state of the layer before, as the
            published code does, instead of in zeros.
        vectors: Initial token vectors ``[vocab_size, embedding_size]``.

    Raises:
        InputError: A size out of range, or vectors of another shape.

    Source:
        arXiv 2602.00062, text experiments; the defaults are its sizes.
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        *,
        depth: int = 3,
        width: int = 300,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        hand_over: bool = False,
        vectors: Tensor | None = None,
    ) -> None:
        size = width if embedding_size is None else embedding_size
        sizes = {"num_classes": num_classes, "depth": depth, "width": width}
        check_text_sizes("LSTM", vocab_size, dropout, embedding_size=size, **sizes)
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["embedding"] = Embedding(vocab_size, size, vectors)
        for number in range(1, depth + 1):
            inputs = size if number == 1 else 2 * width
            children[f"layer{number}"] = LSTMLayer(inputs, width, dropout, hand_over=hand_over)
        children["pool"] = FinalStates()
        children["classifier"] = classifier(width, num_classes)
        super().__init__(children)


class LSTMLayer(nn.Module):
    """One bidirectional LSTM layer: ``(hidden [N, L, C], mask)`` to ``(hidden [N, L, 2 H], mask)``.

    Args:
        inputs: C.
        width: H.
        dropout: Share of input entries that are dropped while training.
        hand_over: Append the final cell states ``[N, 2, H]`` to what is returned, and begin in the
            final states of a layer before that did so. (Its final hidden states are in `hidden`.)
    """

    def __init__(self, inputs: int, width: int, dropout: float, *, hand_over: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(inputs, width, batch_first=True, bidirectional=True)
        self.hand_over = hand_over

    def forward(self, features: TextFeatures) -> TextFeatures:
        """Read ``features`` in both directions."""
        hidden, mask, *cells = features
        # Packed, so that the backward direction begins at a text's own end. The lengths must be
        # known on the CPU; on an accelerator this waits for what is under way there.
        packed = pack_padded_sequence(
            self.dropout(hidden), mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False
        )
        start = [state.transpose(0, 1).contiguous() for state in _states(hidden, mask, cells)]
        output, (_, cell) = self.lstm(packed, tuple(start) or None)
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=mask.shape[1])
        return (output, mask, cell.transpose(0, 1)) if self.hand_over else (output, mask)

    def summarize(self, features: TextFeatures) -> Tensor:
        """Average the final hidden states of both directions: ``[N, H]``."""
        return final_states(*features[:2]).mean(dim=1)


class FinalStates(nn.Module):
    """Average the final hidden states of both directions: ``(hidden, mask)`` to ``[N, H]``."""

    def forward(self, features: TextFeatures) -> Tensor:
        """Average the final states in ``features``."""
        return final_states(*features[:2]).mean(dim=1)


def final_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """Find the final states of both directions in a layer's output ``[N, L, 2 H]``: ``[N, 2, H]``.

    The forward direction ends at a text's last token, the backward direction at its first.
    """
    ahead, back = hidden.chunk(2, dim=2)
    last = (mask.sum(dim=1) - 1)[:, None, None].expand(-1, 1, ahead.shape[2])
    return torch.cat([ahead.gather(1, last), back[:, :1]], dim=1)


def _states(hidden: Tensor, mask: Tensor, cells: list[Tensor]) -> list[Tensor]:
    return [final_states(hidden, mask), *cells] if cells else []
