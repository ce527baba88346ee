"""Classes by their names: which are known, how many samples each has, which have none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from scpl.errors import DataError

__all__ = ["absent", "check_known", "is_number", "matched", "spread"]

_FEW = 10  # names in a message


def check_known(values: Iterable[str], names: Sequence[str], place: str, fix: str) -> None:
    """Check that all labels are classes that are learnt.

    Raises:
        DataError: One is not; names that differ in upper and lower case are set side by side.
    """
    unknown = sorted(set(values).difference(names))
    if unknown:
        alike = {name.lower(): name for name in names}
        meant = [f"{name} as {alike[name.lower()]}" for name in unknown if name.lower() in alike]
        if all(map(is_number, (*unknown, *names))):
            fix = f"If one table counts the classes from 0 and the other from 1: {fix}"
        raise DataError(
            f"Every label must be a class that is learnt: {', '.join(names[:20])}",
            f"Got also {', '.join(map(repr, unknown[:_FEW]))} in {place}",
            f"Write {', '.join(meant[:_FEW])}" if meant else fix,
        )


def is_number(text: str) -> bool:
    """Whether a name is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def matched(
    labels: Tensor, found: Sequence[str] | None, known: Sequence[str], place: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Turn labels of a data set into those of a network, by the names of the classes.

    Args:
        labels: ``int64 [N]``, numbers of the data set.
        found: The names of these numbers; None where it has only numbers.
        known: The classes of the network.
        place: The data set, for messages.

    Returns:
        Labels, ``int64 [N]``, as the network has them, and what the user should know.

    Raises:
        DataError: A class is none of the network's, or it is not clear which one it is.
    """
    if found is not None and tuple(found) == tuple(known):
        return labels, ()
    present = torch.unique(labels).tolist()
    if found is None:
        if all(name.isdecimal() for name in known):
            found = [str(number) for number in range(present[-1] + 1)]
        elif present == list(range(len(known))):
            pairs = ", ".join(f"{i} is {name}" for i, name in enumerate(known[:_FEW]))
            return labels, (f"{place} has numbers for classes, taken in order: {pairs}",)
        else:
            raise DataError(
                f"The data must name its classes, as the network does: {', '.join(known[:20])}",
                f"Got only numbers from {present[0]} to {present[-1]} in {place}",
                "Name them, for parquet in a file classes.json beside it",
            )
    fix = "Rename these, leave them out, or train with them"
    check_known((found[number] for number in present), known, place, fix)
    index = {name: number for number, name in enumerate(known)}
    table = torch.tensor([index.get(name, -1) for name in found], dtype=torch.int64)
    return table[labels], ()


def absent(labels: Tensor, names: Sequence[str], samples: str) -> tuple[str, ...]:
    """Name the classes that none of some samples has; they are said in the plural."""
    sizes = torch.bincount(labels.cpu(), minlength=len(names)).tolist()
    missing = [name for name, size in zip(names, sizes, strict=True) if not size]
    more = f" and {len(missing) - _FEW:,} more" if len(missing) > _FEW else ""
    return (f"no {samples} of {', '.join(missing[:_FEW])}{more}",) if missing else ()


def spread(sizes: Tensor, names: Sequence[str], samples: str = "texts") -> str:
    """Say how many samples each class has; ``sizes`` are ``int64 [C]``."""
    pairs = sorted(zip(sizes.tolist(), names, strict=True), key=lambda pair: -pair[0])
    if len(pairs) <= _FEW:
        return ", ".join(f"{name} {size:,}" for size, name in pairs)
    (most, first), (least, last) = pairs[0], pairs[-1]
    return f"{len(pairs)}, from {least:,} ({last}) to {most:,} ({first}) {samples} each"
