"""Backpropagation: the network trained end to end, on one device or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from scpl.errors import InputError
from scpl.methods.base import CrossEntropy, Layout, Method, Nothing, Objective, Site

__all__ = [
    "Backpropagation",
    "CutBackpropagation",
    "DataParallel",
    "GPipe",
    "MicroBatched",
    "OneForwardOneBackward",
    "WideBackpropagation",
    "ZeroBubble",
]


@dataclass(frozen=True)
class Backpropagation(Method):
    """Plain end-to-end training on one device, with the same loop around it.

    All stages are joined to one, so that the loop is exactly forward, cross-entropy, backward,
    step: the reference every other method is measured against.
    """

    name: ClassVar[str] = "bp"
    cuts_gradients: ClassVar[bool] = False
    layout: ClassVar[Layout] = "one"

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is None:
            return Nothing()
        return CrossEntropy(site.readout, task=site.task)


@dataclass(frozen=True)
class WideBackpropagation(Backpropagation):
    """The same on one device with all the cores that the other methods use together.

    On a CPU this is the honest rival of several processes: threads share the work of every layer.
    """

    name: ClassVar[str] = "bp-wide"


@dataclass(frozen=True)
class CutBackpropagation(Backpropagation):
    """Naive model parallelism: the whole mini-batch goes down and up, one rank works at a time."""

    name: ClassVar[str] = "bp-cut"
    layout: ClassVar[Layout] = "stages"
    schedule: ClassVar[str] = "GPipe"
    """What ``torch.distributed.pipelining`` calls the schedule."""

    @property
    def slices(self) -> int:
        """Micro-batches of a mini-batch."""
        return 1


@dataclass(frozen=True)
class MicroBatched(CutBackpropagation):
    """End-to-end training with the stages spread over the ranks.

    Every mini-batch goes down the stages and its gradient comes back up, in equal micro-batches
    that let ranks work at the same time. A schedule of ``torch.distributed.pipelining`` says in
    which order. BatchNorm sees micro-batches instead of mini-batches, so with it the numbers
    differ from those of plain backpropagation; without it the gradients are the same.
    """

    num_micro_batches: int = 4
    """Slices of a mini-batch. One that cannot be cut into that many equal slices (the last of an
    epoch) is cut into the next smaller number that fits."""

    @property
    def slices(self) -> int:  # noqa: D102
        return self.num_micro_batches

    def __post_init__(self) -> None:
        if self.num_micro_batches < 1:
            raise InputError(
                "`num_micro_batches` must be at least 1", f"Got {self.num_micro_batches}"
            )


@dataclass(frozen=True)
class GPipe(MicroBatched):
    """All micro-batches forward, then all backward (Huang et al. 2019), without recomputation."""

    name: ClassVar[str] = "gpipe"
    schedule: ClassVar[str] = "GPipe"


@dataclass(frozen=True)
class OneForwardOneBackward(MicroBatched):
    """Forward and backward of micro-batches alternate (Narayanan et al. 2019, synchronous)."""

    name: ClassVar[str] = "1f1b"
    schedule: ClassVar[str] = "1F1B"


@dataclass(frozen=True)
class ZeroBubble(MicroBatched):
    """1F1B with a backward pass in two halves; the second fills gaps (Qi et al. 2023)."""

    name: ClassVar[str] = "zero-bubble"
    schedule: ClassVar[str] = "InterleavedZeroBubble"


@dataclass(frozen=True)
class DataParallel(Backpropagation):
    """Every rank has the whole network and a share of each mini-batch; gradients are averaged.

    BatchNorm sees each rank's share, and the statistics of the first rank are kept, as usual. On
    more than two ranks a resumed run equals an undisturbed one up to the last bits only: torch
    groups gradients anew after its first step, and adds them up in another order.
    """

    name: ClassVar[str] = "ddp"
    layout: ClassVar[Layout] = "replicas"
    compress_gradients: Literal["none", "bfloat16"] = "none"
    """Type in which gradients are averaged; bfloat16 halves the traffic, and rounds as torch's own
    hook does: each replica's share is rounded, and so is their sum."""
    accumulation: int = 1
    """Mini-batches whose gradients are averaged together before each update: traffic falls by this
    factor, and what is learned from at once grows by it. The last mini-batches of an epoch make an
    update of their own, however few are left. Rates follow the mini-batches, as without it."""

    def __post_init__(self) -> None:
        if self.compress_gradients not in ("none", "bfloat16"):
            raise InputError(
                "`compress_gradients` must be 'none' or 'bfloat16'",
                f"Got {self.compress_gradients!r}",
            )
        if self.accumulation < 1:
            raise InputError("`accumulation` must be at least 1", f"Got {self.accumulation}")
