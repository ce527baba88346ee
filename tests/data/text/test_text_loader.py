import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.data.text import WITH_ZEROS, Encoded, TextLoader
from scpl.data.text.tokenizer import Words
from scpl.errors import DataError, InputError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=300)


def encoded(lengths, vocab_size=1000):
    """Texts whose first token is their number, and which hold no padding."""
    rows = [[2 + place, *[1] * (length - 1)] for place, length in enumerate(lengths)]
    return Encoded.of(rows, torch.arange(len(lengths)), vocab_size)


def numbers(batches):
    return [number for _, target in batches for number in target.tolist()]


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), shuffle=st.booleans())
def test_every_text_comes_once_and_whole(lengths, batch_size, shuffle):
    loader = TextLoader(encoded(lengths), batch_size=batch_size, shuffle=shuffle, prefetch=0)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert sorted(numbers(batches)) == list(range(len(lengths)))
    for tokens, target in batches:
        assert tokens.dtype == target.dtype == torch.int64
        assert (tokens != 0).sum(1).tolist() == [lengths[number] for number in target]
        assert tokens.shape[1] == max(lengths[number] for number in target)
        assert (tokens[:, 0] == 2 + target).all()
    assert sum(len(target) < batch_size for _, target in batches) <= 1


@given(lengths=LENGTHS, epoch=st.integers(0, 3), data=st.data())
def test_it_resumes_anywhere(lengths, epoch, data):
    loader = TextLoader(encoded(lengths), batch_size=4, shuffle=True, seed=5, prefetch=0)
    loader.set_epoch(epoch)
    whole = list(loader)
    start = data.draw(st.integers(0, len(loader)))
    fresh = TextLoader(encoded(lengths), batch_size=4, shuffle=True, seed=5, prefetch=0)
    fresh.set_epoch(epoch)
    rest = list(fresh.batches(start))
    assert len(rest) == len(whole) - start
    for (tokens, target), (again, same) in zip(whole[start:], rest, strict=True):
        assert torch.equal(tokens, again)
        assert torch.equal(target, same)


def test_seed_and_epoch_decide_the_order():
    def order(seed, epoch):
        loader = TextLoader(encoded([1, 5, 3, 8] * 50), batch_size=8, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return numbers(loader)

    torch.manual_seed(1)
    first = order(0, 0)
    state = torch.get_rng_state()
    assert order(0, 0) == first
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(order(*keys)) for keys in ((0, 0), (1, 0), (0, 1), (1, 1))}) == 4


def test_texts_of_similar_length_come_together():
    lengths = [1 + place % 100 for place in range(4000)]
    tokens = sum(lengths)
    for shuffle in (False, True):
        loader = TextLoader(encoded(lengths, 5000), batch_size=32, shuffle=shuffle)
        padded = sum(inputs.numel() for inputs, _ in loader)
        assert padded < 1.05 * tokens
    # In an epoch of shuffled batches, short ones are not all at one end.
    longest = [inputs.shape[1] for inputs, _ in loader]
    assert longest != sorted(longest)


def test_a_thread_prepares_the_next_batches_and_ends():
    loader = TextLoader(encoded([3] * 40), batch_size=4)
    batches = loader.batches()
    next(batches)
    assert any(thread.name == "scpl-prefetch" for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name == "scpl-prefetch" for thread in threading.enumerate())


def test_numbers_out_of_range_are_refused():
    split = encoded([1, 2])
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "prefetch": -1}):
        with pytest.raises(InputError):
            TextLoader(split, **wrong)
    loader = TextLoader(split, batch_size=1)
    for start in (-1, 3):
        with pytest.raises(InputError, match=r"must be 0\.\.2"):
            loader.batches(start)
    with pytest.raises(InputError):
        loader.set_epoch(-1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_the_largest_number_fits(vocab_size, dtype):
    packed = Encoded.of([[vocab_size - 1, 1], [2]], torch.tensor([0, 1]), vocab_size)
    assert packed.tokens.dtype == dtype
    assert packed.batch(torch.tensor([1, 0]), WITH_ZEROS).tolist() == [[2, 0], [vocab_size - 1, 1]]


def test_padding():
    assert WITH_ZEROS.rows([[5], [6, 7, 8]]).tolist() == [[5, 0, 0], [6, 7, 8]]


@pytest.mark.parametrize(
    ("tokens", "starts", "labels"),
    [
        ([1], [0, 1], []),
        ([], [0], []),
        ([1, 2], [0, 1], [0]),
        ([1], [0, 0, 1], [0, 0]),
    ],
)
def test_parts_must_fit(tokens, starts, labels):
    with pytest.raises(DataError, match="Encoded texts"):
        Encoded(*(torch.tensor(part, dtype=torch.int64) for part in (tokens, starts, labels)))


def test_a_sample_is_shown_by_its_place():
    """The shortest text comes first; it is read out of its tokens."""
    tokenizer = Words(("<pad>", "<unk>", "the", "printer", "burns"))
    rows = tokenizer.encode(["the printer burns", "burns", "the new printer burns"], 9)
    split = Encoded.of(rows, torch.arange(3), 5)
    shown = TextLoader(split, batch_size=2, decode=tokenizer.decode).show(2)
    assert shown.name == "text 3 of 3"
    assert shown.text == "the <unk> printer burns"
    assert shown.picture is None
    assert TextLoader(split, batch_size=2).show(0).text == "4"
