"""What a method is: which objective each stage gets, and how a stage predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias, TypeVar, cast, final

from torch import Tensor, nn

from scpl import heads
from scpl.errors import InputError
from scpl.losses.projections import precise
from scpl.partition.pieces import Following, OwnCopy
from scpl.partition.reading import ReadThen
from scpl.partition.values import Tree, tree_map
from scpl.tasks import TASKS, Classes, Task

__all__ = [
    "CrossEntropy",
    "Layout",
    "LocalClassifiers",
    "Method",
    "Nothing",
    "Objective",
    "Site",
    "Sum",
    "precise",
]

Answer = TypeVar("Answer")

Layout: TypeAlias = Literal["stages", "one", "replicas"]
"""Who holds the network: each rank some of its stages, one rank all of it, or every rank all."""


@dataclass(frozen=True)
class Site:
    """Where an objective is wanted.

    Attributes:
        index: The stage, from 0.
        num_stages: How many stages there are.
        num_classes: Number of outputs of the network: of classes, labels or numbers.
        feature_shape: Shape of one sample of the stage's features, without the batch.
        readout: The network's own classifier, from what the stage hands on to logits; only the last
            stage has it.
        reading: How what the stage hands on becomes features, one tensor ``[N, *feature_shape]``;
            None if it is that tensor.
        following: The layers behind the end of the stage, for objectives that read through a copy
            of them; None on the last stage, and where they cannot be had alone.
        task: What the outputs mean: the form of targets, and the loss of outputs.
    """

    index: int
    num_stages: int
    num_classes: int
    feature_shape: tuple[int, ...]
    readout: nn.Module | None
    reading: Callable[[Tree], Tensor] | None = None
    following: Following | None = None
    task: Task = field(default_factory=Classes)

    def head(self, build: heads.Head) -> nn.Module:
        """Build a head, or another module of features, that takes what the stage hands on."""
        return self.on_features(build(self.feature_shape))

    def head_behind_next(self, build: heads.Head) -> nn.Module:
        """Build a head that reads the features through an own copy of the layers that follow.

        The copy begins with their weights and learns on its own. On the last stage, and where there
        is no such piece, the head reads the features themselves.

        Source:
            Ma et al. 2024, "Scaling Supervised Local Learning with Augmented Auxiliary Networks"
            (auxiliary networks like the layers that follow; these here begin as their copies).
        """
        unit = self.following
        if unit is None:
            return self.head(build)
        return ReadThen(unit.own_copy(), build(unit.shape))

    def length(self, head: nn.Module) -> int:
        """Find the length of the projections of a head of this stage."""
        if not isinstance(head, ReadThen):
            return heads.projection_length(head, self.feature_shape)
        unit = self.following if isinstance(head.reading, OwnCopy) else None
        return heads.projection_length(head.module, unit.shape if unit else self.feature_shape)

    def on_features(self, module: nn.Module) -> nn.Module:
        """Let a module of features (a head, a classifier) take what the stage hands on."""
        return module if self.reading is None else ReadThen(self.reading, module)

    @property
    def is_last(self) -> bool:
        """Whether this is the stage that predicts."""
        return self.readout is not None


@dataclass(frozen=True)
class Method(ABC):
    """A way to train the stages.

    The fields of a method are its options. Those of plain types (numbers, strings, ``Literal``)
    are flags of the command line as well, and the text below a field is its help. The command line
    reads both from the source, without importing torch, so types and defaults must be written out.
    """

    name: ClassVar[str]
    cuts_gradients: ClassVar[bool] = True
    """False: the network is trained end to end (backpropagation)."""
    layout: ClassVar[Layout] = "stages"
    """Who holds the network when there are several ranks."""
    links_objectives: ClassVar[bool] = False
    """Whether objectives build on those of the stages before: a stage with nothing to learn keeps
    its own then."""
    replaces_readout: ClassVar[bool] = False
    """Whether the last stage's `exit_module` predicts instead of the network's own readout."""
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    """What it can learn, by `Task.kind`."""

    @abstractmethod
    def objective(self, site: Site) -> Objective:
        """Build the objective of one stage; called once per stage."""

    @classmethod
    def advice(cls, observed: Mapping[str, float]) -> str:
        """Say which option may help a stage that has learned nothing; by default none.

        Args:
            observed: Means of `Objective.observed` over an epoch.

        Returns:
            What to do, with the names of options in backticks, or an empty string.
        """
        return ""


@dataclass(frozen=True)
class LocalClassifiers(Method):
    """What methods have in common that give every stage but the last a classifier of its own."""

    hidden_features: int = 512
    """Width of the hidden layer of local classifiers."""
    classifier: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None)
    """Builds a local classifier from feature shape and number of classes; default: a pooled
    two-layer network."""

    def classifier_of(self, site: Site) -> nn.Module:
        """Take the network's own classifier on the last stage, and build one on the others."""
        if site.readout is not None:
            return site.readout
        if self.classifier is not None:
            return site.on_features(self.classifier(site.feature_shape, site.num_classes))
        return site.head(heads.PooledMLP(self.hidden_features, site.num_classes))


