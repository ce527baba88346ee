"""What the outputs of a network mean: one class per sample, any number of labels, or numbers.

All that depends on it stands here: the form of a target, the loss of outputs, which samples belong
together, what is observed and measured, and how a prediction is written.

May import: errors, measures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from scpl.errors import DataError, InputError
from scpl.measures import (
    average_precision,
    bins_of,
    calibration,
    largest,
    precision_recall_f1,
    spearman,
)

__all__ = [
    "KEPT",
    "MOST_CONFUSED",
    "TASKS",
    "WORST",
    "Classes",
    "MultiLabel",
    "Regression",
    "Task",
    "task_of",
]

# Shape suffixes: N = samples, C = outputs of the network.

KEPT = ("outputs", "targets")
"""What `Task.tally` holds besides sums, sample by sample, where a metric needs all predictions."""
WORST = "worst"
"""What `Task.add_details` holds besides sums: the worst predictions, the worst first."""

MOST_CONFUSED = 1000
"""Up to so many classes it is counted which is taken for which: a million counts, 8 MB."""
_NUM_POINTS = 1000
"""So many samples, evenly spread, stand for all in a picture of numbers."""

_NUM_BINS = 10
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
        shown = [pairs[0], pairs[-1]] if len(pairs) > _NUM_BINS else pairs
        words = (", ", " to ")[len(pairs) > _NUM_BINS].join(f"{n} {w:.3g}" for w, n in shown)
        return f"Weights of the loss by {self.noun}: {words}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, from which `task_of` makes it again."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **values}


@final
@dataclass(frozen=True)
class Classes(Task):
    """One class per sample; a target is class indices, an integer type ``[N]``.

    Positives of the contrastive loss are the samples of the same class.

    Args:
        weights: What the loss of a sample of each class is multiplied by; none for 1.
        label_smoothing: Share of the target that the loss spreads over all classes. What is
            measured of predictions, their loss among it, knows neither of the two.
    """

    kind: ClassVar[str] = "classes"
    loss_name: ClassVar[str] = "cross_entropy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    proportions: ClassVar[tuple[str, ...]] = ("accuracy",)
    least_outputs: ClassVar[int] = 2
    noun: ClassVar[str] = "class"
    plural: ClassVar[str] = "classes"

    weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def check_target(self, target: Tensor, rows: int, num_outputs: int, place: str) -> None:  # noqa: D102
        if target.ndim != 1 or len(target) != rows or target.is_floating_point():
            raise DataError(
                "A target must hold one class index per row",
                f"Got {tuple(target.shape)} {target.dtype} for {rows} rows in {place}",
            )

    def prepare(self, target: Tensor) -> Tensor:  # noqa: D102
        return target.to(torch.int64)

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if low < 0 or high >= num_outputs:
            raise DataError(
                f"Targets must lie in 0 .. {num_outputs - 1}",
                f"Got {int(low if low < 0 else high)} in {place}",
                "Check the labels, or the number of classes",
            )

    def mend(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        # With classes that do not exist, layers would break the device for the whole process.
        return target.clamp(0, num_outputs - 1)

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        # Unlike `one_hot` this looks at no value, which would wait for the device.
        classes = torch.arange(num_outputs, device=target.device)
        return (target[:, None] == classes).float()

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return torch.randint(num_outputs, (count,), generator=draws)

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:  # noqa: D102
        return targets.to(torch.int64)

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> Classes:
        """See `Task.fitted`; balanced weights are N / (C n) for a class of n of N samples."""
        if not balanced:
            return cls((), label_smoothing)
        sizes = torch.bincount(targets, minlength=num_outputs).clamp(min=1).double()
        weights = (len(targets) / (num_outputs * sizes)).tolist()
        return cls(tuple(weights), label_smoothing)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with _in_float32(outputs):
            values, smoothing = _precise(outputs), self.label_smoothing
            if not self.weights:
                return functional.cross_entropy(values, target, label_smoothing=smoothing)
            loss_N = functional.cross_entropy(
                values, target, label_smoothing=smoothing, reduction="none"
            )
            return (loss_N * _constant(self.weights, loss_N)[target]).mean()

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        return target

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``accuracy``, the share of the samples that are classified right."""
        return {"accuracy": (outputs.argmax(dim=1) == target).float().mean()}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        accuracy = observed.get("accuracy")
        return None if accuracy is None else accuracy > 1.1 / num_outputs

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        found = outputs.argmax(1)
        right = found == target
        ones = torch.ones_like(target, dtype=torch.float64)
        none = ones.new_zeros(outputs.shape[1])
        return {
            "correct": right.sum(),
            "loss": functional.cross_entropy(outputs, target, reduction="sum").double(),
            "count": torch.full((), len(target), device=outputs.device),
            "right": none.index_add(0, target, right.double()),
            "found": none.index_add(0, found, ones),
            "there": none.index_add(0, target, ones),
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: D102
        accuracy = float(tally["correct"]) / float(tally["count"])
        return {"accuracy": accuracy, "macro_f1": _macro_f1(tally)}

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Count which class is taken for which, and how sure predictions are that are right."""
        found, count = outputs.argmax(1), outputs.shape[1]
        right = found == target
        sure = outputs.softmax(1).gather(1, found[:, None])[:, 0].nan_to_num(0)
        if count <= MOST_CONFUSED:
            confusion = details.setdefault("confusion", target.new_zeros(count, count))
            confusion.view(-1).index_add_(0, target * count + found, torch.ones_like(target))
        _add(details, "bins", bins_of(sure, right))
        _add_worst(details, torch.where(right, -1, sure), first, found, target)

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; a mistake is one that the network was sure of."""
        found: dict[str, Any] = {"table": _precision_table(self.noun, tally, names)}
        if "confusion" in tally:
            found["confusion"] = tally["confusion"].tolist()
        found["calibration"] = calibration(tally["bins"])
        found["mistakes"] = [
            {"sample": int(place), "true": names[int(true)], "predicted": names[int(taken)],
             "probability": sure}
            for sure, place, taken, true in tally[WORST].tolist()
            if sure >= 0
        ]  # fmt: skip
        return found

    def confidence(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs.softmax(dim=1).amax(dim=1)

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        if not 1 <= top <= len(names):
            raise InputError(f"--top must lie in 1 .. {len(names)}", f"Got {top}")
        numbers = ["", *range(2, top + 1)]
        return [f"{word}{number}" for number in numbers for word in ("label", "probability")]

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write label, probability, label2, probability2, ..., the surest first."""
        best, columns = outputs.softmax(1).topk(top), self.columns(names, top)
        for chances, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip((names[index] for index in indices), chances, strict=True)
            values = [v for name, chance in pairs for v in (name, round(chance, 6))]
            yield dict(zip(columns, values, strict=True))


@final
@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels per sample; a target is 0 or 1 for each, ``[N, C]`` of any type.

    Values between are soft labels; metrics ask whether they are above 0.5. The contrastive loss
    takes two samples as positives as far as they share labels: with weight |A and B| / |A or B|
    (Jaccard), and 0 for samples without labels.

    Args:
        weights: What the loss of a label that is there is multiplied by; none for 1.
        label_smoothing: The loss takes labels that are there for 1 minus half of this share, and
            others for half of it. What is measured of predictions knows neither of the two.
    """

    kind: ClassVar[str] = "multi-label"
    loss_name: ClassVar[str] = "binary_cross_entropy"
    metrics: ClassVar[tuple[str, ...]] = (
        "macro_f1", "micro_f1", "mean_average_precision", "exact_match",
    )  # fmt: skip
    proportions: ClassVar[tuple[str, ...]] = ("exact_match",)
    keeps: ClassVar[bool] = True
    noun: ClassVar[str] = "label"
    plural: ClassVar[str] = "labels"

    weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def prepare(self, target: Tensor) -> Tensor:  # noqa: D102
        return target.to(torch.float32)

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if not (low >= 0 and high <= 1):
            raise DataError(
                "Targets must say 1 of labels that are there and 0 of others",
                f"Got {high if low >= 0 else low:g} in {place}",
            )

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        return target

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return torch.randint(2, (count, num_outputs), generator=draws)

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:
        """Sort samples by the rarest of their labels; those without any come last."""
        there = targets > 0.5
        sizes = there.sum(0).double()
        rarest = torch.where(there, sizes, math.inf).argmin(1)
        return torch.where(there.any(1), rarest, targets.shape[1])

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> MultiLabel:
        """See `Task.fitted`; balanced weights are (N - n) / n for a label of n of N samples."""
        if not balanced:
            return cls((), label_smoothing)
        sizes = (targets > 0.5).sum(0).double()
        constant = ((sizes == 0) | (sizes == len(targets))).nonzero().flatten().tolist()
        if constant:
            raise DataError(
                "To be balanced, every label must be on some training samples and not on others",
                f"Label number {constant[0]} is on {int(sizes[constant[0]]):,} of {len(targets):,}",
                "Leave the label out, or use more samples",
            )
        return cls(tuple(((len(targets) - sizes) / sizes).tolist()), label_smoothing)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with _in_float32(outputs):
            values, smoothing = _precise(outputs), self.label_smoothing
            wanted = target.to(values.dtype) * (1 - smoothing) + smoothing / 2
            weights = _constant(self.weights, values) if self.weights else None
            return functional.binary_cross_entropy_with_logits(values, wanted, pos_weight=weights)

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        with _in_float32(target):
            shared = target @ target.T
            sizes = target.sum(1)
            either = sizes[:, None] + sizes - shared
            return shared / either.masked_fill(either == 0, 1)

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``micro_f1`` over the labels of the mini-batch."""
        found, there = outputs > 0, target > 0.5
        both = (found & there).sum()
        return {"micro_f1": 2 * both / (found.sum() + there.sum()).clamp(min=1)}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        found = observed.get("micro_f1")
        return None if found is None else found > 0.01

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        found, there = outputs > 0, target > 0.5
        loss_NC = functional.binary_cross_entropy_with_logits(
            outputs, target.to(outputs.dtype), reduction="none"
        )
        return {
            "loss": loss_NC.mean(1).sum().double(),
            "count": torch.full((), len(target), device=outputs.device),
            "exact": (found == there).all(1).sum(),
            "right": (found & there).sum(0),
            "found": found.sum(0),
            "there": there.sum(0),
            "outputs": outputs,
            "targets": target,
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: D102
        right = float(tally["right"].sum())
        either = float((tally["found"] + tally["there"]).sum())
        found = {
            "macro_f1": _macro_f1(tally),
            "micro_f1": 2 * right / either if either else 0.0,
            "exact_match": float(tally["exact"]) / float(tally["count"]),
        }
        if "outputs" in tally:
            there, outputs = tally["targets"] > 0.5, tally["outputs"]
            known = [i for i in range(there.shape[1]) if there[:, i].any()]
            precise = [average_precision(outputs[:, i], there[:, i]) for i in known]
            found["mean_average_precision"] = sum(precise) / max(len(precise), 1)
        return found

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Count how often labels are there that have some probability."""
        chances, there = outputs.sigmoid().nan_to_num(0.5), target > 0.5
        _add(details, "bins", bins_of(chances.flatten(), there.flatten()))
        sure = torch.where(outputs > 0, chances, 1 - chances)
        _add_worst(details, torch.where((outputs > 0) == there, -1, sure), first, there)

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; a mistake is of one label, and one that the network was sure of."""
        words = ("no", "yes")
        return {
            "table": _precision_table(self.noun, tally, names),
            "calibration": calibration(tally["bins"]),
            "mistakes": [
                {"sample": int(place), "label": names[int(label)], "true": words[int(there)],
                 "predicted": words[not there], "probability": sure}
                for sure, place, label, there in tally[WORST].tolist()
                if sure >= 0
            ],
        }  # fmt: skip

    def confidence(self, outputs: Tensor) -> Tensor:
        """Say how sure the network is of the label that it doubts most."""
        return outputs.abs().sigmoid().amin(dim=1)

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        _only_one(top, "lists the labels above 0.5")
        return ["labels", "probabilities"]

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write the labels with a probability above 0.5, and these, as lists."""
        for row in outputs.sigmoid().tolist():
            there = [i for i, chance in enumerate(row) if chance > 0.5]
            labels, chances = [names[i] for i in there], [round(row[i], 6) for i in there]
            yield {"labels": labels, "probabilities": chances}


@final
@dataclass(frozen=True)
class Regression(Task):
    """One or several numbers per sample; a target is ``[N, C]`` (or ``[N]`` for one), of any type.

    The network learns numbers of mean 0 and deviation 1 over the training samples; its loss is the
    squared error of these. The contrastive loss takes two samples as positives as far as they are
    near: with weight exp(-d^2 / 2 s^2), where d^2 is the mean over the numbers of their squared
    distance.

    Args:
        mean: Of each number over the training samples; none for 0.
        std: Their deviations; none for 1.
        nearness: s, in deviations.
    """

    kind: ClassVar[str] = "regression"
    loss_name: ClassVar[str] = "squared_error"
    metrics: ClassVar[tuple[str, ...]] = ("r2", "mean_absolute_error", "spearman")
    keeps: ClassVar[bool] = True
    exits_early: ClassVar[bool] = False
    noun: ClassVar[str] = "number"
    plural: ClassVar[str] = "numbers"

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    nearness: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 < each < math.inf for each in (*self.std, self.nearness)):
            raise InputError(
                "`std` and `nearness` must be more than 0", f"Got {self.std} and {self.nearness}"
            )

    def check_target(self, target: Tensor, rows: int, num_outputs: int, place: str) -> None:  # noqa: D102
        if num_outputs == 1 and target.ndim == 1:
            target = target[:, None]
        super().check_target(target, rows, num_outputs, place)

    def prepare(self, target: Tensor) -> Tensor:
        """Standardise, in float64: numbers may be large and differ by little."""
        values = (target if target.ndim == 2 else target[:, None]).double()
        if self.mean:
            values = values - _constant(self.mean, values)
        if self.std:
            values = values / _constant(self.std, values)
        return values.float()

    def values(self, outputs: Tensor) -> Tensor:
        """Turn outputs of the network into numbers as targets are, ``float64 [N, C]``."""
        values = self.scaled(outputs)
        return values + _constant(self.mean, values) if self.mean else values

    def scaled(self, differences: Tensor) -> Tensor:
        """Turn differences of outputs into those of numbers, ``float64 [N, C]``."""
        values = differences.double()
        return values * _constant(self.std, values) if self.std else values

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                "Targets must be finite numbers",
                f"Got one that is not in {place}",
                "Leave out samples without a number",
            )

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        return target

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return self.values(torch.randn(count, num_outputs, generator=draws))

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:
        """Sort samples by their first number into parts of equal size."""
        first = targets if targets.ndim == 1 else targets[:, 0]
        places = torch.argsort(torch.argsort(first, stable=True), stable=True)
        return places * _NUM_BINS // len(first)

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> Regression:
        """See `Task.fitted`; takes mean and deviation."""
        if balanced or label_smoothing:
            raise InputError(
                "What is balanced or smoothed must be classes or labels",
                "Got numbers (regression)",
                "Leave it out",
            )
        std, mean = torch.std_mean(targets.double().view(len(targets), -1), dim=0, correction=0)
        constant = (~(std > 0)).nonzero().flatten().tolist()
        if constant:
            raise DataError(
                "Numbers to learn must vary over the training samples",
                f"Got {float(mean[constant[0]]):g} for all, in target number {constant[0]}",
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with _in_float32(outputs):
            values = _precise(outputs)
            return functional.mse_loss(values, target.to(values.dtype))

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        squares_NN = (target[:, None] - target).square().mean(2)
        return (squares_NN / (-2 * self.nearness**2)).exp()

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``r2``: 1 minus the squared error as a share of the targets' variance.

        That is the variance over all training samples, 1: over a mini-batch it may be next to none.
        """
        return {"r2": 1 - (outputs.float() - target).square().mean()}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        found = observed.get("r2")
        return None if found is None else found > 0.01

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        wanted = target.double()
        wrong = outputs.double() - wanted
        return {
            "loss": wrong.square().mean(1).sum(),
            "count": torch.full((), len(target), device=outputs.device),
            "squares": wrong.square().sum(0),
            "distances": wrong.abs().sum(0),
            "sum": wanted.sum(0),
            "sum_of_squares": wanted.square().sum(0),
            "outputs": outputs,
            "targets": target,
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:
        """Turn sums into metrics, each the mean over the numbers; distances in their own units."""
        each = self._measured(tally)
        found = {
            name: sum(measured[name] for measured in each) / len(each)
            for name in ("r2", "mean_absolute_error")
        }
        if "outputs" in tally:
            pairs = zip(tally["outputs"].T, tally["targets"].T, strict=True)
            ranks = [spearman(one, other) for one, other in pairs]
            found["spearman"] = sum(ranks) / len(ranks)
        return found

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Keep the predictions that are farthest off, in deviations."""
        wrong = (outputs - target).abs()
        _add_worst(details, wrong, first, self.values(target), self.values(outputs))

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; all numbers are in their own units."""
        found = {
            "table": [
                {self.noun: name, "samples": int(tally["count"]), **measured}
                for name, measured in zip(names, self._measured(tally), strict=True)
            ],
            "mistakes": [
                {"sample": int(place), "number": names[int(number)], "true": true,
                 "predicted": predicted, "error": predicted - true}
                for _, place, number, true, predicted in tally[WORST].tolist()
            ],
        }  # fmt: skip
        if "outputs" in tally:
            every = slice(None, None, -(-len(tally["outputs"]) // _NUM_POINTS))
            pairs = (self.values(tally[name][every]).T.tolist() for name in ("targets", "outputs"))
            found["points"] = [
                {self.noun: name, "true": true, "predicted": predicted}
                for name, true, predicted in zip(names, *pairs, strict=True)
            ]
        return found

    def _measured(self, tally: Mapping[str, Tensor]) -> list[dict[str, float]]:
        """Measure each number by itself, distances in its own units."""
        count, left = tally["count"], tally["squares"]
        spread = tally["sum_of_squares"] - tally["sum"].square() / count
        # As others define it where all targets are equal.
        equal = torch.where(left > 0, 0.0, 1.0).double()
        columns = {
            "r2": torch.where(spread > 0, 1 - left / spread.masked_fill(spread <= 0, 1), equal),
            "mean_absolute_error": self.scaled(tally["distances"] / count),
            "root_mean_squared_error": self.scaled((left / count).sqrt()),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        _only_one(top, "predicts numbers")
        return list(names)

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write each number in the units of the targets, with six digits."""
        for row in self.values(outputs).tolist():
            yield {n: float(f"{value:.6g}") for n, value in zip(names, row, strict=True)}


TASKS: Mapping[str, type[Task]] = {each.kind: each for each in (Classes, MultiLabel, Regression)}
"""Every task by its name in configurations."""


def _check_smoothing(share: float) -> None:
    if not 0 <= share < 1:
        raise InputError(
            "`label_smoothing` must be a share, from 0 to below 1",
            f"Got {share}",
        )


def task_of(values: Mapping[str, Any]) -> Task:
    """Make a task again from `Task.to_json`.

    Raises:
        KeyError, TypeError, ValueError: if the values are damaged.
    """
    own = {k: tuple(map(float, v)) if isinstance(v, list) else v for k, v in values.items()}
    kind = str(own.pop("kind"))
    return TASKS[kind](**own)


# Measuring


def _add(details: dict[str, Tensor], name: str, counted: Tensor) -> None:
    details[name] = details[name] + counted if name in details else counted


def _add_worst(details: dict[str, Tensor], sizes: Tensor, first: int, *columns: Tensor) -> None:
    """Add predictions to the worst ones so far.

    Args:
        details: Gets rows of size, place of the sample, output where there are several, columns.
        sizes: How bad each is, ``[N]`` or ``[N, C]``.
        first: Place of the first sample.
        columns: What else is told of each, of the same shape.
    """
    places = torch.arange(first, first + len(sizes), device=sizes.device)
    if sizes.ndim == 2:
        outputs = torch.arange(sizes.shape[1], device=sizes.device)
        places, columns = places[:, None].expand_as(sizes), (outputs.expand_as(sizes), *columns)
    values = [each.flatten().double() for each in (sizes, places, *columns)]
    rows = largest(torch.stack(values, dim=1))
    details[WORST] = largest(torch.cat([details[WORST], rows])) if WORST in details else rows


def _precision_table(
    noun: str, tally: Mapping[str, Tensor], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Say of each class or label how well it is told from the others."""
    rows = []
    counts = (tally[name].tolist() for name in ("there", "found", "right"))
    for name, there, found, right in zip(names, *counts, strict=True):
        precision, recall, f1 = precision_recall_f1(right, found, there)
        sizes = {"samples": int(there), "predicted": int(found), "right": int(right)}
        rows.append({noun: name, **sizes, "precision": precision, "recall": recall, "f1": f1})
    return rows


def _macro_f1(tally: Mapping[str, Tensor]) -> float:
    """Compute the mean of F1 over the outputs that are somewhere found or there."""
    either = (tally["found"] + tally["there"]).double()
    each = 2 * tally["right"].double()[either > 0] / either[either > 0]
    return float(each.mean()) if len(each) else 0.0


# Arithmetic


def _only_one(top: int, does: str) -> None:
    if top != 1:
        raise InputError("--top is for classes", f"Got {top}, and this network {does}")


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _in_float32(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False):
        yield


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return numbers ``[C]`` in the type and on the device of another tensor."""
    return _constants(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made once, for a copy to a device waits for it; and never as a tensor of inference alone.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=dtype, device=device)
