"""Cut a network along its graph: which nodes are whose, and what an objective reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from scpl.errors import PartitionError
from scpl.partition.balance import (
    Cuts,
    TooFewLayers,
    all_cuts,
    best_cuts,
    counting_operations,
)
from scpl.partition.graph import (
    BY_HAND,
    Code,
    GraphBody,
    Needs,
    Trace,
    constant,
    crossing,
    expression,
    is_same,
    owners,
    piece,
    trace,
)
from scpl.partition.inputs import Form, samples
from scpl.partition.pieces import (
    MIXED,
    Dimensions,
    Following,
    Pieces,
    find_logits,
    hint,
    refuse_shared,
    tied_names,
)
from scpl.partition.reading import Features, Reading, summarized
from scpl.partition.values import Tree, tensors_of
from scpl.partition.verify import (
    Effects,
    describe,
    effects_of,
    run_network,
    undisturbed,
)

__all__ = ["cut_graph"]

_Values: TypeAlias = tuple[fx.Node, ...]

ROWS = 3
"""Samples of the example that are traced and compared."""
_WORTH_CROSSING = 1.5
"""More values cross a cut only if that makes the most expensive stage cheaper by this factor."""


def cut_graph(
    model: nn.Module,
    form: Form,
    example: Tree,
    *,
    before: Sequence[str] | None,
    num_stages: int | None,
    readout: str | None,
    output: str | int | None,
    features: Features | None,
    every: bool,
) -> Pieces:
    """Cut a network of any shape; arguments are those of `scpl.split`.

    Args:
        model: The network.
        form: How a batch becomes its arguments.
        example: An arranged batch.
        before: Names of modules.
        num_stages: Instead of them.
        readout: Where the classifier begins.
        output: Which output holds the logits.
        features: How objectives read what a stage hands on.
        every: Cut at all places where a stage could begin, at least `num_stages`.

    Raises:
        PartitionError: if the network cannot be traced or cut there.
    """
    rows = _few(model, form, example)

    def logits(result: Any) -> Any:
        return find_logits(result, output)

    effects = effects_of(model, form, rows, logits)
    _refuse_hidden_state(model, effects)
    varying = effects.buffers
    with undisturbed(model):
        traces = {mode: trace(model, form, rows, logits, training=mode) for mode in (False, True)}
    for each in traces.values():
        form = _check_batch(each, form, rows)
    evaluated = traces[False]
    head = _readout(evaluated, readout)
    end = _start(traces[False], head)
    costs = _operations(evaluated, model, rows)
    if before is not None:
        choices = [before]
    else:
        assert num_stages is not None
        needs = Needs(evaluated, varying)
        choices = _chosen(evaluated, end, costs, num_stages, needs, every=every)
    for cuts in choices:
        try:
            _check_cuts(model, traces, cuts, head)
            bodies, reads, dims, values = _bodies(model, traces, [*cuts, head], varying, form)
            break
        except PartitionError:  # a layer that is used twice, for instance, lies in one stage
            if cuts is choices[-1]:
                raise
    edges = [0, *(_start(evaluated, name) for name in cuts), end, len(evaluated.body)]
    ranges = list(pairwise(edges))
    ends = _unit_ends(evaluated, costs, cuts, head, Needs(evaluated, varying))
    following = [
        _following(model, traces, (cut, until), held, varying, form, features)
        for cut, until, held in zip(cuts, ends, values, strict=False)
    ]
    layers = [_layers(evaluated, a, b) for a, b in ranges]
    return Pieces(
        bodies=tuple(bodies[:-1]),
        readout=bodies[-1],
        readings=tuple(read.reading(features or summarized) for read in reads),
        names=tuple(layers[:-1]),
        readout_names=layers[-1],
        cuts=tuple(cuts),
        costs=tuple(sum(costs[a:b]) for a, b in ranges[:-1]),
        form=form,
        logits=logits,
        batch_dims=dims,
        following=(*following, None),
    )


def _few(model: nn.Module, form: Form, example: Tree) -> Tree:
    """Take a few samples of the example, which the network must accept."""
    rows = samples(example, ROWS)
    with undisturbed(model), torch.no_grad():
        model.eval()
        run_network(model, form, example)
        try:
            run_network(model, form, rows)
        except PartitionError as error:
            raise PartitionError(
                "The network must take batches of any size",
                f"It takes the example, but not {describe(rows)}: {error.__cause__}",
                BY_HAND,
            ) from error
    return rows


def _refuse_hidden_state(model: nn.Module, effects: Effects) -> None:
    """A graph has a counter, or a random number of Python, as it was when it was made."""
    if effects.throws_dice:
        raise PartitionError(
            "A network that is traced must draw its random numbers with torch",
            f"{type(model).__name__} depends on those of Python or numpy",
            BY_HAND,
        )
    if effects.attributes:
        raise PartitionError(
            "A network that is traced must keep what changes in its forward pass in buffers",
            f"{type(model).__name__} changes {', '.join(map(repr, effects.attributes[:4]))}",
            f"Make it a buffer (register_buffer). {BY_HAND}",
        )


def _start(graph: Trace, name: str) -> int:
    place = graph.start(name)
    assert place is not None, "names have been checked"
    return place


def _readout(graph: Trace, wanted: str | None) -> str:
    """Name the module that the classifier begins with: the last one with parameters."""
    if wanted is not None:
        if graph.start(wanted) is None:
            raise PartitionError(
                "`readout` must name a layer of the network",
                f"There is no layer {wanted!r} that computes{hint(wanted, list(graph.first))}",
            )
        return wanted
    on_the_way = {graph.logits}
    for node in reversed(graph.body):
        if node not in on_the_way:
            continue
        if any(graph.tensors.get(n) in graph.parameters for n in node.all_input_nodes):
            name = (owners(node) or [""])[-1].split(".parametrizations.")[0]
            if name and graph.start(name):
                return name
            raise PartitionError(
                "The classifier at the end of the network must be a layer",
                "Got one that is computed in the network's own forward",
                "Make it a module (nn.Linear), or name a layer before it as `readout`",
            )
        on_the_way.update(node.all_input_nodes)
    raise PartitionError(
        "A network must have parameters to be trained", "Got logits that depend on none"
    )


def _check_cuts(
    model: nn.Module, traces: Mapping[bool, Trace], before: Sequence[str], head: str
) -> None:
    """Collect every fault of the names before raising."""
    faults: list[str] = []
    for mode, graph in traces.items():
        end, last, last_name = graph.start(head), 0, ""
        if end is None:
            faults.append(
                f"{head!r} does not compute in {'training' if mode else 'evaluation'} mode"
            )
            continue
        for cut in before:
            at = graph.start(cut)
            if at is None:
                here = "training" if mode else "evaluation"
                faults.append(_explain_unknown(model, graph, cut, here))
            elif at == 0:
                faults.append(f"{cut!r} comes first: the stage before it would be empty")
            elif at >= end:
                faults.append(f"{cut!r} lies inside the readout, which begins at {head!r}")
            elif before.count(cut) > 1:
                faults.append(f"{cut!r} is named twice")
            elif at <= last:
                same = "at the same place as" if at == last else "before"
                faults.append(
                    f"{cut!r} begins {same} {last_name!r}, but comes after it in the list"
                )
            if at is not None:
                last, last_name = at, cut
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults))
        raise PartitionError(
            "Cuts must name layers of the network, in the order in which they compute, each once",
            f"Faults:\n{listed}\n",
            f"The first layers are: {', '.join(list(_shallow(traces[False]))[:12])}",
        )


def _shallow(graph: Trace) -> Iterable[str]:
    """Names of modules, at least as deep as there are several."""
    for depth in range(1, 8):
        names = [name for name in graph.first if name.count(".") < depth and name]
        if len(names) > 2:
            return names
    return [name for name in graph.first if name]


def _explain_unknown(model: nn.Module, graph: Trace, cut: str, mode: str) -> str:
    if cut in dict(model.named_modules()):
        return f"{cut!r} computes nothing that the logits depend on, in {mode} mode"
    return f"there is no layer {cut!r}{hint(cut, list(graph.first))}"


def _chosen(
    graph: Trace,
    end: int,
    costs: Sequence[float],
    num_stages: int,
    needs: Needs,
    *,
    every: bool,
) -> list[Sequence[str]]:
    """Choose the modules that stages begin with: where as few values cross as possible.

    Between the blocks of a network one value crosses, the features; inside of a block a shortcut
    crosses, too, or the parts of an attention, which say less to an objective and cost more.

    Returns:
        The best choice; if `every`, all places as few values cross, opened as far as possible, then
        less far.
    """
    live = _live(graph, end, needs)
    best: Cuts | None = None
    crossing_at_best = 0
    refusal: PartitionError | None = None
    for most in sorted({count for count in live if count}):
        levels = _levels(graph, costs, [0 < count <= most for count in live])
        try:
            found = best_cuts(levels, num_stages)
        except TooFewLayers as error:
            refusal = error
            continue
        if best is None or found.largest * _WORTH_CROSSING < best.largest:
            best, crossing_at_best = found, most
    if best is None:
        raise refusal or PartitionError(
            "A network must compute features of every sample before its classifier", "Got none"
        )
    if every:
        levels = _levels(graph, costs, [0 < count <= crossing_at_best for count in live])
        return list(all_cuts(levels, num_stages))
    return [best.names]


def _live(graph: Trace, end: int, needs: Needs) -> list[int]:
    """Count for every place before ``end`` the computed features that would cross a cut there.

    It is 0 where none of them has a row per sample.
    """
    last = {argument: at for at, n in enumerate(graph.body) for argument in n.all_input_nodes}
    batches = _batches(graph)
    found, fit = [0] * end, [False] * end
    for node, until in last.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and not needs.again(node):
            for place in range(graph.place[node] + 1, min(until + 1, end)):
                found[place] += 1
                fit[place] |= _batch_dimension(node, batches) is not None
    return [count if good else 0 for count, good in zip(found, fit, strict=True)]


def _batches(graph: Trace) -> set[Any]:
    """The expressions that stand for the number of samples."""
    sizes = [node.meta["val"].shape[0] for node in graph.inputs]
    return {expression(size) for size in sizes if constant(size) is None}


def _levels(
    graph: Trace, costs: Sequence[float], may_begin: Sequence[bool]
) -> Iterator[list[tuple[str, float]]]:
    """Yield the units before the classifier with their costs, each time opening one more level."""
    end = len(may_begin)
    stacks = [owners(node) for node in graph.body[:end]]
    for depth in range(1, max(map(len, stacks))):
        starts: dict[int, str] = {}
        for place, stack in enumerate(stacks):
            for name in stack[1 : depth + 1]:
                first = graph.first[name] == place and ".parametrizations" not in name
                if first and (may_begin[place] or not starts):
                    starts.setdefault(place, name)
        edges = [0, *list(starts)[1:], end]
        yield [
            (name, sum(costs[a:b]))
            for name, (a, b) in zip(starts.values(), pairwise(edges), strict=False)
        ]


def _operations(graph: Trace, model: nn.Module, batch: Tree) -> list[float]:
    """Count the floating-point operations of every node on a batch."""
    state = _all_tensors(model)
    known: dict[fx.Node, Any] = {node: state[name] for node, name in graph.tensors.items()}
    known |= dict(zip(graph.inputs, tensors_of(batch), strict=True)) | dict(graph.constants)
    totals = [0]
    with undisturbed(model), torch.no_grad(), counting_operations() as counter:
        for node in graph.body:
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            if node.op == "get_attr":
                known[node] = graph.modules[str(node.target)]
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            totals.append(counter.get_total_flops())
    return [float(after - before) for before, after in pairwise(totals)]


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a tied one by each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _layers(graph: Trace, start: int, end: int) -> tuple[str, ...]:
    """Name the largest modules that compute nowhere but between two places."""
    last: dict[str, int] = {}
    for place, node in enumerate(graph.body):
        for name in owners(node):
            last[name] = place
    found: list[str] = []
    for name, first in graph.first.items():
        inside = start <= first and last[name] < end
        if inside and not any(f"{name}.".startswith(f"{outer}.") or not outer for outer in found):
            found.append(name)
    return tuple(found)


def _bodies(
    model: nn.Module,
    traces: Mapping[bool, Trace],
    names: Sequence[str],
    varying: Sequence[str],
    form: Form,
) -> tuple[list[GraphBody], list[_Read], tuple[Dimensions, ...], list[dict[bool, _Values]]]:
    """Build a module for each stage and one for the classifier, and find what objectives read.

    Returns:
        The modules; what the objective of each stage reads; for each stage which dimensions of what
        it hands on are the batch, and these values, in training and in evaluation mode.

    Args:
        model: The network.
        traces: Its graphs.
        names: What the second stage and all that follows begins with, the classifier last.
        varying: Buffers that the forward pass changes.
        form: Names the network's inputs.
    """
    codes: list[dict[bool, Code]] = [{} for _ in range(len(names) + 1)]
    crossed: list[dict[bool, _Values]] = [{} for _ in names]
    reads: dict[bool, list[_Read]] = {}
    for mode, graph in sorted(traces.items(), reverse=True):  # evaluation mode last
        cuts = [_start(graph, name) for name in names]
        alone = crossing(graph, cuts, graph.logits, Needs(graph, varying), [()] * len(cuts))
        reads[mode] = [
            _choose(graph, form, values, begin, cut, name)
            for values, (begin, cut), name in zip(alone, pairwise([0, *cuts]), names, strict=True)
        ]
        besides = [read.nodes for read in reads[mode]]
        masks = {node for nodes in besides for node in nodes[1:]}
        found = crossing(graph, cuts, graph.logits, Needs(graph, varying, masks), besides)
        # What is read comes first, so that it has the same place in both modes.
        values = [graph.inputs] + [
            tuple(dict.fromkeys([*first, *every]))
            for first, every in zip(besides, found, strict=True)
        ]
        for stage, (begin, end) in enumerate(pairwise([0, *cuts, len(graph.body)])):
            outputs = values[stage + 1] if stage < len(cuts) else (graph.logits,)
            codes[stage][mode] = piece(graph, graph.body[begin:end], values[stage], outputs)
            if stage < len(cuts):
                crossed[stage][mode] = outputs
    for one, other, name in zip(reads[True], reads[False], names, strict=True):
        if one.form != other.form:
            raise PartitionError(
                "A stage must hand on the same kind of features in training and in evaluation mode",
                f"Before {name!r} it is {one.form} in training and {other.form} in evaluation mode",
                "Cut elsewhere",
            )
    # Only in evaluation mode samples are taken out of what crosses a cut; values are those of it.
    batches = _batches(traces[False])
    dims = tuple(tuple(_rows_of(node, batches) for node in each) for each in values[1:])
    return _hold(model, codes, varying), reads[True], dims, crossed


def _unit_ends(
    graph: Trace, costs: Sequence[float], cuts: Sequence[str], head: str, needs: Needs
) -> list[str]:
    """Name for each cut the layer that begins behind the next unit.

    A unit is the smallest piece that multiplies matrices, and behind which no more values cross
    than before it. What costs nothing and comes next (a normalisation, an activation) is part.
    """
    end = _start(graph, head)
    live = [*_live(graph, end, needs), 1]
    begins = {place: name for name, place in reversed(graph.first.items()) if name}
    found: list[str] = []
    for cut in cuts:
        begin = _start(graph, cut)
        until, busy = head, False
        for place in range(begin + 1, end + 1):
            busy |= costs[place - 1] > 0
            if busy and place in begins and 0 < live[place] <= live[begin]:
                until = head if place == end else begins[place]
            if until is not head and costs[place] > 0:
                break
        found.append(until)
    return found


def _following(
    model: nn.Module,
    traces: Mapping[bool, Trace],
    span: tuple[str, str],
    values: Mapping[bool, _Values],
    varying: Sequence[str],
    form: Form,
    features: Features | None,
) -> Following | None:
    """Build the layers from one name to another, as a piece that takes what crosses the first.

    Returns:
        None if they are not the same kind of piece in training and in evaluation mode.
    """
    codes: dict[bool, Code] = {}
    reads: dict[bool, _Read] = {}
    for mode, graph in traces.items():
        begin, end = (graph.start(name) for name in span)
        if begin is None or end is None or end <= begin:
            return None
        (crossed,) = crossing(graph, [end], graph.logits, Needs(graph, varying), [()])
        try:
            reads[mode] = _choose(graph, form, crossed, begin, end, span[1])
        except PartitionError:
            return None
        inside = {*values[mode], *graph.body[begin:end]}
        if not inside.issuperset(reads[mode].nodes):
            return None
        codes[mode] = piece(graph, graph.body[begin:end], values[mode], reads[mode].nodes)
    if reads[True].form != reads[False].form:
        return None
    (body,) = _hold(model, [codes], varying)
    return Following(body, reads[True].reading(features or summarized))


def _hold(
    model: nn.Module, codes: Sequence[Mapping[bool, Code]], varying: Sequence[str]
) -> list[GraphBody]:
    """Give every stage its parameters and buffers, under all of their names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    every = _all_tensors(model)
    names = tied_names(model)
    used = [
        {id(every[name]): " = ".join(map(repr, names[id(every[name])])) for name in held}
        for held in ({n for code in modes.values() for n in code.tensors} for modes in codes)
    ]
    last = {key: name for held in used[-2:] for key, name in held.items()}
    stages = [*used[:-2], last]  # the classifier is part of the last stage
    parameters = {id(parameter) for parameter in model.parameters()}
    changing = {id(every[name]) for name in varying}
    refuse_shared(
        [{k: n for k, n in each.items() if k in parameters} for each in stages], "parameter"
    )
    refuse_shared(
        [{k: n for k, n in each.items() if k in changing} for each in stages],
        "buffer that the forward pass changes",
    )
    order = {id(tensor): i for i, tensor in enumerate(tensors.values())}
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    return [
        GraphBody(
            modes, model, {key: names[key] for key in sorted(each, key=order.__getitem__)}, device
        )
        for modes, each in zip(codes, used, strict=True)
    ]


