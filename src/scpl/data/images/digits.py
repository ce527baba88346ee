"""Handwritten digits that come with the package: 1,797 images of 8 x 8 pixels, for tests and tries.

Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0. Changes: see ``files/ATTRIBUTION.txt``.
"""

from __future__ import annotations

from importlib import resources

import torch

from scpl.data.images.idx import parse_idx
from scpl.data.images.sets import ImageData, Split, carve_validation, channel_stats

__all__ = ["load_digits"]

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: the test images must be the same for every user and every run


def load_digits() -> ImageData:
    """Read the embedded digits: 1,438 train and 359 test images, ``uint8 [N, 1, 8, 8]``.

    Raises:
        DataError: The installed files are damaged.
    """
    folder = resources.files("scpl.data") / "files"
    arrays = []
    for name in ("digits-images-idx3-ubyte.gz", "digits-labels-idx1-ubyte.gz"):
        arrays.append(torch.from_numpy(parse_idx((folder / name).read_bytes(), name)))
    everything = Split(arrays[0][:, None], arrays[1].long())
    train, test = carve_validation(everything, _TEST_SHARE, _SPLIT_SEED)
    mean, std = channel_stats(train.images)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData("digits", train, test, classes, mean, std, flip=False)
