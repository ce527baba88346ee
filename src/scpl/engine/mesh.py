"""Which stages live on which rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from scpl.errors import InputError

__all__ = ["Mesh"]


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, and how many stages each hosts.

    Attributes:
        rank: This process.
        num_ranks: How many processes there are.
        stages_per_rank: How many consecutive stages each rank hosts. None: a `Pipeline` gives ranks
            stages of about equal cost; where costs are unknown each gets as many, earlier ranks
            the extra ones.
    """

    rank: int = 0
    num_ranks: int = 1
    stages_per_rank: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise InputError(
                "A rank must lie in 0 .. num_ranks - 1",
                f"Got rank {self.rank} of {self.num_ranks}",
            )
        hosted = self.stages_per_rank
        if hosted is not None and (len(hosted) != self.num_ranks or min(hosted) < 1):
            raise InputError(
                "`stages_per_rank` must give every rank at least one stage",
                f"Got {list(hosted)} for {self.num_ranks} ranks",
            )

    @classmethod
    def from_env(cls, stages_per_rank: Sequence[int] | None = None) -> Mesh:
        """Read the place of this process from the variables that ``torchrun`` sets.

        Without them (``python script.py``) this is the only rank, which hosts all stages.
        """
        rank, num_ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and num_ranks.isdecimal()):
            raise InputError(
                "RANK and WORLD_SIZE must be whole numbers",
                f"Got RANK={rank!r} and WORLD_SIZE={num_ranks!r}",
                "Let torchrun set them, or unset both",
            )
        return cls(
            int(rank), int(num_ranks), None if stages_per_rank is None else tuple(stages_per_rank)
        )

    def counts(self, num_stages: int) -> tuple[int, ...]:
        """How many stages each rank hosts.

        Raises:
            InputError: if the stages cannot be stages_per_rank over the ranks.
        """
        wanted = self.stages_per_rank
        if wanted is not None:
            if sum(wanted) != num_stages:
                raise InputError(
                    f"`stages_per_rank` must add up to the {num_stages} stages",
                    f"Got {' + '.join(map(str, wanted))} = {sum(wanted)}",
                )
            return wanted
        if self.num_ranks > num_stages:
            raise InputError(
                "Every rank must host at least one stage",
                f"Got {num_stages} stages for {self.num_ranks} ranks",
                f"Use at most {num_stages} processes, or cut the network into more stages",
            )
        base, extra = divmod(num_stages, self.num_ranks)
        return tuple(base + (rank < extra) for rank in range(self.num_ranks))

    def hosted(self, num_stages: int) -> range:
        """The stages that this rank hosts."""
        counts = self.counts(num_stages)
        start = sum(counts[: self.rank])
        return range(start, start + counts[self.rank])

    def owners(self, num_stages: int) -> list[int]:
        """The rank that hosts each stage."""
        return [rank for rank, n in enumerate(self.counts(num_stages)) for _ in range(n)]

    @property
    def is_first(self) -> bool:
        """Whether this rank reads the data."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank makes the predictions and knows every loss."""
        return self.rank == self.num_ranks - 1
