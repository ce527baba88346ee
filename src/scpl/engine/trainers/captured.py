"""The stream with CUDA graphs: the work of a stage is recorded once and then replayed.

Launching the kernels of a short step from Python takes longer than they run. A graph launches them
all at once, so a stage costs the same few calls whatever it computes. And because stages learn by
themselves, each gets a lane (a CUDA stream) of its own: while one learns, the next one computes
forward, on the same device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from scpl.engine.channel import NoChannel, Outbox
from scpl.engine.messages import LocalLoss, Losses, TrainBatch
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.stream import StreamTrainer
from scpl.errors import InputError, ScplError
from scpl.partition.values import TensorSpec, Tree, tensors_of, tree_map

__all__ = ["KEPT_SHAPES", "WARM_UP", "CapturedTrainer", "CudaLane", "Lane", "Recording"]

WARM_UP = 3
"""Steps of a shape that run as they are, before its graphs are made: libraries set themselves up,
optimizers make their state."""
KEPT_SHAPES = 4
"""Shapes of batches that get graphs, for each holds its memory; further ones run as they are."""


class Recording(Protocol):
    """Work on the device that was recorded.

    Attributes:
        results: What the work returned; its tensors are written anew by every `replay`.
    """

    results: Any

    def replay(self) -> None:
        """Do the work again, on what now lies in the tensors that it read."""


class Lane(Protocol):
    """Work on a device that is done in order."""

    def use(self) -> Any:
        """Return a context in which work is put on this lane."""

    def after(self, other: Lane) -> None:
        """Let what comes here wait for what is on another lane now."""

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record work without doing it."""


