"""Cut a network of any shape, with the graph that ``torch.export`` makes of it.

The network is traced twice, in training and in evaluation mode, over its own parameters and
buffers. Every node of a graph belongs to the modules that made it (``nn_module_stack``), so a cut
is the place of the first node of a named module. A stage is the nodes between two cuts; what
crosses a cut is what is still needed behind it: a value that skips over a stage rides along, and
what follows from sizes and constants alone is computed anew where it is needed.

Source: PyTorch documentation, "torch.export" (training IR).
"""

from __future__ import annotations

import io
import linecache
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from scpl.errors import PartitionError
from scpl.partition.inputs import Form
from scpl.partition.layers import holder, place_tensor
from scpl.partition.recurrent import recurrent_layers_as_nodes, restore_recurrent_layers
from scpl.partition.values import Tree, tensors_of

__all__ = [
    "BY_HAND",
    "GraphBody",
    "Needs",
    "Trace",
    "constant",
    "crossing",
    "expression",
    "in_example",
    "is_same",
    "owners",
    "piece",
    "trace",
    "without_cache",
]

Node: TypeAlias = fx.Node

BY_HAND = (
    "Change the network, or cut it by hand: split([stage, stage, ..., classifier]), "
    "each a module that takes what the one before returns"
)
_CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
"""Nodes that only check what held while tracing."""
_WITH_SUBGRAPHS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
}
"""Nodes that run a subgraph, in which anything may happen."""


@dataclass(frozen=True)
class Trace:
    """One graph of the network.

    Attributes:
        graph: Its nodes, in the order of the forward pass.
        tensors: The placeholders of parameters and buffers, and their names in the network.
        constants: The placeholders of tensors that the forward pass makes of numbers.
        parameters: Which of the names are parameters.
        inputs: The placeholders of the network's inputs, in the order of its `Form`.
        logits: Where they end.
        modules: Subgraphs (a ``torch.no_grad`` block) by the target of their node.
    """

    graph: fx.Graph
    tensors: Mapping[Node, str]
    constants: Mapping[Node, Tensor]
    parameters: frozenset[str]
    inputs: tuple[Node, ...]
    logits: Node
    modules: Mapping[str, nn.Module]

    @cached_property
    def body(self) -> list[Node]:
        """The nodes that compute, in order; a buffer's update comes right after its new value."""
        nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        late = dict.fromkeys(n for n in nodes if _writes_back(n))
        after: dict[Node, list[Node]] = {}
        for node in late:
            after.setdefault(node.args[1], []).append(node)
        return [m for n in nodes if n not in late for m in (n, *after.get(n, ()))]

    @cached_property
    def place(self) -> dict[Node, int]:
        """Where each node stands; inputs, parameters and buffers stand before all others."""
        held = [*self.inputs, *self.tensors, *self.constants]
        return dict.fromkeys(held, -1) | {node: i for i, node in enumerate(self.body)}

    @cached_property
    def first(self) -> dict[str, int]:
        """For each module that computes the place of its first node, by name, in order."""
        found: dict[str, int] = {}
        for place, node in enumerate(self.body):
            for name in owners(node):
                found.setdefault(name, place)
        return found

    def start(self, name: str) -> int | None:
        """Find the first node of a module, or of a container (ModuleList) by what is in it."""
        inside = (at for known, at in self.first.items() if f"{known}.".startswith(f"{name}."))
        return min(inside, default=None)


def owners(node: Node) -> list[str]:
    """Name the modules that a node was made in, the outermost first; the network itself is ""."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    return [n.removeprefix(_ROOT).removeprefix(".") for n in names if n.split(".")[0] == _ROOT]


def _writes_back(node: Node) -> bool:
    """Whether a node at the end of the graph stores a new value in a buffer."""
    return (
        node.target is torch.ops.aten.copy_.default
        and not node.users
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "placeholder"
        and isinstance(node.args[1], fx.Node)
    )


def trace(
    model: nn.Module, form: Form, example: Tree, logits: Callable[[Any], Any], *, training: bool
) -> Trace:
    """Trace a network in one mode, with free sizes of batch and sequence.

    Args:
        model: The network. Its mode is changed and not put back.
        form: How a batch becomes arguments.
        example: At least two samples.
        logits: Finds the logits in what the network returns; what else it returns is left out.
        training: Which mode.

    Raises:
        PartitionError: if ``torch.export`` cannot trace it.
    """
    model.train(training)
    args, kwargs = form.arguments(example)
    sizes = pytree.tree_map(_free_sizes, (args, kwargs))
    try:
        with warnings.catch_warnings(), without_cache(model), _quiet():
            warnings.simplefilter("ignore")  # of torch's own making, about its graph
            with recurrent_layers_as_nodes():
                program = torch.export.export(
                    _Called(model), (args, kwargs), dynamic_shapes=sizes, strict=False
                )
    except Exception as error:
        raise PartitionError(
            f"torch.export must be able to trace {type(model).__name__}, which is not a chain of "
            "layers",
            f"In {'training' if training else 'evaluation'} mode it failed: {_first_cause(error)}",
            BY_HAND,
        ) from error
    return _read(program, logits)


class _Called(nn.Module):
    """Gives every network the same signature, so that inputs come in the order of the example."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


