import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SupConLoss

from scpl.errors import InputError
from scpl.functional import (
    covariance_loss,
    similarity_matching_loss,
    squared_error,
    supervised_contrastive_loss,
    variance_loss,
)

BOTH = pytest.mark.parametrize("normalization", ["paper", "supcon"])


def by_loops(rows, target, temperature, normalization):
    """The formula of the docstring, pair by pair, in float64."""
    rows = rows.detach().double()
    rows = [row / row.norm() if row.norm() > 0 else row for row in rows]
    n = len(rows)
    losses = []
    for a in range(n):
        similar = [float(rows[a] @ rows[b]) / temperature for b in range(n)]
        positives = [b for b in range(n) if b != a and target[b] == target[a]]
        if not positives:
            if normalization == "paper":
                losses.append(0.0)
            continue
        largest = max(similar[c] for c in range(n) if c != a)
        total = sum(math.exp(similar[c] - largest) for c in range(n) if c != a)
        divisor = len(positives) + (normalization == "paper")
        losses.append(sum(math.log(total) + largest - similar[p] for p in positives) / divisor)
    return sum(losses) / len(losses) if losses else 0.0


def random_batch(num_rows=12, num_features=5, num_classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    return rows.to(dtype).requires_grad_(), target


def value_and_grad(rows, target, **options):
    rows = rows.detach().requires_grad_()
    loss = supervised_contrastive_loss(rows, target, **options)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.dtype == rows.dtype
    return loss.detach(), rows.grad


# The formula


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 12),
    num_features=st.integers(1, 8),
    num_classes=st.integers(1, 6),
    temperature=st.floats(0.01, 5.0),
    normalization=st.sampled_from(["paper", "supcon"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loops_over_pairs(
    num_rows, num_features, num_classes, temperature, normalization, dtype, seed
):
    rows, target = random_batch(num_rows, num_features, num_classes, seed, dtype)
    loss, _ = value_and_grad(rows, target, temperature=temperature, normalization=normalization)
    expected = by_loops(rows, target, temperature, normalization)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 + 1e-6 / temperature
    assert float(loss) == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert loss.dtype == dtype
    assert loss.shape == ()


def test_four_samples_by_hand():
    # Two classes of two equal rows, at right angles, T = 1: every anchor sees similarities 1 (its
    # positive), 0 and 0, so its loss is log(e + 2) - 1, halved by the paper's divisor.
    rows = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 3.0]])
    target = torch.tensor([7, 7, 1, 1])
    anchor = math.log(math.e + 2) - 1
    paper = supervised_contrastive_loss(rows, target, temperature=1.0)
    supcon = supervised_contrastive_loss(rows, target, temperature=1.0, normalization="supcon")
    assert float(paper) == pytest.approx(anchor / 2)
    assert float(supcon) == pytest.approx(anchor)


def test_an_anchor_without_a_positive_counts_in_the_mean_of_the_paper_only():
    # The pair (0, 1) sees its positive at 1 and the lone row at 0; the lone row has no loss.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([0, 0, 1])
    anchor = math.log(math.e + 1) - 1
    paper = supervised_contrastive_loss(rows, target, temperature=1.0)
    supcon = supervised_contrastive_loss(rows, target, temperature=1.0, normalization="supcon")
    assert float(paper) == pytest.approx(2 * anchor / 2 / 3)
    assert float(supcon) == pytest.approx(2 * anchor / 2)


@pytest.mark.parametrize("num_positives", [1, 2, 5])
def test_paper_is_p_over_p_plus_one_of_supcon(num_positives):
    rows, _ = random_batch(3 * (num_positives + 1), 6)
    target = torch.arange(3).repeat_interleave(num_positives + 1)
    paper, paper_grad = value_and_grad(rows, target)
    supcon, supcon_grad = value_and_grad(rows, target, normalization="supcon")
    ratio = num_positives / (num_positives + 1)
    torch.testing.assert_close(paper, ratio * supcon)
    torch.testing.assert_close(paper_grad, ratio * supcon_grad)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(
    "target",
    [[0, 0, 0, 1, 1, 2, 2, 2, 1, 0], [0, 0, 1, 1, 2, 3, 4, 0, 5, 6]],
    ids=["all have positives", "some have none"],
)
def test_supcon_equals_pytorch_metric_learning(target, temperature):
    # Its default reducer, a mean over the nonzero losses, leaves out anchors without a positive.
    rows, _ = random_batch(10, 7)
    target = torch.tensor(target)
    ours, grad = value_and_grad(rows, target, temperature=temperature, normalization="supcon")
    theirs = SupConLoss(temperature=temperature)(rows, target)
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, rows.grad, rtol=1e-4, atol=1e-6)


