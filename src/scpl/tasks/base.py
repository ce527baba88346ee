"""What every task says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scpl.errors import DataError, InputError

__all__ = ["KEPT", "NUM_BINS", "WORST", "Task"]

# Shape suffixes: N = samples, C = outputs of the network.

KEPT = ("outputs", "targets")
"""What `Task.tally` holds besides sums, sample by sample, where a metric needs all predictions."""
WORST = "worst"
"""What `Task.add_details` holds besides sums: the worst predictions, the worst first."""
NUM_BINS = 10
"""Parts of equal size that numbers are sorted into, so that all splits have their share of each."""


@dataclass(frozen=True)
class Task(ABC):
    """What the outputs of a network mean, and all that follows from it.

    A *target* is what a loader yields beside the inputs; `prepare` brings it into the form that the
    methods of this class take, and in which it travels from stage to stage.
    """

    kind: ClassVar[str]
    """Its name in configurations."""
    loss_name: ClassVar[str]
    """What the loss is called in logs."""
    metrics: ClassVar[tuple[str, ...]]
    """What is measured of predictions; the first is the main one, and larger is better."""
    proportions: ClassVar[tuple[str, ...]] = ()
    """Those that are shares of the samples, so their number says how sure they are."""
    keeps: ClassVar[bool] = False
    """Whether metrics need all predictions at once, not only sums over mini-batches."""
    exits_early: ClassVar[bool] = True
    """Whether a prediction says how sure it is."""
    least_outputs: ClassVar[int] = 1
    """Fewest outputs that a network must have."""
    noun: ClassVar[str]
    """What an output stands for."""
    plural: ClassVar[str]

    # Outputs

    def check_outputs(self, num_outputs: int) -> None:
        """Check that a network has outputs for it.

        Raises:
            InputError: if not.
        """
        if num_outputs < self.least_outputs:
            raise InputError(
                f"The network must have one output per {self.noun}"
                + (", at least two" if self.least_outputs > 1 else ""),
                f"Got {num_outputs}",
                "Build it with as many outputs as the data has classes",
            )
        for name, values in asdict(self).items():
            if isinstance(values, tuple) and len(values) not in (0, num_outputs):
                raise InputError(
                    f"`{name}` must hold one number per output of the network",
                    f"Got {len(values)} for {num_outputs} outputs",
                )

    # Targets

    def check_target(self, target: Tensor, rows: int, num_outputs: int, place: str) -> None:
        """Check shape and type of a loader's target, without looking at values.

        Args:
            target: What the loader gave.
            rows: Samples of the batch.
            num_outputs: C.
            place: Which batch, for messages.

        Raises:
            DataError: if it does not fit.
        """
        if tuple(target.shape) != (rows, num_outputs):
            raise DataError(
                f"A target must hold one value per row and {self.noun}: [{rows}, {num_outputs}]",
                f"Got {tuple(target.shape)} {target.dtype} in {place}",
            )

    @abstractmethod
    def prepare(self, target: Tensor) -> Tensor:
        """Bring a loader's target into the form that all other methods take."""

    @abstractmethod
    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:
        """Check the lowest and the highest value of a prepared target; NaN if one of them is.

        Raises:
            DataError: if there is one that it cannot have.
        """

    def mend(self, target: Tensor, num_outputs: int) -> Tensor:
        """Make a prepared target whose values nobody has checked yet safe to compute with."""
        return target

    @abstractmethod
    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:
        """Return what ideal outputs say, ``float32 [N, C]``; looks at no value."""

    @abstractmethod
    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:
        """Draw targets as a loader gives them, for measurements of speed."""

    @classmethod
    @abstractmethod
    def strata(cls, targets: Tensor) -> Tensor:
        """Sort samples by what splits shall have the same shares of.

        Args:
            targets: Those of a data set, as a loader gives them.

        Returns:
            A number from 0 for each, ``int64 [N]``.
        """

    @classmethod
    @abstractmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> Task:
        """Make the task of training targets.

        Args:
            targets: Those of all training samples, as a loader gives them.
            num_outputs: C.
            balanced: Whether what is rare weighs more.
            label_smoothing: Share of the target that the loss spreads evenly.

        Raises:
            DataError: if nothing can be learnt from them.
            InputError: if nothing can be balanced or smoothed.
        """

    # Learning

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss over samples, a scalar in at least float32.

        Every sample counts the same whatever else is in the mini-batch, so that the loss of a
        mini-batch is the mean of those of its equal parts.

        Args:
            outputs: ``[N, C]``.
            target: Prepared.
        """

    @abstractmethod
    def pairs(self, target: Tensor) -> Tensor:
        """Say which samples belong together, as `scpl.losses.contrastive` takes it.

        Returns:
            The class of each, an integer type ``[N]``; or how much each two belong together,
            ``float32 [N, N]`` from 0 to 1.
        """

    @abstractmethod
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Say how good the outputs of a mini-batch are: detached scalars by name."""

    @abstractmethod
    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:
        """Say whether means of `observe` are better than guessing; None if it did not observe."""

    # Measuring

    @abstractmethod
    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Sum up what metrics are made of: ``count``, ``loss`` and others by name.

        Sums of two batches add up. Beside them stand the entries named `KEPT`, where the task keeps
        predictions; those of two batches are joined. Nothing waits for the device.

        Args:
            outputs: ``[N, C]`` in at least float32.
            target: Prepared.
        """

    @abstractmethod
    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:
        """Turn what was summed up, on the CPU, into metrics by name.

        What needs kept predictions is left out where there are none.
        """

    @abstractmethod
    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Add what `details` is made of to what was counted of earlier batches, in place.

        Of two series of batches entries add up, but of `WORST` the largest rows stay
        (`scpl.measures.largest`). Nothing waits for the device.

        Args:
            details: What was counted so far; empty at the beginning.
            outputs: ``[N, C]`` in at least float32.
            target: Prepared.
            first: Place of the first of these samples among all.
        """

    @abstractmethod
    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Turn what was counted, on the CPU, into a full account of the predictions.

        Args:
            tally: Of `tally` and `add_details`.
            names: Of the outputs.

        Returns:
            JSON values. ``table``: a row for each output. ``mistakes``: the worst predictions, the
            worst first; ``sample`` is a place among all. ``calibration``, where predictions are
            probabilities, see `scpl.measures.calibration`. What else there is of one task alone:
            ``confusion`` of classes, a row for each true class and a column for each predicted
            one; ``points`` of numbers, true and predicted ones of some samples.
        """

    # Predictions

    def confidence(self, outputs: Tensor) -> Tensor:
        """Say how sure a prediction is of each sample: a probability, ``[N]``.

        Raises:
            InputError: if it does not say.
        """
        raise InputError(
            "To leave early, predictions must say how sure they are, as classes and labels do",
            f"Got a network for {self.kind}, which predicts numbers",
            "Leave the threshold out: all stages run then",
        )

    @abstractmethod
    def columns(self, names: Sequence[str], top: int) -> list[str]:
        """Name the columns that a prediction is written in.

        Args:
            names: Of the outputs.
            top: How many classes are listed.

        Raises:
            InputError: if it cannot list so many.
        """

    @abstractmethod
    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write predictions as JSON values by column, sample by sample.

        Args:
            outputs: ``[N, C]``.
            names: Of the outputs.
            top: How many classes are listed.
        """

    def told(self, names: Sequence[str]) -> str:
        """Say what weighs how much, in words; nothing if all weigh the same."""
        weights: tuple[float, ...] = getattr(self, "weights", ())
        if not weights:
            return ""
        pairs = sorted(zip(weights, names, strict=True))
        shown = [pairs[0], pairs[-1]] if len(pairs) > NUM_BINS else pairs
        words = (", ", " to ")[len(pairs) > NUM_BINS].join(f"{n} {w:.3g}" for w, n in shown)
        return f"Weights of the loss by {self.noun}: {words}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, from which `task_of` makes it again."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **values}
