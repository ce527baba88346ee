"""Mini-batches of images: in a random order, changed at random, as normalised floats.

Crop and flip work on the bytes of a whole batch; the colour formulas are kornia's. All random
numbers come from generators that depend on seed, epoch, batch and view alone, so a resumed run sees
the same images, and a prefetching thread never touches the random state of the network. (Kornia's
own augmentation classes draw from the global state, which two threads cannot share.) The generators
are the CPU's wherever the images are, and only what they drew goes to the device: a batch is the
same on any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from scpl.data.extras import import_extra
from scpl.data.images.dataset import Split
from scpl.data.images.png import png
from scpl.data.loader import Batch, EpochLoader, Shown, check
from scpl.data.sampling import evenly
from scpl.errors import InputError, unknown_name
from scpl.seeding import generator

__all__ = ["AUGMENTATIONS", "Augmentation", "Loader", "normalise"]

AUGMENTATIONS = ("none", "basic", "strong")

_JITTER, _HUE = 0.4, 0.1  # torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1), as the SCPL paper uses it
_JITTER_SHARE, _GREY_SHARE = 0.8, 0.2
_TOGETHER_BYTES = 64 * 2**20  # of batches that a device makes in one go


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A named augmentation for one data set.

    - ``none``: only normalises.
    - ``basic``: zero padding by an eighth of the side (4 for 32 pixels), a random crop back to the
      old size, and a mirror image half the time.
    - ``strong``: ``basic``, then for 80 % of the images a change of brightness, contrast,
      saturation (each by a factor in 0.6..1.4) and hue (up to a tenth of the circle), in an order
      drawn once per batch; 20 % of the images become grey. Colour images only; for grey ones it
      equals ``basic``.

    Args:
        name: One of ``AUGMENTATIONS``.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        flip: Whether mirror images are allowed; not for characters.

    Raises:
        InputError: The name is not known, or kornia is needed and not installed.

    Source: the two pipelines of SCPL's published code; strong is SimCLR's colour distortion.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            raise unknown_name("augmentation", self.name, AUGMENTATIONS)
        if self._colours:  # fail, and pay for the import, now and not in the middle of a run
            import_extra("kornia.enhance", "images", "The augmentation 'strong'")

    @property
    def _colours(self) -> bool:
        return self.name == "strong" and len(self.mean) == 3

    def __call__(
        self,
        images: Tensor,
        *,
        seed: int,
        epoch: int,
        batch: int,
        view: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Augment and normalise one batch, or several that follow each other.

        Several at once come out as one by one, with a fraction of the operations.

        Args:
            images: ``uint8 [B, C, H, W]``, on any device; it is not changed.
            seed: Draws depend on it, and on the following.
            epoch: Number of the epoch.
            batch: Number of the (first) batch in its epoch.
            view: Keeps several views of one batch apart.
            sizes: Images of each batch, which are B together; default: all are of one batch.

        Returns:
            ``float32 [B, C, H, W]``, on the same device.
        """
        if self.name == "none":
            return normalise(images, self.mean, self.std)
        sizes = sizes or [len(images)]
        draws = [
            generator(seed, "augment", epoch, batch + number, view) for number in range(len(sizes))
        ]
        images = _crop(images, sizes, draws)
        if self.flip:
            coins = [_coin(size, 0.5, each) for size, each in zip(sizes, draws, strict=True)]
            mirrored = sent(torch.cat(coins), images.device)
            images = torch.where(mirrored, images.flip(-1), images)
        if not self._colours:
            return normalise(images, self.mean, self.std)
        batches = torch.split(images.float().div_(255), list(sizes))
        pixels = [_colour(part, each) for part, each in zip(batches, draws, strict=True)]
        return _standardise(torch.cat(pixels), self.mean, self.std, scale=1.0)

    def two_views(self, images: Tensor, *, seed: int, epoch: int, batch: int) -> Tensor:
        """Return ``[2B, C, H, W]``: a weak view of each image, then a view by this augmentation.

        The weak view is ``basic``, or ``none`` if this augmentation is ``none``.
        """
        weak = dataclasses.replace(self, name="none" if self.name == "none" else "basic")
        first = weak(images, seed=seed, epoch=epoch, batch=batch, view=0)
        return torch.cat([first, self(images, seed=seed, epoch=epoch, batch=batch, view=1)])


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bring ``uint8 [B, C, H, W]`` to ``float32``, scaled to 0..1, minus mean, over std."""
    return _standardise(images.float(), mean, std, scale=1 / 255)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device without waiting for the device."""
    if device.type == "cuda":  # a copy from memory that the system may move would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _standardise(
    pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], scale: float
) -> Tensor:
    """(scale * pixels - mean) / std per channel, in place."""
    if not len(mean) == len(std) == pixels.shape[1]:
        raise InputError(
            "Mean and std need one number per channel",
            f"Got {len(mean)} and {len(std)} numbers for images of shape {list(pixels.shape)}",
        )
    factor, offset = _line(mean, std, scale, pixels.device)
    return pixels.mul_(factor).sub_(offset)


