"""Images that stay encoded: the same bytes and numbers as those that lie in memory."""

import pyarrow.parquet as pq
import pytest
import torch

from data_files import encoded, picture, write_folder, write_hub
from scpl.data import spool
from scpl.data.images import Augmentation, Loader, Reading, Split, decode_images, limit, load
from scpl.data.images.dataset import channel_stats
from scpl.data.images.ondemand import Survey, survey
from scpl.errors import DataError
from text_files import save_to_disk

LABELS = torch.arange(23) % 3


def pictures(modes=("RGB",), n=23):
    return [encoded(picture((8, 8), modes[i % len(modes)], i)) for i in range(n)]


def on_demand(sources, workers=2):
    name = "image {}".format
    found = survey(sources, None, name, Reading(workers=workers))
    assert not found.unreadable
    return found.images(sources, None, name, workers)


def both(modes=("RGB",)):
    sources = pictures(modes)
    return Split(decode_images(sources), LABELS), Split(on_demand(sources), LABELS)


@pytest.mark.parametrize("modes", [("RGB",), ("L",), ("L", "L", "RGB")])
def test_they_are_the_bytes_and_have_the_statistics_of_those_in_memory(modes):
    held, lazy = both(modes)
    assert lazy.images.shape == held.images.shape
    assert lazy.nbytes == held.nbytes
    for which in (torch.tensor([5, 0, 5]), slice(3, 9), slice(None), 7):
        assert torch.equal(lazy.images[which], held.images[which])
        assert lazy.images[which].is_contiguous()
    some = torch.tensor([2, 3, 11])
    assert channel_stats(lazy.images) == channel_stats(held.images)
    assert channel_stats(lazy.take(some).images) == channel_stats(held.take(some).images)
    for channels in (1, 3):
        changed, same = lazy.with_channels(channels), held.with_channels(channels)
        assert torch.equal(changed.images[:], same.images)
        assert channel_stats(changed.images) == channel_stats(same.images)


@pytest.mark.parametrize("views", [1, 2])
def test_a_loader_makes_the_same_batches_of_them_from_any_place_on(views):
    changes = Augmentation("strong", (0.5,) * 3, (0.2,) * 3)
    options = {"batch_size": 4, "shuffle": True, "seed": 3, "views": views}
    held, lazy = (Loader(limit(split, 19, 5), changes, **options) for split in both(("L", "RGB")))
    for epoch, start in ((0, 0), (2, 3)):
        for loader in (held, lazy):
            loader.set_epoch(epoch)
        pairs = list(zip(held.batches(start), lazy.batches(start), strict=True))
        assert len(pairs) == 5 - start
        for (inputs, targets), (same, also) in pairs:
            assert torch.equal(inputs, same)
            assert torch.equal(targets, also)


def test_unreadable_images_are_found_at_once_and_change_nothing_of_the_others():
    sources = pictures()
    damaged = [sources[0][:40], *sources, b"none"]
    found, whole = (survey(each, None, str, Reading()) for each in (damaged, sources))
    assert list(found.unreadable) == [0, 24]
    assert torch.equal(found.sums[1:-1], whole.sums)
    assert found.size == whole.size == (8, 8)
    again = Survey.of(*found.stored())
    assert (again.size, again.channels, again.white) == (found.size, found.channels, found.white)
    assert again.unreadable == found.unreadable
    images = again.images(damaged, None, str, 2)
    assert torch.equal(images[:], decode_images(sources))
    assert channel_stats(images) == channel_stats(decode_images(sources))


def test_images_of_several_sizes_or_that_change_later_are_refused():
    sources = pictures()
    other = encoded(picture((6, 8)))
    with pytest.raises(DataError, match="Got 0 with 8 x 8 pixels and 23 with 6 x 8"):
        survey([*sources, other], None, str, Reading())
    lazy = Split(on_demand(sources), LABELS)
    sources[4] = other
    batches = Loader(lazy, Augmentation("none", (0.0,) * 3, (1.0,) * 3), batch_size=3)
    with pytest.raises(DataError, match="Got image 4: 6 x 8 pixels, which were 8 x 8"):
        list(batches)
    sources[4] = sources[3][:50]
    with pytest.raises(DataError, match=r"must stay as they are.*\n?.*Got image 4: .*Error"):
        list(batches)


def test_only_what_is_asked_for_is_decoded_and_not_far_ahead():
    asked = []

    class Sources(list):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    lazy = on_demand(Sources(pictures()), workers=1)
    asked.clear()
    batches = lazy.subset(torch.arange(22, 2, -1)).each(torch.arange(20).split(2))
    next(batches)
    batches.close()
    assert asked[:2] == [22, 21]
    assert len(asked) <= 2 * 4  # of 20: one batch is used, two wait, one is being decoded


def same_data(folder, **reading):
    """Check that a folder is the same data in memory and on demand; return the latter."""
    held, lazy = (
        load(str(folder), reading=Reading(in_memory=which, **reading)) for which in ("yes", "no")
    )
    assert (held.classes, held.mean, held.std) == (lazy.classes, lazy.mean, lazy.std)
    for part in ("train", "test"):
        there, here = getattr(held, part), getattr(lazy, part)
        assert torch.equal(there.images, here.images[:])
        assert not isinstance(here.images, torch.Tensor)
        assert torch.equal(there.labels, here.labels)
        assert there.place == here.place
    assert lazy.notes[-1].startswith("Images are decoded when a mini-batch needs them")
    assert lazy.notes[:-1] == held.notes
    return lazy


def test_a_folder_is_the_same_data_in_memory_and_on_demand(tmp_path):
    write_folder(tmp_path, n=7)
    same_data(tmp_path)
    (tmp_path / "dog" / "bad.png").write_bytes(b"none")
    data = same_data(tmp_path, skip_unreadable=True)
    assert (len(data.train), len(data.test)) == (11, 3)
    assert "bad.png" in data.notes[-2]
    for which in ("yes", "no"):
        with pytest.raises(DataError, match=r"1 of 15 are not: .*bad\.png"):
            load(str(tmp_path), reading=Reading(in_memory=which))


def test_rows_of_parquet_are_the_same_data_in_memory_and_on_demand(tmp_path):
    write_hub(tmp_path, size=(8, 8), n=9, classes=3)
    same_data(tmp_path)


def test_images_that_datasets_saved_are_those_of_parquet(tmp_path):
    """The same rows in Arrow files, of two splits or of one, in memory and on demand."""
    write_hub(tmp_path / "hub", size=(8, 8), n=9, classes=3)
    for name in ("train", "test"):
        (file,) = (tmp_path / "hub").glob(f"{name}-*")
        save_to_disk(tmp_path / "saved" / name, pq.read_table(file), shards=2)
    found, other = same_data(tmp_path / "saved"), same_data(tmp_path / "hub")
    assert found.identities == other.identities
    assert found.classes == other.classes
    assert len(load(str(tmp_path / "saved" / "train")).train) == 7  # a fifth is held out


def test_memory_decides_where_images_lie_unless_it_is_said(tmp_path, monkeypatch):
    write_folder(tmp_path, n=5)
    taken = 10 * 3 * 8 * 8
    for free, held in ((4 * taken, True), (4 * taken - 4, False)):
        monkeypatch.setattr(spool, "available_memory", lambda free=free: free)
        images = load(str(tmp_path)).train.images
        assert isinstance(images, torch.Tensor) == held
        for which in ("yes", "no"):
            images = load(str(tmp_path), reading=Reading(in_memory=which)).train.images
            assert isinstance(images, torch.Tensor) == (which == "yes")
