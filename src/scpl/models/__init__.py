"""The networks: those of the paper, a small CNN and an MLP; and those that come from elsewhere.

Each of ours is an ``nn.Sequential`` with named children, so its forward pass is the chain of the
children and it can be cut before any of them. The user's own come from a function of his or from
timm (`own`), or from ``transformers`` (`pretrained`). Importing this package does not import torch.

May import: errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from scpl.errors import InputError, unknown_name

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Origin",
    "build",
    "build_text",
    "known",
    "known_text",
    "origin_of",
    "paper_cuts",
    "readout",
    "text_sizes",
]

Origin: TypeAlias = Literal["ours", "factory", "hf", "timm"]


def origin_of(name: str) -> Origin:
    """Say where a network comes from.

    ``hf:FOLDER_OR_NAME`` is one of ``transformers``, ``timm:NAME`` one of timm, and
    ``package.module:function`` one that a function of the user makes.
    """
    prefix, colon, _ = name.partition(":")
    if not colon:
        return "ours"
    if prefix == "hf":
        return "hf"
    return "timm" if prefix == "timm" else "factory"


class _Entry(NamedTuple):
    make: Callable[..., nn.Sequential]
    cuts: tuple[str, ...]
    sizes: tuple[str, ...] = ()  # which a user may give; text networks only


# Each network is imported by its own function, so that the names are known before torch is loaded.


def _vgg8(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Sequential:
    from scpl.models.vgg import VGG8

    return VGG8(num_classes, in_channels, image_size, width=width)


def _resnet(
    num_classes: int, in_channels: int, image_size: int, width: float, **variant: Any
) -> nn.Sequential:
    from scpl.models.resnet import ResNet

    return ResNet(num_classes, in_channels, image_size, width=width, **variant)


def _small_cnn(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Sequential:
    from scpl.models.small import SmallCNN

    return SmallCNN(num_classes, in_channels, image_size, width=max(1, round(8 * width)))


def _mlp(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Sequential:
    from scpl.models.small import MLP

    return MLP(num_classes, in_channels * image_size**2, hidden=max(1, round(256 * width)))


def _lstm(num_classes: int, vocab_size: int, **sizes: Any) -> nn.Sequential:
    from scpl.models.lstm import LSTM

    return LSTM(num_classes, vocab_size, **sizes)


def _transformer(num_classes: int, vocab_size: int, **sizes: Any) -> nn.Sequential:
    from scpl.models.transformer import Transformer

    return Transformer(num_classes, vocab_size, **sizes)


_BLOCKS = ("block2", "block3", "block4")
_LAYERS = ("layer2", "layer3", "layer4")
_MODELS = {
    "vgg8": _Entry(_vgg8, _BLOCKS),
    "resnet18": _Entry(partial(_resnet, depth=18), _LAYERS),
    "resnet18-3x3": _Entry(partial(_resnet, depth=18, shortcut="projection3x3"), _LAYERS),
    "resnet34": _Entry(partial(_resnet, depth=34), _LAYERS),
    "resnet50": _Entry(partial(_resnet, depth=50), _LAYERS),
    "small-cnn": _Entry(_small_cnn, _BLOCKS),
    "mlp": _Entry(_mlp, _LAYERS),
}
_TEXT_CUTS = ("layer1", "layer2", "layer3")
_SIZES = ("depth", "width", "dropout", "vectors")
_TEXT_MODELS = {
    "lstm": _Entry(_lstm, _TEXT_CUTS, (*_SIZES, "embedding_size", "hand_over")),
    "transformer": _Entry(_transformer, _TEXT_CUTS, (*_SIZES, "heads", "feed_forward")),
}


def known() -> tuple[str, ...]:
    """Names of the networks that :func:`build` makes."""
    return tuple(_MODELS)


def known_text() -> tuple[str, ...]:
    """Names of the networks that :func:`build_text` makes."""
    return tuple(_TEXT_MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
) -> nn.Sequential:
    """Build a network with freshly drawn weights (PyTorch's default initialisation).

    Args:
        name: One of :func:`known`. ``"resnet18-3x3"`` has the projection shortcuts of the authors'
            first SCPL code, the other ResNets the standard ones.
        num_classes: Number of logits.
        in_channels: Channels of the input, or columns of a table row (``"mlp"``, image size 1).
        image_size: Height and width of the input in pixels.
        width: Factor on the channels of every layer, or on the hidden features (``"mlp"``).

    Returns:
        A module from ``[N, in_channels, image_size, image_size]`` to logits ``[N, num_classes]``.

    Raises:
        InputError: An unknown name, or a size the network cannot take.
    """
    if not 0 < width < math.inf:
        raise InputError("The width of a network must be a factor above 0", f"Got {width}", "Use 1")
    return _entry(name).make(num_classes, in_channels, image_size, width)


def build_text(name: str, *, num_classes: int, vocab_size: int, **sizes: Any) -> nn.Sequential:
    """Build a text network with freshly drawn weights.

    Args:
        name: One of :func:`known_text`.
        num_classes: Number of logits.
        vocab_size: Number of token ids, with 0 (padding) and 1 (unknown).
        sizes: Sizes other than the paper's, by name: ``depth``, ``width``, ``dropout``, and for
            ``"transformer"`` ``heads`` and ``feed_forward``, for ``"lstm"`` ``embedding_size`` and
            ``hand_over``; also ``vectors``, the initial word vectors ``[vocab_size, width]``.

    Returns:
        A module from token ids ``[N, L]``, padded at the end with 0, to logits
        ``[N, num_classes]``.

    Raises:
        InputError: An unknown name, or a size the network does not have or cannot take.
    """
    known = text_sizes(name)
    for size in sizes:
        if size not in known:
            raise unknown_name(f"A size of {name!r}", size, known)
    return _TEXT_MODELS[name].make(num_classes, vocab_size, **sizes)


def text_sizes(name: str) -> tuple[str, ...]:
    """Names of the sizes that :func:`build_text` takes for a network.

    Raises:
        InputError: An unknown name.
    """
    if name not in _TEXT_MODELS:
        # Whoever has a table and names no network meets the default one, which is for images.
        fix = f"{name} is for images: choose one of these with `model`" if name in _MODELS else ""
        raise unknown_name("text model", name, _TEXT_MODELS, fix)
    return _TEXT_MODELS[name].sizes


def paper_cuts(name: str) -> tuple[str, ...]:
    """Children that stages 2, 3 and 4 of the paper's four-stage partition begin with.

    Raises:
        InputError: An unknown name.
    """
    return _TEXT_MODELS[name].cuts if name in _TEXT_MODELS else _entry(name).cuts


def readout(name: str) -> str | None:
    """The child that turns the last features into logits; None if the network is not ours.

    Raises:
        InputError: An unknown name.
    """
    if origin_of(name) != "ours":
        return None
    paper_cuts(name)  # raises where the name is unknown
    return "classifier"


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise unknown_name("model", name, _MODELS)
    return _MODELS[name]
