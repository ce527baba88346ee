import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_files import random_split
from scpl.data.images import ImageData, Split, carve_validation, limit
from scpl.data.images.dataset import channel_stats, resize
from scpl.errors import DataError, InputError

LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=60)


def numbered(labels):
    """A split whose pixel tells the place, so that a subset can be traced back."""
    places = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(places, torch.tensor(labels))


def places(split):
    return split.images.flatten().tolist()


def data_of(train, test, classes=("a", "b", "c", "d"), mean=(0.5,) * 3, std=(0.2,) * 3):
    return ImageData("toy", train, test, classes, mean, std)


def test_split_and_data_report_their_sizes():
    data = data_of(random_split(20), random_split(8))
    assert (len(data.train), len(data.test)) == (20, 8)
    assert (data.num_classes, data.channels, data.image_size) == (4, 3, 8)
    assert data.flip


def test_take_keeps_the_given_order():
    split = numbered([0, 1, 2, 3]).take(torch.tensor([3, 1]))
    assert places(split) == [3, 1]
    assert split.labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("images", "labels", "part"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), "torch.float32"),
        (
            torch.zeros(2, 4, 4, dtype=torch.uint8),
            torch.zeros(2, dtype=torch.int64),
            r"\[2, 4, 4\]",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "Labels must be int64"),
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            "2 images and 3 labels",
        ),
        (
            torch.zeros(0, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.int64),
            "at least one image",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), "-1 at index 1"),
    ],
)
def test_a_split_that_cannot_be_is_refused(images, labels, part):
    with pytest.raises(DataError, match=part):
        Split(images, labels)


def test_data_whose_parts_do_not_fit_is_refused():
    good = random_split()
    with pytest.raises(DataError, match=r"\[3, 8, 8\] and \[3, 4, 4\]"):
        data_of(good, random_split(shape=(3, 4, 4)))
    with pytest.raises(DataError, match="Got 3 in the train split"):
        data_of(good, good, classes=("a", "b", "c"))
    with pytest.raises(DataError, match="must be square"):
        data_of(random_split(shape=(3, 8, 6)), random_split(shape=(3, 8, 6)))
    with pytest.raises(DataError, match="3 channels"):
        data_of(good, good, mean=(0.5,))
    with pytest.raises(DataError, match="above 0"):
        data_of(good, good, std=(0.2, 0.0, 0.2))


@given(labels=LABELS, fraction=st.floats(0.05, 0.95), seed=st.integers(-5, 2**40))
def test_carving_parts_the_split_evenly(labels, fraction, seed):
    split = numbered(labels)
    count = round(len(labels) * fraction)
    try:
        train, valid = carve_validation(split, fraction, seed)
    except DataError:
        assert count == 0 or count > len(labels) - len(set(labels))
        return
    assert set(train.labels.tolist()) == set(labels)  # no class is left without
    assert sorted(places(train) + places(valid)) == list(range(len(labels)))
    assert places(train) == sorted(places(train))
    assert [labels[i] for i in places(valid)] == valid.labels.tolist()
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        held = valid.labels.tolist().count(label)
        assert abs(held - share) < 1 or (held == 0 and share > labels.count(label) - 1)
    again = carve_validation(split, fraction, seed)[1]
    assert places(again) == places(valid)


@given(labels=LABELS, n=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_limit_keeps_the_shares(labels, n, seed):
    kept = limit(numbered(labels), n, seed)
    assert len(kept) == min(n, len(labels))
    assert [labels[i] for i in places(kept)] == kept.labels.tolist()
    assert len(set(places(kept))) == len(kept)
    for label in set(labels):
        share = labels.count(label) * len(kept) / len(labels)
        assert abs(kept.labels.tolist().count(label) - share) < 1


def test_other_seeds_choose_others_and_the_global_state_stays():
    split = random_split(200, classes=2)
    before = torch.get_rng_state()
    first, second = limit(split, 50, seed=0), limit(split, 50, seed=1)
    assert not torch.equal(first.images, second.images)
    carve_validation(split, 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match="above 0 and below 1"):
        carve_validation(random_split(), fraction, 0)


def test_limit_to_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        limit(random_split(), 0, 0)


def test_channel_stats_equal_the_definition():
    images = random_split(30).images
    mean, std = channel_stats(images)
    pixels = images.double() / 255
    torch.testing.assert_close(
        torch.tensor(mean).double(), pixels.mean((0, 2, 3)), check_dtype=False
    )
    expected = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(std).double(), expected, atol=1e-6, rtol=1e-6)
    assert channel_stats(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))[1] == pytest.approx((1 / 255,))


def test_resize_keeps_bytes_and_labels():
    split = random_split(shape=(3, 8, 8))
    assert resize(split, 8) is split
    small = resize(split, 4)
    assert small.images.shape == (20, 3, 4, 4)
    assert small.images.dtype == torch.uint8
    assert torch.equal(small.labels, split.labels)
    constant = Split(torch.full((1, 1, 8, 8), 77, dtype=torch.uint8), torch.tensor([0]))
    assert set(resize(constant, 5).images.flatten().tolist()) == {77}