class Objective(nn.Module, ABC):
    """What one stage minimises."""

    observed: dict[str, Tensor]
    """What the last `forward` noticed beside its loss: detached scalars by name, which are reported
    and not minimised. They stay where they are, so noticing costs no device sync."""
    whole: Callable[[Tensor], Tensor]
    """Makes one tensor ``[N, ...]`` of what the replicas of a stage computed of their samples,
    ``[n, ...]`` each. Where a stage has no replicas it returns what it gets. What a head makes of
    features goes through it before it meets the target, which is that of the whole mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = {}
        self.whole = _as_it_is

    @abstractmethod
    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        """Compute the terms of the loss; the stage minimises their sum.

        Args:
            features: What the stage hands on, a tensor ``[N, ...]`` or a tree, still attached to
                its layers; of a stage with replicas the samples of this one (see `whole`). Heads
                that want one tensor are built with `Site.on_features`.
            target: What is to be predicted, as `Task.prepare` made it: class indices ``[N]``, or
                ``float32 [N, C]`` for labels and numbers.
            carry: What `hand_on` of the stage before returned.

        Returns:
            Scalar terms by name, in at least float32.
        """

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:
        """Return what the next stage's objective gets as `carry`: nothing, by default.

        It is called before the loss and without gradients, because a stage sends its result on
        before it learns from it.
        """
        return None

    def predict(self, features: Tree) -> Tensor | None:
        """Return logits ``[N, C]`` made of this stage's features, or None.

        By default they are those of `exit_module`. Of a stage with replicas they are whole.
        """
        module = self.exit_module(())
        return None if module is None else self.whole(module(features))

    def share(self, received: Tree) -> Tree:
        """Tell the next stage's objective what it needs for its predictions.

        It is called at the beginning of every evaluation, before the first `predict`, in the order
        of the stages. What is received is passed on, by default.

        Args:
            received: What `share` of the stage before returned; None on the first stage.
        """
        return received

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module | None:
        """Return the module that `predict` applies to this stage's features, or None.

        It is made of modules of this objective and of earlier ones; export takes it as the exit.

        Args:
            earlier: The objectives of all stages before, in order.
        """
        return None


def _as_it_is(part: Tensor) -> Tensor:
    return part


@final
class Nothing(Objective):
    """No objective: the stage learns from the gradient of a later one, or is frozen."""

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        return {}


@final
class CrossEntropy(Objective):
    """Cross-entropy of a classifier on the features; for other tasks than classes, their loss.

    Args:
        classifier: Maps features to logits ``[N, C]``.
        detach: Keep the gradient of the classifier's loss away from the stage's layers.
        weight: Factor on the loss.
        task: What the outputs mean.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        detach: bool = False,
        weight: float = 1.0,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.task = task or Classes()
        self.classifier = classifier
        self.detach = detach
        self.weight = weight

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        read = tree_map(Tensor.detach, features) if self.detach else features
        logits = self.whole(self.classifier(read))
        self.observed = self.task.observe(logits, target)
        loss = self.task.loss(logits, target)
        return {self.task.loss_name: self.weight * loss}

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module:  # noqa: D102
        return self.classifier


@final
class Sum(Objective):
    """Several objectives on the same features; each term keeps its name.

    Args:
        parts: The objectives. All get the same carry; predictions, and what is handed on, come
            from the last one that has any.
    """

    def __init__(self, *parts: Objective) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        terms: dict[str, Tensor] = {}
        self.observed = {}
        for objective in self._objectives:
            for name, term in objective(features, target, carry).items():
                if name in terms:
                    raise InputError(
                        "Terms of a loss must have different names", f"Got {name!r} twice"
                    )
                terms[name] = term
            self.observed |= objective.observed
        return terms

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:  # noqa: D102
        return self._last_answer(lambda objective: objective.hand_on(target, carry))

    def predict(self, features: Tree) -> Tensor | None:  # noqa: D102
        return self._last_answer(lambda objective: objective.predict(features))

    def share(self, received: Tree) -> Tree:  # noqa: D102
        for objective in self._objectives:
            received = objective.share(received)
        return received

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module | None:  # noqa: D102
        return self._last_answer(lambda objective: objective.exit_module(earlier))

    @property
    def _objectives(self) -> list[Objective]:
        return cast("list[Objective]", list(self.parts))

    def _last_answer(self, ask: Callable[[Objective], Answer | None]) -> Answer | None:
        answers = map(ask, reversed(self._objectives))
        return next((answer for answer in answers if answer is not None), None)
