import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SupConLoss

from scpl.errors import InputError
from scpl.losses.contrastive import supervised_contrastive_loss

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


# Standardised projections


def test_standardising_is_batch_norm_before_the_loss():
    rows = torch.randn(12, 5) * 3 + 7
    target = torch.arange(12) % 3
    normed = torch.nn.functional.batch_norm(rows, None, None, training=True)
    found = supervised_contrastive_loss(rows, target, standardise=True)
    torch.testing.assert_close(found, supervised_contrastive_loss(normed, target))


def test_what_all_projections_share_does_not_count_when_standardised():
    rows, target = torch.randn(12, 5), torch.arange(12) % 3
    moved = rows * torch.tensor([1.0, 10.0, 3.0, 2.0, 5.0]) + 100
    torch.testing.assert_close(
        supervised_contrastive_loss(moved, target, standardise=True),
        supervised_contrastive_loss(rows, target, standardise=True),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("rows", [torch.ones(4, 3), torch.ones(1, 3)], ids=["equal", "single"])
def test_nothing_to_standardise_gives_finite_values(rows):
    loss, grad = value_and_grad(rows, torch.zeros(len(rows)).long(), standardise=True)
    assert math.isfinite(loss)
    assert grad.isfinite().all()


def test_standardising_is_float32_under_autocast():
    rows, target = torch.randn(8, 4), torch.arange(8) % 2
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_contrastive_loss(rows.bfloat16(), target, standardise=True)
    assert loss.dtype == torch.float32
