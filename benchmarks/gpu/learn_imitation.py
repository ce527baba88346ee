"""A trial: every stage learns through a small copy of the layers that follow it.

As in AugLocal (Ma et al. 2024, "Scaling Supervised Local Learning with Augmented Auxiliary
Networks"), the auxiliary network of a stage is made like layers chosen evenly out of all that
follow, with weights of its own, and is the shallower the later the stage. What was left out between
two of them is a pool. It takes the place of the convolution in the head of `scpl`; the loss is the
same. It is no part of the library until it has shown a gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import scpl
from scpl.heads import Head, PooledMLP
from scpl.heads.projection import MapNorm
from scpl.methods import Site
from scpl.models.resnet import ResidualBlock

MOST_LAYERS, FEWEST_LAYERS = 3, 2  # of the first auxiliary network, and of the last one


@dataclass(frozen=True)
class Layer:
    """A layer of the network that can be imitated: a convolution or a residual block.

    Attributes:
        sides: Rows (and columns) of its input and of its output.
        channels: Of its output.
        build: Makes one like it, with new weights, for an input of so many channels.
    """

    sides: tuple[int, int]
    channels: int
    build: Callable[[int], nn.Module]


@dataclass(frozen=True)
class Imitation(scpl.Method):
    """SCPL with a head of its own for each stage.

    Attributes:
        base: Says everything but the heads.
        heads: Those of all stages; None: that of ``base``.
    """

    name: ClassVar[str] = "scpl-imitate"

    base: scpl.SCPL
    heads: Sequence[Head | None]

    def objective(self, site: Site) -> scpl.Objective:
        """Build the objective of one stage."""
        head = self.heads[site.index]
        return (self.base if head is None else replace(self.base, head=head)).objective(site)


def imitation(parts: scpl.Partition, base: scpl.SCPL, example: Tensor) -> Imitation:
    """Let every stage but the last learn through an imitation of what follows.

    Args:
        parts: The network, cut.
        base: Says everything but the heads.
        example: A batch of images ``[N, C, H, W]``.
    """
    layers = layers_of(parts, example)
    last = parts.num_stages - 1
    heads: list[Head | None] = []
    for stage in range(last):
        following = [layer for later in layers[stage + 1 :] for layer in later]
        shrunk = stage / max(last - 1, 1) * (MOST_LAYERS - FEWEST_LAYERS)
        heads.append(imitating(evenly(following, round(MOST_LAYERS - shrunk))))
    return Imitation(base, (*heads, None))


def evenly(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Choose layers at equal distances, the last one among them; all if there are no more."""
    count = min(count, len(layers))
    return [layers[round((number + 1) * len(layers) / count) - 1] for number in range(count)]


def imitating(layers: Sequence[Layer]) -> Head:
    """Make heads out of layers like these, and of the end that `scpl` has."""

    def build(shape: tuple[int, ...]) -> nn.Module:
        channels, side, _ = shape
        parts: list[nn.Module] = []
        for layer in layers:
            if side > layer.sides[0]:
                parts.append(nn.MaxPool2d(side // layer.sides[0]))
            parts.append(layer.build(channels))
            channels, side = layer.channels, layer.sides[1]
        return nn.Sequential(*parts, PooledMLP(256, 128)((channels, side, side)))

    return build


def layers_of(parts: scpl.Partition, example: Tensor) -> list[list[Layer]]:
    """List the layers of each stage that can be imitated; the network stays as it is."""
    found: list[list[Layer]] = []
    features = example.to(next(parts.model.parameters()).device)
    training = parts.model.training
    parts.model.eval()
    for body in parts.bodies:
        inside: list[Layer] = []
        hooks = [_watch(module, inside) for module in _units(body)]
        with torch.no_grad():
            features = body(features)
        for hook in hooks:
            hook.remove()
        found.append(inside)
    parts.model.train(training)
    return found


def _units(body: nn.Module) -> Iterator[nn.Module]:
    """Residual blocks, and the convolutions outside of them."""
    for child in body.children():
        if isinstance(child, (nn.Conv2d, ResidualBlock)):
            yield child
        else:
            yield from _units(child)


def _watch(module: nn.Module, seen: list[Layer]) -> Any:
    """Note the layer as it is used."""

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sides, channels = (inputs[0].shape[-1], output.shape[-1]), output.shape[1]

        def build(in_channels: int) -> nn.Module:
            if isinstance(module, ResidualBlock):
                return ResidualBlock(in_channels, channels, stride=sides[0] // sides[1])
            convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
            return nn.Sequential(convolution, MapNorm(channels), nn.ReLU())

        seen.append(Layer(sides, channels, build))

    return module.register_forward_hook(note)
