"""The data sets known by name, and where they are found: in the user's folders, or on the hub.

Means and standard deviations are those published with the sets or used throughout the literature.
The CIFAR-10 ones (std .2023, .1994, .2010) are an average over images of each image's deviation,
not over all pixels; they are kept because published results were made with them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError

__all__ = [
    "EMBEDDED",
    "IMAGE_SETS",
    "TEXT_SETS",
    "ImageSet",
    "KnownSet",
    "TextSet",
    "find",
    "roots",
]

_log = logging.getLogger(__name__)

EMBEDDED = "digits"
"""The set that comes with the package; all others are files."""
_TIMEOUT_SECONDS = 5.0  # for the question whether something newer exists, not for the download

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A data set known by name.

    Args:
        repo: Its repository on the Hugging Face hub.
        folders: The usual names of its folder.
        test: The split that is tested on.
    """

    repo: str
    folders: tuple[str, ...]
    test: str = "test"

    @property
    def patterns(self) -> list[str]:
        """Which files of the repository are needed."""
        return ["*.parquet", "**/*.parquet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet(KnownSet):
    """A data set of images known by name.

    Args:
        published_as: The format it was published in; a key of ``scpl.data.images.load.FORMATS``.
        channels: 1 for grey images, 3 for colour.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        num_classes: Number of classes.
        classes: Their names, if the files may lack them.
        flip: Whether a mirrored image still belongs to its class.
        image_size: What the literature resizes the images to, in pixels.
        published_size: Side of the published images, in pixels.
    """

    published_as: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    classes: tuple[str, ...] | None = None
    flip: bool = True
    image_size: int | None = None
    published_size: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSet(KnownSet):
    """A data set of texts known by name.

    Args:
        subfolder: Where the hub keeps the files.
        text: Names the text column may have, the hub's first.
        classes: Names of the classes; labels are indices into it.
        num_train: Rows of the official training split.
        num_test: Rows of the split that is tested on.
    """

    subfolder: str
    text: tuple[str, ...] = ("text",)
    classes: tuple[str, ...]
    num_train: int
    num_test: int

    @property
    def patterns(self) -> list[str]:
        """Which files of the repository are needed."""
        return [f"{self.subfolder}/{split}-*.parquet" for split in ("train", self.test)]


_FASHION = "T-shirt/top|Trouser|Pullover|Dress|Coat|Sandal|Shirt|Sneaker|Bag|Ankle boot"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_DBPEDIA = """
    Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building
    NaturalPlace Village Animal Plant Album Film WrittenWork
"""

IMAGE_SETS: Mapping[str, ImageSet] = {
    "mnist": ImageSet(
        repo="ylecun/mnist",
        folders=("mnist", "MNIST"),
        published_as="idx",
        channels=1,
        mean=(0.1307,),
        std=(0.3081,),
        num_classes=10,
        classes=tuple("0123456789"),
        flip=False,
        published_size=28,
    ),
    "fashion-mnist": ImageSet(
        repo="zalando-datasets/fashion_mnist",
        folders=("fashion-mnist", "fashion_mnist", "FashionMNIST"),
        published_as="idx",
        channels=1,
        mean=(0.2860,),
        std=(0.3530,),
        num_classes=10,
        classes=tuple(_FASHION.split("|")),
        published_size=28,
    ),
    "cifar10": ImageSet(
        repo="uoft-cs/cifar10",
        folders=("cifar10", "cifar-10", "cifar-10-batches-bin", "CIFAR-10-images"),
        published_as="cifar10",
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_classes=10,
        classes=tuple(_CIFAR10.split()),
    ),
    "cifar100": ImageSet(
        repo="uoft-cs/cifar100",
        folders=("cifar100", "cifar-100", "cifar-100-binary"),
        published_as="cifar100",
        channels=3,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        num_classes=100,
        classes=tuple(_CIFAR100.split()),
    ),
    "tiny-imagenet": ImageSet(
        repo="zh-plus/tiny-imagenet",
        folders=(
            "tiny-imagenet",
            "tiny_imagenet",
            "tiny-imagenet-200-32x32",
            "tiny-imagenet-200",
        ),
        published_as="tiny-imagenet",
        channels=3,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        num_classes=200,
        image_size=32,
        published_size=64,
    ),
}

TEXT_SETS: Mapping[str, TextSet] = {
    "ag_news": TextSet(
        repo="fancyzhx/ag_news",
        folders=("ag_news",),
        subfolder="data",
        classes=("World", "Sports", "Business", "Sci/Tech"),
        num_train=120_000,
        num_test=7_600,
    ),
    "dbpedia_14": TextSet(
        repo="fancyzhx/dbpedia_14",
        folders=("dbpedia_14",),
        subfolder="dbpedia_14",
        text=("content",),  # without the title, as the paper's
        classes=tuple(_DBPEDIA.split()),
        num_train=560_000,
        num_test=70_000,
    ),
    "imdb": TextSet(
        repo="stanfordnlp/imdb",
        folders=("imdb",),
        subfolder="plain_text",
        classes=("neg", "pos"),
        num_train=25_000,
        num_test=25_000,
    ),
    # The hub hides the labels of the test split; the literature tests on the validation split.
    "sst2": TextSet(
        repo="stanfordnlp/sst2",
        folders=("sst2",),
        subfolder="data",
        text=("sentence", "text"),
        classes=("negative", "positive"),
        num_train=67_349,
        num_test=872,
        test="validation",
    ),
}


def roots(data_dir: Path | None) -> list[Path]:
    """List the folders that may hold data sets: ``data_dir`` (it must exist), ``SCPL_DATA``."""
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise DataError("`data_dir` must be an existing folder", f"Got {data_dir}")
    settings = [data_dir, os.environ.get("SCPL_DATA")]
    return list(dict.fromkeys(Path(setting).expanduser() for setting in settings if setting))


def find(
    name: str,
    known: KnownSet,
    look: Callable[[Path, bool], Found | None],
    *,
    files: str,
    data_dir: Path | None,
    download: bool,
) -> Found:
    """Find a known data set in one of the `roots`, else on the Hugging Face hub.

    Args:
        name: Name of the set.
        known: What is known of it.
        look: Finds the set below a folder, all of which belongs to the set if the second argument
            is true: the hub's own.
        files: Which files a folder must hold, for messages.
        data_dir: Folder that holds data sets.
        download: Whether the hub may be asked.

    Raises:
        DataError: ``data_dir`` does not exist, or the set is nowhere.
    """
    folders = roots(data_dir)
    for root in folders:
        if found := look(root, False):
            return found
    advice = (
        f"Put its files into a folder {known.folders[0]} ({files}) and name the folder above it "
        "with `data_dir` or the environment variable SCPL_DATA"
    )
    if not download:
        looked = " and ".join(map(str, folders)) or "no folder, as none was given"
        raise DataError(
            f"The data set {name} must be on this machine", f"Searched {looked}", advice
        )
    snapshot = _fetch(name, known, advice)
    if found := look(snapshot, True):
        return found
    raise DataError(
        f"{known.repo} must hold train and {known.test} parquet files",
        f"Not so in {snapshot}",
        advice,
    )


def _fetch(name: str, known: KnownSet, advice: str) -> Path:
    """Download the files of a set, or find them in the hub's own cache."""
    rule = f"The data set {name} must be on this machine or be downloadable from {known.repo}"
    try:
        hub = import_extra("huggingface_hub", "hub", "Downloading")
    except InputError as error:
        raise DataError(rule, error.got, f"{advice}; or: pip install 'scpl[hub]'") from error
    _log.info("getting %s from the Hugging Face hub (%s)", name, known.repo)
    try:
        folder = hub.snapshot_download(
            known.repo,
            repo_type="dataset",
            allow_patterns=known.patterns,
            etag_timeout=_TIMEOUT_SECONDS,
        )
    except Exception as error:  # its errors have no common base: OSError, ValueError, httpx's own
        reason = str(error).strip().partition("\n")[0]
        got = f"The download failed: {type(error).__name__}: {reason}"
        raise DataError(rule, got, advice) from error
    return Path(folder)
