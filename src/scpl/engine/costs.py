"""What the parts of a network cost, and what plans of any shape cost by that.

`engine.planning` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

from scpl.errors import InputError
from scpl.partition.balance import share_out

__all__ = ["Costs", "Held", "Plan", "PlannedStage", "Unit", "checked_speeds", "in_columns"]


@dataclass(frozen=True)
class Held:
    """Bytes that a part of a network takes up in training.

    Attributes:
        parameters: Of its tensors.
        gradients: Of those that learn.
        optimizer: State of the optimizer.
        activations: What is kept of a mini-batch for the backward pass, with what is returned.
    """

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0

    def __add__(self, other: Held) -> Held:
        sums = (getattr(self, own.name) + getattr(other, own.name) for own in fields(Held))
        return Held(*sums)


@dataclass(frozen=True)
class Unit:
    """Layers between two places where a network could be cut, and what they cost.

    All times are seconds per mini-batch.

    Attributes:
        layers: Dotted names.
        parameters: Of these layers.
        forward: Within a stage.
        backward: Within a stage: gradients of parameters and of what comes in.
        forward_first: As the beginning of a stage.
        backward_first: As the beginning of a stage, which needs no gradient of what comes in.
        update: By the optimizer, without what a step costs however little there is to update.
        objective: What a stage that ends here costs besides: head and loss, forward and backward,
            their update, and the engine.
        objective_parameters: Of the head.
        bytes_out: What crosses a cut behind this unit, per mini-batch.
        bytes_in: What crosses one before it.
        inputs: Seconds of the backward pass for gradients of what comes in alone, within a stage;
            0 if that was not measured (`measure_parts`).
        held: Bytes.
        objective_held: Bytes of the head.
    """

    layers: tuple[str, ...]
    parameters: int
    forward: float
    backward: float
    forward_first: float
    backward_first: float
    update: float
    objective: float
    objective_parameters: int
    bytes_out: int
    bytes_in: int = 0
    inputs: float = 0.0
    held: Held = Held()
    objective_held: Held = Held()


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan; times are seconds per mini-batch.

    Attributes:
        layers: Dotted names.
        parameters: Of these layers.
        objective_parameters: Of the head.
        forward: Of the layers.
        backward: Of the layers.
        update: Of the layers.
        objective: Head and loss, their update, and the engine.
        bytes_out: Handed on per mini-batch; none by the last stage.
        rank: Who hosts it.
    """

    layers: tuple[str, ...]
    parameters: int
    objective_parameters: int
    forward: float
    backward: float
    update: float
    objective: float
    bytes_out: int
    rank: int

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.update + self.objective


