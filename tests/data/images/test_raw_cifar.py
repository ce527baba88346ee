import pytest
import torch

from data_files import write_cifar
from scpl.data.images.raw import FORMATS
from scpl.errors import DataError

CIFAR10, CIFAR100 = FORMATS["cifar10"], FORMATS["cifar100"]


def test_cifar10(tmp_path):
    assert not CIFAR10.complete(tmp_path)
    pixels, labels = write_cifar(tmp_path)
    assert CIFAR10.complete(tmp_path)
    assert not CIFAR100.complete(tmp_path)
    train, test, classes, *_ = CIFAR10.read(tmp_path)
    assert train.images.shape == (50, 3, 32, 32)
    assert torch.equal(test.images, torch.from_numpy(pixels))
    assert test.labels.tolist() == labels.tolist()
    assert classes is None


def test_cifar100_has_the_fine_labels(tmp_path):
    pixels, labels = write_cifar(tmp_path, fine=True)
    assert CIFAR100.complete(tmp_path)
    train, test, _, *_ = CIFAR100.read(tmp_path)
    assert len(train) == 10
    assert torch.equal(test.images, torch.from_numpy(pixels))
    assert test.labels.tolist() == labels.tolist()


def test_class_names_come_from_the_text_file(tmp_path):
    write_cifar(tmp_path)
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert CIFAR10.read(tmp_path).classes == tuple(names)
    (tmp_path / "batches.meta.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"10 classes\. Got 2 names"):
        CIFAR10.read(tmp_path)


def test_damaged_files_are_named(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        DataError, match=r"data_batch_3.* rows of 3073 bytes.*9 rows and 3068 bytes"
    ):
        CIFAR10.read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="Got 0 bytes"):
        CIFAR10.read(tmp_path)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(DataError, match=r"0\.\.9. Got 11 in row 0"):
        CIFAR10.read(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="readable"):
        CIFAR10.read(tmp_path)
