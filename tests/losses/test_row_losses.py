import numpy as np
import pytest
import torch

from scpl.errors import InputError
from scpl.losses.similarity import (
    covariance_loss,
    similarity_matching_loss,
    squared_error,
    variance_loss,
)


def random_batch(num_rows=12, num_features=5, num_classes=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    return rows.to(dtype).requires_grad_(), target


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
