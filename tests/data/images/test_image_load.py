import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from data_files import write_cifar, write_folder, write_hub, write_mnist
from scpl.data.images import Reading, known, load
from scpl.errors import DataError, InputError

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet")


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    """Neither the user's data nor a network may answer in these tests."""
    monkeypatch.delenv("SCPL_DATA", raising=False)
    monkeypatch.setenv("SCPL_CACHE", "off")

    def offline(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)


def local(name, root, **options):
    return load(name, data_dir=root, download=False, **options)


def test_names():
    assert known() == NAMES


def test_digits_need_nothing():
    data = load("digits")
    assert (data.name, data.image_size) == ("digits", 8)
    assert load("digits", image_size=16).train.images.shape == (1438, 1, 16, 16)


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
def test_mnist_is_found(tmp_path, folder):
    write_mnist(tmp_path / folder)
    data = local("mnist", tmp_path)
    assert (data.name, data.channels, data.image_size, data.flip) == ("mnist", 1, 28, False)
    assert (data.mean, data.std) == ((0.1307,), (0.3081,))
    assert data.classes[3] == "3"
    assert local("mnist", tmp_path, image_size=32).image_size == 32


@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw", "fashion_mnist"])
def test_sets_with_the_same_file_names_are_kept_apart(tmp_path, folder):
    write_mnist(tmp_path / folder)
    data = local("fashion-mnist", tmp_path)
    assert data.classes[9] == "Ankle boot"
    assert data.flip
    with pytest.raises(DataError, match="mnist must be on this machine"):
        local("mnist", tmp_path)
    with pytest.raises(DataError, match="mnist must be on this machine"):
        local("mnist", tmp_path / folder.partition("/")[0])


@pytest.mark.parametrize(
    ("name", "folder", "fine"),
    [
        ("cifar10", "cifar-10-batches-bin", False),
        ("cifar10", "cifar10", False),
        ("cifar100", "cifar-100-binary", True),
        ("cifar100", "", True),
    ],
)
def test_binary_cifar_is_found(tmp_path, name, folder, fine):
    write_cifar(tmp_path / folder, fine)
    data = local(name, tmp_path)
    assert data.num_classes == len(set(data.classes)) == (100 if fine else 10)
    assert data.classes == tuple(sorted(data.classes))


def test_a_known_set_as_image_folder(tmp_path):
    classes = [f"class{i}" for i in range(10)]
    for kind in ("train", "test"):
        write_folder(tmp_path / kind, classes, n=1, size=(32, 32))
    data = local("cifar10", tmp_path)
    assert data.classes == tuple(classes)
    assert data.mean == (0.4914, 0.4822, 0.4465)


def test_tiny_imagenet_is_brought_to_32_pixels(tmp_path):
    write_hub(tmp_path / "tiny-imagenet-200-32x32", size=(64, 64), n=3, metadata=False)
    data = local("tiny-imagenet", tmp_path)
    assert (data.image_size, data.num_classes) == (32, 200)
    assert local("tiny-imagenet", tmp_path, image_size=64).image_size == 64


def test_another_set_under_the_name_is_refused(tmp_path):
    write_hub(tmp_path / "cifar10", mode="L", size=(8, 8))
    with pytest.raises(DataError, match=r"3 channels\. Got 10 classes and 1 channels"):
        local("cifar10", tmp_path)
    write_hub(tmp_path / "cifar10", size=(8, 8), names=["a", "b"], classes=2)
    with pytest.raises(DataError, match="Got 2 classes"):
        local("cifar10", tmp_path)


def test_data_dir_comes_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "env" / "mnist", n=10)
    monkeypatch.setenv("SCPL_DATA", str(tmp_path / "env"))
    (tmp_path / "own").mkdir()
    assert len(local("mnist", tmp_path / "own").train) == 10
    write_mnist(tmp_path / "own" / "mnist", n=11)
    assert len(local("mnist", tmp_path / "own").train) == 11
    assert len(local("mnist", None).train) == 10
    with pytest.raises(DataError, match="`data_dir` must be an existing folder"):
        local("mnist", tmp_path / "nowhere")


def test_an_incomplete_set_is_passed_over_and_a_damaged_one_not(tmp_path):
    write_mnist(tmp_path / "mnist")
    write_mnist(tmp_path / "MNIST", n=12)
    first = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    whole = first.read_bytes()
    first.unlink()
    assert len(local("mnist", tmp_path).train) == 12
    first.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="intact"):
        local("mnist", tmp_path)


