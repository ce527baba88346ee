"""One stage: body, objective, optimizer. The only caller of ``backward()`` and ``step()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scpl.errors import CheckpointError, NonFiniteError, StageError
from scpl.finite import LossGuard
from scpl.message import TensorSpec, Tree, tensors_of, tree_map
from scpl.objectives import Objective
from scpl.randomness import RandomState
from scpl.state import broken_values, copy_to_cpu, differences
from scpl.summary import summary_of

__all__ = ["OptimizerFactory", "SchedulerFactory", "Stage", "StageOptions"]

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class StageOptions:
    """How every stage learns.

    Attributes:
        optimizer: Builds a stage's optimizer from its parameters.
        scheduler: Builds its learning-rate schedule, stepped once per training step.
        clip_norm: Clip the norm of a stage's gradient to this.
        precision: Type of the forward pass (``torch.autocast``); losses are always float32.
    """

    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    clip_norm: float | None = None
    precision: torch.dtype = torch.float32


class Stage:
    """A stage of the line.

    Args:
        index: Its place, from 0.
        body: Its layers.
        names: The dotted names of the layers in the user's network, for its saved state.
        objective: What it minimises.
        options: How it learns.
        seed: Where its random state starts.
        device: Where it computes.
    """

    def __init__(
        self,
        index: int,
        body: nn.Sequential,
        names: tuple[str, ...],
        objective: Objective,
        options: StageOptions,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.index = index
        self.body = body.to(device)
        self.objective = objective.to(device)
        self.device = device
        self._options = options
        self._names = names
        self.random = RandomState(seed, device)
        self._summary = summary_of(body) or (lambda output: output)
        self._output: Tree = None
        self._output_version = 0
        self.guard = LossGuard(index)
        self._modules = [*self.body.modules(), *self.objective.modules()]
        # A user's objective could hold a layer of the body: count its parameters once.
        self.parameters = list(dict.fromkeys([*body.parameters(), *objective.parameters()]))
        trained = [p for p in self.parameters if p.requires_grad]
        self.optimizer = options.optimizer(trained) if trained else None
        self.scheduler = (
            options.scheduler(self.optimizer) if options.scheduler and self.optimizer else None
        )

    def forward(self, features: Tree) -> Tree:
        """Compute the stage's output, and keep it attached for `learn`.

        Args:
            features: The detached output of the stage before.

        Returns:
            The detached output. It shares storage with what `learn` needs, so whoever sends it
            must not change it; a later stage may, because it runs after `learn`.
        """
        self.set_mode(training=True)
        with self.random.active(), self.autocast():
            self._output = self.body(features)
        # Contiguous, so that the next stage meets the same strides in this process and in
        # another: strides choose kernels, and kernels decide the last bit.
        detached = tree_map(lambda tensor: tensor.detach().contiguous(), self._output)
        self._output_version = _version(self._output)
        return detached

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:
        """Return what the objective of the next stage gets."""
        with torch.no_grad(), self.random.active(), self.autocast():
            onward = self.objective.hand_on(target, carry)
        return tree_map(lambda tensor: tensor.detach().contiguous(), onward)

    def learn(self, target: Tensor, carry: Tree, step: int) -> dict[str, Tensor]:
        """Update the stage from the local loss of its last output.

        Args:
            target: Class indices ``[N]``.
            carry: What the objective of the stage before handed on.
            step: The training step, for messages.

        Returns:
            The detached terms of the loss.

        Raises:
            NonFiniteError: if the loss is NaN or infinite; the parameters are as before.
        """
        output, self._output = self._output, None
        with self.random.active():
            with self.autocast():
                terms = self.objective(self._summary(output), target, carry)
            if _version(output) != self._output_version:
                raise StageError(
                    "An objective must not change the features in place: they are on their way "
                    "to the next stage",
                    f"The objective of stage {self.index} did",
                    "Give its first layer inplace=False",
                )
            loss = reduce(torch.add, terms.values())
            self.guard.check(loss, output, step)
            if loss.requires_grad:
                loss.backward()
                if self._options.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self.parameters, self._options.clip_norm)
                self.update()
        return {name: term.detach() for name, term in terms.items()}

    def update(self) -> None:
        """Let the optimizer use the gradients that are there, and clear them."""
        if self.optimizer is None:
            return
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self, features: Tree) -> Tree:
        """Compute the output in evaluation mode, without gradients."""
        self.set_mode(training=False)
        with torch.no_grad(), self.random.active(), self.autocast():
            return tree_map(Tensor.contiguous, self.body(features))

    def predict(self, output: Tree) -> Tensor | None:
        """Read logits ``[N, C]`` in float32 out of this stage's output, if it can."""
        with torch.no_grad(), self.random.active(), self.autocast():
            logits = self.objective.predict(self._summary(output))
        return None if logits is None else logits.float()

    def share(self, received: Tree) -> Tree:
        """Return copies of what the objective tells the next stage's for its predictions."""
        with torch.no_grad(), self.random.active():
            return tree_map(lambda t: t.detach().clone(), self.objective.share(received))

    def state_dict(self) -> dict[str, Any]:
        """Return everything the stage needs to continue, under the user's layer names."""
        body = {
            f"{name}.{key}": value
            for name, layer in zip(self._names, self.body, strict=True)
            for key, value in layer.state_dict().items()
        }
        return {
            "layers": list(self._names),  # those without parameters count, too
            "body": body,
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "random": self.random.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a saved state fits, without changing anything.

        Raises:
            CheckpointError: if it is of another network or method; all differences are listed.
        """
        faults = differences(self.state_dict(), state)
        if faults:
            raise CheckpointError(
                f"A checkpoint must be of the same network, cuts and method (stage {self.index})",
                "Differences: " + "; ".join(faults[:6]) + ("; ..." if len(faults) > 6 else ""),
                "Resume with the configuration the run was started with",
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state that fits.

        Raises:
            CheckpointError: if it does not; nothing was changed.
        """
        self.check_state_dict(state)
        for name, layer in zip(self._names, self.body, strict=True):
            prefix = f"{name}."
            own = {k.removeprefix(prefix): k for k in state["body"] if k.startswith(prefix)}
            layer.load_state_dict({key: state["body"][full] for key, full in own.items()})
        self.objective.load_state_dict(state["objective"])
        if self.optimizer and state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
            _lay_out_like_parameters(self.optimizer)
        if self.scheduler and state["scheduler"]:
            self.scheduler.load_state_dict(state["scheduler"])
        self.random.load_state_dict(state["random"])

    def snapshot(self, step: int) -> dict[str, Any]:
        """Copy the state to the CPU, to be written while the stage goes on.

        Raises:
            NonFiniteError: if a parameter is NaN or infinite, or a buffer NaN. A buffer may be
                infinite: the mask of an attention layer is.
        """
        self.guard.look()
        state: dict[str, Any] = copy_to_cpu(self.state_dict())
        broken = broken_values({**state["body"], **state["objective"]}, self._parameter_names())
        if broken:
            raise NonFiniteError(
                "Weights must be finite to be saved",
                f"{broken[0]!r} of stage {self.index} is not, after step {step}",
                "Lower the learning rate or clip gradients; earlier checkpoints are kept",
            )
        return state

    def _parameter_names(self) -> set[str]:
        """Keys of the saved state that stand for parameters, not buffers."""
        layers = zip(self._names, self.body, strict=True)
        names = {f"{name}.{key}" for name, layer in layers for key, _ in layer.named_parameters()}
        return names | {key for key, _ in self.objective.named_parameters()}

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the stage's precision."""
        precision = self._options.precision
        if precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=precision)

    def set_mode(self, *, training: bool) -> None:
        """Look at every layer: the user may have called ``eval()`` on his network meanwhile."""
        if any(module.training != training for module in self._modules):
            self.body.train(training)
            self.objective.train(training)

    def explain(self, error: Exception, features: Tree, step: int) -> StageError:
        """Name stage, step and input of an error that user code raised."""
        shapes = ", ".join(map(str, map(TensorSpec.of, tensors_of(features)))) or "nothing"
        layers = ", ".join(self._names) or "no layers"
        return StageError(
            f"Stage {self.index} ({layers}) failed at step {step}",
            f"Its input was {shapes}; {type(error).__name__}: {error}",
        )


def _lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Give what an optimizer keeps the order in memory of its parameter.

    A checkpoint may come from a device where another order is faster. Fused optimizers on a CPU
    walk through memory without a look at strides: where two differ they mix up entries silently.
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _version(tree: Tree) -> int:
    """Count the in-place changes of all tensors of a tree."""
    return sum(tensor._version for tensor in tensors_of(tree))
