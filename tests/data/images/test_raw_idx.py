import gzip

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_files import idx_bytes, write_mnist
from scpl.data.images.raw import (
    FILES,
    has_mnist,
    load_digits,
    parse_idx,
    read_idx,
    read_mnist,
)
from scpl.errors import DataError

KINDS = st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64])
FIRST_TEST_LABELS = [1, 3, 4, 2, 2, 1, 6, 6, 5, 0, 6, 3]
TEST_PIXEL_SUM = 1788827
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)


@given(values=KINDS.flatmap(lambda kind: hnp.arrays(kind, SHAPES)), packed=st.booleans())
def test_round_trip(values, packed):
    data = idx_bytes(values)
    read = parse_idx(gzip.compress(data) if packed else data, "memory")
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


@given(cut=st.integers(0, 40))
def test_any_truncation_is_noticed(cut):
    data = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    if cut < len(data):
        with pytest.raises(DataError, match="memory"):
            parse_idx(data[:cut], "memory")


def test_sizes_are_named(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    data = idx_bytes(np.zeros(10, np.uint8))
    path.write_bytes(data[:-3])
    with pytest.raises(
        DataError, match=r"hold the 18 bytes .* Got 15 bytes: the file is truncated"
    ):
        read_idx(path, 1)
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match="Got 19 bytes: the file is too long"):
        read_idx(path, 1)
    path.write_bytes(data[:6])
    with pytest.raises(DataError, match="the 8 bytes"):
        read_idx(path, 1)


@pytest.mark.parametrize("data", [b"", b"\0", b"<html>", b"\0\0\x07\x01\0\0\0\0"])
def test_another_kind_of_file_is_refused(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match="must begin with"):
        read_idx(path, 1)


def test_huge_dimensions_allocate_nothing():
    with pytest.raises(DataError, match="truncated"):
        parse_idx(b"\0\0\x08\x03" + b"\xff" * 12, "memory")


def test_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "labels.gz"
    whole = gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)))
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"labels\.gz"):
        read_idx(path, 1)
    path.write_bytes(whole[:30] + bytes(20) + whole[50:])
    with pytest.raises(DataError, match="intact"):
        read_idx(path, 1)
    with pytest.raises(DataError, match="readable"):
        read_idx(tmp_path / "missing", 1)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("subfolder", ["", "raw"])
def test_mnist_layouts(tmp_path, compress, subfolder):
    assert not has_mnist(tmp_path)
    written = write_mnist(tmp_path / subfolder, compress=compress)
    assert has_mnist(tmp_path)
    train, test, classes, *_ = read_mnist(tmp_path)
    assert train.images.shape == (20, 1, 28, 28)
    assert torch.equal(train.images[:, 0], torch.from_numpy(written[FILES[0]]))
    assert torch.equal(test.images[:, 0], torch.from_numpy(written[FILES[2]]))
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    assert classes is None


def test_dotted_names_are_found_and_missing_files_noticed(tmp_path):
    write_mnist(tmp_path, compress=False)
    for name in FILES:
        (tmp_path / name).rename(tmp_path / name.replace("-idx", ".idx"))
    assert has_mnist(tmp_path)
    (tmp_path / "train-images.idx3-ubyte").unlink()
    with pytest.raises(DataError, match="four files"):
        read_mnist(tmp_path)


def test_counts_and_kinds_must_match(tmp_path):
    write_mnist(tmp_path, compress=False)
    labels = tmp_path / FILES[1]
    labels.write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match=r"Got 20 images in .* and 19 labels in"):
        read_mnist(tmp_path)
    labels.write_bytes(idx_bytes(np.zeros(20, np.int32)))
    with pytest.raises(DataError, match="must hold bytes in 1 dimensions"):
        read_mnist(tmp_path)


def test_embedded_digits():
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert (data.channels, data.image_size, data.num_classes, data.flip) == (1, 8, 10, False)
    both = torch.cat([data.train.images, data.test.images])
    assert int(both.min()) == 0
    assert int(both.max()) == 255
    assert len(both.unique()) == 17
    counts = torch.bincount(data.train.labels) / torch.bincount(data.test.labels)
    assert counts.tolist() == pytest.approx([4.0] * 10, rel=0.05)
    assert torch.equal(load_digits().test.images, data.test.images)


def test_the_split_of_the_digits_never_changes():
    data = load_digits()
    assert data.test.labels[:12].tolist() == FIRST_TEST_LABELS
    assert int(data.test.images.long().sum()) == TEST_PIXEL_SUM


def test_embedded_digits_equal_the_published_ones():
    datasets = pytest.importorskip("sklearn.datasets")
    published = datasets.load_digits()
    data = load_digits()
    scaled = np.floor(published.images * 255 / 16 + 0.5).astype(np.uint8)
    expected = sorted(
        zip(scaled.reshape(1797, 64).tolist(), published.target.tolist(), strict=True)
    )
    images = torch.cat([data.train.images, data.test.images]).flatten(1).tolist()
    labels = torch.cat([data.train.labels, data.test.labels]).tolist()
    assert sorted(zip(images, labels, strict=True)) == expected


def test_a_bomb_of_gzip_is_refused_before_it_unpacks(monkeypatch):
    """4 MB of gzip became 4 GB in memory before their header was looked at."""
    monkeypatch.setattr("scpl.outside._UNPACKED", 1 << 10)
    data = idx_bytes(np.zeros((100, 100, 100), np.uint8))
    with pytest.raises(DataError, match=r"the 1000016 bytes .* Got at most 1\d{5} bytes"):
        parse_idx(gzip.compress(data), "memory")
    # Nor is more read than the header says, however much follows.
    honest = gzip.compress(idx_bytes(np.zeros(5, np.uint8)) + bytes(1_000_000))
    with pytest.raises(DataError, match="Got at least 14 bytes: the file is too long"):
        parse_idx(honest, "memory")


@pytest.mark.parametrize("header", [b"\xc8" + bytes(800), b"\x04" + bytes(4) + b"\xff" * 12])
def test_absurd_shapes_without_a_single_number_are_refused(header):
    """Sides whose product is 0 announce no bytes; numpy has no such arrays, and said so."""
    with pytest.raises(DataError):
        parse_idx(b"\0\0\x08" + header, "memory")
