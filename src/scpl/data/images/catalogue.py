"""The data sets known by name: where they are found, their classes, how they are normalised.

Means and standard deviations are those published with the sets or used throughout the literature.
The CIFAR-10 ones (std .2023, .1994, .2010) are an average over images of each image's deviation,
not over all pixels; they are kept because published results were made with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from scpl.data.images.cifar import has_cifar10, has_cifar100, read_cifar10, read_cifar100
from scpl.data.images.folder import has_folder, read_folder
from scpl.data.images.idx import has_mnist, read_mnist
from scpl.data.images.parquet import has_parquet, read_parquet
from scpl.data.images.sets import Parts
from scpl.data.images.tiny_imagenet import has_tiny_imagenet, read_tiny_imagenet

__all__ = ["ANY_FORMATS", "EMBEDDED", "FOLDER", "KNOWN", "Format", "Known"]

EMBEDDED = "digits"
"""The set that comes with the package; all others are files."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of files: whether a folder holds a complete set of them, and how to read it."""

    files: str
    complete: Callable[[Path], bool]
    read: Callable[[Path, int | None], Parts]


@dataclasses.dataclass(frozen=True)
class Known:
    """A data set known by name."""

    repo: str
    folders: tuple[str, ...]
    formats: tuple[Format, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    classes: tuple[str, ...] | None = None
    flip: bool = True
    image_size: int | None = None
    published_size: int = 32


IDX = Format("train-images-idx3-ubyte(.gz) and the other three idx files", has_mnist, read_mnist)
CIFAR10 = Format("data_batch_1.bin .. 5.bin and test_batch.bin", has_cifar10, read_cifar10)
CIFAR100 = Format("train.bin and test.bin", has_cifar100, read_cifar100)
TINY = Format("wnids.txt, train and val", has_tiny_imagenet, read_tiny_imagenet)
PARQUET = Format("train-*.parquet and test-*.parquet", has_parquet, read_parquet)
FOLDER = Format("folders train/<class> and test/<class> of images", has_folder, read_folder)
ANY_FORMATS = (TINY, PARQUET, IDX, CIFAR10, CIFAR100, FOLDER)

_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
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

KNOWN: Mapping[str, Known] = {
    "mnist": Known(
        repo="ylecun/mnist",
        folders=("mnist", "MNIST"),
        formats=(IDX, PARQUET, FOLDER),
        channels=1,
        mean=(0.1307,),
        std=(0.3081,),
        num_classes=10,
        classes=tuple("0123456789"),
        flip=False,
        published_size=28,
    ),
    "fashion-mnist": Known(
        repo="zalando-datasets/fashion_mnist",
        folders=("fashion-mnist", "fashion_mnist", "FashionMNIST"),
        formats=(IDX, PARQUET, FOLDER),
        channels=1,
        mean=(0.2860,),
        std=(0.3530,),
        num_classes=10,
        classes=_FASHION,
        published_size=28,
    ),
    "cifar10": Known(
        repo="uoft-cs/cifar10",
        folders=("cifar10", "cifar-10", "cifar-10-batches-bin", "CIFAR-10-images"),
        formats=(CIFAR10, PARQUET, FOLDER),
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_classes=10,
        classes=tuple(_CIFAR10.split()),
    ),
    "cifar100": Known(
        repo="uoft-cs/cifar100",
        folders=("cifar100", "cifar-100", "cifar-100-binary"),
        formats=(CIFAR100, PARQUET, FOLDER),
        channels=3,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        num_classes=100,
        classes=tuple(_CIFAR100.split()),
    ),
    "tiny-imagenet": Known(
        repo="zh-plus/tiny-imagenet",
        folders=(
            "tiny-imagenet",
            "tiny_imagenet",
            "tiny-imagenet-200-32x32",
            "tiny-imagenet-200",
        ),
        formats=(TINY, PARQUET, FOLDER),
        channels=3,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        num_classes=200,
        image_size=32,
        published_size=64,
    ),
}
