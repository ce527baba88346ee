"""Mini-batches of a split, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from scpl.data.epochs import Batch, EpochLoader, require
from scpl.data.images.augment import Augmentation
from scpl.data.images.sets import Split
from scpl.errors import InputError
from scpl.seeding import generator

__all__ = ["Loader"]


class Loader(EpochLoader):
    """Iterates over a split in augmented, normalised mini-batches, on the CPU.

    Every batch is inputs ``float32 [B * views, C, H, W]`` and targets ``int64 [B * views]``; with
    two views the B weak ones come first, then the B augmented ones, in the same order. It depends
    only on the arguments, the epoch and its own number. The global random state is neither read nor
    changed.

    Args:
        split: The images.
        batch_size: Images per batch, before views; the last batch may have fewer.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        augmentation: ``"none"``, ``"basic"`` or ``"strong"``.
        views: 1, or 2 for a weak and an augmented view of each image in one batch.
        flip: Whether ``basic`` and ``strong`` may mirror images.
        shuffle: Whether each epoch has an order of its own.
        seed: Of order and augmentation.
        drop_last: Leave out a last batch that is not full.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.

    Raises:
        InputError: A number is out of its range, or the augmentation is not known.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: str = "none",
        views: int = 1,
        flip: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        super().__init__(batch_size, prefetch)
        require(views in (1, 2), "the number of views must be 1 or 2", views)
        self.split, self.views = split, views
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.augmentation = Augmentation(augmentation, mean, std, flip, seed)
        if len(self) == 0:
            raise InputError(
                "there must be at least one full batch if the last, smaller one is dropped",
                f"Got {len(split)} images and a batch size of {batch_size}",
                "Use a smaller batch size",
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def num_samples(self) -> int:
        """Images per epoch; one image in two views counts once."""
        return min(len(self.split), len(self) * self.batch_size)

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        order = self._order(epoch)
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images, labels = self.split.images[chosen], self.split.labels[chosen]
            if self.views == 1:
                yield self.augmentation(images, epoch=epoch, batch=batch), labels
            else:
                inputs = self.augmentation.two_views(images, epoch=epoch, batch=batch)
                yield inputs, torch.cat([labels, labels])

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.split))
        return torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))
