"""What a user should know of his data: what was left out or repaired."""

from __future__ import annotations

__all__ = ["Faults"]

_MOST_KINDS = 20  # of faults that are told one by one


class Faults:
    """Counts faults by kind; one bad row or file must not end a run, nor pass unseen."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Count a fault, e.g. ``add("rows without a label left out", "a.csv row 3")``."""
        count, first = self._found.get(kind, (0, place))
        self._found[kind] = (count + 1, first)

    def count(self, kind: str) -> int:
        """How many of a kind there were."""
        return self._found.get(kind, (0, ""))[0]

    def notes(self) -> list[str]:
        """One sentence for each kind."""
        told = [
            f"{kind}: {count:,} (first: {first})" for kind, (count, first) in self._found.items()
        ]
        if len(told) > _MOST_KINDS:
            told[_MOST_KINDS:] = [f"and {len(told) - _MOST_KINDS} more kinds of these"]
        return told
