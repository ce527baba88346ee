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

import torch
from torch import Tensor, nn

from scpl.errors import InputError, unknown_name

__all__ = [
    "MLP",
    "Convolutional",
    "Head",
    "Identity",
    "Linear",
    "MapNorm",
    "MeanOverPositions",
    "PooledMLP",
    "RowNorm",
    "by_name",
    "known",
    "pooled",
    "projection_length",
]

Head: TypeAlias = Callable[[tuple[int, ...]], nn.Module]

_NARROWEST = 32  # channels of a convolutional head


class _Sized:
    """A factory whose fields are widths: whole numbers of at least 1."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(
                    f"{name} of a head must be at least 1",
                    f"Got {value}",
                    "Use a positive whole number",
                )


@dataclass(frozen=True)
class Identity:
    """No parameters: the features themselves, flattened to ``[N, prod(shape)]``."""

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Flatten()


@dataclass(frozen=True)
class Linear(_Sized):
    """Flatten, then one linear layer: ``[N, *shape] -> [N, out_features]``.

    Raises:
        InputError: A width below one; on a call, a shape without positive sizes.
    """

    out_features: int = 128

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), self.out_features))


@dataclass(frozen=True)
class MLP(_Sized):
    """The paper's head: flatten, linear, ReLU, linear: ``[N, *shape] -> [N, out_features]``.

    Every entry of a feature map has its own row of weights, so the head grows with the image.

    Raises:
        InputError: A width below one; on a call, a shape without positive sizes.

    Source:
        Projector type "m" of the published SCPL code, with its default widths for images.
    """

    hidden_features: int = 512
    out_features: int = 1024

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        _check_shape(shape)
        return nn.Sequential(
            nn.Flatten(), *_mlp(math.prod(shape), self.hidden_features, self.out_features)
        )


@dataclass(frozen=True)
class PooledMLP(_Sized):
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

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        layers, in_features = pooled(shape, self.pool)
        return nn.Sequential(*layers, *_mlp(in_features, self.hidden_features, self.out_features))


@dataclass(frozen=True)
class Convolutional:
    """Strided convolutions like those of the layers to come, then a pooled two-layer network.

    What a stage's objective can see decides what the stage learns to pass on: read by two linear
    layers, features must be linearly useful at once; read by a few layers like the ones that
    follow, they may be left unfinished, as under backpropagation. Each 3 x 3 convolution (batch
    norm, ReLU) halves a map that is larger than the pool, so the heads cost a small part of the
    network: at 32 x 32 pixels 8 % of the operations of VGG8 and 5 % of those of ResNet-18.
    Feature maps ``[C, H, W]`` only are convolved; for sequences and flat features the head is
    :class:`PooledMLP`.

    Args:
        depth: Number of convolutions.
        width: Channels of the convolutions, as a factor on those of the features; there are at
            least 32, because what a narrow head cannot see a narrow stage does not learn.
        hidden_features: Width between the two linear layers.
        out_features: D, the length of a projection.
        pool: Rows and columns of a map that are kept at most.

    Raises:
        InputError: A width below one or a depth below zero; on a call, a shape that is none of
            the three.

    Source:
        Belilovsky et al. 2019, "Decoupled Greedy Learning of CNNs" (auxiliary networks of a few
        layers on reduced maps); Wang et al. 2021, "Revisiting Locally Supervised Learning"
        (InfoPro's head of one convolution and two linear layers).
    """

    depth: int = 1
    width: float = 1.0
    hidden_features: int = 256
    out_features: int = 128
    pool: int = 2

    def __post_init__(self) -> None:
        self._pooled()
        if self.depth < 0 or not 0 < self.width < math.inf:
            raise InputError(
                "A convolutional head needs a depth of at least 0 and a width above 0",
                f"Got depth {self.depth} and width {self.width}",
            )

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        pooled_mlp = self._pooled()
        if len(shape) != 3 or self.depth == 0 or min(shape) < 1:
            return pooled_mlp(shape)  # which also says what is wrong with a shape
        channels, *sides = shape
        wide = max(_NARROWEST, round(channels * self.width))
        layers: list[nn.Module] = []
        for _ in range(self.depth):
            down, across = (2 if side > self.pool else 1 for side in sides)
            layers += [
                nn.Conv2d(channels, wide, 3, (down, across), padding=1, bias=False),
                MapNorm(wide),
                nn.ReLU(),
            ]
            channels, sides = wide, [-(-sides[0] // down), -(-sides[1] // across)]
        return nn.Sequential(*layers, pooled_mlp((channels, *sides)))

    def _pooled(self) -> PooledMLP:
        return PooledMLP(self.hidden_features, self.out_features, self.pool)


class MeanOverPositions(nn.Module):
    """Average a sequence over its positions: ``[N, L, C] -> [N, C]``."""

    def forward(self, features: Tensor) -> Tensor:
        """Average ``features`` over dimension 1."""
        return features.mean(dim=1)


class _ForOneToo(nn.Module):
    """Lets BatchNorm take one sample of one position, as an epoch's last mini-batch may be.

    A single value has no variance, so it is normalised by the running statistics.
    """

    training: bool

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``[N, C, ...]``."""
        if not self.training or features.numel() > features.shape[1]:
            normalised: Tensor = super().forward(features)
            return normalised
        assert isinstance(self, (RowNorm, MapNorm))
        return nn.functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class RowNorm(_ForOneToo, nn.BatchNorm1d):
    """BatchNorm of vectors ``[N, C]``."""


class MapNorm(_ForOneToo, nn.BatchNorm2d):
    """BatchNorm of maps ``[N, C, H, W]``."""


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


def projection_length(head: nn.Module, shape: tuple[int, ...]) -> int:
    """Find D, the length of a head's projections, without changing the head.

    Args:
        head: Maps ``[N, *shape]`` to ``[N, D]``.
        shape: Of one sample's features.

    Raises:
        InputError: The head does not take plain tensors of this shape to projections ``[N, D]``.
    """
    training = head.training
    try:
        with torch.no_grad():
            projections = head.eval()(torch.zeros(1, *shape))
        _, length = projections.shape
    except Exception as error:
        raise InputError(
            "For a local classifier the head must map features [N, *shape] to projections [N, D]",
            f"On zeros of the shape {[1, *shape]} it failed: {type(error).__name__}: {error}",
            "Change the head, or use contrast alone (SCPL with `cross_entropy` 0)",
        ) from error
    finally:
        head.train(training)
    return int(length)