@final
class CudaLane:
    """A CUDA stream.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    @classmethod
    def new(cls, device: torch.device) -> CudaLane:
        """Make a lane of its own."""
        return cls(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    @classmethod
    def current(cls, device: torch.device) -> CudaLane:
        """Return the lane that other work of this thread is on."""
        return cls(torch.cuda.current_stream(device))

    def use(self) -> Any:  # noqa: D102
        return torch.cuda.stream(self._stream)

    def after(self, other: Lane) -> None:  # noqa: D102
        assert isinstance(other, CudaLane)
        self._stream.wait_stream(other._stream)

    def record(self, work: Callable[[], Any]) -> Recording:
        """Record work without doing it; recordings of a lane share their memory."""
        return _CudaRecording(work, self._stream, self._pool)


class _CudaRecording:
    def __init__(self, work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its stream in use; the outer context gives it up.
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # Work that only passes views on, or a stage without a loss, needs no kernel.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            try:
                # Other threads (a prefetching loader, a receiver) may use the device meanwhile.
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ):
                    self.results = work()
            except Exception:
                _draw_again(stream)
                raise

    def replay(self) -> None:
        self._graph.replay()


def _draw_again(stream: torch.cuda.Stream) -> None:
    """Let the device draw random numbers again after a recording that failed.

    Torch before 2.13 leaves the generator of the device recording then, and refuses the next draw
    ("Offset increment outside graph capture"). A recording that succeeds ends that.
    """
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=stream.device)


@final
class CapturedTrainer(StreamTrainer):
    """Trains stages that learn from local objectives, by replaying recorded work.

    Numbers are those of `StreamTrainer`, except that a recorded optimizer reads its learning rate
    in float32. A step is recorded once its shapes have been seen a few times; steps of other shapes
    (the last mini-batch of an epoch) run as they are. Data, weights, random state and learning
    rates may change between steps. Where weights or buffers are put elsewhere, frozen or loaded, or
    other options of an optimizer change, the step is recorded anew, after a few that run as they
    are.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where messages go on.
        timeline: Where it records what it does when; on a device that is when it launches it.
        lane: Returns the lane that all other work is on.
        new_lane: Makes a lane.
        may_fail: Go on without recordings where a step cannot be recorded.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        timeline: Timeline,
        *,
        lane: Callable[[], Lane],
        new_lane: Callable[[], Lane],
        may_fail: bool = False,
    ) -> None:
        super().__init__(stages, outbox, timeline)
        self._may_fail = may_fail
        self._lane, self._lanes = lane, [new_lane() for _ in stages]
        self._seen: dict[str, int] = {}
        self._recorded: dict[str, _RecordedStep] = {}
        # Kept until the next one is made: the memory of a lane ends with its last recording.
        self._outdated: _RecordedStep | None = None
        self._failed = False
        self._apart: set[int] = set()  # stages whose optimizer is not recorded

    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:  # noqa: D102
        shape = repr(tree_map(TensorSpec.of, [batch.features, batch.target, batch.carry]))
        step = self._recorded.get(shape)
        if step is not None and self._has_changed(step):
            # Steps run as they are first, as at the beginning: what an optimizer makes in the
            # middle of a recording would be made anew by every replay.
            self._outdated, self._seen[shape] = self._recorded.pop(shape), 0
            step = None
        step = step or self._try_record(shape, batch)
        if step is None:
            return super().train(batch, earlier)
        return self._replay(step, batch, earlier)

    def _has_changed(self, step: _RecordedStep) -> bool:
        """Whether a step must be recorded anew, some stages then without their optimizers."""
        changed = [one for one in step.stages if one.has_changed()]
        self._apart |= {one.stage.index for one in changed if one.options_changed()}
        return bool(changed)

    def _try_record(self, shape: str, batch: TrainBatch) -> _RecordedStep | None:
        """Record a step, if it is time."""
        seen = self._seen[shape] = self._seen.get(shape, 0) + 1
        if seen <= WARM_UP or self._failed:
            return None
        if len(self._recorded) == KEPT_SHAPES:
            if seen == WARM_UP + 1:
                warnings.warn(
                    f"CUDA graphs are kept for {KEPT_SHAPES} shapes of mini-batches. There are "
                    "more, and their steps run as they are: give mini-batches the same shape, for "
                    "instance by padding texts to one length",
                    stacklevel=2,
                )
            return None
        try:
            self._recorded[shape] = self._record(batch)
        except InputError as error:
            if not self._may_fail:
                raise
            self._failed = True
            warnings.warn(f"Steps run without CUDA graphs. {error}", stacklevel=2)
            return None
        self._outdated = None
        return self._recorded[shape]

    def _record(self, batch: TrainBatch) -> _RecordedStep:
        recorded: list[_RecordedStage] = []
        features, carry = batch.features, batch.carry
        for stage, lane in zip(self.stages, self._lanes, strict=True):
            apart = stage.index in self._apart
            with stage.naming_errors(features, batch.step):
                one = _RecordedStage(stage, lane, features, batch.target, carry, apart=apart)
            recorded.append(one)
            features, carry = one.output, one.onward
        return _RecordedStep(recorded)

    def _replay(self, step: _RecordedStep, batch: TrainBatch, earlier: Losses) -> Losses:
        """Forward, send on, learn, as `StreamTrainer.train`, with every stage on its own lane."""
        here, is_first = self._lane(), step.overlaps is None
        begin = self._random_states() if is_first else []
        features, carry = batch.features, batch.carry
        step.stages[0].lane.after(here)
        for place, one in enumerate(step.stages):
            stage, following = one.stage, step.stages[place + 1 : place + 2]
            naming = stage.naming_errors(features, batch.step)
            with naming, stage.random.active(), one.lane.use():
                with self.timeline.during("forward", stage.index, batch.step):
                    one.forward(features, batch.target, carry)
                if not following:
                    self._send(one, batch, earlier, here)
                elif step.overlaps:
                    following[0].lane.after(one.lane)
                with self.timeline.during("learn", stage.index, batch.step):
                    one.learn()
                if following and not step.overlaps:
                    following[0].lane.after(one.lane)
            features, carry = one.output, one.onward
        for one in step.stages:
            here.after(one.lane)
        if is_first:
            step.overlaps = not any(map(_differ, begin, self._random_states()))
        return tuple(one.losses(batch.step) for one in step.stages)

    def _random_states(self) -> list[dict[str, Tensor]]:
        return [stage.random.state_dict() for stage in self.stages]

    def _send(self, one: _RecordedStage, batch: TrainBatch, earlier: Losses, here: Lane) -> None:
        """Send on a copy: the next step writes into what was recorded, maybe before it has left."""
        if isinstance(self.outbox, NoChannel):
            return
        here.after(one.lane)
        with here.use():
            features, carry = tree_map(torch.clone, [one.output, one.onward])
            message = replace(batch, features=features, carry=carry, losses=earlier)
            self.bytes_sent += self.outbox.send(message)


