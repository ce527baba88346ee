"""Mini-batches of a split, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from scpl.data.augment import Augmentation
from scpl.data.images import Split
from scpl.data.prefetch import prefetched
from scpl.data.seeding import generator
from scpl.errors import InputError

__all__ = ["Loader"]

Batch = tuple[Tensor, Tensor]


class Loader:
    """Iterates over a split in augmented, normalised mini-batches, on the CPU.

    Every batch depends only on the arguments, the epoch and its own number; so training can resume
    in the middle of an epoch, and preparing batches in a thread changes no number. The global
    random state is neither read nor changed.

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
        _require(batch_size >= 1, "the batch size must be at least 1", batch_size)
        _require(views in (1, 2), "the number of views must be 1 or 2", views)
        _require(prefetch >= 0, "the number of batches to prefetch must be 0 or more", prefetch)
        self.split, self.batch_size, self.views = split, batch_size, views
        self.shuffle, self.seed, self.drop_last, self.prefetch = shuffle, seed, drop_last, prefetch
        self.augmentation = Augmentation(augmentation, mean, std, flip, seed)
        self.epoch = 0
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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterators made from now on; those under way keep theirs."""
        _require(epoch >= 0, "the epoch must be 0 or more", epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Iterate over the batches of the epoch, beginning with number ``start``.

        Those before are not produced. Closing the iterator, or dropping the last reference to it,
        ends its thread.

        Yields:
            Inputs ``float32 [B * views, C, H, W]`` and targets ``int64 [B * views]``; with two
            views the B weak ones come first, then the B augmented ones, in the same order.

        Raises:
            InputError: ``start`` is not one of 0..len(self).
        """
        _require(0 <= start <= len(self), f"the first batch must be 0..{len(self)}", start)
        produced = self._produce(self.epoch, start)
        return prefetched(produced, self.prefetch) if self.prefetch else produced

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
        return torch.randperm(len(self.split), generator=generator("order", self.seed, epoch))


def _require(holds: bool, rule: str, got: int) -> None:
    if not holds:
        raise InputError(rule, f"Got {got}")
