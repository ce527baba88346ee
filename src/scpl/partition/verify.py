"""Prove that the stages of a network compute what the network computes.

The network and its stages run on the same batch, in training and in evaluation mode, from the
same random state. All parameters and buffers are disturbed meanwhile: a gate or a position that
begins at zero would hide what was left out. Outputs, gradients and buffers must be the same.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn

from scpl.errors import PartitionError
from scpl.partition.inputs import Form
from scpl.partition.pieces import Pieces
from scpl.partition.values import TensorSpec, Tree, tensors_of, tree_map

__all__ = [
    "BOTH_MODES",
    "Difference",
    "Effects",
    "describe",
    "difference",
    "effects_of",
    "run_network",
    "undisturbed",
]

_EXAMPLE = "Check the shapes and types of the example against the network's inputs"
BOTH_MODES = (False, True, True)
_THROWS = 8
"""How often a network runs with other random numbers of Python, to see whether they matter."""
_CLOSE = 1e-4
"""Largest difference of a traced network, as a share of the largest value."""
_ZERO = 1e-6
"""Largest difference of a gradient, as a share of the largest one of any parameter: one that is
zero by its formula (that of a key's bias) is what rounding leaves of large ones."""


Pick: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Difference:
    """Where the stages differ from the network.

    Attributes:
        what: In one sentence.
        is_rounding: Whether it is so small that the order of additions explains it.
    """

    what: str
    is_rounding: bool


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@contextmanager
def undisturbed(model: nn.Module, *, weights: bool = False) -> Iterator[None]:
    """Let a network run without a trace on its state, its modes and the random generators.

    Args:
        model: The network.
        weights: Whether parameters will be changed, and must be put back, too.
    """
    plain = [(module, _plain_attributes(module)) for module in model.modules()]
    kept: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]] = [
        (held, name, value, None if value is None else value.detach().clone())
        for module in model.modules()
        for held in _held(module, weights=weights)
        for name, value in held.items()
    ]
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        with torch.no_grad():
            for held, name, value, copy in kept:
                held[name] = value
                if value is not None and copy is not None:
                    value.copy_(copy)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, attributes in plain:
            vars(module).update(attributes)
            # The old weight_norm keeps what it computed; attached, it cannot be copied.
            kept_weights = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
            vars(module).update({k: v.detach() for k, v in kept_weights.items() if v.grad_fn})


def _held(module: nn.Module, *, weights: bool) -> list[dict[str, Any]]:
    buffers: dict[str, Any] = module._buffers
    parameters: dict[str, Any] = module._parameters
    return [buffers, parameters] if weights else [buffers]


@dataclass(frozen=True)
class Effects:
    """What a forward pass in training mode does besides its output.

    Attributes:
        buffers: Those that it changes.
        attributes: What else it changes, by name: counters, extra state.
        throws_dice: Whether its logits depend on random numbers of Python or numpy.
    """

    buffers: tuple[str, ...]
    attributes: tuple[str, ...]
    throws_dice: bool


def effects_of(model: nn.Module, form: Form, batch: Tree, pick: Pick) -> Effects:
    """Run the network, and again from other random states of Python if it draws from them.

    Args:
        model: The network.
        form: How a batch becomes its arguments.
        batch: Some samples.
        pick: Finds the logits in what it returns.
    """

    def run(seed: int) -> Tensor:
        _seed_python(seed)
        torch.manual_seed(0)
        logits: Tensor = pick(run_network(model.train(), form, batch))
        return logits

    with undisturbed(model), torch.no_grad():
        model.train()
        held = {n: b.clone() for n, b in model.named_buffers(remove_duplicate=False)}
        state = _other_state(model)
        first = run(0)
        draws = _python_state() != _python_state(seed=0)
        after = dict(model.named_buffers(remove_duplicate=False))
        buffers = tuple(name for name, value in held.items() if not _same(value, after[name]))
        now = _other_state(model)
        attributes = tuple(name for name, value in now.items() if state.get(name, value) != value)
    depends = False
    for seed in range(1, _THROWS if draws else 1):
        with undisturbed(model), torch.no_grad():
            depends |= not _same(first, run(seed))
    return Effects(buffers, attributes, depends)


def _python_state(seed: int | None = None) -> tuple[object, object]:
    """What Python and numpy draw next; after seeding them, if a seed is given."""
    if seed is not None:
        _seed_python(seed)
    return random.random(), numpy.random.random()


