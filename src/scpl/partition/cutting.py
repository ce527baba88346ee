"""Cut a network into stages, and prove on an example that nothing changed.

A *chain* of layers (an ``nn.Sequential``, or a module whose forward calls its named children one
after the other) is cut as it is. Any other network is traced by ``torch.export`` and cut along its
graph. Either way the stages hold the network's own parameters and buffers, so training them trains
the user's network, under its own ``state_dict`` keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from scpl.errors import PartitionError, ScplError
from scpl.partition.chain import chain_cuts, cut_chain, is_in_chain
from scpl.partition.graph import BY_HAND, without_cache
from scpl.partition.inputs import Form, beside, samples
from scpl.partition.layers import is_chain
from scpl.partition.pieces import Following, Pieces, Read
from scpl.partition.reading import Features, ReadThen
from scpl.partition.traced import ROWS, cut_graph
from scpl.partition.values import TensorSpec, Tree, tensors_of, tree_map
from scpl.partition.verify import BOTH_MODES, describe, difference, run_network, undisturbed
from scpl.tasks import Classes, Task

__all__ = ["Partition", "split", "split_everywhere"]

_READS_SUMMARY = (
    "The classifier must read what the last layer before it says of its output (`summarize`): "
    "make the summary a layer before the classifier, or name a later layer as `readout`"
)
_CHAIN = "The network's stages must accept the example batch one after the other"
_ADVICE = f"Its forward may depend on chance or on state of its own. {BY_HAND}"


@dataclass(frozen=True)
class Partition(Pieces):
    """A network cut into stages.

    Attributes:
        model: The user's network.
        feature_shapes: For each stage the shape of one sample of what its objective reads.
        feature_types: For each stage the type of that.
        num_outputs: Number of logits C.
        task: What they mean.
        unused: Parameters and buffers that its logits do not depend on: no stage has them, and
            they stay as they are.
        is_traced: Whether it was cut along its graph; else it is a chain of layers.
        rounding: Where the stages differ from the network by rounding; empty if they are the same
            bit for bit.
    """

    model: nn.Module
    feature_shapes: tuple[tuple[int, ...], ...]
    feature_types: tuple[torch.dtype, ...]
    num_outputs: int
    task: Task = field(default_factory=Classes)
    unused: tuple[str, ...] = ()
    is_traced: bool = False
    rounding: str = ""

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.bodies)

    def compiled(self, **options: Any) -> Partition:
        """Compile each stage with ``torch.compile``, in place; weights and keys stay as they are.

        Compiled layers give the numbers of the plain ones up to rounding. Copies (and so
        `Pipeline.export`) are plain again. Layers outside of the stages (the classifier, heads) are
        not compiled.

        Args:
            options: Of ``torch.compile``, for instance ``mode="max-autotune"`` or
                ``dynamic=True``.

        Returns:
            The same partition.
        """
        # Stages of one class share their code: without this they share torch's limit of
        # recompilations, too, and beyond it run uncompiled.
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options = {"isolate_recompiles": True, **options}
        else:  # torch before 2.13
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 8 * len(self.bodies))
        for body in self.bodies:
            body.compile(**options)
        return self

    def merged(self) -> Partition:
        """The same network as one stage, for end-to-end training."""
        return replace(
            self,
            bodies=(Joined(self.bodies),),
            readings=self.readings[-1:],
            names=(tuple(name for stage in self.names for name in stage),),
            feature_shapes=self.feature_shapes[-1:],
            feature_types=self.feature_types[-1:],
            cuts=(),
            costs=(sum(self.costs),),
            batch_dims=self.batch_dims[-1:],
            following=(None,),
        )


def split(
    model: nn.Module | Sequence[nn.Module],
    before: Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    readout: str | None = None,
    output: str | int | None = None,
    features: Features | None = None,
    costs: Sequence[float] | None = None,
    task: Task | None = None,
    example: Any,
) -> Partition:
    """Cut a network into stages.

    Args:
        model: Any network that ``torch.export`` can trace; a chain of layers is not traced. Or, cut
            by hand, a list of modules: the stages, and the classifier at the end; each takes what
            the one before returns.
        before: The layers that the second and later stages begin with, by dotted name.
        num_stages: Instead of `before`: cut into this many stages of about equal cost
            (floating-point operations, so that every rank finds the same cuts).
        readout: The layer at which the classifier begins. Default: the last layer that has
            parameters.
        output: Key or number of the output that holds the logits ``[N, C]``. Default: the only
            output, or ``logits``.
        features: How objectives read what a stage hands on, see `scpl.partition.reading`.
        costs: What each stage costs, if that was measured (`scpl.plan`); ranks share the stages by
            it. Default: floating-point operations of its layers.
        task: What the outputs mean: `scpl.Classes` (the default), `scpl.MultiLabel` or
            `scpl.Regression`. It decides losses, metrics and the form of targets.
        example: A small batch, as the network takes it: a tensor ``[N, ...]``, a tuple of
            arguments, or a mapping of keyword arguments (``labels`` are left out). It is put where
            the network is. Later batches may have any number of rows, and sequences any length.

    Returns:
        The stages; they hold the parameters and buffers of `model` itself.

    Raises:
        PartitionError: if the cuts cannot be made, or the stages would not compute what the network
            computes: in training and in evaluation mode, with its parameters disturbed.
    """
    before = _checked_cuts(before, num_stages)
    if isinstance(model, (list, tuple)):
        parts = _by_hand(model, before, num_stages, features, example)
    else:
        parts = _cut(
            _unwrapped(model), before, num_stages, readout, output, features, example, every=False
        )
    if task is not None:
        parts = replace(parts, task=task)
    if costs is None:
        return parts
    if len(costs) != parts.num_stages or not all(0 <= cost < float("inf") for cost in costs):
        raise PartitionError(
            f"`costs` must hold one finite number for each of the {parts.num_stages} stages, "
            "none negative",
            f"Got {list(costs)}",
        )
    return replace(parts, costs=tuple(costs))


def split_everywhere(
    model: nn.Module,
    *,
    num_stages: int,
    readout: str | None = None,
    output: str | int | None = None,
    features: Features | None = None,
    example: Any,
) -> Partition:
    """Cut a network at every place where `split` would consider to begin a stage.

    Arguments are those of `split`; `num_stages` is how many stages must be possible at least.

    Raises:
        PartitionError: as `split`.
    """
    model = _unwrapped(model)
    return _cut(model, None, num_stages, readout, output, features, example, every=True)


def _cut(
    model: nn.Module,
    before: list[str] | None,
    num_stages: int | None,
    readout: str | None,
    output: str | int | None,
    features: Features | None,
    example: Any,
    *,
    every: bool,
) -> Partition:
    if features is not None and not callable(features):
        raise PartitionError(
            "`features` must be a function",
            f"Got {features!r}",
            "For instance scpl.partition.reading.first_token, of a value and a mask",
        )
    example = beside(model, example)
    with without_cache(model), torch.enable_grad(), _uncompiled(model):
        if output is None and is_chain(model):
            _initialise(model, Form.whole(), example)
            if before is None:
                assert num_stages is not None
                before = chain_cuts(model, num_stages, readout, example, every=every)
            if before is not None and is_in_chain(model, [*before, readout or ""]):
                pieces = cut_chain(model, example, before, readout, features)
                return _verified(model, pieces, example, is_traced=False)
        form = Form.of(model, example)
        arranged = form.arrange(example)
        _initialise(model, form, arranged)
        pieces = cut_graph(
            model, form, arranged,
            before=before, num_stages=num_stages, readout=readout, output=output,
            features=features, every=every,
        )  # fmt: skip
        return _verified(model, pieces, arranged, is_traced=True)


def _checked_cuts(before: Any, num_stages: int | None) -> list[str] | None:
    if (before is None) == (num_stages is None):
        raise PartitionError(
            "split needs either `before` (names of layers) or `num_stages`",
            "Got both" if before is not None else "Got neither",
        )
    if isinstance(before, str):
        return [before]
    if num_stages is not None and type(num_stages) is not int:
        raise PartitionError("`num_stages` must be a whole number", f"Got {num_stages!r}")
    if before is not None and not (
        isinstance(before, (list, tuple)) and all(isinstance(name, str) for name in before)
    ):
        raise PartitionError(
            "`before` must be a list of layer names",
            f"Got {before!r}",
            "For a number of stages pass num_stages=...",
        )
    return None if before is None else list(before)


def _by_hand(
    modules: Sequence[nn.Module],
    before: Sequence[str] | None,
    num_stages: int | None,
    features: Features | None,
    example: Any,
) -> Partition:
    """Take the stages as they are given."""
    wrong = [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]
    stages = len(modules) - 1
    if wrong or stages < 1 or before is not None or num_stages != stages:
        raise PartitionError(
            "A list must hold a module for each stage and the classifier at the end, and "
            "`num_stages` their number without it",
            f"Got {', '.join(wrong)} in it"
            if wrong
            else f"Got {len(modules)} modules and "
            + (f"num_stages={num_stages}" if before is None else f"before={before!r}"),
        )
    model = nn.Sequential(*modules)
    example = beside(model, example)
    names = [str(i) for i in range(len(modules))]
    _initialise(model, Form.whole(), example)
    pieces = cut_chain(model, example, names[1:-1], names[-1], features)
    return _verified(model, pieces, example, is_traced=False)


def _unwrapped(model: Any) -> nn.Module:
    """Take the network out of ``torch.compile``, DataParallel and the like."""
    if not isinstance(model, nn.Module):
        raise PartitionError(
            "A network must be a torch.nn.Module, or a list of them",
            f"Got {type(model).__name__}",
        )
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            found: nn.Module = model
            return found


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Run layers that torch.compile has wrapped as they are: compiling takes minutes."""
    layers = list(model.modules())
    if any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl for layer in layers):
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _initialise(model: nn.Module, form: Form, example: Tree) -> None:
    """Run the network once: it must accept the example, and lazy layers need it."""
    lazy = any(nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers()))
    if lazy:
        with torch.no_grad(), torch.random.fork_rng():
            training = model.training
            run_network(model.eval(), form, example)
            model.train(training)


