"""Which stages live on which rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from scpl.errors import InputError

__all__ = ["Mesh", "group_sizes"]


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, with two axes: which stages a rank hosts, and which replica it is.

    Ranks that host the same stages form a *group*; its members follow each other. Without replicas
    every rank is a group of its own.

    Attributes:
        rank: This process.
        num_ranks: How many processes there are.
        stages_per_rank: How many consecutive stages the ranks of each group host. None: a
            `Pipeline` gives groups stages of about equal cost; where costs are unknown each gets as
            many, earlier groups the extra ones.
        replicas: How many ranks each group has; None: one.
    """

    rank: int = 0
    num_ranks: int = 1
    stages_per_rank: tuple[int, ...] | None = None
    replicas: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise InputError(
                "A rank must lie in 0 .. num_ranks - 1",
                f"Got rank {self.rank} of {self.num_ranks}",
            )
        if (
            self.replicas is not None
            and group_sizes(self.replicas, self.num_ranks) != self.replicas
        ):
            raise InputError(
                f"`replicas` must add up to the {self.num_ranks} ranks", f"Got {self.replicas}"
            )
        hosted = self.stages_per_rank
        if hosted is not None and (len(hosted) != self.num_groups or min(hosted) < 1):
            raise InputError(
                "`stages_per_rank` must give every rank, or group of replicas, at least one stage",
                f"Got {list(hosted)} for {self.num_groups}",
            )

    @classmethod
    def from_env(
        cls,
        stages_per_rank: Sequence[int] | None = None,
        replicas: int | Sequence[int] | None = None,
    ) -> Mesh:
        """Read the place of this process from the variables that ``torchrun`` sets.

        Without them (``python script.py``) this is the only rank, which hosts all stages.

        Args:
            stages_per_rank: See the class.
            replicas: Of all groups, or of each.

        Raises:
            InputError: if the variables are damaged, or do not fit.
        """
        rank, num_ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and num_ranks.isdecimal()):
            raise InputError(
                "RANK and WORLD_SIZE must be whole numbers",
                f"Got RANK={rank!r} and WORLD_SIZE={num_ranks!r}",
                "Let torchrun set them, or unset both",
            )
        return cls(
            int(rank),
            int(num_ranks),
            None if stages_per_rank is None else tuple(stages_per_rank),
            None if replicas is None else group_sizes(replicas, int(num_ranks)),
        )

    @property
    def groups(self) -> list[range]:
        """The ranks of each group."""
        ends = [0, *accumulate(self.replicas or (1,) * self.num_ranks)]
        return [range(begin, end) for begin, end in pairwise(ends)]

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return self.num_ranks if self.replicas is None else len(self.replicas)

    @property
    def group(self) -> int:
        """The group of this rank, from 0."""
        return self.group_of(self.rank)

    def group_of(self, rank: int) -> int:
        """The group of a rank."""
        return next(index for index, ranks in enumerate(self.groups) if rank in ranks)

    @property
    def siblings(self) -> range:
        """The ranks of this rank's group, itself among them."""
        return self.groups[self.group]

    @property
    def replica(self) -> int:
        """Which of its group this rank is, from 0."""
        return self.rank - self.siblings.start

    @property
    def num_replicas(self) -> int:
        """How many ranks this rank's group has."""
        return len(self.siblings)

    @property
    def sources(self) -> Sequence[int]:
        """The ranks that send to this one; none to the first, where batches begin.

        Groups of the same size are linked rank by rank, others all with all. The first rank gives
        the others of its group their shares.
        """
        if self.group == 0:
            return () if self.is_first else (0,)
        return self._linked(self.group - 1)

    @property
    def targets(self) -> Sequence[int]:
        """The ranks of the next group that this one sends to."""
        return () if self.group == self.num_groups - 1 else self._linked(self.group + 1)

    def _linked(self, group: int) -> Sequence[int]:
        others = self.groups[group]
        return others[self.replica :][:1] if len(others) == self.num_replicas else others

    def group_speeds(self, speeds: Sequence[float]) -> tuple[float, ...]:
        """How fast each group is, of which all replicas work on shares of the same size.

        Args:
            speeds: Of each rank; empty: all are as fast.
        """
        each = speeds or (1.0,) * self.num_ranks
        return tuple(len(ranks) * min(each[rank] for rank in ranks) for ranks in self.groups)

    def counts(self, num_stages: int) -> tuple[int, ...]:
        """How many stages each group hosts.

        Raises:
            InputError: if the stages cannot be spread over the groups like that.
        """
        wanted = self.stages_per_rank
        if wanted is not None:
            if sum(wanted) != num_stages:
                raise InputError(
                    f"`stages_per_rank` must add up to the {num_stages} stages",
                    f"Got {' + '.join(map(str, wanted))} = {sum(wanted)}",
                )
            return wanted
        if self.num_groups > num_stages:
            one, many = ("rank", "ranks") if self.replicas is None else ("group", "groups of ranks")
            raise InputError(
                f"Every {one} must host at least one stage",
                f"Got {num_stages} stages for {self.num_groups} {many}",
                f"Use at most {num_stages} processes, or cut the network into more stages"
                if self.replicas is None
                else "Give groups more `replicas`, or cut the network into more stages",
            )
        base, extra = divmod(num_stages, self.num_groups)
        return tuple(base + (group < extra) for group in range(self.num_groups))

    def hosted(self, num_stages: int) -> range:
        """The stages that this rank hosts."""
        counts = self.counts(num_stages)
        start = sum(counts[: self.group])
        return range(start, start + counts[self.group])

    def owners(self, num_stages: int) -> list[int]:
        """For each stage the rank that saves and exports it: the first one that hosts it."""
        firsts = [ranks.start for ranks in self.groups]
        return [
            rank for rank, n in zip(firsts, self.counts(num_stages), strict=True) for _ in range(n)
        ]

    @property
    def is_first(self) -> bool:
        """Whether this rank reads the data."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank makes the predictions and knows every loss."""
        return self.rank == self.num_ranks - 1


def group_sizes(replicas: int | Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Spread ranks over groups of replicas.

    Args:
        replicas: How many ranks every group has (one number, alone or in a sequence), or each.
        num_ranks: How many ranks there are.

    Raises:
        InputError: if the ranks cannot be spread like that.
    """
    sizes = (replicas,) if isinstance(replicas, int) else tuple(replicas)
    if len(sizes) != 1:
        if min(sizes, default=0) < 1 or sum(sizes) != num_ranks:
            raise InputError(
                f"`replicas` must be at least 1 each, and add up to the {num_ranks} ranks",
                f"Got {' + '.join(map(str, sizes)) or 'none'} = {sum(sizes)}",
                "Start as many processes as they add up to",
            )
        return sizes
    (size,) = sizes
    if size < 1 or num_ranks % size:
        raise InputError(
            "`replicas` must divide the number of ranks",
            f"Got {size} for {num_ranks} ranks",
            "Start a multiple of it, or say for each group of ranks how many it has",
        )
    return sizes * (num_ranks // size)
