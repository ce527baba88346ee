"""Plan a run by measurement: where to cut a network, and what each rank will have to do.

The network is cut everywhere it could be. Of every unit between two such cuts the forward pass, the
backward pass and the update are timed, and of every cut what a stage that ends there costs besides:
its objective with the head, and the engine. A stage costs the sum of its units, and what its end
costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from statistics import median
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scpl.engine.batches import Source, pair
from scpl.engine.build import build_objective
from scpl.engine.costs import Costs, Held, Plan, Unit
from scpl.engine.parameters import StageParameters
from scpl.engine.ranks import OneRank, Ranks
from scpl.engine.stage import OptimizerFactory, Stage, StageOptions
from scpl.methods.base import Method, Nothing, Objective
from scpl.partition import Partition
from scpl.partition.cutting import split_everywhere
from scpl.partition.reading import Features
from scpl.partition.values import Tree, dense, tensors_of, tree_map
from scpl.partition.verify import undisturbed
from scpl.tasks import Task

__all__ = [
    "REPEATS",
    "Kind",
    "measurable",
    "measure",
    "measure_parts",
    "plan",
    "relative_speeds",
    "seconds_of_a_piece",
]

REPEATS = 5
"""How often each unit has its turn."""
STEPS_OF_A_VISIT = 2
"""Timed steps of a unit before the next unit's turn; one more warms up."""
AS_FAST = 1.15
"""Ranks whose times differ by less than this factor count as equally fast: the same processor
differs as much from one moment to the next."""
_SMALL = 1e-3
"""Size of gradients that are made up, where no objective gives any."""


def plan(
    model: nn.Module,
    method: Method,
    optimizer: OptimizerFactory,
    *,
    num_stages: int,
    batch: Any,
    num_ranks: int | None = None,
    ranks: Ranks | None = None,
    speeds: Sequence[float] | None = None,
    readout: str | None = None,
    output: str | int | None = None,
    features: Features | None = None,
    task: Task | None = None,
) -> Plan:
    """Measure what the parts of a network cost here, and plan its stages by it.

    Use it as ``scpl.split(model, plan.cuts, costs=plan.costs, example=...)``. Times differ from
    call to call: with several ranks the first one measures, and all get its plan.

    Args:
        model: The network; it is left as it was.
        method: Which objective each stage gets.
        optimizer: Builds one stage's optimizer from its parameters.
        num_stages: How many stages.
        batch: A mini-batch of full size, as a loader yields it: ``(inputs, target)``, or a mapping
            with labels.
        num_ranks: How many ranks to plan for; default: those of `ranks`, else one for each stage.
        ranks: This rank and the others, from `scpl.connect`; all must call. Default: this process
            alone, on the device of the network's parameters.
        speeds: How fast each rank is beside this one, or the first; default: they are timed, if
            `ranks` are several and none others are planned for.
        readout: As for `scpl.split`, like the arguments that follow.
        output: Which output holds the logits.
        features: How objectives read what a stage hands on.
        task: What the outputs mean.

    Raises:
        PartitionError: if the network cannot be cut.
        InputError: if there are more ranks than stages, or not one speed for each rank.
    """
    if num_ranks is None and ranks is not None and ranks.mesh.num_ranks > 1:
        num_ranks = ranks.mesh.num_groups
    if ranks is None:
        ranks = OneRank(next((p.device for p in model.parameters()), torch.device("cpu")))
    if speeds is None:
        theirs = num_ranks == ranks.mesh.num_groups
        speeds = relative_speeds(ranks) if theirs else ()
        if theirs and ranks.mesh.replicas is not None:
            speeds = ranks.mesh.group_speeds(speeds)
    if ranks.mesh.is_first:
        costs = measure(
            model, method, StageOptions(optimizer), num_stages=num_stages, batch=batch,
            device=ranks.device, readout=readout, output=output, features=features, task=task,
        )  # fmt: skip
        ranks.share("plan", costs.plan(num_stages, num_ranks, speeds).to_json())
    return Plan.from_json(ranks.fetch("plan"))


def relative_speeds(
    ranks: Ranks, piece: Callable[[torch.device], float] | None = None
) -> tuple[float, ...]:
    """Time the same piece of work on every rank; all ranks call it, and work at the same time.

    Args:
        ranks: This rank and the others.
        piece: Does the work on a device, and returns its seconds; default: `seconds_of_a_piece`.

    Returns:
        How fast each rank is beside the first, which measures units; empty: all are as fast.
    """
    if ranks.mesh.num_ranks == 1:
        return ()
    ranks.exchange("ready to be timed", True)
    seconds = ranks.exchange("seconds", (piece or seconds_of_a_piece)(ranks.device))
    if max(seconds) < AS_FAST * min(seconds):
        return ()
    return tuple(seconds[0] / own for own in seconds)


