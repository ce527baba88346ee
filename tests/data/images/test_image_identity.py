"""Images of every format have digests of their content, and nothing else decides these."""

import shutil

import pytest
import torch

from data_files import picture, write_cifar, write_folder, write_mnist, write_parquet
from scpl.data.images import carve_validation, limit, load, shared_images


def folder(root, seed=0):
    write_folder(root / "train", n=6)
    write_folder(root / "test", n=3, size=(9 if seed else 8, 8))


def parquet(root, seed=0):
    for name, count in (("train", 6), ("test", 3)):
        pictures = [picture((8, 8), "RGB", number + seed) for number in range(count)]
        write_parquet(root / f"{name}.parquet", pictures, [n % 2 for n in range(count)])


@pytest.mark.parametrize("write", [folder, parquet, write_mnist, write_cifar])
def test_the_content_and_nothing_else_identifies_images(tmp_path, write):
    """Neither where they lie, nor when they were written, nor the size that they are read at."""
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b", copy_function=shutil.copyfile)
    first = load(str(tmp_path / "a"), image_size=8).identities
    assert set(first) == {"train", "test"}
    assert first == load(str(tmp_path / "elsewhere" / "b"), image_size=16).identities
    write(tmp_path / "other", seed=1)
    other = load(str(tmp_path / "other"), image_size=8).identities
    assert (other["test"].count, other["test"].sizes.keys()) == (
        first["test"].count, first["test"].sizes.keys(),
    )  # fmt: skip
    assert other["test"].digest != first["test"].digest


def test_images_to_test_on_that_are_learnt_from_are_counted(tmp_path):
    """As rows of texts are; wherever the images come from, and after they are divided."""
    folder(tmp_path / "a")  # the first three of each class are in both
    data = load(str(tmp_path / "a"))
    told = "6 of the 6 test images occur in train as well"
    assert shared_images(data.train, None, data.test) == (told,)
    train, valid = carve_validation(data.train, 0.5, seed=0)
    assert shared_images(train, valid, train) == (told,)
    assert not torch.isin(valid.digests, train.digests).any()
    assert torch.isin(limit(train, 2, seed=0).digests, train.digests).all()
