"""What outputs mean: losses, positives and metrics against values by hand and by slow loops."""

import json
import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import scpl
from networks import for_task, mlp, rows
from scpl.engine.ranks import OneRank
from scpl.engine.scores import Counts, Scores, joined
from scpl.errors import DataError, InputError
from scpl.losses.contrastive import supervised_contrastive_loss
from scpl.measures import average_precision, spearman
from scpl.methods import METHODS
from scpl.tasks import (
    MOST_CONFUSED,
    TASKS,
    WORST,
    Classes,
    MultiLabel,
    Regression,
    task_of,
)

KINDS = ["classes", "weighted", "multi-label", "regression"]


def measured(task, outputs, target, sizes=None):
    """What an evaluation finds of these predictions, in batches of these sizes."""
    counts = Counts(1, task)
    sizes = sizes or [len(outputs)]
    for some, wanted in zip(outputs.split(sizes), task.prepare(target).split(sizes), strict=True):
        counts.add(0, some, wanted, last=True)
    return Scores(counts.stages, 1, OneRank(), task).result()


# Losses


def test_the_loss_of_classes_is_the_plain_cross_entropy():
    outputs, target = torch.randn(7, 3), torch.arange(7) % 3
    assert torch.equal(Classes().loss(outputs, target), F.cross_entropy(outputs, target))
    smoothed = F.cross_entropy(outputs, target, label_smoothing=0.1)
    assert torch.equal(Classes(label_smoothing=0.1).loss(outputs, target), smoothed)
    equal = Classes((1.0, 1.0, 1.0), 0.1).loss(outputs, target)
    torch.testing.assert_close(equal, smoothed)