@BOTH
def test_order_of_the_rows_and_names_of_the_classes_do_not_matter(normalization):
    rows, target = random_batch(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    loss, grad = value_and_grad(rows, target, normalization=normalization)
    shuffled, shuffled_grad = value_and_grad(
        rows[order], 100 - target[order], normalization=normalization
    )
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(shuffled_grad, grad[order])


@BOTH
def test_gradients_are_those_of_the_formula(normalization):
    rows, target = random_batch(7, 4, num_classes=4, dtype=torch.float64)

    def loss(rows):
        return supervised_contrastive_loss(rows, target, normalization=normalization)

    assert torch.autograd.gradcheck(loss, rows)
    assert torch.autograd.gradgradcheck(loss, rows)


def test_length_of_a_row_does_not_matter():
    rows, target = random_batch()
    scale = torch.logspace(-9, 30, len(rows))[:, None]
    loss, _ = value_and_grad(rows, target)
    scaled, _ = value_and_grad(rows.detach() * scale, target)
    torch.testing.assert_close(scaled, loss)


# Edge cases: value and gradient stay finite (value_and_grad checks it)


@BOTH
@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_no_positive_pair_is_zero_with_zero_gradients(num_rows, normalization):
    rows, _ = random_batch(num_rows)
    loss, grad = value_and_grad(rows, torch.arange(num_rows), normalization=normalization)
    assert float(loss) == 0
    assert not grad.any()


@BOTH
def test_one_class(normalization):
    rows, _ = random_batch(6)
    target = torch.full((6,), 3)
    loss, grad = value_and_grad(rows, target, normalization=normalization)
    assert float(loss) == pytest.approx(by_loops(rows, target, 0.1, normalization), rel=1e-5)
    assert grad.any()


@BOTH
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_equal_rows(temperature, normalization):
    # All similarities are equal, so each of the other five rows gets one fifth.
    rows = torch.ones(6, 3)
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    loss, _ = value_and_grad(rows, target, temperature=temperature, normalization=normalization)
    expected = math.log(5) * (2 / 3 if normalization == "paper" else 1)
    assert float(loss) == pytest.approx(expected, abs=1e-4)


@BOTH
@pytest.mark.parametrize("which", [[0], [0, 3], list(range(12))])
def test_zero_rows_have_no_direction_and_no_gradient(which, normalization):
    rows, target = random_batch()
    rows = rows.detach().clone()
    rows[which] = 0
    loss, grad = value_and_grad(rows, target, normalization=normalization)
    assert float(loss) == pytest.approx(by_loops(rows, target, 0.1, normalization), rel=1e-5)
    assert not grad[which].any()


@BOTH
@pytest.mark.parametrize("temperature", [0.001, 0.01])
def test_low_temperature_with_opposite_rows(temperature, normalization):
    # The positive of each row points away from it: the largest loss there is, about 2 / T.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    target = torch.tensor([0, 0, 1, 1])
    loss, _ = value_and_grad(rows, target, temperature=temperature, normalization=normalization)
    expected = 2 / temperature * (1 / 2 if normalization == "paper" else 1)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_values_that_are_not_numbers_are_not_hidden():
    rows, target = random_batch()
    for bad in (math.nan, math.inf):
        broken = rows.detach().clone()
        broken[0, 0] = bad
        assert supervised_contrastive_loss(broken, target).isnan()


# Types


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float64, 1e300)],
)
def test_rows_of_any_floating_point_type_and_magnitude(dtype, largest):
    rows, target = random_batch(16, 8, dtype=torch.float64)
    rows = rows.detach() / rows.detach().abs().max()
    for scale in (1.0, largest):
        typed = (rows * scale).to(dtype)
        loss, _ = value_and_grad(typed, target)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The reference sees the rounded rows: all arithmetic after the input is float32.
        expected = by_loops(typed.double() / scale, target, 0.1, "paper")
        assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_types_are_near_those_of_float32(dtype):
    rows, target = random_batch(16, 8, dtype=dtype)
    _, grad = value_and_grad(rows, target)
    _, expected = value_and_grad(rows.detach().float(), target)
    torch.testing.assert_close(grad, expected.to(dtype))


