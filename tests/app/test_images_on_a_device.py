"""Where the images of a run lie: on an accelerator, if they take little of it."""

import pytest
import torch

from data_files import write_folder
from scpl.app.build import build_loaders
from scpl.app.config import TrainConfig
from scpl.app.inputs import images

DIGITS_BYTES = 1797 * (16 * 16 + 8)  # enlarged to 16 pixels; labels are int64


def loaders_with(free, monkeypatch):
    monkeypatch.setattr(images, "free_memory", lambda device: free)
    loaders = build_loaders(TrainConfig.of(augmentation="basic"))
    return loaders, [loaders.train, loaders.valid, loaders.test]


@pytest.mark.parametrize("free", [None, 4 * DIGITS_BYTES - 4])
def test_images_stay_in_the_memory_of_the_cpu(free, monkeypatch):
    loaders, each = loaders_with(free, monkeypatch)
    assert [one.prefetch for one in each] == [2, 2, 2]
    assert not any("Images lie on" in note for note in loaders.notes)


def test_images_lie_on_an_accelerator_with_room_and_the_run_says_so(monkeypatch):
    plain, expected = loaders_with(None, monkeypatch)
    loaders, each = loaders_with(4 * DIGITS_BYTES, monkeypatch)
    assert [one.prefetch for one in each] == [0, 0, 0]
    assert loaders.notes == (*plain.notes, "Images lie on cpu: they take 0 of its 2 MB free")
    for one, other in zip(each, expected, strict=True):
        for (inputs, targets), (same, also) in zip(one, other, strict=True):
            assert torch.equal(inputs, same)
            assert torch.equal(targets, also)


def test_images_on_demand_stay_where_they_are_and_make_the_same_batches(tmp_path, monkeypatch):
    write_folder(tmp_path, n=12)
    monkeypatch.setattr(images, "free_memory", lambda device: None)
    held, lazy = (
        build_loaders(
            TrainConfig.of(data=str(tmp_path), image_size=16, augmentation="basic", in_memory=which)
        )
        for which in ("yes", "no")
    )
    monkeypatch.setattr(images, "free_memory", lambda device: 1 << 40)
    split = lazy.train.split
    assert images.lie_on(torch.device("cpu"), [split]) == (None, ())
    assert held.inputs == lazy.inputs  # with the same mean and deviation
    assert [note for note in lazy.notes if note not in held.notes] == [
        "Images are decoded when a mini-batch needs them, by 2 threads: in memory they would take "
        "0 MB (--in-memory)"
    ]
    for one, other in ((held.train, lazy.train), (held.valid, lazy.valid), (held.test, lazy.test)):
        for start in (0, len(one) - 1):  # resumed in the middle of an epoch
            for (inputs, targets), (same, also) in zip(
                one.batches(start), other.batches(start), strict=True
            ):
                assert torch.equal(inputs, same)
                assert torch.equal(targets, also)