def _verified(model: nn.Module, pieces: Pieces, example: Tree, *, is_traced: bool) -> Partition:
    """Compare the stages with the network, and find the shapes of what objectives read.

    Raises:
        PartitionError: if they differ by more than rounding (a chain on the CPU: at all; kernels of
            accelerators may add up in another order each time).
    """
    rows = samples(example, ROWS)
    seen, num_outputs, following = _look(model, pieces, rows)
    pieces = replace(pieces, following=following)
    held = {id(t) for part in (*pieces.bodies, pieces.readout) for t in _tensors(part).values()}
    unused = tuple(name for name, tensor in _tensors(model).items() if id(tensor) not in held)
    rounding = ""
    may_round = is_traced or any(p.device.type != "cpu" for p in model.parameters())
    for batch, modes in ((rows, BOTH_MODES), *_other_sizes(model, pieces, rows, is_traced)):
        fault = difference(model, pieces, batch, modes, unused)
        if fault is not None and not (may_round and fault.is_rounding):
            raise PartitionError(
                "The stages must compute exactly what the network computes",
                f"{type(model).__name__} is not the same cut into stages: {fault.what}",
                _ADVICE,
            )
        rounding = rounding or (fault.what if fault else "")
    return Partition(
        **vars(pieces), model=model, feature_shapes=tuple(spec.shape for spec in seen),
        feature_types=tuple(spec.dtype for spec in seen), num_outputs=num_outputs, unused=unused,
        is_traced=is_traced, rounding=rounding,
    )  # fmt: skip