_ROOT = "model"  # what `_Called` calls the network


def _free_sizes(value: Any) -> Any:
    """Leave the batch free, and the length of a sequence (of numbers or of vectors)."""
    if not isinstance(value, Tensor):
        return None
    free = 2 if value.ndim in (2, 3) else 1
    return dict.fromkeys(range(free), torch.export.Dim.AUTO)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing a graph for each reason why it cannot trace."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a language model from returning a cache of its keys, which is no output to train on."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if config is None or not cached:
        yield
        return
    try:
        config.use_cache = False
        yield
    finally:
        config.use_cache = cached


def _first_cause(error: BaseException) -> str:
    """Say in one line what went wrong, without torch's advice to its own developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'without a message'}"


def _read(program: torch.export.ExportedProgram, logits: Callable[[Any], Any]) -> Trace:
    graph = program.graph
    by_name = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    tensors: dict[Node, str] = {}
    constants: dict[Node, Tensor] = {}
    parameters: set[str] = set()
    inputs: list[Node] = []
    for spec in program.graph_signature.input_specs:
        if isinstance(spec.arg, ConstantArgument):
            continue  # None, or a number, which is part of the graph now
        node, name = by_name[spec.arg.name], str(spec.target).removeprefix(f"{_ROOT}.")
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensors[node] = name
            parameters |= {name} if spec.kind == InputKind.PARAMETER else set()
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constants[node] = program.constants[str(spec.target)].detach().clone()
        else:
            raise PartitionError(
                "A network must hold nothing but parameters and buffers to be traced",
                f"Got {name!r}, a {spec.kind.name.lower().replace('_', ' ')}",
                BY_HAND,
            )
    restore_recurrent_layers(graph)
    (flat,) = graph.output_node().args
    assert program.call_spec.out_spec is not None
    output = logits(pytree.tree_unflatten(list(flat), program.call_spec.out_spec))
    graph.output_node().args = (output,)
    for node in reversed(list(graph.nodes)):
        if node.target in _CHECKS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    modules = {
        str(node.target): program.graph_module.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "get_attr"
    }
    return Trace(graph, tensors, constants, frozenset(parameters), tuple(inputs), output, modules)


class Needs:
    """Decides which values of a graph must cross a cut, and which are computed anew behind it.

    Masks and positions follow from sizes, constants and the numbers of tokens by a few cheap
    operations that give the same bits each time; what a parameter, a buffer that varies or a random
    number is part of does not.

    Args:
        graph: The whole graph.
        varying: Buffers that the forward pass changes.
        riding: Masks that cross cuts anyway.
    """

    def __init__(self, graph: Trace, varying: Iterable[str], riding: Collection[Node] = ()) -> None:
        self._graph, self._riding = graph, riding
        self._lasting = {
            node
            for node, name in graph.tensors.items()
            if name not in graph.parameters and name not in set(varying)
        } | graph.constants.keys()
        self._changed = _changed_in_place(graph)
        self._roots: dict[Node, frozenset[Node] | None] = {}
        self._deps: dict[Node, frozenset[Node]] = {}
        self._sizes: dict[Node, frozenset[Node]] = {}

    def again(self, node: Node) -> bool:
        """Whether a value is computed anew behind a cut instead of crossing it."""
        if node.op == "placeholder":
            return node not in self._graph.inputs
        if node.op == "get_attr":
            return True
        if node in self._riding:
            return False
        roots = self._roots_of(node)
        if roots is None:
            return False
        price = sum(_bytes(root) for root in roots if root not in self._riding)
        return not _is_tensor(node) or price <= _bytes(node)

    def values(self, node: Node) -> frozenset[Node]:
        """The values that must cross so that this one is there."""
        if not self.again(node):
            return frozenset([node])
        if node.op != "call_function" or _is_size(node):
            return frozenset()
        if node not in self._deps:
            parts = [self.values(argument) for argument in node.all_input_nodes]
            self._deps[node] = frozenset().union(*parts)
        return self._deps[node]

    def sizes(self, node: Node) -> frozenset[Node]:
        """The sizes that computing this value anew begins with."""
        if not self.again(node) or node.op != "call_function":
            return frozenset()
        if _is_size(node):
            return frozenset([node])
        if node not in self._sizes:
            parts = [self.sizes(argument) for argument in node.all_input_nodes]
            self._sizes[node] = frozenset().union(*parts)
        return self._sizes[node]

    def _roots_of(self, node: Node) -> frozenset[Node] | None:
        """The inputs that a value can be computed anew from; None if it cannot be."""
        if node not in self._roots:
            self._roots[node] = self._find_roots(node)
        return self._roots[node]

    def _find_roots(self, node: Node) -> frozenset[Node] | None:
        if node in self._changed:
            return None
        if node in self._riding:
            return frozenset([node])
        if node.op == "placeholder":
            if node in self._graph.inputs:
                return None if node.meta["val"].is_floating_point() else frozenset([node])
            return frozenset() if node in self._lasting else None
        if _is_size(node):
            return frozenset()  # any tensor of this size tells
        if node.op != "call_function" or not _is_pure(node):
            return None
        if not _is_tensor(node) and any(map(_is_tensor, node.all_input_nodes)):
            return None  # a number that was read out of data
        found: frozenset[Node] = frozenset()
        for argument in node.all_input_nodes:
            roots = self._roots_of(argument)
            if roots is None:
                return None
            found |= roots
        return found


def _changed_in_place(graph: Trace) -> set[Node]:
    """The values that are written to, and those that they are views of."""
    changed: set[Node] = set()
    for node in graph.body:
        waiting = list(_written(node))
        while waiting:
            value = waiting.pop()
            if value not in changed:
                changed.add(value)
                waiting += _viewed(value)
    return changed


def _schema_arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        yield from zip(node.args, schema.arguments, strict=False)


def _written(node: Node) -> list[Node]:
    return [
        value
        for value, argument in _schema_arguments(node)
        if isinstance(value, fx.Node) and argument.alias_info and argument.alias_info.is_write
    ]


def _viewed(node: Node) -> list[Node]:
    return [
        value
        for value, argument in _schema_arguments(node)
        if isinstance(value, fx.Node) and argument.alias_info
    ]


def _is_pure(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target not in _WITH_SUBGRAPHS
    target = node.target
    return not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def _is_size(node: Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _bytes(node: Node) -> int:
    """Bytes of a value in the example."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return 0
    return math.prod(map(in_example, value.shape)) * value.element_size()