def test_weighted_losses_by_hand():
    outputs = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    # -log 1/2 with weight 2, -log 3/4 with weight 1/2
    loss = Classes((2.0, 0.5)).loss(outputs, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((2 * math.log(2) + 0.5 * math.log(4 / 3)) / 2)
    # labels: there with weight 3, there with weight 1, not there, not there
    labels = MultiLabel((3.0, 1.0)).loss(outputs, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    by_hand = 3 * math.log(2) + math.log(2) + math.log(2) + math.log(4 / 3)
    assert labels.item() == pytest.approx(by_hand / 4)
    numbers = Regression().loss(outputs, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert numbers.item() == pytest.approx((1 + math.log(3) ** 2) / 4)
    smoothed = MultiLabel(label_smoothing=0.5).loss(outputs[:1, 1:], torch.ones(1, 1))
    assert smoothed.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_parts(kind):
    """Whatever is in them: so micro-batches and replicas learn from the same loss."""
    task, ((_, target),) = for_task(kind, [(None, torch.tensor([0, 0, 0, 1, 2, 2]))])
    outputs, target = torch.randn(6, 3, dtype=torch.float64), task.prepare(target)
    parts = [task.loss(outputs[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(task.loss(outputs, target).double(), sum(parts).double() / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_float32_under_autocast(kind):
    task, ((_, target),) = for_task(kind, [(None, torch.tensor([0, 1, 2, 2]))])
    outputs, target = torch.randn(4, 3).bfloat16(), task.prepare(target)
    expected = task.loss(outputs.float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task.loss(outputs, target), expected)


def test_balanced_weights_make_classes_weigh_the_same():
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    task = Classes.fitted(targets, 3, balanced=True)
    assert task.weights == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    assert sum(task.weights[t] for t in targets.tolist()) == pytest.approx(10)  # the mean is 1
    assert Classes.fitted(targets, 3).weights == ()
    labels = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0]])
    assert MultiLabel.fitted(labels, 2, balanced=True).weights == (1 / 3, 3.0)
    with pytest.raises(DataError, match=r"every label must be on some training samples"):
        MultiLabel.fitted(labels[:2], 2, balanced=True)
    for wish in ({"balanced": True}, {"label_smoothing": 0.1}):
        with pytest.raises(InputError, match=r"must be classes or labels\. Got numbers"):
            Regression.fitted(torch.arange(4.0), 1, **wish)
    assert "no 0.5, yes 2" in Classes((2.0, 0.5)).told(["yes", "no"])
    assert "x0 1 to x29 30" in Classes(tuple(range(1, 31))).told([f"x{i}" for i in range(30)])
    assert Classes().told(["yes", "no"]) == ""


def test_numbers_are_standardised_and_come_back():
    targets = torch.tensor([[1e9, -2.0], [1e9 + 4, 0.0], [1e9 + 2, 2.0]], dtype=torch.float64)
    task = Regression.fitted(targets, 2)
    ready = task.prepare(targets)
    assert ready.dtype == torch.float32
    torch.testing.assert_close(ready.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(ready.std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(task.values(ready), targets, atol=1e-6, rtol=0)
    assert torch.equal(Regression().prepare(torch.arange(3)), torch.arange(3.0)[:, None])
    with pytest.raises(DataError, match=r"must vary .* Got 5 for all, in target number 0"):
        Regression.fitted(torch.full((4, 1), 5.0), 1)
    with pytest.raises(InputError, match=r"`std` and `nearness` must be more than 0"):
        Regression((0.0,), (0.0,))


# Which samples belong together


def test_labels_belong_together_as_far_as_they_are_shared():
    target = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]])
    pairs = MultiLabel().pairs(target)
    assert pairs[0].tolist() == [1, 0.5, 0, 0, 1]
    assert pairs[3].tolist() == [0, 0, 0, 0, 0]  # no label shares none
    assert torch.equal(pairs, pairs.T)


def test_numbers_belong_together_as_far_as_they_are_near():
    pairs = Regression(nearness=2.0).pairs(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]))
    by_hand = [1, math.exp(-2 / 8), math.exp(-8 / 8)]
    assert pairs[0].tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("normalization", ["paper", "supcon"])
@pytest.mark.parametrize("standardise", [False, True])
def test_all_or_nothing_pairs_give_the_loss_of_classes(normalization, standardise):
    rows, target = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 4
    options = {"normalization": normalization, "standardise": standardise}
    same = (target[:, None] == target).double()
    weighted = supervised_contrastive_loss(rows, same, **options)
    torch.testing.assert_close(weighted, supervised_contrastive_loss(rows, target, **options))


@pytest.mark.parametrize("normalization", ["paper", "supcon"])
def test_weighted_pairs_against_loops(normalization):
    rows = F.normalize(torch.randn(6, 3, dtype=torch.float64))
    weights = torch.rand(6, 6, dtype=torch.float64)
    weights[2] = 0  # an anchor without a positive
    found = supervised_contrastive_loss(rows, weights, temperature=0.5, normalization=normalization)
    losses = []
    for a in range(6):
        others = [c for c in range(6) if c != a]
        every = math.log(sum(math.exp(float(rows[a] @ rows[c]) / 0.5) for c in others))
        summed = sum(
            float(weights[a, p]) * (every - float(rows[a] @ rows[p]) / 0.5) for p in others
        )
        positives = sum(float(weights[a, p]) for p in others)
        if normalization == "paper":
            losses.append(summed / (positives + 1))
        elif positives:
            losses.append(summed / positives)
    assert found.item() == pytest.approx(sum(losses) / len(losses))


def test_pairs_must_fit_the_rows():
    with pytest.raises(InputError, match=r"A target of pairs .* Pass a target of the shape \[4, 4"):
        supervised_contrastive_loss(torch.randn(4, 3), torch.rand(4, 3))


# Metrics


def f1_by_loops(found, there):
    right = sum(a and b for a, b in zip(found, there, strict=True))
    either = sum(found) + sum(there)
    return 2 * right / either if either else None


def mean_known(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 30), outputs=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_metrics_of_classes_against_loops(seed, count, outputs):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, outputs, generator=draws)
    target = torch.randint(outputs, (count,), generator=draws)
    found = measured(Classes(), logits, target, [1] * (count // 2) + [count - count // 2])
    best = logits.argmax(1).tolist()
    assert found.accuracy == sum(a == b for a, b in zip(best, target.tolist(), strict=True)) / count
    assert found.metrics["macro_f1"] == pytest.approx(
        mean_known(
            f1_by_loops([b == c for b in best], [t == c for t in target.tolist()])
            for c in range(outputs)
        )
    )
    assert found.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


def precision_by_loops(outputs, there):
    """For every threshold that is an output: what it gains in recall, times its precision."""
    total, before = 0.0, 0
    for threshold in sorted(set(outputs), reverse=True):
        above = [t for o, t in zip(outputs, there, strict=True) if o >= threshold]
        total += (sum(above) - before) / sum(there) * sum(above) / len(above)
        before = sum(above)
    return total


@given(seed=st.integers(0, 2**31), count=st.integers(2, 30), outputs=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_metrics_of_labels_against_loops(seed, count, outputs):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, outputs, generator=draws).round(decimals=1)  # with ties
    target = torch.randint(2, (count, outputs), generator=draws)
    target[0] = 1
    found = measured(MultiLabel(), logits, target, [count - 1, 1])
    guessed, there = (logits > 0).T.tolist(), target.bool().T.tolist()
    pairs = list(zip(guessed, there, strict=True))
    assert found.score == found.metrics["macro_f1"]
    assert found.score == pytest.approx(mean_known(f1_by_loops(*pair) for pair in pairs))
    micro = f1_by_loops([*chain(*guessed)], [*chain(*there)])
    assert found.metrics["micro_f1"] == pytest.approx(micro)
    exact = ((logits > 0) == target.bool()).all(1).double().mean()
    assert found.metrics["exact_match"] == pytest.approx(exact.item())
    columns = zip(logits.T.tolist(), there, strict=True)
    average = mean_known(precision_by_loops(*column) for column in columns)
    assert found.metrics["mean_average_precision"] == pytest.approx(average)
    expected = F.binary_cross_entropy_with_logits(logits, target.float())
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


def test_average_precision_by_hand():
    there = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), there) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.zeros(4), there) == 0.5


