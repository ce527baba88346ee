"""Run a network and its stages on an example: they must agree to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scpl.errors import PartitionError
from scpl.partition.features import Summary, summary_of
from scpl.partition.values import Tree, tensors_of, tree_map

__all__ = ["check_agreement"]


def check_agreement(
    model: nn.Module, bodies: Sequence[nn.Sequential], readout: nn.Sequential, example: Tensor
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Check that the stages compute on ``example`` exactly what the network does.

    Returns:
        For each stage the shape of one sample of what its objective sees, and the number of logits.

    Raises:
        PartitionError: if the network or a stage does not accept the example, or they differ.
    """
    modes = {module: module.training for module in model.modules()}
    shapes: list[tuple[int, ...]] = []
    try:
        model.eval()
        devices = [example.device] if example.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            expected = _run(model, example, "The network must accept the example batch", _EXAMPLE)
            features: Tree = _fresh(example)
            seen, rule, fix = features, f"{_CHAIN} (read-out)", _ADVICE
            for index, body in enumerate(bodies):
                features = _run(body, features, f"{_CHAIN} (stage {index})", _ADVICE)
                summary = summary_of(body)
                seen = _summarise(summary, features, index) if summary else features
                shapes.append(_sample_shape(seen, index))
            if summary_of(bodies[-1]):
                rule, fix = _READS_SUMMARY, _POOL
            found = _run(readout, seen, rule, fix)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not _same(expected, found):
        raise PartitionError(
            "The chained layers must give exactly the network's output on the example",
            f"{type(model).__name__}.forward gives {_describe(expected)}, "
            f"its layers in order give {_describe(found)}",
            _ADVICE,
        )
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise PartitionError("The network must end in logits [N, C]", f"Got {_describe(found)}")
    return tuple(shapes), found.shape[1]


_EXAMPLE = "Check the shape of the example against the network's first layer"
_CHAIN = "The network's layers must accept the example batch one after the other"
_ADVICE = (
    "Its forward does more than call its children in order: make such steps layers "
    "(torch.flatten -> nn.Flatten, a residual sum -> a block module)"
)
_READS_SUMMARY = (
    "The read-out must read what the last layer before it says of its output (`summarize`)"
)
_POOL = (
    "Make the summary a layer of the network before the read-out (as `pool` in the text networks "
    "of scpl.models), or name a later layer as readout"
)


def _run(module: nn.Module, inputs: Tensor, rule: str, fix: str) -> Tensor:
    try:
        result: Tensor = module(_fresh(inputs))
    except Exception as error:
        raise PartitionError(
            rule,
            f"On {_describe(inputs)} it raised {type(error).__name__}: {error}",
            fix,
        ) from error
    return result


def _fresh(tree: Tensor) -> Tensor:
    """Copy, because a first layer that works in place would change the caller's tensor."""
    copied: Tensor = tree_map(Tensor.clone, tree)
    return copied


def _summarise(summary: Summary, features: Tensor, index: int) -> Tensor:
    try:
        seen = summary(features)
    except Exception as error:
        raise PartitionError(
            f"A layer must be able to summarise its own output (stage {index})",
            f"On {_describe(features)} `summarize` raised {type(error).__name__}: {error}",
        ) from error
    rows = len(tensors_of(features)[0])
    if not isinstance(seen, Tensor) or seen.ndim < 2 or len(seen) != rows:
        raise PartitionError(
            f"A summary must be one tensor with a row per sample (stage {index})",
            f"Got {_describe(seen)} for {rows} samples",
        )
    return seen


def _sample_shape(features: Tensor, index: int) -> tuple[int, ...]:
    tensors = tensors_of(features)
    if not tensors:
        raise PartitionError("A stage must hand on a tensor", f"Stage {index} hands on none")
    return tuple(tensors[0].shape[1:])


def _same(expected: Tensor, found: Tensor) -> bool:
    pairs = list(zip(tensors_of(expected), tensors_of(found), strict=False))
    return len(tensors_of(expected)) == len(tensors_of(found)) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs
    )


def _describe(tree: Tensor) -> str:
    found = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_of(tree)]
    return " and ".join(found) or "nothing"
