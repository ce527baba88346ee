import shutil

import pytest
import torch

from data_files import picture, write_folder
from scpl.data.images.encoded import has_tiny_imagenet, list_tiny_imagenet
from scpl.data.images.folders import has_folder, list_folder
from scpl.errors import DataError


def read_folder(root, image_size=None):
    return list_folder(root).decoded(image_size)


def read_tiny_imagenet(root, image_size=None):
    return list_tiny_imagenet(root).decoded(image_size)


@pytest.mark.parametrize("kind", ["val", "valid", "validation", "test"])
def test_train_and_test_folders(tmp_path, kind):
    assert not has_folder(tmp_path)
    write_folder(tmp_path / "train", n=5)
    write_folder(tmp_path / kind, n=2)
    assert has_folder(tmp_path)
    train, test, classes, *_ = read_folder(tmp_path)
    assert classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert test.labels.tolist() == [0] * 2 + [1] * 2
    expected = torch.tensor(list(picture(seed=101).tobytes())).view(8, 8, 3)
    assert torch.equal(train.images[6].permute(1, 2, 0).long(), expected)


@pytest.mark.parametrize("inside", ["", "train"])
def test_without_a_test_folder_a_fifth_is_cut_off(tmp_path, inside):
    write_folder(tmp_path / inside, n=10)
    train, test, _, *_ = read_folder(tmp_path)
    assert (len(train), len(test)) == (16, 4)
    assert test.labels.bincount().tolist() == [2, 2]
    assert torch.equal(read_folder(tmp_path).test.images, test.images)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_folder(tmp_path, n=5)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / ".hidden.png").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dog" / "000.png").rename(tmp_path / "dog" / "000.PNG")
    train, test, classes, *_ = read_folder(tmp_path)
    assert len(train) + len(test) == 10
    assert classes == ("cat", "dog")


def test_links_are_followed(tmp_path):
    write_folder(tmp_path / "elsewhere", n=5)
    (tmp_path / "root").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(read_folder(tmp_path / "root").train) == 8


def test_one_colour_image_makes_all_colour(tmp_path):
    write_folder(tmp_path / "train", mode="L")
    write_folder(tmp_path / "test", mode="L", n=1)
    assert read_folder(tmp_path).train.images.shape[1] == 1
    picture().save(tmp_path / "test" / "cat" / "000.png")
    assert read_folder(tmp_path).train.images.shape[1] == 3


def test_sizes_that_differ_between_the_splits(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", size=(9, 12))
    with pytest.raises(DataError, match=r"8 x 8 .* 9 x 12.*image_size"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, 6).test.images.shape[2:] == (6, 6)


def test_faulty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="one folder per class"):
        read_folder(tmp_path)
    write_folder(tmp_path / "train")
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=r"train/eel"):
        read_folder(tmp_path)
    (tmp_path / "train" / "eel").rmdir()
    write_folder(tmp_path / "val", classes=("cat", "fox"), n=1)
    with pytest.raises(DataError, match="Got also fox"):
        read_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "train" / "dog" / "001.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"dog/001\.png"):
        read_folder(tmp_path)


def test_an_unlabelled_test_folder_is_passed_over(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", classes=("images",))
    write_folder(tmp_path / "val", classes=("dog",), n=3)
    assert read_folder(tmp_path).test.labels.tolist() == [1, 1, 1]


def write_tiny(root, wnids=("n02", "n01")):
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius\nn09\tother\n")
    notes = []
    for number, wnid in enumerate(wnids):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            image = picture(mode="L" if i == 2 else "RGB", seed=10 * number + i)
            image.save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        picture(seed=50 + number).save(root / "val" / "images" / f"val_{number}.JPEG")
        notes.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t7\t7")
    (root / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")


def test_tiny_imagenet_as_published(tmp_path):
    assert not has_tiny_imagenet(tmp_path)
    write_tiny(tmp_path)
    assert has_tiny_imagenet(tmp_path)
    train, test, classes, *_ = read_tiny_imagenet(tmp_path, 4)
    assert classes == ("goldfish", "n02")
    assert train.labels.tolist() == [0] * 3 + [1] * 3
    assert test.labels.tolist() == [1, 0]
    assert train.images.shape == (6, 3, 4, 4)


def test_faulty_tiny_imagenet_is_named(tmp_path):
    write_tiny(tmp_path)
    notes = tmp_path / "val" / "val_annotations.txt"
    good = notes.read_text()
    notes.write_text(good + "val_9.JPEG n01\n")
    with pytest.raises(DataError, match="line 3 of"):
        read_tiny_imagenet(tmp_path)
    notes.write_text(good + "val_9.JPEG\tn01\n")
    with pytest.raises(DataError, match=r"Missing: .*val_9\.JPEG and 0 more"):
        read_tiny_imagenet(tmp_path)
    notes.write_text("")
    with pytest.raises(DataError, match="at least one image"):
        read_tiny_imagenet(tmp_path)
    notes.write_text(good)
    (tmp_path / "wnids.txt").write_text("n01\nn02\nn03\n")
    with pytest.raises(DataError, match="n03"):
        read_tiny_imagenet(tmp_path)
    (tmp_path / "wnids.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="readable text"):
        read_tiny_imagenet(tmp_path)