def seconds_of_a_piece(device: torch.device) -> float:
    """Time a linear layer, forward and backward, as long as one of a network: the median."""
    layer, inputs = nn.Linear(1024, 1024, device=device), torch.ones(256, 1024, device=device)
    seconds: list[float] = []
    for _ in range(8):
        begin = _now(device)
        torch.autograd.backward([layer(inputs.requires_grad_()).sum()])
        seconds.append(_now(device) - begin)
    return median(seconds[1:])  # the first one warms up


def measure(
    model: nn.Module,
    method: Method,
    options: StageOptions,
    *,
    num_stages: int,
    batch: Any,
    device: torch.device,
    readout: str | None = None,
    output: str | int | None = None,
    features: Features | None = None,
    task: Task | None = None,
    seed: int = 0,
    repeats: int = REPEATS,
) -> Costs:
    """Time every unit of a network in turns; medians count.

    Only one unit at a time is on the device with its optimizer, so a network that is too large for
    the device can be measured on it.

    Args:
        model: The network; it is left as it was.
        method: Which objective each stage gets.
        options: How stages learn.
        num_stages: How many must be possible.
        batch: A mini-batch of full size.
        device: Where to measure.
        readout: As for `scpl.split`.
        output: As for `scpl.split`.
        features: As for `scpl.split`.
        task: As for `scpl.split`.
        seed: Seed of the objectives' parameters.
        repeats: How often each unit has its turn.

    Raises:
        PartitionError: if the network cannot be cut.
    """
    parts = measurable(
        model, num_stages=num_stages, batch=batch, readout=readout, output=output,
        features=features, task=task,
    )  # fmt: skip
    [costs] = measure_parts(
        parts, [Kind(method)], options, batch=batch, device=device, seed=seed, repeats=repeats
    )
    return costs


def measurable(
    model: nn.Module,
    *,
    num_stages: int,
    batch: Any,
    readout: str | None = None,
    output: str | int | None = None,
    features: Features | None = None,
    task: Task | None = None,
) -> Partition:
    """Cut a network into the units that `measure_parts` times; arguments as for `measure`.

    Raises:
        PartitionError: if the network cannot be cut.
    """
    parts = split_everywhere(
        model, num_stages=num_stages, readout=readout, output=output, features=features,
        example=pair(batch)[0],
    )  # fmt: skip
    return parts if task is None else replace(parts, task=task)


@dataclass(frozen=True)
class Kind:
    """One of the ways in which units can be measured.

    Attributes:
        method: Which objective each stage gets.
        rows: Measure so many rows of the mini-batch; None: all.
        halves: Also time gradients of what comes in alone (`Unit.inputs`).
    """

    method: Method
    rows: int | None = None
    halves: bool = False


def measure_parts(
    parts: Partition,
    kinds: Sequence[Kind],
    options: StageOptions,
    *,
    batch: Any,
    device: torch.device,
    seed: int = 0,
    repeats: int = REPEATS,
) -> list[Costs]:
    """Time every unit in several ways, in turns, so that a machine that gets slower hits all.

    Args:
        parts: The units.
        kinds: The ways.
        options: How stages learn.
        batch: A mini-batch of full size.
        device: Where to measure.
        seed: Seed of the objectives' parameters.
        repeats: How often each unit has its turn.

    Returns:
        What the units cost in each of the ways.
    """
    inputs, target = pair(batch)
    home = next((p.device for p in parts.model.parameters()), torch.device("cpu"))
    source = Source(parts.num_outputs, parts.task, device, parts.form)
    message = source.to_train(1, (inputs, target))
    timers = [
        [
            _Timer(
                parts, i, build_objective(parts, kind.method, i, seed), options, device,
                halves=kind.halves,
            )
            for i in range(parts.num_stages)
        ]
        for kind in kinds
    ]  # fmt: skip
    goals = [message.target[: kind.rows] for kind in kinds]
    with undisturbed(parts.model, weights=True):
        for _ in range(repeats):
            for kind, own, goal in zip(kinds, timers, goals, strict=True):
                values, carry = tree_map(itemgetter(slice(kind.rows)), message.features), None
                for timer in own:
                    values, carry = timer.visit(values, goal, carry)
        parts.readout.to(home)
    return [
        Costs(parts.cuts, tuple(timer.unit() for timer in own), len(goal))
        for own, goal in zip(timers, goals, strict=True)
    ]


