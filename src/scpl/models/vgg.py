"""VGG8, the network of the paper's image experiments."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from scpl.models.sizes import check_image_size, check_positive, scaled

__all__ = ["VGG8"]

_BLOCKS = ((128, 256), (256, 512), (512,), (512,))  # output channels of the convolutions
_HIDDEN = 2500


class VGG8(nn.Sequential):
    """Six 3 x 3 convolutions in four blocks, then two linear layers.

    A convolution has no bias and is followed by batch norm and ReLU; a block ends with a 2 x 2
    max-pool. At 32 x 32 pixels the blocks put out ``[256, 16, 16]``, ``[512, 8, 8]``,
    ``[512, 4, 4]`` and ``[512, 2, 2]``. Images below 16 x 16 run out of pixels before the last
    block; the pools that would leave none are left out.

    Children: ``block1`` to ``block4``, ``flatten``, ``classifier``.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the input.
        image_size: Height and width of the input in pixels, at least 8.
        width: Factor on the channels and on the hidden layer of the classifier.

    Raises:
        InputError: A size that is zero or negative, or an image below 8 x 8.

    Source:
        The VGG of the published SCPL code (4 blocks, Sigmoid in the classifier).
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, *, width: float = 1.0
    ) -> None:
        check_positive("VGG8", num_classes=num_classes, in_channels=in_channels, width=width)
        check_image_size("VGG8", image_size, smallest=8)
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels, size = in_channels, image_size
        for number, block in enumerate(_BLOCKS, start=1):
            layers: list[nn.Module] = []
            for out_channels in (scaled(base, width) for base in block):
                convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
            if size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            children[f"block{number}"] = nn.Sequential(*layers)
        children["flatten"] = nn.Flatten()
        hidden = scaled(_HIDDEN, width)
        children["classifier"] = nn.Sequential(
            nn.Linear(channels * size**2, hidden), nn.Sigmoid(), nn.Linear(hidden, num_classes)
        )
        super().__init__(children)
