"""One stage: body, objective, optimizer; how it learns, and how its state is saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scpl.engine.messages import LocalLoss
from scpl.engine.parameters import StageParameters
from scpl.engine.precision import Precision, narrowed, widened
from scpl.engine.randomness import RandomState
from scpl.engine.transfer import LOOK_EVERY, answers_at_once
from scpl.errors import CheckpointError, InputError, NonFiniteError, ScplError, StageError
from scpl.methods.base import Objective, precise
from scpl.partition.pieces import OwnCopy
from scpl.partition.values import (
    TensorSpec,
    Tree,
    dense,
    is_channels_last,
    tensors_of,
    tree_map,
)

__all__ = [
    "BROKEN_FEATURES",
    "LossGuard",
    "OptimizerFactory",
    "SchedulerFactory",
    "Stage",
    "StageOptions",
    "broken_values",
    "copy_to_cpu",
    "differences",
    "is_state",
]

OptimizerFactory: TypeAlias = Callable[[StageParameters], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]


BROKEN_FEATURES = "its features already were not finite; "


@dataclass(frozen=True)
class StageOptions:
    """How every stage learns.

    Attributes:
        optimizer: Builds a stage's optimizer from its parameters.
        scheduler: Builds its learning-rate schedule, stepped once per training step.
        clip_norm: Clip the norm of a stage's gradient to this.
        precision: In which types it computes, and hands on what it computed.
        cuda_graphs: Record the work of a step on the device once, and replay it; "auto": where that
            can be done.
    """

    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    clip_norm: float | None = None
    precision: Precision = field(default_factory=Precision)
    cuda_graphs: bool | Literal["auto"] = False


class LossGuard:
    """Looks at the losses of one stage.

    Args:
        stage: Its index, for messages.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage
        self._unchecked: list[tuple[int, Tensor]] = []

    def check(self, loss: Tensor, output: Tree, step: int) -> None:
        """Look at a loss: at once where that is free (CPU), elsewhere later, many at a time.

        Args:
            loss: A scalar.
            output: The features it was computed from, to tell which broke first.
            step: The training step, for messages.

        Raises:
            NonFiniteError: if it is NaN or infinite.
        """
        if not answers_at_once(loss.device):
            self._unchecked.append((step, loss.detach()))
            if len(self._unchecked) >= LOOK_EVERY:
                self.look()
        elif not math.isfinite(loss.item()):
            broken = any(
                not t.isfinite().all() for t in tensors_of(output) if t.is_floating_point()
            )
            raise self._error(loss, step, BROKEN_FEATURES if broken else "")

    def look(self) -> None:
        """Look at the losses that were not looked at yet (one sync).

        Raises:
            NonFiniteError: naming the first step whose loss was NaN or infinite.
        """
        waiting, self._unchecked = self._unchecked, []
        if not waiting:
            return
        finite = torch.stack([loss for _, loss in waiting]).isfinite().tolist()
        for (step, loss), good in zip(waiting, finite, strict=True):
            if not good:
                raise self._error(loss, step, "")

    def _error(self, loss: Tensor, step: int, detail: str) -> NonFiniteError:
        return NonFiniteError(
            "The loss of every stage must be finite",
            f"Stage {self._stage} got {loss.item()} at step {step} ({detail}"
            "earlier checkpoints are kept)",
            "Check the data for NaN, lower the learning rate, or clip gradients",
        )