def ranks_by_loops(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def correlation(one, other):
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@given(seed=st.integers(0, 2**31), count=st.integers(5, 30), outputs=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_metrics_of_numbers_against_loops(seed, count, outputs):
    draws = torch.Generator().manual_seed(seed)
    target = 10 + 3 * torch.randn(count, outputs, generator=draws).double().round(decimals=1)
    target[:2] = torch.tensor([[0.0], [20.0]])  # never all equal
    task = Regression.fitted(target, outputs)
    logits = torch.randn(count, outputs, generator=draws).round(decimals=1)
    logits[:2] = torch.tensor([[5.0], [-5.0]])
    found = measured(task, logits, target, [2, count - 2])
    values = task.values(logits)
    r2, distances, ranks = [], [], []
    for column in range(outputs):
        y, f = target[:, column].tolist(), values[:, column].tolist()
        middle = sum(y) / count
        wrong = sum((a - b) ** 2 for a, b in zip(y, f, strict=True))
        r2.append(1 - wrong / sum((a - middle) ** 2 for a in y))
        distances.append(sum(abs(a - b) for a, b in zip(y, f, strict=True)) / count)
        rounded = [round(value, 6) for value in f]
        ranks.append(correlation(ranks_by_loops(y), ranks_by_loops(rounded)))
    assert found.score == pytest.approx(sum(r2) / outputs, rel=1e-4)
    assert found.metrics["mean_absolute_error"] == pytest.approx(sum(distances) / outputs, rel=1e-4)
    assert found.metrics["spearman"] == pytest.approx(sum(ranks) / outputs, rel=1e-6)
    with pytest.raises(InputError, match=r"Accuracy is a metric of classes\. Got r2"):
        _ = found.accuracy
    with pytest.raises(InputError, match=r"`score` is the first"):
        _ = found.stage_accuracy


def test_metrics_at_their_edges():
    assert spearman(torch.ones(3), torch.arange(3)) == 0.0
    constant = torch.full((3, 1), 2.0)
    assert measured(Regression(), constant, constant).metrics["r2"] == 1.0
    assert measured(Regression(), constant + 1, constant).metrics["r2"] == 0.0
    nothing = measured(MultiLabel(), -torch.ones(3, 2), torch.zeros(3, 2))
    assert nothing.metrics == {
        "macro_f1": 0.0, "micro_f1": 0.0, "mean_average_precision": 0.0, "exact_match": 1.0,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"An evaluation needs at least one sample"):
        Scores([{}], 1, OneRank(), MultiLabel()).result()
    with pytest.raises(DataError, match=r"An evaluation needs at least one sample"):
        Scores([{}], 1, OneRank(), MultiLabel()).details("ab")


def detailed(task, outputs, target, names, sizes=None):
    """A full account of these predictions, in batches of these sizes."""
    counts, first = Counts(1, task), 0
    sizes = sizes or [len(outputs)]
    for some, wanted in zip(outputs.split(sizes), task.prepare(target).split(sizes), strict=True):
        counts.add(0, some, wanted, last=True, first=first)
        first += len(some)
    return Scores(counts.stages, 1, OneRank(), task).details(names)


def test_an_account_of_classes_by_hand():
    """Six samples of a, b, c: three are right, a is once taken for b, b and c once for a."""
    taken, true = [0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 1, 2]
    sure = torch.tensor([0.6, 0.7, 0.9, 0.8, 0.6, 0.5])
    outputs = torch.full((6, 3), 0.0)
    for row, (place, chance) in enumerate(zip(taken, sure, strict=True)):
        outputs[row] = ((1 - chance) / 2).log()
        outputs[row, place] = chance.log()
    found = detailed(Classes(), outputs, torch.tensor(true), ["a", "b", "c"], [2, 3, 1])
    assert found["confusion"] == [[1, 1, 0], [1, 1, 0], [1, 0, 1]]  # rows: what is true
    columns = ["class", "samples", "predicted", "right", "precision", "recall", "f1"]
    expected = [
        ["a", 2, 3, 1, 1 / 3, 1 / 2, 2 / 5],
        ["b", 2, 2, 1, 1 / 2, 1 / 2, 1 / 2],
        ["c", 2, 1, 1, 1, 1 / 2, 2 / 3],
    ]
    assert [list(row) for row in found["table"]] == [columns] * 3
    assert [list(row.values()) for row in found["table"]] == [
        [row[0], *map(pytest.approx, row[1:])] for row in expected
    ]
    result = measured(Classes(), outputs, torch.tensor(true))
    assert result.metrics["macro_f1"] == pytest.approx((2 / 5 + 1 / 2 + 2 / 3) / 3)
    # 0.5 by 6: 0.5 + 0.320077 -+ 0.5 z sqrt(...), over 1.640153
    assert result.intervals == {"accuracy": pytest.approx((0.187616, 0.812384), abs=1e-6)}
    assert found["mistakes"] == [  # the surest first, by their place among all six
        {"sample": 2, "true": "b", "predicted": "a", "probability": pytest.approx(0.9)},
        {"sample": 3, "true": "c", "predicted": "a", "probability": pytest.approx(0.8)},
        {"sample": 1, "true": "a", "predicted": "b", "probability": pytest.approx(0.7)},
    ]
    # Bins of 1/15: 0.5 (right), 0.6 (two, right), 0.7, 0.8 and 0.9 (all wrong).
    error = (0.5 + 2 * 0.4 + 0.7 + 0.8 + 0.9) / 6
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(error, abs=1e-6)


def test_an_account_of_labels_by_hand():
    chances = torch.tensor([[0.9, 0.2], [0.6, 0.8], [0.3, 0.7]])
    target = torch.tensor([[1, 1], [0, 1], [0, 0]])
    found = detailed(MultiLabel(), chances.logit(), target, ["x", "y"], [1, 2])
    assert [list(row.values()) for row in found["table"]] == [
        ["x", 1, 2, 1, 0.5, 1.0, pytest.approx(2 / 3)],
        ["y", 2, 2, 1, 0.5, 0.5, 0.5],
    ]
    assert found["mistakes"] == [
        {"sample": 0, "label": "y", "true": "yes", "predicted": "no",
         "probability": pytest.approx(0.8)},
        {"sample": 2, "label": "y", "true": "no", "predicted": "yes",
         "probability": pytest.approx(0.7)},
        {"sample": 1, "label": "x", "true": "no", "predicted": "yes",
         "probability": pytest.approx(0.6)},
    ]  # fmt: skip
    # Each in a bin of its own: 0.9 and 0.8 are there, 0.3 is not; 0.2 is there, 0.6 and 0.7 not.
    error = (0.1 + 0.2 + 0.3 + 0.8 + 0.6 + 0.7) / 6
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(error, abs=1e-6)
    exact = measured(MultiLabel(), chances.logit(), target).intervals["exact_match"]
    assert exact == pytest.approx((0.0, 0.561497), abs=1e-6)  # z^2 / (3 + z^2)


def test_an_account_of_numbers_by_hand():
    """True 0, 10, 20 and predicted 1, 10, 16, of mean 10 and deviation 5."""
    task = Regression((10.0,), (5.0,))
    target = torch.tensor([0.0, 10.0, 20.0])
    outputs = (torch.tensor([[1.0], [10.0], [16.0]]) - 10) / 5
    found = detailed(task, outputs, target, ["hours"], [2, 1])
    (row,) = found["table"]
    assert row["r2"] == pytest.approx(1 - 17 / 200)
    assert row["mean_absolute_error"] == pytest.approx(5 / 3)
    assert row["root_mean_squared_error"] == pytest.approx((17 / 3) ** 0.5)
    assert [row["sample"] for row in found["mistakes"]] == [2, 0, 1]
    assert found["mistakes"][0] == {
        "sample": 2, "number": "hours", "true": pytest.approx(20), "predicted": pytest.approx(16),
        "error": pytest.approx(-4),
    }  # fmt: skip
    (points,) = found["points"]
    assert points["true"] == pytest.approx([0, 10, 20])
    assert points["predicted"] == pytest.approx([1, 10, 16])
    assert "calibration" not in found
    assert measured(task, outputs, target).intervals == {}


def test_of_very_many_classes_it_is_not_counted_which_is_taken_for_which():
    count = MOST_CONFUSED + 1
    outputs, target = torch.randn(40, count), torch.arange(40)
    found = detailed(Classes(), outputs, target, [str(i) for i in range(count)])
    assert "confusion" not in found
    assert len(found["table"]) == count
    few = detailed(Classes(), outputs[:, :40], target, [str(i) for i in range(40)])
    assert torch.tensor(few["confusion"]).sum(1).tolist() == [1] * 40


@pytest.mark.parametrize("kind", KINDS)
def test_an_account_does_not_depend_on_batches_and_bears_what_is_no_number(kind):
    task, ((_, target),) = for_task(kind, [(None, torch.arange(30) % 3)])
    outputs = torch.randn(30, 3)
    whole, parts = (
        detailed(task, outputs, target, ["a", "b", "c"], sizes) for sizes in ([30], [7, 7, 16])
    )
    assert whole["mistakes"] == parts["mistakes"]
    assert whole.get("confusion") == parts.get("confusion")
    outputs[3] = math.nan
    broken = detailed(task, outputs, target, ["a", "b", "c"])
    assert json.loads(json.dumps(broken))["table"][0].keys() == whole["table"][0].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_what_ranks_counted_of_their_shares_adds_up(kind):
    task, ((_, target),) = for_task(kind, [(None, torch.tensor([0, 1, 2, 2, 1, 0, 0]))])
    outputs, target = torch.randn(7, 3), task.prepare(target)
    whole, first, second = Counts(1, task), Counts(1, task), Counts(1, task)
    whole.add(0, outputs, target, last=True)
    first.add(0, outputs[:3], target[:3], last=True)
    second.add(0, outputs[3:], target[3:], last=True, first=3)
    both = joined(first.stages[0], second.stages[0])
    expected, found = (
        Scores([counted], 1, OneRank(), task).result() for counted in (whole.stages[0], both)
    )
    assert found.metrics == pytest.approx(expected.metrics)
    assert found.num_samples == 7
    accounts = [
        Scores([counted], 1, OneRank(), task).details("abc") for counted in (whole.stages[0], both)
    ]
    assert accounts[0]["mistakes"] == accounts[1]["mistakes"]
    assert accounts[0].get("confusion") == accounts[1].get("confusion")


def test_only_the_last_stage_keeps_predictions():
    counts = Counts(2, MultiLabel())
    for stage in (0, 1):
        counts.add(stage, torch.randn(3, 2), torch.ones(3, 2), last=stage == 1)
    for kept in ("outputs", WORST):
        assert [kept in stage for stage in counts.stages] == [False, True]
    elsewhere = Counts(1, MultiLabel(), predicts=False)
    elsewhere.add(0, torch.randn(3, 2), torch.ones(3, 2), last=True)
    assert not {"outputs", WORST} & elsewhere.stages[0].keys()
    result = Scores(counts.stages, 2, OneRank(), MultiLabel()).result()
    assert None not in result.stage_scores
    assert not math.isnan(result.metrics["mean_average_precision"])


# Predictions


def test_predictions_are_written_for_people():
    outputs = torch.tensor([[math.log(3), 0.0], [0.0, math.log(4)]])
    assert list(Classes().written(outputs, ["a", "b"], 2)) == [
        {"label": "a", "probability": 0.75, "label2": "b", "probability2": 0.25},
        {"label": "b", "probability": 0.8, "label2": "a", "probability2": 0.2},
    ]
    assert Classes().columns(["a", "b"], 1) == ["label", "probability"]
    with pytest.raises(InputError, match=r"--top must lie in 1 \.\. 2\. Got 3"):
        Classes().columns(["a", "b"], 3)
    assert list(MultiLabel().written(outputs, ["a", "b"], 1)) == [
        {"labels": ["a"], "probabilities": [0.75]}, {"labels": ["b"], "probabilities": [0.8]},
    ]  # fmt: skip
    task = Regression((10.0, 0.0), (2.0, 1.0))
    assert list(task.written(torch.tensor([[1.0, 0.5]]), ["x", "y"], 1)) == [{"x": 12.0, "y": 0.5}]
    for other in (MultiLabel(), task):
        with pytest.raises(InputError, match=r"--top is for classes\. Got 2"):
            other.columns(["x", "y"], 2)


def test_how_sure_a_prediction_is():
    outputs = torch.tensor([[math.log(3), 0.0], [-math.log(4), math.log(9)]])
    assert Classes().confidence(outputs)[0].item() == pytest.approx(0.75)
    assert MultiLabel().confidence(outputs).tolist() == pytest.approx([0.5, 0.8])
    with pytest.raises(InputError, match=r"To leave early, .* Got a network for regression"):
        Regression().confidence(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_survives_json(kind):
    task, _ = for_task(kind, [])
    assert task_of(task.to_json()) == task
    assert set(TASKS) == {"classes", "multi-label", "regression"}


# Targets


def test_targets_that_do_not_fit_are_refused():
    refused = [
        (Classes(), torch.zeros(5, 3), r"one class index per row\. Got \(5, 3\) torch.float32"),
        (MultiLabel(), torch.zeros(5), r"one value per row and label: \[5, 3\]\. Got \(5,\)"),
        (MultiLabel(), torch.full((5, 3), 2), r"1 of labels that are there .* Got 2 in batch 1"),
        (MultiLabel(), torch.full((5, 3), -1), r"Got -1 in batch 1"),
        (Regression(), torch.full((5, 3), math.nan), r"must be finite numbers"),
        (Regression(), torch.zeros(5), r"one value per row and number: \[5, 3\]"),
        (Classes(), [0], r"must be a tensor with a class per row\. Got list"),
    ]
    for task, target, message in refused:
        parts = scpl.split(mlp(), num_stages=2, task=task, example=torch.zeros(2, 5))
        pipeline = scpl.Pipeline(parts, scpl.SCPL(), lambda p: torch.optim.SGD(p, lr=0.1))
        with pytest.raises(DataError, match=message):
            pipeline.train([(torch.randn(5, 5), target)])


def test_networks_must_have_outputs_for_the_task():
    one = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))

    def pipeline(task):
        parts = scpl.split(one, num_stages=1, task=task, example=torch.zeros(2, 5))
        return scpl.Pipeline(parts, scpl.SCPL(), lambda p: torch.optim.SGD(p, lr=0.1))

    with pytest.raises(InputError, match=r"one output per class, at least two\. Got 1"):
        pipeline(Classes())
    with pytest.raises(InputError, match=r"`mean` must hold one number per output .* Got 2 for 1"):
        pipeline(Regression((0.0, 0.0), (1.0, 1.0)))
    found = pipeline(Regression())
    found.train([(torch.randn(6, 5), torch.randn(6))])
    assert found.evaluate([(torch.randn(6, 5), torch.randn(6))]).result().num_samples == 6


def test_strata():
    assert Classes.strata(torch.tensor([1, 0])).tolist() == [1, 0]
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert MultiLabel.strata(labels).tolist() == [0, 1, 1, 3, 2]
    strata = Regression.strata(torch.randn(50, 2))
    assert torch.bincount(strata).tolist() == [5] * 10
    assert Regression.strata(torch.arange(20.0)).tolist() == [i // 2 for i in range(20)]


# Learning


LOCAL = [n for n, m in METHODS.items() if m.layout == "stages" and m.cuts_gradients]


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
@pytest.mark.parametrize("name", [*LOCAL, "bp"])
def test_every_method_learns_other_tasks_or_says_that_it_does_not(name, kind):
    task, batches = for_task(kind, rows([16]))
    parts = scpl.split(mlp(), before=["linear1", "linear2"], task=task, example=batches[0][0][:2])

    def pipeline():
        return scpl.Pipeline(parts, METHODS[name](), lambda p: torch.optim.Adam(p, lr=0.02))

    if kind not in METHODS[name].tasks:
        with pytest.raises(InputError, match=rf"{name} learns classes\. Got a network for {kind}"):
            pipeline()
        assert name in ("predsim", "deinforeg")
        return
    found = pipeline()
    before = found.evaluate(batches).result()
    for _ in range(60):
        found.train(batches)
    after = found.evaluate(batches).result()
    assert after.loss < before.loss - 0.03
    assert after.score > before.score + 0.1


def test_contrast_alone_brings_near_what_belongs_together():
    """Regression without a classifier: projections of near targets become similar."""
    torch.manual_seed(0)
    target = torch.linspace(-1.5, 1.5, 32)[:, None]
    inputs = torch.cat([target + 0.1 * torch.randn(32, 1), torch.randn(32, 4)], 1)
    parts = scpl.split(mlp(3), num_stages=2, task=Regression(), example=inputs[:2])
    parts = scpl.split(
        torch.nn.Sequential(*list(mlp(3))[:-1], torch.nn.Linear(6, 1)),
        num_stages=2, task=Regression(), example=inputs[:2],
    )  # fmt: skip
    method = scpl.SCPL(cross_entropy=0.0, head="linear", standardise=False)
    pipeline = scpl.Pipeline(parts, method, lambda p: torch.optim.Adam(p, lr=0.01))
    seen = []
    for _ in range(40):
        pipeline.train([(inputs, target)], lambda report: seen.append(report.read()[1][0]))
    assert seen[-1]["above_chance"] < seen[0]["above_chance"] - 0.1
    assert seen[-1]["positives"] > 1
