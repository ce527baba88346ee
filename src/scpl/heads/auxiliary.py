"""Auxiliary networks: a few layers like those to come, between a stage and its loss.

Shapes: ``[C]`` flat features, ``[L, C]`` a sequence of L positions, ``[C, H, W]`` feature maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from scpl.errors import InputError, unknown_name
from scpl.heads.projection import MeanOverPositions, PooledMLP

__all__ = ["Auxiliary", "Convolutional", "build"]

Auxiliary: TypeAlias = Literal["mlp", "mlp-sr", "cnn"]

_NARROWEST = 32  # channels of a convolutional head
_POOL = 2  # rows and columns that the linear layers see
_SHRINK = 4  # what "mlp-sr" divides the sides of a map by
_WIDTH = 4  # hidden features of the perceptron per channel


@dataclass(frozen=True)
class Convolutional:
    """Strided convolutions like those of the layers to come, then a pooled two-layer network.

    What a stage's objective can see decides what the stage learns to pass on: read by two linear
    layers, features must be linearly useful at once; read by a few layers like the ones that
    follow, they may stay half-digested, as under backpropagation. Each 3 x 3 convolution (batch
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
        self._read()
        if self.depth < 0 or not 0 < self.width < math.inf:
            raise InputError(
                "A convolutional head needs a depth of at least 0 and a width above 0",
                f"Got depth {self.depth} and width {self.width}",
            )

    def __call__(self, shape: tuple[int, ...]) -> nn.Module:
        """Build the head for one sample's features of this shape."""
        read = self._read()
        if len(shape) != 3 or self.depth == 0 or min(shape) < 1:
            return read(shape)  # which also says what is wrong with a shape
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
        return nn.Sequential(*layers, read((channels, *sides)))

    def _read(self) -> PooledMLP:
        return PooledMLP(self.hidden_features, self.out_features, self.pool)


def build(kind: Auxiliary, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the auxiliary network of DGL for one stage.

    ============  ======================================================================
    ``"mlp"``     mean down to 2 x 2, then three linear layers of width 4 C
    ``"mlp-sr"``  mean down to a quarter of the sides, three 1 x 1 convolutions, ``"mlp"``
    ``"cnn"``     two 3 x 3 convolutions, mean down to 2 x 2, one linear layer
    ============  ======================================================================

    Hidden layers are followed by BatchNorm and ReLU. Features that are no maps get ``"mlp"``
    whatever the kind, sequences after averaging over L.

    Args:
        kind: Which one.
        shape: Of one sample's features.
        num_classes: Number of logits.

    Raises:
        InputError: An unknown kind, or a shape that is none of the three.

    Source:
        Belilovsky et al. 2020, "Decoupled Greedy Learning of CNNs", section 4.
    """
    if kind not in get_args(Auxiliary):
        raise unknown_name("auxiliary", kind, get_args(Auxiliary))
    match shape:
        case (channels,):
            return nn.Sequential(*_perceptron(channels, channels, num_classes))
        case (_, channels):
            layers = _perceptron(channels, channels, num_classes)
            return nn.Sequential(MeanOverPositions(), *layers)
        case (channels, height, width):
            return nn.Sequential(*_on_maps(kind, channels, (height, width), num_classes))
        case _:
            raise InputError(
                "An auxiliary network takes features of the shape [C], [L, C] or [C, H, W]",
                f"Got {list(shape)} for one sample",
                "Use early-exit with a classifier of your own",
            )


def _on_maps(
    kind: Auxiliary, channels: int, sides: tuple[int, int], num_classes: int
) -> list[nn.Module]:
    if kind == "mlp-sr":  # smaller maps first, and convolutions that see one pixel
        sides = (-(-sides[0] // _SHRINK), -(-sides[1] // _SHRINK))
        first = [nn.AdaptiveAvgPool2d(sides), *_convolutions(3, channels, kernel=1)]
    else:
        first = _convolutions(2, channels, kernel=3) if kind == "cnn" else []
    rows, columns = (min(_POOL, side) for side in sides)
    pool = [nn.AdaptiveAvgPool2d((rows, columns)), nn.Flatten()]
    features = channels * rows * columns
    if kind == "cnn":
        return [*first, *pool, nn.Linear(features, num_classes)]
    return [*first, *pool, *_perceptron(features, channels, num_classes)]


def _convolutions(count: int, channels: int, *, kernel: int) -> list[nn.Module]:
    return [
        layer
        for _ in range(count)
        for layer in (
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
            MapNorm(channels),
            nn.ReLU(),
        )
    ]


def _perceptron(in_features: int, channels: int, num_classes: int) -> list[nn.Module]:
    width = _WIDTH * channels
    return [
        nn.Linear(in_features, width, bias=False),
        RowNorm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        RowNorm(width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    ]


class _ForOneToo(nn.Module):
    """Lets BatchNorm take one row of one position, as an epoch's last mini-batch may be.

    It has no spread of its own, so it is normalised by the running statistics.
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
    """BatchNorm of rows ``[N, C]``."""


class MapNorm(_ForOneToo, nn.BatchNorm2d):
    """BatchNorm of maps ``[N, C, H, W]``."""
