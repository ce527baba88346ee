import shutil

import pytest
import torch

from data_files import picture, write_folder, write_hub
from scpl.data.classes import absent
from scpl.data.images import Reading, folders, load_test, sentence
from scpl.data.images import listing as listing_module
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
    with pytest.raises(DataError, match="Got also 'fox'"):
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


class TestWhichFolders:
    """Which folders a number is of is never guessed in silence."""

    def test_every_number_says_its_folder(self, tmp_path):
        write_folder(tmp_path / "train", n=5)
        write_folder(tmp_path / "val", n=3)
        write_folder(tmp_path / "test", n=1)
        listing = list_folder(tmp_path)
        assert listing.sentence() == (
            f"train: 10 images of {tmp_path}/train, validation: 6 images of {tmp_path}/val, "
            f"test: 2 images of {tmp_path}/test"
        )
        train, valid, test = listing.to_learn()
        assert valid.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(listing.decoded().valid) == 6
        shutil.rmtree(tmp_path / "test")
        train, valid, test = list_folder(tmp_path).to_learn()
        assert (len(train), valid, len(test), test.place) == (10, None, 6, f"{tmp_path}/val")

    def test_names_in_another_case_are_a_mistake(self, tmp_path):
        """They were passed over, and a fifth of train was tested on: 100 % on 5 images."""
        write_folder(tmp_path / "train", classes=("Cat", "Dog"))
        write_folder(tmp_path / "test", n=1)
        with pytest.raises(
            DataError,
            match=r"Got also 'cat', 'dog' in .*Write cat as Cat, dog as Dog",
        ):
            list_folder(tmp_path)
        shutil.rmtree(tmp_path / "test")
        write_folder(tmp_path / "test", classes=("eel", "fox"), n=1)
        with pytest.raises(DataError, match="Got also 'eel', 'fox'"):
            list_folder(tmp_path)

    @pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "testing")])
    def test_usual_names_in_any_case(self, tmp_path, train, test):
        write_folder(tmp_path / train, n=4)
        write_folder(tmp_path / test, n=1)
        assert len(list_folder(tmp_path).to_learn()[2]) == 2
        write_folder(tmp_path / "train_", n=1)
        (tmp_path / "train_").rename(tmp_path / "tRain")
        with pytest.raises(DataError, match=rf"Got {tmp_path}/\w+ and {tmp_path}/\w+"):
            list_folder(tmp_path)

    def test_a_class_called_train(self, tmp_path):
        write_folder(tmp_path, classes=("bus", "train"), n=5)
        listing = list_folder(tmp_path)
        assert listing.classes == ("bus", "train")
        assert listing.notes == (f"{tmp_path}/train is taken as a class",)
        write_folder(tmp_path / "train", classes=("steam",), n=1)
        with pytest.raises(DataError, match="beside it bus"):
            list_folder(tmp_path)

    def test_what_has_no_classes_is_passed_over_aloud(self, tmp_path):
        write_folder(tmp_path / "train")
        write_folder(tmp_path / "val", n=1)
        write_folder(tmp_path / "test", classes=("images",), n=3)
        write_folder(tmp_path, classes=("extra",), n=1)
        notes = list_folder(tmp_path).notes
        assert "extra is passed over, as it holds no folders of classes" in notes[0]
        assert "test is passed over, as its images have no classes, only images/" in notes[1]

    def test_a_folder_one_level_too_deep_is_named(self, tmp_path):
        write_folder(tmp_path / "photos" / "animals")
        with pytest.raises(DataError, match=rf"Give the folder {tmp_path}/photos/animals"):
            list_folder(tmp_path / "photos")
        with pytest.raises(DataError, match=rf"Give the folder {tmp_path}/photos/animals"):
            list_folder(tmp_path)

    def test_a_folder_without_folders_says_what_it_holds(self, tmp_path):
        (tmp_path / "pets.zip").write_bytes(b"")
        with pytest.raises(DataError, match=r"Got 1 file \.zip in .*Unpack pets\.zip"):
            list_folder(tmp_path)
        (tmp_path / "pets.zip").rename(tmp_path / "labels.csv")
        picture().save(tmp_path / "a.png")
        with pytest.raises(DataError, match="Sort the images into folders named as the classes"):
            list_folder(tmp_path)

    def test_one_class_is_told_in_the_words_of_the_user(self, tmp_path):
        write_folder(tmp_path, classes=("cat",))
        with pytest.raises(DataError, match=rf"at least two classes.*Got only cat in {tmp_path}"):
            list_folder(tmp_path).to_learn()