def in_example(size: int | torch.SymInt) -> int:
    """What a free size was in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_same(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are the same in every batch."""
    return bool(expression(one) == expression(other))


def constant(size: int | torch.SymInt) -> int | None:
    """The value of a size that is the same in every batch; None if it is free."""
    found = expression(size)
    return int(found) if isinstance(found, int) or found.is_number else None


def expression(size: int | torch.SymInt) -> Any:
    """Write a size as an expression of the free sizes."""
    return size if isinstance(size, int) else size.node.expr


def _dimension(node: Node, size: Node) -> int | None:
    """Find a dimension of a value that has this size in every batch."""
    value, wanted = node.meta.get("val"), size.meta["val"]
    shape = value.shape if isinstance(value, Tensor) else ()
    return next((dim for dim, found in enumerate(shape) if is_same(found, wanted)), None)


def crossing(
    graph: Trace, cuts: Sequence[int], output: Node, needs: Needs, besides: Sequence[Iterable[Node]]
) -> list[tuple[Node, ...]]:
    """Find what crosses each cut, in the order of the graph.

    Args:
        graph: The whole graph.
        cuts: Places of nodes, in order.
        output: What is needed at the end.
        needs: What must cross.
        besides: For each cut further values that shall cross it.

    Raises:
        PartitionError: if a number that depends on data would have to cross.
    """
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    last_use = {output: len(graph.body)}
    for at, node in enumerate(graph.body):
        for argument in node.all_input_nodes:
            last_use[argument] = max(last_use.get(argument, at), at)
    found: list[tuple[Node, ...]] = []
    behind: tuple[Node, ...] = ()  # what crosses the next cut
    for cut, extra in zip(reversed(cuts), reversed(besides), strict=True):
        used = [node for node, last in last_use.items() if graph.place[node] < cut <= last]
        values = {node for node in behind if graph.place[node] < cut} | set(extra)
        values = values.union(*map(needs.values, used))
        for size in sorted(frozenset().union(*map(needs.sizes, used)), key=order.__getitem__):
            if all(_dimension(node, size) is None for node in values):
                values |= needs.values(size.all_input_nodes[0])
        for node in values:
            if not isinstance(node.meta.get("val"), Tensor):
                raise PartitionError(
                    "What crosses a cut must be tensors",
                    f"Got a number that depends on data ({node.target}, computed in "
                    f"{(owners(node) or [''])[-1] or 'the network'})",
                    "Cut elsewhere",
                )
        behind = tuple(sorted(values, key=order.__getitem__))
        found.append(behind)
    return found[::-1]