@dataclass
class _RecordedStep:
    """The recorded stages of a step of one shape.

    Attributes:
        stages: The stages.
        overlaps: Whether a stage may compute while the one before still learns. Recorded work
            reads where the random numbers begin from one place for all of a device, so stages that
            draw must take turns; whether they do is known after the first replay.
    """

    stages: list[_RecordedStage]
    overlaps: bool | None = None


class _RecordedStage:
    """The recorded work of one stage.

    Args:
        stage: The stage.
        lane: Where its work goes.
        features: What it gets, for the shapes.
        target: As `Task.prepare` made it.
        carry: What its objective gets, for the shapes.
        apart: Run the optimizer as it is, after what is recorded.

    Attributes:
        output: What the stage hands on; written anew by `forward`.
        onward: What its objective hands on; the same.

    Raises:
        InputError: if the work cannot be recorded.
    """

    def __init__(
        self,
        stage: Stage,
        lane: Lane,
        features: Tree,
        target: Tensor,
        carry: Tree,
        *,
        apart: bool,
    ) -> None:
        self.stage, self.lane = stage, lane
        self._inputs = tree_map(torch.clone, [features, target, carry])
        groups = stage.optimizer.param_groups if stage.optimizer and not apart else []
        # Torch's fused Adam is made for this: all that its step reads lies on the device.
        records = stage.scaler is None and all(
            group.get("fused") and "capturable" in group and isinstance(group["lr"], float)
            for group in groups
        )
        self._groups = groups if records else []
        self._known = [group["lr"] for group in self._groups]
        self._rates = [
            torch.tensor(lr, dtype=torch.float32, device=stage.device) for lr in self._known
        ]
        self._weights, self._options = self._weights_now(), self._options_now()
        with self._buffers_kept():
            self._forward = self._record(self._compute_forward)
            self.output, self.onward = self._forward.results
            _clear(stage.parameters)
            try:
                with self._state_there():
                    self._learn = self._record(self._compute_learn)
            finally:
                _clear(stage.parameters)
            self._found, self._scalars, self._gradients = self._learn.results

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> None:
        """Take what the stage gets, and compute `output` and `onward`."""
        given = tensors_of([features, target, carry])
        for mine, new in zip(tensors_of(self._inputs), given, strict=True):
            mine.copy_(new)
        self._forward.replay()

    def learn(self) -> None:
        """Compute the loss of the last output, and learn from it."""
        stage = self.stage
        for place, group in enumerate(self._groups):
            if group["lr"] != self._known[place]:
                self._known[place] = group["lr"]
                self._rates[place].fill_(group["lr"])
        self._learn.replay()
        if self._groups and self._gradients:
            stage.advance()
        elif self._gradients:
            for parameter, gradient in zip(stage.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            stage.update(stage.clip_norm)

    def losses(self, step: int) -> LocalLoss:
        """Return what the last loss came to; call it where other work may wait for this lane.

        Raises:
            NonFiniteError: if a loss was NaN or infinite; on a device it is noticed later.
        """
        values = iter(self._scalars.clone().unbind() if self._scalars is not None else ())
        found = self._found
        terms = {name: next(values) for name in found.terms}
        observed = {name: next(values) for name in found.observed}
        for loss in values:  # the last one is their sum
            self.stage.guard.check(loss, None, step)
        return LocalLoss(terms, observed)

    def has_changed(self) -> bool:
        """Whether something that was recorded is not true any more."""
        return self._weights_now() != self._weights or self.options_changed()

    def options_changed(self) -> bool:
        """Whether the optimizer has other options than were recorded."""
        return self._options_now() != self._options

    def _compute_forward(self) -> tuple[Tree, Tree]:
        features, target, carry = self._inputs
        output = self.stage.forward(self.stage.take(features))
        return output, self.stage.hand_on(target, carry)

    def _compute_learn(self) -> tuple[LocalLoss, Tensor | None, list[Tensor | None]]:
        stage, (_, target, carry) = self.stage, self._inputs
        found, loss = stage.compute_loss(target, carry)
        gradients: list[Tensor | None] = []
        if loss is not None and loss.requires_grad:
            stage.backward(loss)
            gradients = [parameter.grad for parameter in stage.parameters]
            if self._groups:
                with self._capturable():
                    stage.descend(stage.clip_norm)
        scalars = [*found.terms.values(), *found.observed.values()]
        scalars += [] if loss is None else [loss.detach()]
        if not scalars:
            return found, None, gradients
        types = [scalar.dtype for scalar in scalars]
        widest = reduce(torch.promote_types, types, torch.float32)
        return found, torch.stack([scalar.to(widest) for scalar in scalars]), gradients

    def _record(self, work: Callable[[], Any]) -> Recording:
        with self.stage.random.active():
            before = torch.get_rng_state()
            try:
                recording = self.lane.record(work)
            except ScplError:
                raise
            except Exception as error:
                # The end of a recording that failed raises again, and says less.
                cause = error.__context__ or error
                reason = str(cause).strip().splitlines() or [type(cause).__name__]
                raise InputError(
                    "For `cuda_graphs` a step must run on the device alone and never wait for it",
                    f"Stage {self.stage.index} cannot be recorded: {reason[0]}",
                    "Leave `cuda_graphs` out, or change what waits (.item(), .cpu(), a condition "
                    "on data)",
                ) from cause
            if not torch.equal(before, torch.get_rng_state()):
                raise InputError(
                    "For `cuda_graphs` a step must draw its random numbers on the device",
                    f"Stage {self.stage.index} draws on the CPU",
                    "Leave `cuda_graphs` out, or give device= where it draws",
                )
        return recording

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """See that work leaves every buffer where it is; a recording would read the old ones.

        Raises:
            InputError: if it puts others in their places; the old ones are back then.
        """
        before = [(module, dict(module._buffers)) for module in self.stage.modules]
        replaced: set[str] = set()
        try:
            yield
        finally:
            for module, kept in before:
                names = [name for name, old in kept.items() if module._buffers.get(name) is not old]
                module._buffers.update((name, kept[name]) for name in names)
                replaced.update(names)
        if replaced:
            raise InputError(
                "For `cuda_graphs` a step must change buffers in place",
                f"Stage {self.stage.index} replaces {', '.join(map(repr, sorted(replaced)))}",
                "Leave `cuda_graphs` out, or use copy_(), mul_(), add_() or lerp_()",
            )

    @contextmanager
    def _state_there(self) -> Iterator[None]:
        """See that the recorded optimizer has its state; a replay would make it anew every time.

        Raises:
            InputError: if a parameter learns for the first time; its state is gone then.
        """
        if not self._groups:
            yield
            return
        assert self.stage.optimizer is not None
        state = self.stage.optimizer.state
        before = set(state)
        yield
        new = [parameter for parameter in state if parameter not in before]
        for parameter in new:
            del state[parameter]
        if new:
            raise InputError(
                "For `cuda_graphs` the parameters that learn must be the same in every step",
                f"{len(new)} of stage {self.stage.index} learn for the first time as it is "
                "recorded",
                "Leave `cuda_graphs` out, or let them take part from the first step on",
            )

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """Let the optimizer read learning rates from the device."""
        for group, rate in zip(self._groups, self._rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            for group, lr in zip(self._groups, self._known, strict=True):
                group.update(lr=lr, capturable=False)

    def _weights_now(self) -> list[tuple[int, bool]]:
        weights = [(p.data_ptr(), p.requires_grad) for p in self.stage.parameters]
        buffers = [
            (buffer.data_ptr(), False)
            for module in self.stage.modules
            for buffer in module._buffers.values()
            if buffer is not None
        ]
        averages = [
            (value.data_ptr(), False)
            for group in self._groups
            for value in self._state_of(group["params"][0]).values()
            if isinstance(value, Tensor)
        ]
        return [(self.stage.num_loads, False), *weights, *buffers, *averages]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        assert self.stage.optimizer is not None
        state: dict[str, Any] = self.stage.optimizer.state.get(parameter, {})
        return state

    def _options_now(self) -> list[dict[str, Any]]:
        free = ("params", "lr", "initial_lr")
        return [{k: v for k, v in group.items() if k not in free} for group in self._groups]


def _clear(parameters: Iterable[nn.Parameter]) -> None:
    """Let go of gradients: those of a recording are its own, and no other step may add to them."""
    for parameter in parameters:
        parameter.grad = None


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)