def _seed_python(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers and texts that a module keeps: its mode, a counter."""
    kinds = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(module).items() if type(value) in kinds}


def _other_state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}{key}": value for key, value in _plain_attributes(module).items()}
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[f"{prefix}get_extra_state()"] = pickle.dumps(module.get_extra_state())
    return found


def run_network(model: nn.Module, form: Form, batch: Tree) -> Any:
    """Run the network on an arranged batch.

    Raises:
        PartitionError: if it does not accept the batch.
    """
    args, kwargs = form.arguments(tree_map(Tensor.clone, batch))
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise PartitionError(
            "The network must accept the example batch",
            f"On {describe(batch)} it raised {type(error).__name__}: {error}",
            _EXAMPLE,
        ) from error


def difference(
    model: nn.Module, pieces: Pieces, batch: Tree, modes: Sequence[bool], unused: Collection[str]
) -> Difference | None:
    """Find out whether the stages differ from the network.

    Args:
        model: The network; its state is put back afterwards.
        pieces: Its stages, which share its parameters and buffers.
        batch: Some samples.
        modes: Whether to compare in training mode; several times with other random numbers.
        unused: Parameters and buffers that are in no stage.
    """

    def network(batch: Tree) -> Tensor:
        found: Tensor = pieces.logits(run_network(model, pieces.form, batch))
        return found

    worst: Difference | None = None
    for seed, training in enumerate(modes):
        with undisturbed(model, weights=True), _one_order():
            model.train(training)
            for part in (*pieces.bodies, pieces.readout):
                part.train(training)
            _disturb(model, seed)
            state = {n: t.detach().clone() for n, t in _state(model).items()}
            expected = _outcome(model, network, batch, seed)
            with torch.no_grad():
                for name, tensor in _state(model).items():
                    tensor.copy_(state[name])
            found = _outcome(model, pieces.run, batch, seed)
        mode = "training" if training else "evaluation"
        fault = _compare(expected, found, mode, unused)
        if fault is not None and not fault.is_rounding:
            return fault
        worst = worst or fault
    return worst


@contextmanager
def _one_order() -> Iterator[None]:
    """Let convolutions on an accelerator add up in the same order each time."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _disturb(model: nn.Module, seed: int) -> None:
    """Change every parameter, and move every buffer up: a variance must stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.add_(0.05 * noise.to(buffer))


def _outcome(
    model: nn.Module, function: Callable[[Tree], Tensor], batch: Tree, seed: int
) -> _Outcome:
    _seed_python(seed)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = None
    logits = function(tree_map(Tensor.clone, batch))
    if model.training and logits.requires_grad:
        weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
        (logits * weights.to(logits)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    return _Outcome(logits.detach(), gradients, buffers)


def _compare(
    expected: _Outcome, found: _Outcome, mode: str, unused: Collection[str]
) -> Difference | None:
    """Compare outputs, then what happened to every parameter and buffer by name."""
    faults: list[Difference] = []
    pairs = [("the output", expected.logits, found.logits)]
    for kind, theirs, ours in (
        ("the gradient of", expected.gradients, found.gradients),
        ("", expected.buffers, found.buffers),
    ):
        for name in {**theirs, **ours}:
            if not kind and name in unused:
                continue
            if name not in theirs or name not in ours:
                with_it = "the network" if name in theirs else "the stages"
                what = f"in {mode} mode {kind} {name!r} exists in {with_it} only"
                return Difference(" ".join(what.split()), is_rounding=False)
            pairs.append((f"{kind} {name!r}".strip(), theirs[name], ours[name]))
    sizes = [_size(gradient) for gradient in expected.gradients.values()]
    zero = _ZERO * max(sizes, default=0.0)
    for what, one, other in pairs:
        if not _same(one, other):
            near = zero if what.startswith("the gradient") else 0.0
            faults.append(_describe_difference(what, one, other, mode, near))
    large = [fault for fault in faults if not fault.is_rounding]
    return next(iter([*large, *faults]), None)


def _describe_difference(
    what: str, one: Tensor, other: Tensor, mode: str, near: float
) -> Difference:
    if one.shape != other.shape:
        shapes = f"{TensorSpec.of(one)} in the network and {TensorSpec.of(other)} in the stages"
        return Difference(f"in {mode} mode {what} is {shapes}", is_rounding=False)
    finite = one.isfinite() & other.isfinite()
    same_elsewhere = _same(one[~finite], other[~finite])
    apart = (one - other)[finite].abs().double()
    scale = _size(one[finite])
    most = apart.max().item() if len(apart) else 0.0
    text = f"in {mode} mode {what} differs by up to {most:.2g} (largest value {scale:.2g})"
    return Difference(text, is_rounding=same_elsewhere and most <= max(_CLOSE * scale, near))


def _size(tensor: Tensor) -> float:
    """The largest finite number there is, by magnitude; 0 if there is none."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if len(finite) else 0.0


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    if one.is_floating_point():
        return torch.equal(one.isnan(), other.isnan()) and torch.equal(
            one.nan_to_num(), other.nan_to_num()
        )
    return False


def describe(tree: Tree) -> str:
    """Describe the tensors of a tree."""
    return " and ".join(str(TensorSpec.of(tensor)) for tensor in tensors_of(tree)) or "nothing"