@dataclass(frozen=True)
class _Read:
    """What the objective of a stage reads.

    Attributes:
        nodes: The main value, and the mask if there is one.
        batch: The dimension of the main value that is the batch.
        marks_padding: Whether the mask is True where padding is.
        shape: The main value's other sizes; None where they are free.
    """

    nodes: tuple[fx.Node, ...]
    batch: int
    marks_padding: bool
    shape: tuple[int | None, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        """What must be the same in both modes."""
        return len(self.nodes), self.batch, self.marks_padding, self.shape

    def reading(self, features: Features) -> Reading:
        """Say the same without nodes."""
        return Reading(features, self.batch, len(self.nodes) > 1, self.marks_padding)


def _choose(
    graph: Trace, form: Form, values: Sequence[fx.Node], begin: int, cut: int, name: str
) -> _Read:
    """Choose the main value among those that cross a cut: the one that was computed last."""
    batches = _batches(graph)
    fit = [
        node
        for node in values
        if node.meta["val"].is_floating_point() and _batch_dimension(node, batches) is not None
    ]
    own = [node for node in fit if graph.place[node] >= begin]
    if not fit:
        raise PartitionError(
            f"The stage before {name!r} must hand on features with a row per sample",
            f"Got {', '.join(str(tuple(n.meta['val'].shape)) for n in values) or 'nothing'}",
            "Cut elsewhere",
        )
    main = max(own or fit, key=lambda node: graph.place[node])
    batch = _batch_dimension(main, batches)
    assert batch is not None
    shape = main.meta["val"].shape
    mask = (
        _mask_of(graph, form, shape[1 - batch], batches, cut)
        if len(shape) == 3 and batch < 2
        else None
    )
    sizes = tuple(constant(size) for dim, size in enumerate(shape) if dim != batch)
    if mask is None:
        return _Read((main,), batch, False, sizes)
    return _Read((main, mask[0]), batch, mask[1], sizes)


def _rows_of(node: fx.Node, batches: set[Any]) -> int | None:
    """Find the dimension of a value that is the batch: -1 if it is mixed with another one."""
    dim = _batch_dimension(node, batches)
    symbols = {symbol for each in batches for symbol in getattr(each, "free_symbols", ())}
    sizes: Iterator[set[Any]] = (
        getattr(expression(size), "free_symbols", set()) for size in node.meta["val"].shape
    )
    return MIXED if dim is None and any(symbols & found for found in sizes) else dim


def _batch_dimension(node: fx.Node, batches: set[Any]) -> int | None:
    shape = node.meta["val"].shape
    return next((dim for dim, size in enumerate(shape) if expression(size) in batches), None)


def _mask_of(
    graph: Trace, form: Form, length: int | torch.SymInt, batches: set[Any], cut: int
) -> tuple[fx.Node, bool] | None:
    """Find what tells tokens from padding in sequences of this length.

    That is an input called a mask, or a comparison of the tokens with one of them.

    Returns:
        Its node, and whether it marks padding.
    """

    def fits(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return (
            isinstance(value, Tensor)
            and value.ndim == 2
            and not value.is_floating_point()
            and expression(value.shape[0]) in batches
            and is_same(value.shape[1], length)
        )

    for node, name in zip(graph.inputs, form.names, strict=True):
        if "mask" in name and fits(node):
            return node, "pad" in name
    compared = {torch.ops.aten.ne.Scalar: False, torch.ops.aten.eq.Scalar: True}
    for node in graph.body[:cut]:
        if node.target in compared and node.args[0] in graph.inputs and fits(node):
            return node, compared[node.target]
    return None


def _check_batch(graph: Trace, form: Form, example: Tree) -> Form:
    """Make sure that the graph is good for any number of samples, and note the sizes it is for."""
    sizes: list[tuple[int | None, ...]] = []
    for node, name, tensor in zip(graph.inputs, form.names, tensors_of(example), strict=True):
        shape = node.meta["val"].shape
        if constant(shape[0]) is not None and len(tensor) > 1:
            raise PartitionError(
                "The network must take batches of any size",
                f"Its forward is only right for {len(tensor)} rows of {name!r}, as the example has",
                BY_HAND,
            )
        sizes.append(tuple(map(constant, shape)))
    return replace(form, sizes=tuple(sizes))