@dataclass(frozen=True)
class Code:
    """A piece of a graph as a function.

    Attributes:
        function: Takes a device, the values that come in, tensors and subgraphs; returns a tuple.
        tensors: Names of the parameters and buffers it takes.
        constants: The constants it takes.
        modules: The subgraphs it takes.
    """

    function: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[str, ...]
    constants: tuple[Tensor, ...]
    modules: tuple[nn.Module, ...]


def piece(
    graph: Trace, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]
) -> Code:
    """Make a function of consecutive nodes.

    Args:
        graph: The whole graph.
        nodes: What to compute, in order. What else is needed for that is computed first.
        inputs: The values that come in.
        outputs: The values that go out.
    """
    needed = _in_order(nodes, inputs, outputs)
    made = fx.Graph()
    device = made.placeholder("device")
    known = {node: made.placeholder(f"value_{i}") for i, node in enumerate(inputs)}
    tensors = {n: graph.tensors[n] for n in needed if n in graph.tensors}
    constants = {n: graph.constants[n] for n in needed if n in graph.constants}
    modules = {n: graph.modules[str(n.target)] for n in needed if n.op == "get_attr"}
    for kind, group in (("tensor", tensors), ("constant", constants), ("module", modules)):
        known |= {node: made.placeholder(f"{kind}_{i}") for i, node in enumerate(group)}

    def adapt(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in needed:
        if node in known:
            continue
        assert callable(node.target)
        if _is_size(node) and node.args[0] not in known:
            tensor = next(value for value in inputs if _dimension(value, node) is not None)
            args: Any = (known[tensor], _dimension(tensor, node))
        else:
            args = map_aggregate(map_arg(node.args, known.__getitem__), adapt)
        kwargs: Any = map_aggregate(map_arg(node.kwargs, known.__getitem__), adapt)
        known[node] = made.call_function(node.target, args, kwargs)
    made.output(tuple(known[node] for node in outputs))
    return Code(
        _compile(made), tuple(tensors.values()), tuple(constants.values()), tuple(modules.values())
    )


def _in_order(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> list[Node]:
    """List what must be there to compute some nodes and outputs, each after what it needs."""
    here, given = set(nodes), set(inputs)
    found = dict.fromkeys(inputs)
    for goal in (*nodes, *outputs):
        waiting = [goal]
        while waiting:
            node = waiting[-1]
            # A size from an earlier stage is read off any value that has it.
            alone = _is_size(node) and node not in here
            missing = [] if alone else [n for n in node.all_input_nodes if n not in found]
            if missing and node not in found:
                waiting += reversed(missing)
            else:
                found[node] = None
                waiting.pop()
    return [node for node in found if node not in given]


_numbers = count()


def _compile(graph: fx.Graph) -> Callable[..., tuple[Tensor, ...]]:
    code = graph.python_code("self")
    name = f"<stage {next(_numbers)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    function: Callable[..., tuple[Tensor, ...]] = partial(scope["forward"], None)
    return function


@final
class GraphBody(nn.Module):
    """A piece of a network: takes what crosses the cut before it, returns what crosses the next.

    It holds the network's own parameters and buffers, under their own keys.

    Args:
        codes: What to compute in training and in evaluation mode.
        model: The network.
        names: All names of each parameter and buffer of this piece, by its identity.
        device: Where they are.
    """

    def __init__(
        self,
        codes: Mapping[bool, Code],
        model: nn.Module,
        names: Mapping[int, Sequence[str]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._codes = dict(codes)
        self._constants = {mode: list(code.constants) for mode, code in codes.items()}
        self._device = device
        held = {n: place_tensor(self, model, n) for every in names.values() for n in every}
        self._held = {mode: [held[name] for name in code.tensors] for mode, code in codes.items()}
        # Where the network itself keeps them: a buffer that moves is another tensor then.
        self._tied = [(held[name], holder(model, name)) for name in held]

    def forward(self, values: Tree) -> Tree:
        """Compute one tensor or a tuple from one tensor or a tuple."""
        code = self._codes[self.training]
        outputs = code.function(
            self._device,
            *tensors_of(values),
            *(kept[name] for kept, name in self._held[self.training]),
            *self._constants[self.training],
            *code.modules,
        )
        return outputs[0] if len(outputs) == 1 else outputs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphBody:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._device = fn(torch.empty(0, device=self._device)).device
        for mode, tensors in self._constants.items():
            self._constants[mode] = [fn(tensor) for tensor in tensors]
        for (mine, name), (theirs, key) in self._tied:
            theirs[key] = mine[name]
        return self
