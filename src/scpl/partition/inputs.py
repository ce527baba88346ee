"""How a batch becomes the arguments of a network, and how many of its samples there are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scpl.errors import InputError, PartitionError
from scpl.partition.values import TensorSpec, Tree, tensors_of, tree_map

__all__ = ["LABELS", "Form", "beside", "samples", "without_labels"]

LABELS = ("labels", "label")
"""What batches of ``transformers`` call the target; it is no input of the network."""


@dataclass(frozen=True)
class Form:
    """The form of a network's inputs, as its example has it.

    Inside of the library a batch is one tensor, or a tuple of tensors in the order of the example.

    Attributes:
        keywords: Names of the arguments if a batch is a mapping; None if it is a tensor or a tuple.
        names: What the network's forward calls each tensor, as far as that is known.
        given: For each positional argument whether it is given (or None).
        sizes: The shape that each tensor must have; None where a size is free.
        is_whole: Whether a batch is the only argument, whatever tree of tensors it is.
    """

    keywords: tuple[str, ...] | None
    names: tuple[str, ...]
    given: tuple[bool, ...] = ()
    sizes: tuple[tuple[int | None, ...], ...] = ()
    is_whole: bool = False

    @classmethod
    def whole(cls) -> Form:
        """Describe batches that a chain's first layer takes as they are."""
        return cls(None, (), is_whole=True)

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Form:
        """Describe an example: a tensor, a tuple of arguments, or a mapping of keyword arguments.

        Raises:
            PartitionError: if it holds anything but tensors and None.
        """
        if isinstance(example, Mapping):
            kept = without_labels(example)
            keywords = tuple(name for name, value in kept.items() if value is not None)
            return cls(keywords, _checked(keywords, [kept[name] for name in keywords]))
        items = list(example) if isinstance(example, (tuple, list)) else [example]
        known = _parameter_names(model, len(items))
        given = tuple(item is not None for item in items)
        pairs = [(name, item) for name, item in zip(known, items, strict=True) if item is not None]
        names = _checked([name for name, _ in pairs], [item for _, item in pairs])
        return cls(None, names, given)

    def arrange(self, inputs: Any) -> Tree:
        """Bring a batch into the library's order: a tensor, or a tuple of tensors.

        Raises:
            InputError: if it has other parts than the example.
        """
        if self.is_whole:
            return inputs
        if self.keywords is not None:
            values = self._by_keyword(inputs)
        else:
            items = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
            if tuple(item is not None for item in items) != self.given:
                raise InputError(
                    f"A batch must have the parts of the example that the network was cut with: "
                    f"{_list(self.names)}",
                    f"Got {len([item for item in items if item is not None])} tensors",
                )
            values = [item for item in items if item is not None]
        self._check_sizes(values)
        return values[0] if len(values) == 1 else tuple(values)

    def _by_keyword(self, inputs: Any) -> list[Any]:
        assert self.keywords is not None
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"A batch must be a mapping with {_list(self.keywords)}, as the example was",
                f"Got {type(inputs).__name__}",
            )
        kept = {k: v for k, v in without_labels(inputs).items() if v is not None}
        if kept.keys() != set(self.keywords):
            missing = [name for name in self.keywords if name not in kept]
            extra = [name for name in kept if name not in self.keywords]
            faults = [f"without {_list(missing)}"] * bool(missing)
            faults += [f"with {_list(extra)} besides"] * bool(extra)
            raise InputError(
                f"A batch must have the parts of the example that the network was cut with: "
                f"{_list(self.keywords)}",
                f"Got one {' and '.join(faults)}",
                "Cut the network with a batch of the loader as example",
            )
        return [kept[name] for name in self.keywords]

    def _check_sizes(self, values: list[Any]) -> None:
        for name, value, wanted in zip(self.names, values, self.sizes):  # noqa: B905
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if len(shape) != len(wanted) or any(
                size not in (None, got) for size, got in zip(wanted, shape, strict=True)
            ):
                free = ", ".join("any" if size is None else str(size) for size in wanted)
                raise InputError(
                    f"The network was cut for {name!r} of the shape [{free}]",
                    f"Got {list(shape)}",
                    "Bring batches to this shape, or cut the network with an example like them",
                )

    def arguments(self, arranged: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments of the network for an arranged batch."""
        if self.is_whole:
            return (arranged,), {}
        values = tensors_of(arranged)
        if self.keywords is not None:
            return (), dict(zip(self.keywords, values, strict=True))
        waiting = iter(values)
        return tuple(next(waiting) if given else None for given in self.given), {}


def beside(model: nn.Module, example: Any) -> Any:
    """Put the tensors of an example where the network's parameters are."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None or device.type == "meta":
        return example

    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        if isinstance(part, Mapping):
            return {name: moved(value) for name, value in part.items()}
        return type(part)(map(moved, part)) if type(part) in (list, tuple) else part

    return moved(example)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the target out of a batch of ``transformers``."""
    return {str(name): value for name, value in batch.items() if name not in LABELS}


def samples(arranged: Tree, count: int) -> Tree:
    """Take the first samples of a batch; one alone is doubled, for a size of one is special."""
    first = tensors_of(arranged)
    rows = len(first[0]) if first and first[0].ndim else 0
    if rows < 2:
        return (
            tree_map(lambda tensor: tensor.repeat_interleave(2, 0), arranged) if rows else arranged
        )
    return tree_map(lambda tensor: tensor[:count] if len(tensor) == rows else tensor, arranged)


def _parameter_names(model: nn.Module, wanted: int) -> list[str]:
    """Name the first arguments of forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [
        name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds
    ]
    return [*known, *(f"argument {i}" for i in range(len(known), wanted))][:wanted]


def _checked(names: Any, values: list[Any]) -> tuple[str, ...]:
    bad = [
        f"{name}: {TensorSpec.of(value) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in zip(names, values, strict=True)
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 0
    ]
    if bad or not values:
        raise PartitionError(
            "The example must be a tensor [N, ...] with a row, or a tuple or mapping of such",
            f"Got {', '.join(bad) or 'nothing'}",
            "Take a batch of your loader, without its target",
        )
    return tuple(names)


def _list(names: Any) -> str:
    return ", ".join(map(repr, names))
