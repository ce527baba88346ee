"""Mini-batches of images, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Generator

import torch

from scpl.data.images.augment import Augmentation
from scpl.data.images.dataset import Split
from scpl.data.loader import Batch, EpochLoader, check
from scpl.seeding import generator

__all__ = ["Loader"]


class Loader(EpochLoader):
    """Iterates over a split in augmented, normalised mini-batches, on the CPU.

    Every batch is inputs ``float32 [B * views, C, H, W]`` and targets ``int64 [B * views]``; with
    two views the B weak ones come first, then the B augmented ones, in the same order. It depends
    only on the arguments, the epoch and its own number.

    Args:
        split: The images.
        augmentation: How they are changed and normalised.
        batch_size: Images per batch, before views; the last batch may have fewer.
        views: 1, or 2 for a weak and an augmented view of each image in one batch.
        shuffle: Whether each epoch has an order of its own.
        seed: Of order and augmentation.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.

    Raises:
        InputError: A number is out of its range.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        *,
        batch_size: int,
        views: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        prefetch: int = 2,
    ) -> None:
        super().__init__(len(split), batch_size, prefetch)
        check(views in (1, 2), "The number of views must be 1 or 2", views)
        self.split, self.augmentation, self.views = split, augmentation, views
        self.shuffle, self.seed = shuffle, seed

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        order = torch.arange(len(self.split))
        if self.shuffle:
            order = torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images, labels = self.split.images[chosen], self.split.labels[chosen]
            draws = {"seed": self.seed, "epoch": epoch, "batch": batch}
            if self.views == 1:
                yield self.augmentation(images, **draws), labels
            else:
                yield self.augmentation.two_views(images, **draws), torch.cat([labels, labels])
