import gc
import io
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_files import random_split, write_folder
from scpl.data.images import Augmentation, Loader, Split
from scpl.data.images import loader as loading
from scpl.data.images.folders import list_folder
from scpl.data.loader import prefetched
from scpl.errors import InputError

SPLIT = random_split(22, shape=(3, 8, 8))
BATCH_BYTES = 4 * 5 * 3 * 8 * 8  # of 5 images as floats


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    if left():
        gc.collect()  # takes half a second where much is loaded
    assert left() == []


def left():
    return [t.name for t in threading.enumerate() if t.name == "scpl-prefetch"]


def loader(split=SPLIT, batch_size=5, augmentation="none", **options):
    changes = Augmentation(augmentation, (0.5,) * 3, (0.2,) * 3)
    return Loader(split, changes, batch_size=batch_size, **options)


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def numbered(n):
    return Split(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n))


def order(n, batch_size, epoch, **options):
    plain = Augmentation("none", (0.0,), (1.0,))
    loader = Loader(numbered(n), plain, batch_size=batch_size, **options)
    loader.set_epoch(epoch)
    batches = [targets.tolist() for _, targets in loader]
    assert len(batches) == len(loader)
    assert sum(map(len, batches)) == loader.num_samples
    return batches


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_has_every_image_once(n, batch_size, epoch, seed):
    options = {"shuffle": True, "seed": seed, "prefetch": 0}
    batches = order(n, batch_size, epoch, **options)
    assert sorted(label for batch in batches for label in batch) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert order(n, batch_size, epoch, **options) == batches


