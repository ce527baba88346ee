"""The LSTM text classifier of the paper."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

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

    C is `inputs`, H is `width`. The backward direction is given each text reversed, with the
    padding still behind it. (``pack_padded_sequence`` is ten times as slow on a CPU and waits for
    the lengths on an accelerator.) With `hand_over` the layer appends its final cell states
    ``[N, 2, H]``, and begins in the final states of a layer before that did so.
    """

    def __init__(self, inputs: int, width: int, dropout: float, *, hand_over: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.hand_over = hand_over
        self.ahead, self.back = (
            nn.LSTM(inputs + hand_over, width, batch_first=True) for _ in range(2)
        )
        if hand_over:
            _hold(self.ahead)
            _hold(self.back)

    def forward(self, features: TextFeatures) -> TextFeatures:
        """Read ``features`` in both directions."""
        hidden, mask, *cells = features
        starts = _starts(hidden, mask, cells[0]) if cells else (None, None)
        hidden = self.dropout(hidden)
        if self.hand_over:
            padding = ~mask[..., None]
            hidden = torch.cat([hidden.masked_fill(padding, 0.0), padding], dim=2)
        order = _reversal(mask)
        ahead, (_, ahead_cell) = self.ahead(hidden, starts[0])
        back, (_, back_cell) = self.back(_reorder(hidden, order), starts[1])
        output = torch.cat([ahead, _reorder(back, order)], dim=2)
        if not self.hand_over:
            return output, mask
        return output, mask, torch.stack([ahead_cell[0], back_cell[0]], dim=1)

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


def _hold(lstm: nn.LSTM) -> None:
    """Make the last input, 1 at padding, keep the cell as it is: so it ends as the text ends.

    Input gate shut, forget gate open: the gradient of these weights is exactly zero, so they stay.
    """
    with torch.no_grad():
        shut, opened, *others = lstm.get_parameter("weight_ih_l0")[:, -1].chunk(4)
        shut.fill_(-1000.0)
        opened.fill_(1000.0)
        for gate in others:
            gate.zero_()


def _starts(hidden: Tensor, mask: Tensor, cell: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Initial state of each direction from what the layer before handed on."""
    states = final_states(hidden, mask)
    return [(states[None, :, i].contiguous(), cell[None, :, i].contiguous()) for i in (0, 1)]


def _reversal(mask: Tensor) -> Tensor:
    """Positions ``[N, L]`` that reverse each text and leave padding where it is."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, mask.sum(dim=1, keepdim=True) - 1 - places, places)


def _reorder(hidden: Tensor, order: Tensor) -> Tensor:
    return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[2]))
