"""DGL: every stage learns from cross-entropy through a small auxiliary network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from torch import nn

from scpl.errors import InputError, unknown_name
from scpl.heads.projection import MapNorm, MeanOverPositions, RowNorm
from scpl.methods.base import CrossEntropy, Method, Objective, Site

__all__ = ["DGL", "auxiliary_network"]

Auxiliary: TypeAlias = Literal["mlp", "mlp-sr", "cnn"]

_POOL = 2  # rows and columns that the linear layers see
_SHRINK = 4  # what "mlp-sr" divides the sides of a map by
_WIDTH = 4  # hidden features of the perceptron per channel


@dataclass(frozen=True)
class DGL(Method):
    """Decoupled greedy learning (Belilovsky et al. 2020), without its replay buffer.

    The last stage learns through the network's own readout.
    """

    name: ClassVar[str] = "dgl"

    auxiliary: Literal["mlp", "mlp-sr", "cnn"] = "mlp"
    """Auxiliary network on feature maps, see `scpl.methods.dgl.auxiliary_network`."""

    def __post_init__(self) -> None:
        if self.auxiliary not in get_args(Auxiliary):
            raise unknown_name("auxiliary", self.auxiliary, get_args(Auxiliary))

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is not None:
            return CrossEntropy(site.readout, task=site.task)
        return CrossEntropy(
            site.head(lambda shape: auxiliary_network(self.auxiliary, shape, site.num_classes)),
            task=site.task,
        )


def auxiliary_network(kind: Auxiliary, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the auxiliary network of DGL for one stage.

    ============  ======================================================================
    ``"mlp"``     mean down to 2 x 2, then three linear layers of width 4 C
    ``"mlp-sr"``  mean down to a quarter of the sides, three 1 x 1 convolutions, ``"mlp"``
    ``"cnn"``     two 3 x 3 convolutions, mean down to 2 x 2, one linear layer
    ============  ======================================================================

    Hidden layers are followed by BatchNorm and ReLU. Features that are no maps get ``"mlp"``
    whatever the kind, sequences after averaging over L.

    Args:
        kind: Which one, see the table.
        shape: Of one sample's features.
        num_classes: Number of logits.

    Raises:
        InputError: A shape that is not ``[C]``, ``[L, C]`` or ``[C, H, W]``.

    Source:
        Belilovsky et al. 2020, "Decoupled Greedy Learning of CNNs", section 4.
    """
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
