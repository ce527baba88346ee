"""Associated Learning: every stage brings its features near a code of the label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor, nn
from torch.func import functional_call

from scpl import heads
from scpl.errors import InputError
from scpl.losses.similarity import squared_error
from scpl.methods.base import Method, Objective, Site
from scpl.partition.values import Tree
from scpl.tasks import Classes, Task

__all__ = ["AssociatedLearning", "Association"]


@dataclass(frozen=True)
class AssociatedLearning(Method):
    """Features and label meet half way (Kao & Chen 2021).

    The label is encoded stage by stage, and each stage's code goes on to the next stage beside the
    features. The network's own readout is not trained and not used: a prediction goes over the
    last stage's bridge and through all decoders, which `Pipeline.export` puts in its place.
    """

    name: ClassVar[str] = "al"
    links_objectives: ClassVar[bool] = True
    replaces_readout: ClassVar[bool] = True

    label_features: int = 128
    """Length of a label's code."""
    bridge: heads.Head | None = field(default=None)
    """Builds a bridge from the shape of one sample's features to ``[N, label_features]``; default:
    a pooled two-layer network. Tanh follows, as in the encoders."""

    def __post_init__(self) -> None:
        if self.label_features < 1:
            raise InputError("`label_features` must be at least 1", f"Got {self.label_features}")

    def objective(self, site: Site) -> Objective:  # noqa: D102
        build = self.bridge or heads.PooledMLP(out_features=self.label_features)
        bridge = nn.Sequential(site.head(build), nn.Tanh())
        encoder = self._encoder(site.index, site.num_classes)
        decoder = self._decoder(site.index, site.num_classes)
        earlier = [self._decoder(index, site.num_classes) for index in range(site.index)]
        return Association(bridge, encoder, decoder, site.num_classes, earlier, site.task)

    def _encoder(self, index: int, num_classes: int) -> nn.Module:
        """From the one-hot label, or the code of the stage before, to this stage's code."""
        first = index == 0
        linear = nn.Linear(num_classes if first else self.label_features, self.label_features)
        # Codes of different classes shall be as far apart on the last stage as on the first;
        # PyTorch's default weights bring them closer with each, and learning begins later.
        if first:
            nn.init.normal_(linear.weight)
        else:
            nn.init.xavier_normal_(linear.weight, nn.init.calculate_gain("tanh"))
        return nn.Sequential(linear, nn.Tanh())

    def _decoder(self, index: int, num_classes: int) -> nn.Module:
        """From this stage's code to that of the stage before, or to logits."""
        if index == 0:
            return nn.Sequential(nn.Linear(self.label_features, num_classes))
        linear = nn.Linear(self.label_features, self.label_features)
        nn.init.xavier_normal_(linear.weight, nn.init.calculate_gain("tanh"))
        return nn.Sequential(linear, nn.Tanh())


@final
class Association(Objective):
    """Associate the features with a code of the label, and keep the code decodable.

    The code of the stage before, or the one-hot label, is encoded further by each stage. Two
    losses, whose gradients meet in no parameter: the bridge brings the features near the code,
    which is a constant to it, and the decoder brings the code back to the one it was made of.

    A prediction goes from the features over the bridge to a code, and through the decoders of this
    and all earlier stages back to logits. As nothing goes back to earlier stages, they share
    their decoders with later ones, at the beginning of every evaluation.

    Args:
        bridge: Maps features to ``[N, D]``, where this stage's code lives.
        encoder: Maps the code before, ``[N, D']`` (on the first stage one-hot), to ``[N, D]``.
        decoder: Maps ``[N, D]`` back to ``[N, D']``, on the first stage to logits ``[N, C]``.
        num_classes: C.
        earlier: Decoders like those of the stages before, in order. Only their structure is used.
        task: What the outputs mean. Labels that are there, and numbers, are encoded as a one-hot
            class is.
    """

    def __init__(
        self,
        bridge: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        num_classes: int,
        earlier: Sequence[nn.Module] = (),
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.bridge, self.encoder, self.decoder = bridge, encoder, decoder
        self._num_classes, self._task = num_classes, task or Classes()
        self._earlier = tuple(earlier)  # in a tuple, so that they are none of our own modules
        self._received: list[dict[str, Tensor]] = []

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        before = self._code_before(target, carry)
        code = self.encoder(before)
        decoded = self.decoder(code)
        return {
            "association": squared_error(self.whole(self.bridge(features)), code),
            # The label itself is a class, not a point: cross-entropy makes the decoder's output
            # logits, and teaches codes of different classes to keep apart.
            "reconstruction": squared_error(decoded, before)
            if self._earlier
            else self._task.loss(decoded, target),
        }

    def hand_on(self, target: Tensor, carry: Tree) -> Tensor:  # noqa: D102
        code: Tensor = self.encoder(self._code_before(target, carry))
        return code

    def share(self, received: Tree) -> Tree:  # noqa: D102
        self._received = received or []
        if len(self._received) != len(self._earlier):
            raise InputError(
                "Every stage before must share its decoder",
                f"Got {len(self._received)} of {len(self._earlier)}",
                "Give all stages the objective of Associated Learning",
            )
        return [*self._received, dict(self.decoder.state_dict())]

    def predict(self, features: Tree) -> Tensor:  # noqa: D102
        code: Tensor = self.decoder(self.whole(self.bridge(features)))
        for decoder, weights in zip(reversed(self._earlier), reversed(self._received), strict=True):
            code = functional_call(decoder, weights, (code,))
        return code

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module:  # noqa: D102
        before = [m for each in earlier for m in each.modules() if isinstance(m, Association)]
        decoders = [self.decoder, *(each.decoder for each in reversed(before))]
        return nn.Sequential(self.bridge, *decoders)

    def _code_before(self, target: Tensor, carry: Tree) -> Tensor:
        if not self._earlier:
            like = next(self.encoder.parameters())
            return self._task.as_vector(target, self._num_classes).to(like.dtype)
        assert isinstance(carry, Tensor), "the stage before hands its code on"
        return carry
