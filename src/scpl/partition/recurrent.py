"""Recurrent layers as single nodes of a graph.

``torch.export`` writes out the steps of an LSTM, GRU or RNN one by one, for the length of the
example: slow to run, and right for no other length. While a network is traced, its recurrent layers
call stand-ins that only tell the shapes of their outputs; in the finished graph the operations of
torch take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.nn.modules import rnn

__all__ = ["recurrent_layers_as_nodes", "restore_recurrent_layers"]

_SPACE = "scpl_recurrent"
_ARGUMENTS = (
    "(Tensor input, Tensor[] states, Tensor[] weights, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, bool batch_first) -> Tensor[]"
)
_KINDS = {
    "lstm": torch.ops.aten.lstm.input,
    "gru": torch.ops.aten.gru.input,
    "rnn_tanh": torch.ops.aten.rnn_tanh.input,
    "rnn_relu": torch.ops.aten.rnn_relu.input,
}


@cache
def _library() -> torch.library.Library:
    """Define the stand-ins, once."""
    library = torch.library.Library(_SPACE, "DEF")  # type: ignore[no-untyped-call]
    for kind in _KINDS:
        library.define(f"{kind}{_ARGUMENTS}")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{_SPACE}::{kind}", _shapes, lib=library)
    return library


def _shapes(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """An output ``[N, L, directions * D]`` (or ``[L, N, ...]``), and a state like each given."""
    features = states[0].shape[2] * (2 if bidirectional else 1)
    output = input.new_empty((*input.shape[:2], features))
    return [output, *(torch.empty_like(state) for state in states)]


class _StandIns:
    """In place of the functions that recurrent layers call."""

    def __getattr__(self, name: str) -> Any:
        original = getattr(torch._VF, name)
        return _stand_in(name, original) if name in _KINDS else original


def _stand_in(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if len(arguments) != 9 or not isinstance(arguments[3], bool):
            return original(*arguments)  # of packed sequences
        given, states, *others = arguments
        several = isinstance(states, (tuple, list))
        operation = getattr(getattr(torch.ops, _SPACE), kind)
        return tuple(operation(given, list(states) if several else [states], *others))

    return call


@contextmanager
def recurrent_layers_as_nodes() -> Iterator[None]:
    """Let recurrent layers that run inside become one node each."""
    _library()
    with mock.patch.object(rnn, "_VF", _StandIns()):
        yield


def restore_recurrent_layers(graph: fx.Graph) -> None:
    """Put torch's operations in place of the stand-ins."""
    wanted = {f"{_SPACE}.{kind}.default": kind for kind in _KINDS}
    for node in graph.nodes:
        kind = wanted.get(str(node.target))
        if kind is not None:
            given, states, *others = node.args
            node.target = _KINDS[kind]
            node.args = (given, states if kind == "lstm" else states[0], *others)