@pytest.mark.parametrize("inside", ["", "data", "plain_text", "cifar10"])
def test_the_hub_is_asked_last(tmp_path, monkeypatch, inside):
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return str(tmp_path)

    write_hub(tmp_path / inside, n=3, image="img")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    data = load("cifar10")
    assert (data.name, len(data.train)) == ("cifar10", 3)
    ((repo, options),) = asked
    assert repo == "uoft-cs/cifar10"
    assert options["repo_type"] == "dataset"
    assert options["etag_timeout"] <= 10
    load("cifar10", data_dir=tmp_path)
    assert len(asked) == 1


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    advice = r"into a folder cifar10 .*test_batch\.bin.*`data_dir` .* SCPL_DATA"
    with pytest.raises(DataError, match=f"ConnectionError: no network in tests. .*{advice}"):
        load("cifar10")
    with pytest.raises(DataError, match=f"Searched no folder.*{advice}"):
        load("cifar10", download=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(DataError, match="must hold train and test parquet files"):
        load("cifar10")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=rf"{advice}; or: pip install 'scpl\[hub\]'"):
        load("cifar10")


def test_a_folder_of_ones_own(tmp_path):
    write_folder(tmp_path / "pets", n=5)
    data = load(str(tmp_path / "pets"))
    assert (data.name, data.classes, len(data.test)) == ("pets", ("cat", "dog"), 2)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert load(str(tmp_path / "pets"), image_size=4).image_size == 4


def test_other_folders(tmp_path):
    write_hub(tmp_path / "flat", size=(8, 8), n=4, metadata=False)
    assert load(str(tmp_path / "flat")).classes == ("0", "1", "2", "3")
    write_mnist(tmp_path / "letters")
    assert load(str(tmp_path / "letters"), image_size=14).image_size == 14
    write_folder(tmp_path / "wide", size=(8, 6))
    with pytest.raises(DataError, match=r"must be square.*image_size"):
        load(str(tmp_path / "wide"))
    assert load(str(tmp_path / "wide"), image_size=6).image_size == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"Got nothing in .*Known: wnids"):
        load(str(tmp_path / "empty"))


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(InputError, match=r"cifar10, .*path of a folder works too"):
        load("cifar-10000")
    with pytest.raises(InputError, match="at least 1 pixel"):
        load("digits", image_size=0)


def test_importing_the_package_brings_no_optional_package():
    code = (
        "import sys, scpl.data.images; optional = {'kornia', 'PIL', 'pyarrow', 'huggingface_hub'};"
        "print(sorted(optional & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_loading_leaves_the_global_random_state(tmp_path):
    write_folder(tmp_path, n=5)
    before = torch.get_rng_state()
    load(str(tmp_path), image_size=4)
    assert torch.equal(torch.get_rng_state(), before)


def write_deep(folder, *values):
    folder.mkdir(parents=True)
    for number, value in enumerate(values):
        pixels = np.full((8, 8), value, np.uint16)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_one_white_is_chosen_for_all_images_of_a_data_set(tmp_path):
    """12 bits in files of 16; a data set that is tested on later is read by the same white."""
    for number, name in enumerate(("a", "b")):
        write_deep(tmp_path / "train" / name, 1000 + number, 3000)
        write_deep(tmp_path / "test" / name, 500)
    data = load(str(tmp_path))
    assert data.white == (4095, 1.0)
    assert data.train.images[:, 0, 0, 0].tolist() == [62, 187, 62, 187]
    assert data.test.images[:, 0, 0, 0].tolist() == [31, 31]
    assert "4,095 is white" in " ".join(data.notes)
    # Alone, these images would be of 10 bits.
    later = tmp_path / "later"
    for name in ("a", "b"):
        write_deep(later / "train" / name, 1000)
        write_deep(later / "test" / name, 500)
    assert load(str(later)).white.whole == 1023
    known = load(str(later), reading=Reading(data.white))
    assert known.test.images[:, 0, 0, 0].tolist() == [31, 31]
    for name in ("a", "b"):
        write_deep(tmp_path / "beyond" / name, *range(5000, 5005))
    with pytest.raises(DataError, match=r"10 of 10 are not.*5,000 \.\. 5,000, must lie .* 4,095"):
        load(str(tmp_path / "beyond"), reading=Reading(data.white))


def test_images_that_cannot_be_read_may_be_left_out_but_no_whole_class(tmp_path):
    write_folder(tmp_path / "train", n=4)
    write_folder(tmp_path / "test", n=2)
    whole = load(str(tmp_path))
    (tmp_path / "train" / "cat" / "001.png").write_bytes(b"junk")
    (tmp_path / "test" / "dog" / "000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 12 are not: .*001\.png.*000\.png.*skip_unreadable"):
        load(str(tmp_path))
    data = load(str(tmp_path), reading=Reading(skip_unreadable=True))
    assert torch.equal(data.train.images, whole.train.images[[0, 2, 3, 4, 5, 6, 7]])
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1]
    assert "images that cannot be read left out: 2 (first: " in " ".join(data.notes)
    (tmp_path / "test" / "dog" / "001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"Got none of 1 of the classes in .*test, .*dog"):
        load(str(tmp_path), reading=Reading(skip_unreadable=True))


def test_class_names_that_are_no_text_are_escaped(tmp_path):
    """A folder may be called by any bytes; a report or table could not be written of it."""
    for name in (os.fsdecode(b"caf\xe9"), "Größe"):
        write_folder(tmp_path, (name,), n=3)
    assert set(load(str(tmp_path)).classes) == {r"caf\xe9", "Größe"}