class Stage:
    """Consecutive layers with a local objective and an optimizer of their own.

    Args:
        index: Its place, from 0.
        body: Its layers; their state has the keys of the user's network.
        names: The dotted names of the layers in the user's network.
        objective: What it minimises.
        options: How it learns.
        keys: The names of the user's parameters, by identity.
        seed: Where its random state starts.
        device: Where it computes.

    Raises:
        InputError: if it cannot learn in this precision.
    """

    def __init__(
        self,
        index: int,
        body: nn.Module,
        names: tuple[str, ...],
        objective: Objective,
        options: StageOptions,
        *,
        keys: Mapping[int, str],
        seed: int,
        device: torch.device,
    ) -> None:
        self.index = index
        self.body = body.to(device)
        self.objective = objective.to(device)
        if any(map(is_channels_last, body.parameters())):
            objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self._options = options
        self.clip_norm = options.clip_norm
        self._names = names
        self.random = RandomState(seed, device)
        self._output: Tree = None
        self._output_version = 0
        self.guard = LossGuard(index)
        self.num_loads = 0  # what was recorded of the optimizer is not true after one
        self.modules = [*self.body.modules(), *self.objective.modules()]
        # A user's objective could hold a layer of the body: count its parameters once.
        named = {
            parameter: keys.get(id(parameter), name)
            for prefix, module in (("objective", self.objective), ("", self.body))
            for name, parameter in module.named_parameters(prefix)
        }
        self.parameters = list(dict.fromkeys([*body.parameters(), *objective.parameters()]))
        trained = [(named[p], p) for p in self.parameters if p.requires_grad]
        self._check_types([parameter for _, parameter in trained])
        self.optimizer = (
            options.optimizer(StageParameters(index, trained, _of_heads(objective)))
            if trained
            else None
        )
        self.scheduler = (
            options.scheduler(self.optimizer) if options.scheduler and self.optimizer else None
        )
        scales = options.precision.compute == torch.float16 and self.optimizer is not None
        # Small gradients vanish in float16, so they are computed of a larger loss.
        self.scaler = torch.amp.GradScaler(device.type) if scales else None

    def take(self, received: Tree) -> Tree:
        """Read what the stage before handed on in training, or the batch."""
        rounds = self._options.precision.send_as is not None
        return widened(received) if rounds and self.index > 0 else received

    def forward(self, features: Tree) -> Tree:
        """Compute the stage's output, and keep it attached for `learn`.

        Args:
            features: The detached output of the stage before, as `take` read it.

        Returns:
            The detached output, as `take` of the next stage reads it. It shares storage with what
            `learn` needs, so whoever sends it must not change it; a later stage may, because it
            runs after `learn`.
        """
        self.set_mode(training=True)
        with self.random.active(), self.autocast():
            self._output = self.body(features)
        # Dense, so that the next stage meets the same strides in this process and in another:
        # strides choose kernels, and kernels decide the last bit.
        detached = tree_map(lambda tensor: dense(tensor.detach()), self._output)
        self._output_version = _version(self._output)
        send_as = self._options.precision.send_as
        return detached if send_as is None else narrowed(self._output, detached, send_as)

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:
        """Return what the objective of the next stage gets."""
        with torch.no_grad(), self.random.active(), self.autocast():
            onward = self.objective.hand_on(target, carry)
        return tree_map(lambda tensor: dense(tensor.detach()), onward)

    def learn(self, target: Tensor, carry: Tree, step: int) -> LocalLoss:
        """Update the stage from the local loss of its last output.

        Args:
            target: As `Task.prepare` made it.
            carry: What the objective of the stage before handed on.
            step: The training step, for messages.

        Returns:
            The detached terms of the loss, and what the objective noticed beside it.

        Raises:
            NonFiniteError: if the loss is NaN or infinite; the parameters are as before. Gradients
                may overflow in float16: such a step is left out, and the next ones are scaled less.
        """
        output = self._output
        with self.random.active():
            found, loss = self.compute_loss(target, carry)
            self.descend_from(loss, output, step)
        return found

    def descend_from(self, loss: Tensor | None, output: Tree, step: int) -> None:
        """Update the stage from a loss that is computed; otherwise as `learn`.

        Args:
            loss: From `compute_loss`.
            output: The features it was computed from.
            step: The training step, for messages.
        """
        if loss is not None:
            self.guard.check(loss, output, step)
            if loss.requires_grad:
                self.backward(loss)
                self.update(self.clip_norm)

    def compute_loss(self, target: Tensor, carry: Tree) -> tuple[LocalLoss, Tensor | None]:
        """Compute the local loss of the last output; arguments as `learn`.

        Returns:
            What `learn` returns, and the sum of the terms, attached; None for a frozen stage, which
            has none.
        """
        output, self._output = self._output, None
        with self.autocast():
            terms = self.objective(output, target, carry)
        if _version(output) != self._output_version:
            raise StageError(
                "An objective must not change the features in place: they are on their way "
                "to the next stage",
                f"The objective of stage {self.index} did",
                "Give its first layer inplace=False",
            )
        loss = reduce(torch.add, terms.values()) if terms else None
        return LocalLoss(_detached(terms), _detached(self.objective.observed)), loss

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, in float16 those of a scaled loss."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def update(self, clip_norm: float | None, num_batches: int = 1) -> None:
        """Let the optimizer use the gradients that are there, and clear them.

        Args:
            clip_norm: Clip their norm to this first; None: they are fine.
            num_batches: Of so many mini-batches they are; learning rates follow these.
        """
        if self.optimizer is None:
            return
        if self.descend(clip_norm):
            for _ in range(num_batches):
                self.advance()
        self.optimizer.zero_grad(set_to_none=True)

    def descend(self, clip_norm: float | None) -> bool:
        """Let the optimizer use the gradients; returns whether it did (see `learn`)."""
        assert self.optimizer is not None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        return self._step(self.optimizer)

    def advance(self) -> None:
        """Set the learning rate of the next step."""
        if self.scheduler is not None:
            self.scheduler.step()

    def _step(self, optimizer: Optimizer) -> bool:
        """Step, unless scaled gradients overflowed; returns whether.

        Only the device knows whether they did, so float16 waits for it in every step.
        """
        if self.scaler is None:
            optimizer.step()
            return True
        self.scaler.step(optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def infer(self, features: Tree) -> Tree:
        """Compute the output in evaluation mode, without gradients."""
        self.set_mode(training=False)
        with torch.no_grad(), self.random.active(), self.autocast():
            return tree_map(dense, self.body(features))

    def predict(self, output: Tree) -> Tensor | None:
        """Read logits ``[N, C]`` in at least float32 out of this stage's output, if it can."""
        with torch.no_grad(), self.random.active(), self.autocast():
            logits = self.objective.predict(output)
        return None if logits is None else precise(logits)

    def share(self, received: Tree) -> Tree:
        """Return copies of what the objective tells the next stage's for its predictions."""
        with torch.no_grad(), self.random.active():
            return tree_map(lambda t: t.detach().clone(), self.objective.share(received))

    def state_dict(self) -> dict[str, Any]:
        """Return everything the stage needs to continue, under the user's layer names."""
        return {
            "layers": list(self._names),  # those without parameters count, too
            "body": dict(self.body.state_dict()),
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
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
            CheckpointError: if it does not; nothing was changed, unless an optimizer or schedule
                of the user's refuses what it was given.
        """
        self.check_state_dict(state)
        try:
            self._load(state)
        except Exception as error:
            raise CheckpointError(
                f"A checkpoint must hold values that fit (stage {self.index})",
                f"{type(error).__name__}: {error}",
                "Resume from another, with the configuration the run was started with",
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        self.body.load_state_dict(state["body"])
        self.objective.load_state_dict(state["objective"])
        if self.optimizer and state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
            _lay_out_like_parameters(self.optimizer)
        if self.scheduler and state["scheduler"]:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.random.load_state_dict(state["random"])
        self.num_loads += 1

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
        values = {
            **self.body.state_dict(keep_vars=True),
            **self.objective.state_dict(keep_vars=True),
        }
        return {name for name, value in values.items() if isinstance(value, nn.Parameter)}

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the stage's precision."""
        return self._options.precision.autocast(self.device)

    def _check_types(self, trained: list[nn.Parameter]) -> None:
        """Autocast computes nothing of float64 in another type, and float16 cannot be scaled."""
        compute = self._options.precision.compute
        wrong = torch.float16 if compute == torch.float16 else torch.float64
        if compute != torch.float32 and any(p.dtype in (wrong, torch.float64) for p in trained):
            types = {str(p.dtype).removeprefix("torch.") for p in trained}
            raise InputError(
                f"To compute in {str(compute).removeprefix('torch.')}, parameters must be float32",
                f"Those of stage {self.index} are {', '.join(sorted(types))}",
                "Call float() on the network, or leave `precision` as it is",
            )

    def set_mode(self, *, training: bool) -> None:
        """Look at every layer: the user may have called ``eval()`` on their network meanwhile."""
        if any(module.training != training for module in self.modules):
            self.body.train(training)
            self.objective.train(training)

    @contextmanager
    def naming_errors(self, features: Tree, step: int) -> Iterator[None]:
        """Have an error of the user's code inside name this stage, its step and its input.

        Raises:
            StageError: in place of any error that does not say enough by itself.
        """
        try:
            yield
        except ScplError:
            raise
        except Exception as error:
            raise self.explain(error, features, step) from error

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


def _detached(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in scalars.items()}


def _of_heads(objective: Objective) -> list[nn.Parameter]:
    """The parameters of an objective but for those that are copies of the network's layers."""
    copies = {
        id(parameter)
        for module in objective.modules()
        if isinstance(module, OwnCopy)
        for parameter in module.parameters()
    }
    return [parameter for parameter in objective.parameters() if id(parameter) not in copies]


def _version(tree: Tree) -> int:
    """Count the in-place changes of all tensors of a tree."""
    return sum(tensor._version for tensor in tensors_of(tree))


State = Mapping[str, Any]


def copy_to_cpu(state: Any) -> Any:
    """Deep-copy nested dicts and lists, with every tensor cloned to the CPU.

    Numbers of other libraries (``lr=numpy.float64(0.1)``) become Python's own: a checkpoint is
    read with ``weights_only``, which knows no others.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(value) for value in state)
    if isinstance(state, float):
        return float(state)
    return copy.deepcopy(state)


def broken_values(state: State, parameters: set[str]) -> list[str]:
    """Name what is NaN, and the parameters that are infinite (a mask may well be)."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and (~value.isfinite() if name in parameters else value.isnan()).any()
    ]


def is_state(value: Any) -> bool:
    """Whether a value read from a file is built like the saved state of a stage, of any network."""
    if not isinstance(value, dict) or not value.keys() >= _PARTS:
        return False
    layers, tables = value["layers"], [value["body"], value["objective"]]
    optional = [value[name] for name in ("optimizer", "scheduler", "scaler")]
    named = [*tables, *(table for table in optional if table is not None), value["random"]]
    if not (isinstance(layers, list) and all(isinstance(name, str) for name in layers)):
        return False
    if not all(
        isinstance(table, dict) and all(isinstance(k, str) for k in table) for table in named
    ):
        return False
    return _is_optimizer(value["optimizer"]) and _is_random(value["random"])


_PARTS = {"layers", "body", "objective", "optimizer", "scheduler", "scaler", "random"}


def _is_optimizer(value: State | None) -> bool:
    if value is None:
        return True
    groups, kept = value.get("param_groups"), value.get("state")
    return (
        isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and isinstance(kept, dict)
        and all(isinstance(entry, dict) for entry in kept.values())
    )


def _is_random(value: State) -> bool:
    try:
        torch.Generator().set_state(value["cpu"])
    except (KeyError, TypeError, RuntimeError):
        return False
    return isinstance(value.get("accelerator", value["cpu"]), Tensor)


def differences(mine: State, other: State) -> list[str]:
    """List everything that keeps a stage from continuing from a saved state."""
    return [
        *_layers(mine["layers"], other["layers"]),
        *_tensors("", mine["body"], other["body"]),
        *_tensors("objective.", mine["objective"], other["objective"]),
        *_optimizers(mine["optimizer"], other["optimizer"]),
        *_scalers(mine["scaler"], other.get("scaler")),
    ]


def _layers(mine: list[str], other: list[str]) -> Iterator[str]:
    """Layers without parameters leave no other trace."""
    if mine != other:
        yield f"the layers are {', '.join(other)} there and {', '.join(mine)} here"


def _tensors(prefix: str, mine: State, other: State) -> Iterator[str]:
    yield from (f"{prefix}{key} is missing" for key in mine if key not in other)
    yield from (f"{prefix}{key} is unknown here" for key in other if key not in mine)
    for key, value in mine.items():
        if isinstance(value, Tensor) and key in other:
            there = getattr(other[key], "shape", None)
            if there != value.shape:
                kind = type(other[key]).__name__ if there is None else tuple(there)
                yield f"{prefix}{key} is {kind} there and {tuple(value.shape)} here"


def _optimizers(mine: State | None, other: State | None) -> Iterator[str]:
    if mine is None or other is None:
        if mine is not other:
            yield f"{_article(other)} optimizer there and {_article(mine)} optimizer here"
        return
    here, there = mine["param_groups"], other["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (there, here)]
    if sizes[0] != sizes[1]:
        yield f"the optimizer trains {sizes[0]} tensors there and {sizes[1]} here"
    elif any(one.keys() - saved.keys() for one, saved in zip(here, there, strict=True)):
        yield "the optimizer is of another kind"


def _scalers(mine: State | None, other: State | None) -> Iterator[str]:
    if (mine is None) != (other is None):
        yield f"losses are {_scaled(other)} there and {_scaled(mine)} here (`precision`)"


def _scaled(scaler: State | None) -> str:
    return "not scaled" if scaler is None else "scaled"


def _article(optimizer: State | None) -> str:
    return "no" if optimizer is None else "an"