def _other_sizes(
    model: nn.Module, pieces: Pieces, rows: Tree, is_traced: bool
) -> Iterator[tuple[Tree, tuple[bool, ...]]]:
    """Yield one sample, of a shorter sequence where lengths are free, if the network takes it."""
    if not is_traced:
        return
    values = []
    for tensor, sizes in zip(tensors_of(rows), pieces.form.sizes, strict=True):
        one = tensor[:1]
        free = len(sizes) > 1 and sizes[1] is None and tensor.shape[1] > 2
        values.append(one[:, :-1] if free else one)
    one_row = values[0] if len(values) == 1 else tuple(values)
    with undisturbed(model), torch.no_grad():
        try:
            run_network(model.eval(), pieces.form, one_row)
        except PartitionError:
            return
    yield one_row, (False,)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _look(
    model: nn.Module, pieces: Pieces, batch: Tree
) -> tuple[list[TensorSpec], int, tuple[Following | None, ...]]:
    """Run network and stages once, in evaluation mode.

    Returns:
        For each stage one sample of what its objective reads; the number of logits; for each stage
        the layers that follow, with the shape of what is read of them.

    Raises:
        PartitionError: if the network or a stage does not accept what it gets.
    """
    found: list[TensorSpec] = []
    following: list[Following | None] = []
    with undisturbed(model), torch.no_grad():
        model.eval()
        run_network(model, pieces.form, batch)
        values: Tree = tree_map(Tensor.clone, batch)
        for index, (body, reading) in enumerate(zip(pieces.bodies, pieces.readings, strict=True)):
            values = _run(body.eval(), values, f"{_CHAIN} (stage {index})")
            seen = _read(reading, values, index, len(tensors_of(batch)[0])) if reading else values
            found.append(_one_sample(seen, index))
            following.append(_measured(pieces.following[index], values))
        summarised = isinstance(pieces.readout, ReadThen)
        rule = _READS_SUMMARY if summarised else f"{_CHAIN} (readout)"
        logits = _run(pieces.readout.eval(), values, rule)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PartitionError(
            "The network must end in logits [N, C]",
            f"Got {describe(logits)}",
            "If it has several outputs, name one with `output`",
        )
    return found, logits.shape[1], tuple(following)