def test_what_is_left_out_is_counted_and_named(tmp_path, monkeypatch):
    write_folder(tmp_path, n=3)
    cat, dog = tmp_path / "cat", tmp_path / "dog"
    for name in ("1.heic", "2.HEIC", "x.txt", "none"):
        (cat / name).write_text("x")
    (dog / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (dog / "loop").symlink_to(tmp_path)
    (dog / "more").mkdir()
    for end, kind in {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF"}.items():
        picture(seed=7).save(dog / "more" / f"a.{end}", kind)
    picture().save(tmp_path / "loose.png")
    listing = list_folder(tmp_path)
    told = "\n".join(listing.left_out.notes())
    assert (
        f".heic left out, which cannot be read (save them as JPEG or PNG): 2 (first: {cat}/1.heic)"
        in told
    )
    assert "files named .txt left out: 1" in told
    assert "files without an ending left out: 1" in told
    assert f"broken links left out: 1 (first: {dog}/gone.png)" in told
    assert "links to folders left out: 1" in told
    assert "images in no folder of a class left out: 1" in told
    assert (
        f"in sub-folders of a class, taken as of that class: 3 (first: {dog}/more/a.avif)" in told
    )
    part = listing.parts["all"]
    assert part.labels.bincount().tolist() == [3, 6]
    assert len(listing.decoded().train) == 7
    monkeypatch.setattr(folders, "reads_avif", lambda: False)
    assert "this Pillow cannot read" in "\n".join(list_folder(tmp_path).left_out.notes())


def test_a_size_for_which_there_is_no_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(listing_module, "decode_readable", None)
    monkeypatch.setattr(listing_module, "survey", None)
    with pytest.raises(DataError, match="1 x 1 x 100000000 x 100000000 bytes"):
        list_folder(tmp_path).decoded(10**8)
    with pytest.raises(DataError, match="10 x 1 x 1000000 x 1000000 bytes"):
        list_folder(tmp_path).decoded(10**6, Reading(in_memory="yes"))


def test_a_class_of_few_images_is_tested_as_texts_are(tmp_path):
    """Of three images of a class none reached the test set, though there was room."""
    write_folder(tmp_path, classes=("cat", "dog"), n=20)
    write_folder(tmp_path, classes=("eel",), n=1)
    train, _, test = list_folder(tmp_path).to_learn()
    assert (len(train), len(test)) == (33, 8)
    assert train.labels.bincount().tolist() == [16, 16, 1]
    assert absent(test.labels, ("cat", "dog", "eel"), "test image") == ("no test image of eel",)


class TestAnotherFolderThanItsOwn:
    def test_classes_are_matched_by_name(self, tmp_path):
        """They were by number: red and zebra were taken as green and red."""
        write_folder(tmp_path, classes=("green", "red"), n=3)
        test, _ = load_test(str(tmp_path), ("blue", "red", "green"), 8, own=False)
        assert test.labels.tolist() == [2] * 3 + [1] * 3
        (tmp_path / "green").rename(tmp_path / "zebra")
        with pytest.raises(DataError, match=r"Got also 'zebra'"):
            load_test(str(tmp_path), ("blue", "red", "green"), 8, own=False)

    def test_all_images_of_a_plain_folder_are_tested(self, tmp_path):
        write_folder(tmp_path, n=10)
        test, _ = load_test(str(tmp_path), ("cat", "dog"), 8, own=False)
        assert len(test) == 20
        assert sentence(test=test) == f"test: 20 images of {tmp_path}"
        own, _ = load_test(str(tmp_path), ("cat", "dog"), 8, own=True)
        assert torch.equal(own.images, read_folder(tmp_path).test.images)
        write_folder(tmp_path / "more" / "train", n=1)
        with pytest.raises(DataError, match=rf"To test on all of it, give {tmp_path}/more/train"):
            load_test(str(tmp_path / "more"), ("cat", "dog"), 8, own=False)

    def test_numbers_are_not_taken_for_names(self, tmp_path):
        write_hub(tmp_path, size=(8, 8), n=6, classes=3)
        test, notes = load_test(str(tmp_path), ("a", "b", "c"), 8, own=False)
        assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert "taken in order: 0 is a, 1 is b, 2 is c" in notes[0]
        with pytest.raises(DataError, match=r"must name its classes.*only numbers from 0 to 2"):
            load_test(str(tmp_path), ("a", "b", "c", "d"), 8, own=False)
        with pytest.raises(DataError, match="Got also '2'"):
            load_test(str(tmp_path), ("0", "1"), 8, own=False)
