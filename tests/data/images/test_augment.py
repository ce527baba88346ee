import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_files import random_split
from scpl.data.images import AUGMENTATIONS, Augmentation, normalise
from scpl.data.images.loader import _jitter
from scpl.errors import InputError
from scpl.seeding import generator

UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
IMAGES = random_split(64, shape=(3, 16, 16)).images


def augment(name, images=IMAGES, seed=0, epoch=0, batch=0, view=0, sizes=None, **options):
    channels = images.shape[1]
    options = {"mean": (0.0,) * channels, "std": (1.0,) * channels, **options}
    draws = {"seed": seed, "epoch": epoch, "batch": batch, "view": view, "sizes": sizes}
    return Augmentation(name, **options)(images, **draws)


def test_normalise_is_the_formula():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (IMAGES / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for result in (normalise(IMAGES, mean, std), augment("none", mean=mean, std=std)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)
    with pytest.raises(InputError, match="one number per channel"):
        normalise(IMAGES, (0.1,), (0.2,))


def test_normalisation_follows_the_colours():
    plain, shifted = augment("strong"), augment("strong", mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(shifted, (plain - 0.5) / 0.25)


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (16, 2), (28, 4), (32, 4), (64, 8), (3, 1)])
def test_basic_is_a_shifted_perhaps_mirrored_window(side, pad):
    images = random_split(40, shape=(1, side, side)).images
    result = (augment("basic", images) * 255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    offsets, mirrored = set(), 0
    for before, after in zip(padded, result, strict=True):
        found = [
            (top, left, flip)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flip in (False, True)
            if torch.equal(
                before[:, top : top + side, left : left + side],
                after.flip(-1) if flip else after,
            )
        ]
        assert found
        offsets.add(found[0][:2])
        mirrored += found[0][2]
    assert len(offsets) > 3
    assert 8 < mirrored < 32


def test_flip_can_be_off():
    ramp = torch.arange(16, dtype=torch.uint8).expand(64, 1, 16, 16)
    result = augment("basic", ramp, flip=False)
    assert bool((result[..., 13] >= result[..., 3]).all())
    assert not bool((augment("basic", ramp)[..., 13] >= augment("basic", ramp)[..., 3]).all())


def test_strong_changes_the_colours_of_most_images():
    grey_world = torch.full((500, 3, 16, 16), 100, dtype=torch.uint8)
    grey_world[:, 0] = 160
    centre = augment("strong", grey_world)[:, :, 8, 8]
    basic = augment("basic", grey_world)[:, :, 8, 8]
    same = (centre - basic).abs().amax(1) < 1e-6
    grey = (centre - centre.mean(1, keepdim=True)).abs().amax(1) < 1e-6
    assert 0.10 < float(same.float().mean()) < 0.22  # (1 - 0.8) * (1 - 0.2) = 0.16
    assert 0.14 < float(grey.float().mean()) < 0.26
    assert float(centre.min()) >= 0
    assert float(centre.max()) <= 1


def test_the_jitter_has_the_limits_of_its_definition():
    flat = torch.full((2000, 3, 4, 4), 0.4)  # only brightness acts on a flat grey
    ratio = _jitter(flat, generator(0, "test"))[:, 0, 2, 2] / 0.4
    assert float(ratio.min()) == pytest.approx(0.6, abs=0.01)
    assert float(ratio.max()) == pytest.approx(1.4, abs=0.01)


def test_strong_equals_basic_for_grey_images_and_needs_no_kornia(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    grey = random_split(8, shape=(1, 8, 8)).images
    assert torch.equal(augment("strong", grey), augment("basic", grey))
    augment("none")
    augment("basic")
    with pytest.raises(InputError, match=r"pip install 'scpl\[images\]'"):
        augment("strong")


@pytest.mark.parametrize("name", ["basic", "strong"])
def test_draws_depend_on_the_four_keys_alone(name):
    base = augment(name)
    torch.rand(7)
    assert torch.equal(augment(name), base)
    others = [{"epoch": 1}, {"batch": 1}, {"view": 1}, {"seed": 1}]
    assert not any(torch.equal(augment(name, **other), base) for other in others)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_neither_the_global_state_nor_the_images_change(name):
    images, before = IMAGES.clone(), torch.get_rng_state()
    result = augment(name, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, IMAGES)
    assert result.is_contiguous()
    assert augment(name, images[:1]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "weak"), [("none", "none"), ("basic", "basic"), ("strong", "basic")]
)
def test_two_views_are_weak_then_named(name, weak):
    both = Augmentation(name, **UNIT).two_views(IMAGES, seed=0, epoch=3, batch=5)
    assert both.shape == (128, 3, 16, 16)
    assert torch.equal(both[:64], augment(weak, epoch=3, batch=5, view=0))
    assert torch.equal(both[64:], augment(name, epoch=3, batch=5, view=1))


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"strong, basic, none\. Got 'strnog'"):
        Augmentation("strnog", **UNIT)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    side=st.integers(3, 17),
    batch=st.integers(0, 50),
    name=st.sampled_from(["none", "basic"]),
)
def test_several_batches_at_once_are_those_one_by_one(sizes, side, batch, name):
    images = random_split(sum(sizes), shape=(2, side, side)).images
    together = augment(name, images, batch=batch, sizes=sizes)
    parts = torch.split(images, sizes)
    alone = [augment(name, part, batch=batch + place) for place, part in enumerate(parts)]
    assert torch.equal(together, torch.cat(alone))
