"""A multilayer perceptron, for table rows and for quick runs on small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from scpl.models.sizes import check_positive

__all__ = ["MLP"]


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
