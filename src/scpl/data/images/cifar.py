"""CIFAR-10 and CIFAR-100 in their *binary version*.

A row is one or two label bytes, then 3 x 32 x 32 pixels. The Python version of the archives is a
pickle, which can run code when it is opened; it is not read.
Source of the format: Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from scpl.data.images.sets import Parts, Split
from scpl.errors import DataError

__all__ = ["has_cifar10", "has_cifar100", "read_cifar10", "read_cifar100"]

_TRAIN_10 = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


def has_cifar10(folder: Path) -> bool:
    """Whether ``folder`` holds ``data_batch_1.bin`` to ``5.bin`` and ``test_batch.bin``."""
    return all((folder / name).is_file() for name in (*_TRAIN_10, "test_batch.bin"))


def has_cifar100(folder: Path) -> bool:
    """Whether ``folder`` holds ``train.bin`` and ``test.bin``."""
    return all((folder / name).is_file() for name in ("train.bin", "test.bin"))


def read_cifar10(folder: Path, image_size: int | None = None) -> Parts:
    """Read CIFAR-10; ``image_size`` is ignored, the images are 32 x 32.

    Raises:
        DataError: A file is unreadable, truncated, or holds a label that cannot be.
    """
    train = [folder / name for name in _TRAIN_10]
    return _read(folder, train, folder / "test_batch.bin", "batches.meta.txt", num_labels=1)


def read_cifar100(folder: Path, image_size: int | None = None) -> Parts:
    """Read CIFAR-100 with its 100 fine labels; ``image_size`` is ignored, the images are 32 x 32.

    Raises:
        DataError: A file is unreadable, truncated, or holds a label that cannot be.
    """
    # Each row has two labels: one of 20 coarse classes, then one of 100 fine classes.
    train = [folder / "train.bin"]
    return _read(folder, train, folder / "test.bin", "fine_label_names.txt", num_labels=2)


def _read(folder: Path, train: list[Path], test: Path, names: str, num_labels: int) -> Parts:
    classes = _class_names(folder / names)
    num_classes = 10 if num_labels == 1 else 100
    if classes is not None and len(classes) != num_classes:
        raise DataError(
            f"{folder / names} must name {num_classes} classes", f"Got {len(classes)} names"
        )
    parts = [_read_file(path, num_labels, num_classes) for path in train]
    joined = Split(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )
    return Parts(joined, _read_file(test, num_labels, num_classes), classes)


def _read_file(path: Path, num_labels: int, num_classes: int) -> Split:
    row = num_labels + _PIXELS
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError("a CIFAR file must be readable", f"Got {path}: {error}") from error
    if data.size == 0 or data.size % row:
        raise DataError(
            f"{path} must hold whole rows of {row} bytes",
            f"Got {data.size} bytes: {data.size // row} rows and {data.size % row} bytes more",
            "Download the binary version again",
        )
    rows = torch.from_numpy(data.reshape(-1, row))
    labels = rows[:, num_labels - 1].long()
    if int(labels.max()) >= num_classes:
        raise DataError(
            f"labels in {path} must be 0..{num_classes - 1}",
            f"Got {int(labels.max())} in row {int(labels.argmax())}",
            "Download the binary version again",
        )
    return Split(rows[:, num_labels:].reshape(-1, 3, _SIDE, _SIDE), labels)


def _class_names(path: Path) -> tuple[str, ...] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None  # the file of names is optional: the known names serve as well
    return tuple(line.strip() for line in lines if line.strip()) or None
