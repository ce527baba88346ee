"""Small networks for tests, examples, table rows and machines without an accelerator."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from scpl.models.sizes import check_image_size, check_positive

__all__ = ["MLP", "SmallCNN"]

_POOL_ABOVE = 4  # maps of at most this many pixels a side are not halved any more
_READ = 2  # pixels a side that the classifier sees


class SmallCNN(nn.Sequential):
    """Four units of 3 x 3 convolution, max-pool, batch norm and ReLU, then one linear layer.

    Each unit has twice the channels of the one before. A unit pools 2 x 2 as long as its map is
    larger than 4 x 4, so all four units have work to do on 8 x 8 images as well as on 64 x 64
    ones. Batch norm and ReLU come after the pool, where they touch a quarter of the entries.

    Children: ``block1`` to ``block4``, ``pool`` (mean down to 2 x 2), ``flatten``,
    ``classifier``.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the input.
        image_size: Height and width of the input in pixels, at least 4.
        width: Channels of the first unit.

    Raises:
        InputError: A size that is zero or negative, or an image below 4 x 4.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, *, width: int = 8
    ) -> None:
        check_positive("SmallCNN", num_classes=num_classes, in_channels=in_channels, width=width)
        check_image_size("SmallCNN", image_size, smallest=4)
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels, size = in_channels, image_size
        for number, out_channels in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
            layers: list[nn.Module] = [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)]
            if size > _POOL_ABOVE:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
            children[f"block{number}"] = nn.Sequential(*layers)
            channels = out_channels
        # Fixed windows where they fit: their backward pass is faster and deterministic on CUDA.
        fits = size % _READ == 0
        children["pool"] = nn.AvgPool2d(size // _READ) if fits else nn.AdaptiveAvgPool2d(_READ)
        children["flatten"] = nn.Flatten()
        children["classifier"] = nn.Linear(channels * _READ**2, num_classes)
        super().__init__(children)


class MLP(nn.Sequential):
    """``depth`` units of linear layer and ReLU on the flattened input, then one linear layer.

    Children: ``flatten``, ``layer1`` to ``layer<depth>``, ``classifier``.

    Args:
        num_classes: Number of logits.
        in_features: Entries of one sample, e.g. channels * height * width.
        hidden: Width of each unit.
        depth: Number of units.

    Raises:
        InputError: A size that is zero or negative.
    """

    def __init__(
        self, num_classes: int, in_features: int, *, hidden: int = 256, depth: int = 4
    ) -> None:
        check_positive(
            "MLP", num_classes=num_classes, in_features=in_features, hidden=hidden, depth=depth
        )
        children: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number in range(1, depth + 1):
            children[f"layer{number}"] = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
            in_features = hidden
        children["classifier"] = nn.Linear(in_features, num_classes)
        super().__init__(children)
