"""Projection heads: from the features of a stage to the vectors its local objective compares.

A head *factory* is any callable from the shape of one sample's features (without the batch
dimension) to a module that maps ``[N, *shape]`` to ``[N, D]``. Each stage needs a head of its own
size, so methods take factories, never modules; a user's own function serves as well as these.

Shapes: ``[C]`` flat features, ``[L, C]`` a sequence of L positions, ``[C, H, W]`` feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from scpl.errors import InputError, unknown_name

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

Head: TypeAlias = Callable[[tuple[int, ...]], nn.Module]


@dataclass(frozen=True)
class Identity:
    """No parameters: the features themselves, flattened to ``[N, prod(shape)]``."""

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Flatten()


@dataclass(frozen=True)
class Linear:
    """Flatten, then one linear layer: ``[N, *shape] -> [N, out_features]``.

    Raises:
        InputError: A width below one; on a call, a shape without positive sizes.
    """

    out_features: int = 128

    def __post_init__(self) -> None:
        _check_width("out_features", self.out_features)

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), self.out_features))


@dataclass(frozen=True)
class MLP:
    """The paper's head: flatten, linear, ReLU, linear: ``[N, *shape] -> [N, out_features]``.

    Every entry of a feature map has its own row of weights, so the head grows with the image.

    Raises:
        InputError: A width below one; on a call, a shape without positive sizes.

    Source:
        Projector type "m" of the published SCPL code, with its default widths for images.
    """

    hidden_features: int = 512
    out_features: int = 1024

    def __post_init__(self) -> None:
        _check_width("hidden_features", self.hidden_features)
        _check_width("out_features", self.out_features)

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Sequential(
            nn.Flatten(), *_mlp(math.prod(shape), self.hidden_features, self.out_features)
        )


@dataclass(frozen=True)
class PooledMLP:
    """Summarise positions, then linear, ReLU, linear: ``[N, *shape] -> [N, out_features]``.

    Feature maps ``[C, H, W]`` are averaged down to at most ``pool x pool``, sequences ``[L, C]``
    to their mean over L, and flat features ``[C]`` are taken as they are. Smaller maps are left
    alone.

    Heads are trained but serve no prediction, and the paper's are larger than the network; this
    one is small. On VGG8 with 32 x 32 images and 10 classes, which has 11.9 million
    parameters, the four heads have together:

    - :class:`MLP`: 57,677,824 parameters, 4.8 times the network;
    - :class:`PooledMLP`: 3,934,720 parameters, a third of it.

    Args:
        hidden_features: Width between the two linear layers.
        out_features: D, the length of a projection.
        pool: Rows and columns of a map that are kept at most.

    Raises:
        InputError: A width below one; on a call, a shape that is none of the three.
    """

    hidden_features: int = 512
    out_features: int = 128
    pool: int = 2

    def __post_init__(self) -> None:
        for name in ("hidden_features", "out_features", "pool"):
            _check_width(name, getattr(self, name))

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        layers, in_features = pooled(shape, self.pool)
        return nn.Sequential(*layers, *_mlp(in_features, self.hidden_features, self.out_features))


class MeanOverPositions(nn.Module):
    """Average a sequence over its positions: ``[N, L, C] -> [N, C]``."""

    def forward(self, features: Tensor) -> Tensor:
        """Average ``features`` over dimension 1."""
        return features.mean(dim=1)


def local_classifier(
    shape: tuple[int, ...],
    num_classes: int,
    hidden_features: int,
    build: Callable[[tuple[int, ...], int], nn.Module] | None = None,
) -> nn.Module:
    """Build a classifier of one stage's features: the user's kind, or a pooled two-layer network.

    Args:
        shape: Shape of one sample's features.
        num_classes: C, the number of logits.
        hidden_features: Width between the two layers, where ``build`` is None.
        build: Builds a classifier from the two arguments before.
    """
    if build is not None:
        return build(shape, num_classes)
    return PooledMLP(hidden_features, num_classes)(shape)


_BY_NAME: dict[str, Callable[[], Head]] = {
    "identity": Identity,
    "linear": Linear,
    "mlp": MLP,
    "pooled-mlp": PooledMLP,
}


def known() -> tuple[str, ...]:
    """Names that :func:`by_name` answers to."""
    return tuple(_BY_NAME)


def by_name(name: str) -> Head:
    """The head factory of this name, with its default widths.

    Args:
        name: ``"identity"``, ``"linear"``, ``"mlp"`` or ``"pooled-mlp"``.

    Raises:
        InputError: No head has this name; the message lists those that exist.
    """
    if name not in _BY_NAME:
        raise unknown_name("head", name, _BY_NAME)
    return _BY_NAME[name]()


def pooled(shape: tuple[int, ...], pool: int | tuple[int, int]) -> tuple[list[nn.Module], int]:
    """Summarise positions: the layers, and how many features they leave of a sample."""
    _check_shape(shape)
    match shape:
        case (channels,):
            return [], channels
        case (_, channels):
            return [MeanOverPositions()], channels
        case (channels, height, width):
            most = pool if isinstance(pool, tuple) else (pool, pool)
            rows, columns = min(most[0], height), min(most[1], width)
            layers = [*_average_pool((height, width), (rows, columns)), nn.Flatten()]
            return layers, channels * rows * columns
        case _:
            raise InputError(
                "A pooled head takes features of the shape [C], [L, C] or [C, H, W]",
                f"Got {list(shape)} for one sample",
                "Use the head 'mlp', which flattens any shape, or pass your own factory",
            )


def _mlp(in_features: int, hidden_features: int, out_features: int) -> tuple[nn.Module, ...]:
    return (
        nn.Linear(in_features, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, out_features),
    )


def _average_pool(size: tuple[int, int], to: tuple[int, int]) -> tuple[nn.Module, ...]:
    """Average maps of one size down to another; fixed windows where they fit, which is faster."""
    if size == to:
        return ()
    if size[0] % to[0] == 0 and size[1] % to[1] == 0:
        return (nn.AvgPool2d((size[0] // to[0], size[1] // to[1])),)
    return (nn.AdaptiveAvgPool2d(to),)


def _check_shape(shape: tuple[int, ...]) -> None:
    if not shape or any(size < 1 for size in shape):
        raise InputError(
            "A head needs the shape of one sample's features, with at least one positive size",
            f"Got {list(shape)}",
            "Pass the shape without the batch dimension, e.g. tuple(features.shape[1:])",
        )


def _check_width(name: str, value: int) -> None:
    if value < 1:
        raise InputError(
            f"{name} of a head must be at least 1", f"Got {value}", "Use a positive whole number"
        )