@dataclass(frozen=True)
class Plan:
    """Where to cut a network, who hosts what, and what that is expected to cost.

    ``print(plan)`` shows it as a table.

    Attributes:
        cuts: The layers that the second and later stages begin with, for `scpl.split`.
        stages: What each stage will cost.
        num_samples: Of the mini-batch that was measured.
        speeds: How fast each rank is beside the one that measured; empty: all are as fast.
    """

    cuts: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    num_samples: int
    speeds: tuple[float, ...] = ()

    @property
    def costs(self) -> tuple[float, ...]:
        """Seconds of each stage per mini-batch, for `scpl.split`."""
        return tuple(stage.seconds for stage in self.stages)

    @property
    def num_ranks(self) -> int:
        """How many ranks it is for."""
        return self.stages[-1].rank + 1

    @property
    def stages_per_rank(self) -> tuple[int, ...]:
        """How many consecutive stages each rank hosts, for `scpl.connect`."""
        owners = [stage.rank for stage in self.stages]
        return tuple(map(owners.count, range(self.num_ranks)))

    @property
    def rank_seconds(self) -> tuple[float, ...]:
        """How long each rank computes per mini-batch, at its own speed."""
        speeds = self.speeds or [1.0] * self.num_ranks
        return tuple(
            sum(stage.seconds for stage in self.stages if stage.rank == rank) / speed
            for rank, speed in enumerate(speeds)
        )

    @property
    def wait_shares(self) -> tuple[float, ...]:
        """The share of time that each rank waits for the slowest one, 0 .. 1."""
        slowest = max(self.rank_seconds)
        return tuple(1 - seconds / slowest for seconds in self.rank_seconds)

    @property
    def samples_per_second(self) -> float:
        """What is trained while the line is full, if links and data keep up."""
        return self.num_samples / max(self.rank_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Rebuild from `to_json`."""
        stages = (
            PlannedStage(**{**stage, "layers": tuple(stage["layers"])})
            for stage in values["stages"]
        )
        speeds = tuple(values["speeds"])
        return cls(tuple(values["cuts"]), tuple(stages), values["num_samples"], speeds)

    def __str__(self) -> str:
        head = (
            "stage", "layers", "parameters", "forward", "backward", "update", "objective", "sum",
            "hands on", "rank", "rank waits",
        )  # fmt: skip
        waits = self.wait_shares
        rows = [
            (
                str(index),
                " .. ".join(dict.fromkeys((stage.layers[0], stage.layers[-1])))
                if stage.layers
                else "-",
                f"{stage.parameters + stage.objective_parameters:,}",
                *(
                    f"{1e3 * seconds:.2f} ms"
                    for seconds in (
                        stage.forward, stage.backward, stage.update, stage.objective, stage.seconds
                    )
                ),
                f"{stage.bytes_out / 1e6:.2f} MB" if stage.bytes_out else "-",
                str(stage.rank),
                f"{100 * waits[stage.rank]:.0f} %",
            )
            for index, stage in enumerate(self.stages)
        ]  # fmt: skip
        lines = in_columns([head, *rows], left=(1,))
        ranks = f"{self.num_ranks} ranks" if self.num_ranks > 1 else "one rank"
        if self.speeds:
            ranks += f" of speeds {' '.join(f'{speed:.3g}' for speed in self.speeds)}"
        lines.append(f"{self.samples_per_second:,.0f} samples/s on {ranks}")
        return "\n".join(lines)


def in_columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of a table; cells stand on the right but for those columns that do on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Costs:
    """What every part of a network costs, measured once; plans of any shape follow from it.

    Attributes:
        cuts: All places where it could be cut.
        units: What lies before, between and behind them: one more.
        num_samples: Of the mini-batch that was measured.
    """

    cuts: tuple[str, ...]
    units: tuple[Unit, ...]
    num_samples: int

    def range_of(self, begin: int, end: int) -> Unit:
        """Units ``begin .. end - 1`` as one."""
        first, last, inner = self.units[begin], self.units[end - 1], self.units[begin + 1 : end]
        units = (first, *inner)
        total = {
            name: sum(getattr(unit, name) for unit in units)
            for name in ("parameters", "forward", "backward", "update", "inputs")
        }
        return replace(
            last,
            layers=tuple(name for unit in units for name in unit.layers),
            **total,
            forward_first=first.forward_first + sum(unit.forward for unit in inner),
            backward_first=first.backward_first + sum(unit.backward for unit in inner),
            bytes_in=first.bytes_in,
            held=sum((unit.held for unit in inner), first.held),
        )

    def joined(self, cuts: Sequence[str]) -> Costs:
        """The same if the network could be cut at these places alone.

        Raises:
            InputError: if one of the cuts was not measured.
        """
        places = self.places(cuts)
        units = [self.range_of(a, b) for a, b in pairwise(places)]
        found = tuple(self.cuts[place - 1] for place in places[1:-1])
        return replace(self, cuts=found, units=tuple(units))

    def plan(
        self, num_stages: int, num_ranks: int | None = None, speeds: Sequence[float] = ()
    ) -> Plan:
        """Choose cuts and who hosts which stages, so that the slowest rank is the fastest.

        Args:
            num_stages: How many stages.
            num_ranks: How many ranks; default: one for each stage.
            speeds: How fast each rank is beside the one that measured; default: all as fast.

        Raises:
            InputError: if there are too few units or stages, or too many or few speeds.
        """
        num_ranks = num_stages if num_ranks is None else num_ranks
        if not 1 <= num_ranks <= num_stages <= len(self.units):
            raise InputError(
                "A plan needs at least one stage for each rank, and at most one for each of the "
                f"{len(self.units)} units of the network",
                f"Got {num_stages} stages and {num_ranks} ranks",
            )
        checked_speeds(speeds, num_ranks)
        size = len(self.units)
        costs = torch.full((size + 1, size + 1), torch.inf, dtype=torch.float64)
        for begin in range(size):
            for end in range(begin + 1, size + 1):
                costs[begin, end] = self._stage(begin, end, 0).seconds
        return self._planned(share_out(costs, num_stages, num_ranks, speeds), speeds)

    def at(
        self,
        cuts: Sequence[str],
        stages_per_rank: Sequence[int] | None = None,
        speeds: Sequence[float] = (),
    ) -> Plan:
        """Say what cuts that are given would cost.

        Args:
            cuts: Layers that later stages begin with.
            stages_per_rank: How many stages each rank hosts; default: one.
            speeds: How fast each rank is beside the one that measured; default: all as fast.

        Raises:
            InputError: if one of the cuts was not measured, or there are too many or few speeds.
        """
        stages = list(pairwise(self.places(cuts)))
        waiting = iter(stages)
        counts = stages_per_rank or [1] * len(stages)
        checked_speeds(speeds, len(counts))
        return self._planned([[next(waiting) for _ in range(count)] for count in counts], speeds)

    def places(self, cuts: Sequence[str]) -> list[int]:
        """The first unit of each stage between these cuts, and the number of units.

        Raises:
            InputError: if one of the cuts was not measured.
        """
        places = [0]
        for cut in cuts:
            inside = [i for i, name in enumerate(self.cuts, 1) if f"{name}.".startswith(f"{cut}.")]
            if not inside or inside[0] <= places[-1]:
                raise InputError(
                    "Cuts must be places that were measured, in their order",
                    f"Got {cut!r}",
                    f"They are: {', '.join(self.cuts)}",
                )
            places.append(inside[0])
        return [*places, len(self.units)]

    def _planned(
        self, shares: Sequence[Sequence[tuple[int, int]]], speeds: Sequence[float]
    ) -> Plan:
        ranges = [(rank, *stage) for rank, stages in enumerate(shares) for stage in stages]
        return Plan(
            cuts=tuple(self.cuts[begin - 1] for _, begin, _ in ranges[1:]),
            stages=tuple(self._stage(begin, end, rank) for rank, begin, end in ranges),
            num_samples=self.num_samples,
            speeds=tuple(speeds) if any(speed != 1 for speed in speeds) else (),
        )

    def _stage(self, begin: int, end: int, rank: int) -> PlannedStage:
        own = self.range_of(begin, end)
        return PlannedStage(
            layers=own.layers,
            parameters=own.parameters,
            objective_parameters=own.objective_parameters,
            forward=own.forward_first,
            backward=own.backward_first,
            update=own.update,
            objective=own.objective,
            bytes_out=own.bytes_out if end < len(self.units) else 0,
            rank=rank,
        )


def checked_speeds(speeds: Sequence[float], num_ranks: int) -> None:
    """Check that there is a speed above 0 for each rank, or none at all.

    Raises:
        InputError: if not.
    """
    if speeds and not (len(speeds) == num_ranks and all(0 < s < torch.inf for s in speeds)):
        raise InputError(
            f"`speeds` must be numbers above 0, one for each rank, of which there are {num_ranks}",
            f"Got {' '.join(f'{speed:g}' for speed in speeds)}",
            "Give that of the rank that measures as 1",
        )