@dataclass
class _Seconds:
    """Seconds of each step that was timed."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def add(self, step: tuple[float, float, float]) -> None:
        """Keep what a step took."""
        for kept, seconds in zip((self.forward, self.backward, self.update), step, strict=True):
            kept.append(seconds)


@final
class _Timer:
    """Times one unit of a network, within a stage and as its beginning, and what an end costs."""

    def __init__(
        self,
        parts: Partition,
        index: int,
        objective: Objective,
        options: StageOptions,
        device: torch.device,
        *,
        halves: bool,
    ) -> None:
        self._body, self._layers = parts.bodies[index], parts.names[index]
        self._parameters = [p for p in self._body.parameters() if p.requires_grad]
        self._options, self._device = options, device
        self._follows, self._halves = index > 0, halves
        # What a stage does besides its layers is what a stage without layers does.
        # Optimizers are those of the first stage: how many there will be is not known yet.
        self._end = Stage(0, nn.Identity(), (), objective, options, keys={}, seed=0, device=device)
        self._almost_nothing = nn.Parameter(torch.zeros(1, device=device))
        self._within, self._begins = _Seconds(), _Seconds()
        self._steps: list[float] = []
        self._objective: list[float] = []
        self._inputs: list[float] = []
        self._bytes_in = self._bytes_out = 0
        self._held = self._objective_held = Held()

    def _optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        return self._options.optimizer(StageParameters(0, [("", p) for p in parameters]))

    def visit(self, values: Tree, target: Tensor, carry: Tree) -> tuple[Tree, Tree]:
        """Time a few steps of each kind.

        Args:
            values: What the unit before returned.
            target: As `Task.prepare` made it.
            carry: What the objective before handed on.

        Returns:
            What this unit returns, and what its objective hands on.
        """
        home = next((p.device for p in self._body.parameters()), self._device)
        self._body.to(self._device).train()
        optimizer = self._optimizer(self._parameters) if self._parameters else None
        small = self._optimizer([self._almost_nothing])
        with self._end.random.active():
            with torch.no_grad(), self._end.autocast():
                outputs = self._body(tree_map(Tensor.clone, values))
            self._bytes_in = sum(t.nbytes for t in tensors_of(values))
            self._bytes_out = self._bytes_sent(outputs)
            for step in range(STEPS_OF_A_VISIT + 1):
                seconds, gradients, onward = self._time_end(outputs, target, carry)
                first = self._time_body(tree_map(dense, values), gradients, optimizer)
                within = (
                    self._time_body(values, gradients, optimizer, attached=True)
                    if self._follows
                    else first
                )
                if self._halves and self._follows:
                    inputs = self._time_inputs(values, gradients)
                    self._inputs += [inputs] if step > 0 else []
                self._almost_nothing.grad = torch.zeros_like(self._almost_nothing)
                step_itself = self._time_update(small, [self._almost_nothing])
                if step > 0:
                    self._objective.append(seconds)
                    self._steps.append(step_itself)
                    self._begins.add(first)
                    self._within.add(within)
            if self._held == Held():
                self._count_held(values, outputs, target, carry, optimizer)
        self._body.to(home)
        return outputs, onward

    def unit(self) -> Unit:
        """Sum up what was measured."""
        # A stage has one optimizer; its step is counted at the end of the stage, with the head.
        update = median([*self._begins.update, *self._within.update]) - median(self._steps)
        return Unit(
            layers=self._layers,
            parameters=sum(p.numel() for p in self._body.parameters()),
            forward=median(self._within.forward),
            backward=median(self._within.backward),
            forward_first=median(self._begins.forward),
            backward_first=median(self._begins.backward),
            update=max(update, 0.0),
            objective=median(self._objective),
            objective_parameters=sum(p.numel() for p in self._end.objective.parameters()),
            bytes_out=self._bytes_out,
            bytes_in=self._bytes_in,
            inputs=median(self._inputs or [0.0]),
            held=self._held,
            objective_held=self._objective_held,
        )

    def _bytes_sent(self, outputs: Tree) -> int:
        """Bytes of what goes on; values that learn may do so in a narrower type."""
        narrow = self._options.precision.send_as
        return sum(
            t.numel() * min(narrow.itemsize, t.element_size())
            if narrow is not None and t.is_floating_point()
            else t.nbytes
            for t in tensors_of(outputs)
        )

    def _count_held(
        self, values: Tree, outputs: Tree, target: Tensor, carry: Tree, optimizer: Optimizer | None
    ) -> None:
        """Count bytes, once there is a state of the optimizer."""
        inputs = tree_map(Tensor.clone, tree_map(_leaf, values))
        kept = _Kept([*tensors_of(inputs), *self._body.parameters()])
        with kept, self._end.autocast():
            for tensor in tensors_of(self._body(inputs)):
                kept.keep(tensor)
        self._held = _held(list(self._body.parameters()), optimizer, kept.num_bytes)
        attached = tree_map(Tensor.clone, tree_map(_leaf, outputs))
        end = self._end
        parameters = list(end.objective.parameters())
        kept = _Kept([*tensors_of(attached), *parameters])
        with kept:
            end.forward(attached)
            end.hand_on(target, carry)
            if not isinstance(end.objective, Nothing):
                end.learn(target, carry, 0)
        self._objective_held = _held(parameters, end.optimizer, kept.num_bytes)

    def _time_end(
        self, outputs: Tree, target: Tensor, carry: Tree
    ) -> tuple[float, list[Tensor], Tree]:
        """Time the objective; returns the gradients of what the unit returns, too."""
        leaves = tree_map(_leaf, outputs)
        attached = tree_map(Tensor.clone, leaves)
        end = self._end
        begin = self._now()
        with end.naming_errors(attached, 0):
            end.forward(attached)
            onward = end.hand_on(target, carry)
            if not isinstance(end.objective, Nothing):
                end.learn(target, carry, 0)
        seconds = self._now() - begin
        gradients = [
            leaf.grad if leaf.grad is not None else torch.randn_like(leaf) * _SMALL
            for leaf in tensors_of(leaves)
            if leaf.requires_grad
        ]
        return seconds, gradients, onward

    def _time_body(
        self,
        values: Tree,
        gradients: Sequence[Tensor],
        optimizer: Optimizer | None,
        *,
        attached: bool = False,
    ) -> tuple[float, float, float]:
        """Time one step of the layers; `attached` to layers before them that learn, too."""
        # Copies, because a first layer may work in place, which a leaf must not bear.
        inputs = tree_map(Tensor.clone, tree_map(_leaf, values) if attached else values)
        begin = self._now()
        with self._end.autocast():
            outputs = self._body(inputs)
        forwarded = self._now()
        floating = [t for t in tensors_of(outputs) if t.is_floating_point()]
        pairs = [(t, g) for t, g in zip(floating, gradients, strict=True) if t.requires_grad]
        prepared = self._now()
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        learned = self._now()
        updated = self._time_update(optimizer, self._parameters) if optimizer and pairs else 0.0
        return forwarded - begin, learned - prepared, updated

    def _time_inputs(self, values: Tree, gradients: Sequence[Tensor]) -> float:
        """Time the gradients of what comes in alone, of layers that follow others."""
        leaves = tree_map(_leaf, values)
        with self._end.autocast():
            outputs = self._body(tree_map(Tensor.clone, leaves))
        floating = [t for t in tensors_of(outputs) if t.is_floating_point()]
        pairs = [(t, g) for t, g in zip(floating, gradients, strict=True) if t.requires_grad]
        wanted = [leaf for leaf in tensors_of(leaves) if leaf.requires_grad]
        if not (pairs and wanted):
            return 0.0
        begin = self._now()
        outs, grads = [t for t, _ in pairs], [g for _, g in pairs]
        torch.autograd.grad(outs, wanted, grads, allow_unused=True)
        return self._now() - begin

    def _time_update(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> float:
        begin = self._now()
        if self._options.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return self._now() - begin

    def _now(self) -> float:
        return _now(self._device)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, without known tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._found: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor; two that share their memory count once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept as it is would keep itself alive

    @property
    def num_bytes(self) -> int:
        """Of all that were kept."""
        return sum(self._found.values())


def _held(parameters: Sequence[nn.Parameter], optimizer: Optimizer | None, kept: int) -> Held:
    states = optimizer.state.values() if optimizer is not None else ()
    return Held(
        parameters=sum(p.nbytes for p in parameters),
        gradients=sum(p.nbytes for p in parameters if p.requires_grad),
        optimizer=sum(
            value.nbytes
            for state in states
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        activations=kept,
    )


def _now(device: torch.device) -> float:
    """The moment at which everything that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())
