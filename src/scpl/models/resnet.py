"""ResNets for small images, with both projection shortcuts the SCPL code has used."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from scpl.errors import InputError, unknown_name
from scpl.models.sizes import check_image_size, check_positive, scaled

__all__ = ["ResNet", "ResidualBlock"]

Activation = Literal["leaky_relu", "relu"]
Shortcut = Literal["projection1x1", "projection3x3"]

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # blocks per layer
_EXPANSION = 4  # of a bottleneck block
_CHANNELS = (64, 128, 256, 512)
_KERNEL = {"projection1x1": 1, "projection3x3": 3}


class ResNet(nn.Sequential):
    """Residual network with the stem for small images: a 3 x 3 convolution and no pool.

    At 32 x 32 pixels the layers put out maps of 32, 16, 8 and 4 pixels a side.

    Children: ``stem``, ``layer1`` to ``layer4``, ``pool`` (mean over the map), ``flatten``,
    ``classifier`` (one linear layer).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the input.
        image_size: Height and width of the input in pixels, at least 8; only checked, as any
            larger size works.
        depth: 18 or 34 (basic blocks), or 50 (bottleneck blocks).
        shortcut: How a block projects its input where the shape changes: a strided 1 x 1
            convolution and batch norm, the standard, or a 3 x 3 one.
        activation: ``"leaky_relu"`` with slope 0.01, the paper's and the default, or ``"relu"``.
        width: Factor on the channels.

    Raises:
        InputError: An unknown depth, shortcut or activation; a size that is zero or negative; an
            image below 8 x 8.

    Source:
        He et al. 2015, "Deep Residual Learning for Image Recognition", table 1 for the blocks;
        stem, activation and the 3 x 3 shortcut as in the published SCPL code.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        depth: int = 18,
        shortcut: Shortcut = "projection1x1",
        activation: Activation = "leaky_relu",
        width: float = 1.0,
    ) -> None:
        if depth not in _BLOCKS:
            raise InputError("The depth of a ResNet is 18, 34 or 50", f"Got {depth}", "Use 18")
        check_positive("ResNet", num_classes=num_classes, in_channels=in_channels, width=width)
        check_image_size("ResNet", image_size, smallest=8)
        channels = scaled(_CHANNELS[0], width)
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["stem"] = nn.Sequential(
            *_convolution(in_channels, channels, 3), _activation(activation)
        )
        for number, num_blocks in enumerate(_BLOCKS[depth]):
            blocks = []
            for index in range(num_blocks):
                block = ResidualBlock(
                    channels,
                    scaled(_CHANNELS[number], width),
                    stride=2 if number > 0 and index == 0 else 1,
                    bottleneck=depth == 50,
                    shortcut=shortcut,
                    activation=activation,
                )
                blocks.append(block)
                channels = block.out_channels
            children[f"layer{number + 1}"] = nn.Sequential(*blocks)
        children["pool"] = nn.AdaptiveAvgPool2d(1)
        children["flatten"] = nn.Flatten()
        children["classifier"] = nn.Linear(channels, num_classes)
        super().__init__(children)


class ResidualBlock(nn.Module):
    """``activation(residual(x) + shortcut(x))``, basic (two convolutions) or bottleneck (three).

    Args:
        in_channels: Channels of the input.
        channels: Channels inside the block; a bottleneck block puts out four times as many.
        stride: Of the block's (first) 3 x 3 convolution and of the shortcut.
        bottleneck: Whether the 3 x 3 convolution sits between two 1 x 1 ones.
        shortcut: Kind of the shortcut where the shape changes; it is the identity elsewhere.
        activation: Kind of the activation.

    Raises:
        InputError: An unknown shortcut or activation.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        bottleneck: bool = False,
        shortcut: Shortcut = "projection1x1",
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        if shortcut not in _KERNEL:
            raise unknown_name("shortcut", shortcut, _KERNEL)
        self.out_channels = channels * _EXPANSION if bottleneck else channels
        if bottleneck:
            self.residual = nn.Sequential(
                *_convolution(in_channels, channels, 1),
                _activation(activation),
                *_convolution(channels, channels, 3, stride),
                _activation(activation),
                *_convolution(channels, self.out_channels, 1),
            )
        else:
            self.residual = nn.Sequential(
                *_convolution(in_channels, channels, 3, stride),
                _activation(activation),
                *_convolution(channels, channels, 3),
            )
        projection: tuple[nn.Module, ...] = ()
        if stride != 1 or in_channels != self.out_channels:
            projection = _convolution(in_channels, self.out_channels, _KERNEL[shortcut], stride)
        self.shortcut = nn.Sequential(*projection)
        self.activation = _activation(activation)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        out: Tensor = self.activation(self.residual(features) + self.shortcut(features))
        return out


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _activation(kind: Activation) -> nn.Module:
    if kind == "leaky_relu":
        return nn.LeakyReLU(0.01)
    if kind == "relu":
        return nn.ReLU()
    raise unknown_name("activation", kind, ("leaky_relu", "relu"))