def test_order_depends_on_seed_and_epoch():
    orders = [order(50, 50, e, seed=s, shuffle=True)[0] for s in (0, 1) for e in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert order(5, 2, 3) == [[0, 1], [2, 3], [4]]
    assert sum(order(50, 7, 0, shuffle=True), []) == order(50, 50, 0, shuffle=True)[0]  # noqa: RUF017


def test_batches_are_the_images_normalised():
    batches = list(loader())
    inputs = torch.cat([batch[0] for batch in batches])
    assert torch.equal(torch.cat([batch[1] for batch in batches]), SPLIT.labels)
    torch.testing.assert_close(inputs, (SPLIT.images / 255 - 0.5) / 0.2)
    assert [len(targets) for _, targets in batches] == [5, 5, 5, 5, 2]


def test_two_views_double_inputs_and_targets():
    inputs, targets = next(iter(loader(augmentation="basic", views=2, prefetch=0)))
    assert inputs.shape == (10, 3, 8, 8)
    assert targets.tolist() == SPLIT.labels[:5].tolist() * 2
    assert loader(views=2).num_samples == 22


def test_an_impatient_end_does_not_wait_for_the_next_item():
    come = threading.Event()

    def items():
        yield 1
        come.wait()

    taken = prefetched(items(), 1, patient=False)
    assert next(taken) == 1
    taken.close()  # or this test would hang
    come.set()


@pytest.mark.parametrize("augmentation", ["none", "basic", "strong"])
@pytest.mark.parametrize("views", [1, 2])
def test_a_thread_and_a_resumption_change_nothing(augmentation, views):
    options = {"augmentation": augmentation, "views": views, "shuffle": True, "seed": 3}
    whole = loader(prefetch=0, **options)
    whole.set_epoch(2)
    expected = list(whole.batches())
    threaded = loader(prefetch=2, **options)
    threaded.set_epoch(2)
    assert same(expected, list(threaded))
    for start in range(len(whole) + 1):
        assert same(expected[start:], list(threaded.batches(start)))


def test_earlier_batches_are_not_produced(monkeypatch):
    made = []
    plain = type(loader().augmentation).__call__

    def counting(self, images, **draws):
        made.append(draws["batch"])
        return plain(self, images, **draws)

    monkeypatch.setattr(type(loader().augmentation), "__call__", counting)
    list(loader().batches(3))
    assert made == [3, 4]


def test_an_iterator_keeps_its_epoch():
    batches = loader(shuffle=True)
    expected = list(batches.batches())
    iterator = batches.batches()
    batches.set_epoch(1)
    assert same(expected, list(iterator))
    assert not same(expected, list(batches))


def test_the_global_state_is_free_for_the_network():
    torch.manual_seed(0)
    expected = [torch.rand(3).tolist() for _ in range(5)]
    torch.manual_seed(0)
    drawn = []
    for _ in loader(augmentation="strong", views=2, shuffle=True):
        drawn.append(torch.rand(3).tolist())
    assert drawn == expected


def test_numbers_out_of_range_are_refused():
    for options in ({"batch_size": 0}, {"views": 3}, {"views": 0}, {"prefetch": -1}):
        with pytest.raises(InputError, match="Got"):
            loader(**options)
    with pytest.raises(InputError, match="augmentation must be one of"):
        loader(augmentation="weak")
    for start in (-1, 6):
        with pytest.raises(InputError, match=r"first batch must be 0\.\.5"):
            loader().batches(start)
    with pytest.raises(InputError, match="epoch"):
        loader().set_epoch(-1)


def failing():
    yield 1
    raise ValueError("broken image")


def test_errors_of_the_thread_reach_the_consumer():
    items = prefetched(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken image"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


def test_the_queue_is_bounded():
    taken = []

    def counting():
        for i in range(100):
            taken.append(i)
            yield i

    items = prefetched(counting(), 2)
    assert taken == []  # nothing runs before the first item is asked for
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) <= 4  # one used, two queued, one in hand
    items.close()
    assert list(prefetched(iter(range(50)), 1)) == list(range(50))


@pytest.mark.parametrize("end", ["close", "forget", "raise", "cycle"])
def test_the_thread_ends_with_its_iterator(end):
    items = loader(batch_size=1).batches()
    next(items)
    assert any(t.name == "scpl-prefetch" for t in threading.enumerate())
    if end == "close":
        items.close()
    elif end == "raise":
        with pytest.raises(RuntimeError, match="stop"):
            items.throw(RuntimeError("stop"))
    elif end == "cycle":
        holder = [items]
        holder.append(holder)
        del holder
    del items
    gc.collect()
    assert not any(t.name == "scpl-prefetch" for t in threading.enumerate())


def test_many_early_ends_never_block():
    for depth in (1, 2, 3):
        for taken in range(6):
            items = prefetched(iter(range(5)), depth)
            for _ in zip(range(taken), items, strict=False):
                pass
            items.close()


@pytest.mark.parametrize("augmentation", ["none", "basic", "strong"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("batches_at_once", [1, 2, 100])
def test_a_device_makes_the_same_batches(augmentation, views, batches_at_once, monkeypatch):
    monkeypatch.setattr(loading, "_TOGETHER_BYTES", batches_at_once * BATCH_BYTES)
    options = {"augmentation": augmentation, "views": views, "shuffle": True, "seed": 3}
    here, there = loader(**options), loader(device="cpu", **options)
    for epoch in (0, 2):
        for each in (here, there):
            each.set_epoch(epoch)
        expected = list(here)
        for start in range(len(here) + 1):
            assert same(expected[start:], list(there.batches(start)))


def test_a_device_makes_several_batches_in_one_go_and_without_a_thread(monkeypatch):
    made = []
    plain = Augmentation.__call__

    def counting(self, images, **draws):
        made.append(len(images))
        return plain(self, images, **draws)

    monkeypatch.setattr(Augmentation, "__call__", counting)
    monkeypatch.setattr(loading, "_TOGETHER_BYTES", 3 * BATCH_BYTES)
    batches = loader(augmentation="basic", device="cpu", prefetch=2).batches()
    next(batches)
    assert not any(t.name == "scpl-prefetch" for t in threading.enumerate())
    assert made == [15]
    list(batches)
    assert made == [15, 7]


@pytest.mark.parametrize("augmentation", ["none", "basic", "strong"])
def test_batches_are_made_where_the_images_lie_and_nothing_waits_to_read_a_number(augmentation):
    batches = loader(augmentation=augmentation, shuffle=True, device="cpu")

    class Elsewhere:  # meta tensors raise where a number is read, as a device would wait there
        images, labels = SPLIT.images.to("meta"), SPLIT.labels.to("meta")
        __len__, batches = SPLIT.__len__, Split.batches

    batches.split = Elsewhere()
    found = [(inputs.device.type, targets.device.type, len(targets)) for inputs, targets in batches]
    assert found == [("meta", "meta", size) for size in (5, 5, 5, 5, 2)]


def test_a_sample_is_shown_by_its_place_and_named_by_its_file(tmp_path):
    write_folder(tmp_path / "train", n=3)
    write_folder(tmp_path / "test", n=3)
    test = list_folder(tmp_path).decoded().test
    shown = loader(test).show(4)
    assert shown.name == str(tmp_path / "test" / "dog" / "001.png")
    assert shown.text is None
    image = Image.open(io.BytesIO(shown.picture))
    assert list(image.tobytes()) == test.images[4].permute(1, 2, 0).flatten().tolist()
    # Whatever the order: batches and samples agree.
    mixed = loader(test, shuffle=True, seed=3, batch_size=6)
    ((_, labels),) = list(mixed)
    names = [mixed.show(place).name for place in range(6)]
    assert sorted(names) == sorted(map(str, test.names))
    assert [int("dog" in name) for name in names] == labels.tolist()
    assert loader().show(4).name == "image 5 of 22"