@BOTH
def test_autocast_changes_nothing(normalization):
    rows, target = random_batch(16, 8)
    loss, grad = value_and_grad(rows, target, normalization=normalization)
    again = rows.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supervised_contrastive_loss(again, target, normalization=normalization)
    inside.backward()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss)
    assert torch.equal(again.grad, grad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_targets_of_any_integer_type(dtype):
    rows, target = random_batch()
    expected = supervised_contrastive_loss(rows, target)
    assert torch.equal(supervised_contrastive_loss(rows, target.to(dtype)), expected)


def test_inputs_are_left_as_they_are():
    rows, target = random_batch()
    before = rows.detach().clone(), target.clone()
    supervised_contrastive_loss(rows, target).backward()
    assert torch.equal(rows, before[0])
    assert torch.equal(target, before[1])


def test_nothing_depends_on_values_on_the_host():
    """Tracing with fake tensors fails at the first look at a value or shape that depends on one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rows = torch.randn(8, 4, requires_grad=True)
        target = torch.randint(3, (8,))
        for normalization in ("paper", "supcon"):
            supervised_contrastive_loss(rows, target, normalization=normalization).backward()


# Errors


@pytest.mark.parametrize(
    ("rows", "target", "options", "parts"),
    [
        (torch.ones(4, 2, 2), torch.ones(4).long(), {}, ["[N, D]", "[4, 2, 2] float32", "Flatten"]),
        (torch.ones(0, 2), torch.ones(0).long(), {}, ["at least one row", "[0, 2]"]),
        (
            torch.ones(4, 2).long(),
            torch.ones(4).long(),
            {},
            ["floating point", "int64", ".float()"],
        ),
        (torch.ones(4, 2), torch.ones(3).long(), {}, ["one class per row", "[3] int64", "[4, 2]"]),
        (torch.ones(4, 2), torch.ones(4, 1).long(), {}, ["one class per row", "[4, 1]", "[4]"]),
        (torch.ones(4, 2), torch.ones(4), {}, ["integer classes", "[4] float32", ".argmax("]),
        (torch.ones(4, 2), torch.ones(4).long(), {"temperature": 0.0}, ["above zero", "Got 0.0"]),
        (torch.ones(4, 2), torch.ones(4).long(), {"temperature": -1}, ["above zero", "Got -1"]),
        (torch.ones(4, 2), torch.ones(4).long(), {"temperature": math.nan}, ["finite", "Got nan"]),
        (
            torch.ones(4, 2),
            torch.ones(4).long(),
            {"normalization": "supcom"},
            ["Did you mean 'sup"],
        ),
    ],
)
def test_a_wrong_argument_is_named(rows, target, options, parts):
    with pytest.raises(InputError) as raised:
        supervised_contrastive_loss(rows, target, **options)
    for part in parts:
        assert part in str(raised.value)


# The losses of the other methods


def similarity_by_loops(rows, target, num_classes):
    def unit(row):
        row = row.double() - row.double().mean()
        return row / row.norm() if row.norm() > 0 else row

    rows = [unit(row) for row in rows.detach()]
    labels = [unit(row) for row in torch.eye(num_classes)[target]]
    n = len(rows)
    pairs = [(a, b) for a in range(n) for b in range(n)]
    return sum(float(rows[a] @ rows[b] - labels[a] @ labels[b]) ** 2 for a, b in pairs) / n**2


def unit_rows(rows):
    rows = rows.detach().double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def variance_by_numpy(rows):
    spread = np.sqrt(unit_rows(rows).var(axis=0) + 1e-7)
    return float(np.maximum(0, 1 - spread).mean() / len(rows))


def covariance_by_loops(rows):
    unit = unit_rows(rows)
    centred = unit - unit.mean(axis=0)
    n, d = centred.shape
    entries = [
        sum(centred[a, i] * centred[a, j] for a in range(n)) / n
        for i in range(d)
        for j in range(d)
        if i != j
    ]
    return float(sum(entry**2 for entry in entries) / d)


def of_rows(name):
    """A loss as a function of rows alone, and its reference."""
    target = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0])
    return {
        "similarity": (
            lambda rows: similarity_matching_loss(rows, target[: len(rows)], 4),
            lambda rows: similarity_by_loops(rows, target[: len(rows)], 4),
        ),
        "variance": (variance_loss, variance_by_numpy),
        "covariance": (covariance_loss, covariance_by_loops),
    }[name]


EACH_LOSS = pytest.mark.parametrize("name", ["similarity", "variance", "covariance"])


@EACH_LOSS
@pytest.mark.parametrize("num_rows", [1, 2, 12])
@pytest.mark.parametrize("num_features", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_loss_of_rows_equals_its_definition(name, num_rows, num_features, dtype):
    loss, reference = of_rows(name)
    rows, _ = random_batch(num_rows, num_features, dtype=dtype)
    found = loss(rows)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.detach()) == pytest.approx(reference(rows.float()), rel=1e-5, abs=1e-7)
    found.backward()
    assert rows.grad.isfinite().all()
    assert rows.grad.dtype == dtype


@EACH_LOSS
def test_the_gradient_of_a_loss_is_that_of_its_definition(name):
    loss, _ = of_rows(name)
    rows, _ = random_batch(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, rows)


@EACH_LOSS
def test_a_row_without_direction_gets_no_gradient(name):
    loss, reference = of_rows(name)
    rows = random_batch(6, 4)[0].detach()
    rows[2] = 0.0
    rows.requires_grad_()
    found = loss(rows)
    found.backward()
    assert float(found.detach()) == pytest.approx(reference(rows), rel=1e-5)
    assert not rows.grad[2].any()
    assert rows.grad[3].any()


@EACH_LOSS
def test_a_loss_of_rows_under_autocast_is_the_same(name):
    loss, _ = of_rows(name)
    rows, _ = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(rows)
    assert torch.equal(inside, loss(rows))


def test_one_class_brings_all_rows_together():
    """Equal rows are the best there is; the same rows of two classes are not."""
    rows = torch.tensor([[1.0, 2.0, 4.0]] * 3)
    assert float(similarity_matching_loss(rows, torch.zeros(3).long(), 2)) < 1e-12
    apart = similarity_matching_loss(rows, torch.tensor([0, 0, 1]), 2)
    assert float(apart) == pytest.approx(4 / 9 * 4)  # four of nine pairs are 2 away from -1


def test_rows_that_differ_only_in_length_and_height_are_alike():
    rows, target = random_batch(dtype=torch.float64)
    moved = rows * torch.rand(12, 1, dtype=torch.float64).add(0.1) + torch.randn(12, 1)
    torch.testing.assert_close(
        similarity_matching_loss(moved, target, 3), similarity_matching_loss(rows, target, 3)
    )


def test_the_variance_loss_is_hardly_more_than_a_constant():
    """What the docstring says of the published loss: near 1 / N whatever the rows are."""
    for seed in range(5):
        rows, _ = random_batch(64, 128, seed=seed)
        assert 0.85 / 64 < float(variance_loss(rows).detach()) < 1 / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_squared_error_reaches_what_was_found_alone(dtype):
    found, wanted = (torch.randn(3, 4).to(dtype).requires_grad_() for _ in range(2))
    loss = squared_error(found, wanted)
    pairs = zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True)
    assert float(loss.detach()) == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 12)
    assert loss.dtype == torch.float32
    loss.backward()
    expected = (2 / 12 * (found.float() - wanted.float())).to(dtype)
    torch.testing.assert_close(found.grad, expected)
    assert wanted.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squared_error(torch.ones(2, 3), torch.ones(2)), r"one shape. Got \[2, 3\]"),
        (lambda: variance_loss(torch.ones(3)), r"\[N, D\].*Got \[3\]"),
        (lambda: covariance_loss(torch.ones(3, 2).long()), "floating point"),
        (
            lambda: similarity_matching_loss(torch.ones(3, 2), torch.ones(2).long(), 3),
            "one class per row",
        ),
        (
            lambda: similarity_matching_loss(torch.ones(3, 2), torch.ones(3).long(), 1),
            "at least 2. Got 1",
        ),
    ],
)
def test_a_wrong_argument_of_the_others_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