@lru_cache(maxsize=16)
def _line(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What pixels are multiplied by and what is then subtracted, ``[C, 1, 1]``; made once."""
    means, stds = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return sent(scale / stds, device), sent(means / stds, device)


def _crop(images: Tensor, sizes: Sequence[int], draws: Sequence[torch.Generator]) -> Tensor:
    """Pad with black and cut a window of the old size out at a random place, per image."""
    height, width = images.shape[2:]
    pad = max(1, round(width / 8))
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    corners = [
        torch.randint(0, 2 * pad + 1, (2, size), generator=each)
        for size, each in zip(sizes, draws, strict=True)
    ]
    top, left = sent(torch.cat(corners, 1), images.device)
    return windows[torch.arange(len(images), device=images.device), :, top, left].contiguous()


def _colour(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Jitter the colours of most images and make some grey; ``float32`` in 0..1."""
    from kornia import color

    device = pixels.device
    jitter = _coin(len(pixels), _JITTER_SHARE, draws).flatten()
    grey = sent(_coin(len(pixels), _GREY_SHARE, draws), device)
    if bool(jitter.any()):
        chosen = sent(torch.nonzero(jitter)[:, 0], device)
        pixels = pixels.index_copy(0, chosen, _jitter(pixels[chosen], draws))
    return torch.where(grey, color.rgb_to_grayscale(pixels), pixels)


def _jitter(pixels: Tensor, draws: torch.Generator) -> Tensor:
    from kornia import enhance

    steps = (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        enhance.adjust_hue,
    )
    shift = torch.rand(4, len(pixels), generator=draws) * 2 - 1  # -1..1, one row per step
    factors = 1 + _JITTER * shift
    factors[3] = 2 * math.pi * _HUE * shift[3]  # kornia turns the hue by an angle
    factors = sent(factors, pixels.device)
    for step in torch.randperm(4, generator=draws).tolist():
        pixels = steps[step](pixels, factors[step])
    return pixels


def _coin(count: int, chance: float, draws: torch.Generator) -> Tensor:
    """Draw one bool per image, shaped ``[count, 1, 1, 1]``."""
    return (torch.rand(count, generator=draws) < chance).view(-1, 1, 1, 1)


class Loader(EpochLoader):
    """Iterates over a split in augmented, normalised mini-batches.

    Every batch is inputs ``float32 [B * views, C, H, W]`` and targets ``int64 [B * views]``; with
    two views the B weak ones come first, then the B augmented ones, in the same order. It depends
    only on the arguments, the epoch and its own number.

    With a ``device`` the images lie there as bytes, and batches are made there, several at a time:
    nothing but the random draws is copied, and nothing waits for the device. A thread would only
    add to one queue of work, so there is none.

    Args:
        split: The images.
        augmentation: How they are changed and normalised.
        batch_size: Images per batch, before views; the last batch may have fewer.
        views: 1, or 2 for a weak and an augmented view of each image in one batch.
        shuffle: Whether each epoch has an order of its own.
        seed: Of order and augmentation.
        strata: With ``shuffle``: draw equally often from each of these classes, ``int64 [N]`` on
            the CPU, instead of every image once per epoch.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.
        device: Where the images lie and batches are made; default: where the images are now, with
            a thread.

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
        strata: Tensor | None = None,
        prefetch: int = 2,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(len(split), batch_size, prefetch if device is None else 0)
        check(views in (1, 2), "The number of views must be 1 or 2", views)
        self.augmentation, self.views = augmentation, views
        self.split = split if device is None else split.to(device)
        self.shuffle, self.seed, self._strata = shuffle, seed, strata
        self._together = 1
        if device is not None and views == 1:
            batch_bytes = 4 * batch_size * split.images[0].numel()
            self._together = max(1, _TOGETHER_BYTES // batch_bytes)

    def show(self, place: int) -> Shown:  # noqa: D102
        index = int(self._order(self.epoch)[place])
        return Shown(self.split.name(index), picture=png(self.split.images[index]))

    def _order(self, epoch: int) -> Tensor:
        """The images of an epoch in their order, as indices on the CPU."""
        if not self.shuffle:
            return torch.arange(len(self.split))
        draws = generator(self.seed, "order", epoch)
        if self._strata is None:
            return torch.randperm(len(self.split), generator=draws)
        return evenly(self._strata, draws)

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        order = sent(self._order(epoch), self.split.images.device)
        numbers = range(start, len(self), self._together)
        ends = [(n * self.batch_size, (n + self._together) * self.batch_size) for n in numbers]
        found = self.split.batches(order[begin:end] for begin, end in ends)
        for number, (images, labels) in zip(numbers, found, strict=True):
            yield from self._made(images, labels, seed=self.seed, epoch=epoch, batch=number)

    def _made(self, images: Tensor, labels: Tensor, **draws: int) -> Iterator[Batch]:
        """Make the batches that hold these images, numbered from ``draws["batch"]``."""
        if self.views == 2:
            yield self.augmentation.two_views(images, **draws), torch.cat([labels, labels])
            return
        targets = torch.split(labels, self.batch_size)
        sizes = [len(each) for each in targets]
        inputs = self.augmentation(images, sizes=sizes, **draws)
        yield from zip(torch.split(inputs, sizes), targets, strict=True)