def _measured(unit: Following | None, values: Tree) -> Following | None:
    """Find the shape of what is read of the layers that follow; None if that is not one tensor."""
    if unit is None:
        return None
    try:  # a user's `features` are for what stages hand on, which this is not
        result = unit.body.eval()(tree_map(Tensor.clone, values))
        seen = result if unit.reading is None else unit.reading(result)
    except Exception:
        return None
    if not isinstance(seen, Tensor) or seen.ndim < 2 or not seen.is_floating_point():
        return None
    return replace(unit, shape=tuple(seen.shape[1:]))


def _run(module: nn.Module, inputs: Tree, rule: str) -> Tree:
    # Copies, because a first layer that works in place would change the caller's tensor.
    try:
        return module(tree_map(Tensor.clone, inputs))
    except ScplError:
        raise
    except Exception as error:
        raise PartitionError(
            rule,
            f"On {describe(inputs)} it raised {type(error).__name__}: {error}",
            "Let each layer take what the one before it returns",
        ) from error


def _read(reading: Read, values: Tree, index: int, rows: int) -> Tensor:
    try:
        seen = reading(values)
    except Exception as error:
        raise PartitionError(
            f"What stage {index} hands on must be readable (`summarize`, `features`)",
            f"On {describe(values)} it raised {type(error).__name__}: {error}",
        ) from error
    if not isinstance(seen, Tensor) or seen.ndim < 2 or len(seen) != rows:
        raise PartitionError(
            f"What an objective reads must be one tensor with a row per sample (stage {index})",
            f"Got {describe(seen)} for {rows} samples",
        )
    return seen


def _one_sample(features: Tree, index: int) -> TensorSpec:
    for tensor in tensors_of(features):
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
        return TensorSpec(tuple(tensor.shape[1:]), dtype)
    raise PartitionError("A stage must hand on a tensor", f"Stage {index} hands on none")


@final
class Joined(nn.Module):
    """Stages one after the other as one body, still under the network's own keys.

    Args:
        bodies: The stages.
    """

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, values: Tree) -> Tree:
        """Compute what the last stage hands on."""
        for body in self.bodies:
            values = body(values)
        return values

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the states of all stages in one."""
        found: dict[str, Any] = {}
        for body in self.bodies:
            found |= body.state_dict(*args, **options)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the state of each stage."""
        for body in self.bodies:
            own = {key: state_dict[key] for key in body.state_dict() if key in state_dict}
            body.load_state_dict(own, *args, **options)
