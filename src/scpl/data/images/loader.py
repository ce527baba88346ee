"""Mini-batches of images: in a random order, changed at random, as normalised floats.

Crop and flip work on the bytes of a whole batch; the colour formulas are kornia's. All random
numbers come from generators that depend on seed, epoch, batch and view alone, so a resumed run sees
the same images, and a prefetching thread never touches the random state of the network. (Kornia's
own augmentation classes draw from the global state, which two threads cannot share.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator

import torch
from torch import Tensor
from torch.nn import functional as F

from scpl.data.extras import import_extra
from scpl.data.images.dataset import Split
from scpl.data.loader import Batch, EpochLoader, check
from scpl.errors import InputError, unknown_name
from scpl.seeding import generator

__all__ = ["AUGMENTATIONS", "Augmentation", "Loader", "normalise"]

AUGMENTATIONS = ("none", "basic", "strong")

_JITTER, _HUE = 0.4, 0.1  # torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1), as the SCPL paper uses it
_JITTER_SHARE, _GREY_SHARE = 0.8, 0.2


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
        self, images: Tensor, *, seed: int, epoch: int, batch: int, view: int = 0
    ) -> Tensor:
        """Augment and normalise one batch.

        Args:
            images: ``uint8 [B, C, H, W]``; it is not changed.
            seed: Draws depend on it, and on the following.
            epoch: Number of the epoch.
            batch: Number of the batch in its epoch.
            view: Keeps several views of one batch apart.

        Returns:
            ``float32 [B, C, H, W]``.
        """
        if self.name == "none":
            return normalise(images, self.mean, self.std)
        draws = generator(seed, "augment", epoch, batch, view)
        images = _crop(images, draws)
        if self.flip:
            images = torch.where(_coin(len(images), 0.5, draws), images.flip(-1), images)
        if not self._colours:
            return normalise(images, self.mean, self.std)
        pixels = _colour(images.float().div_(255), draws)
        return _standardise(pixels, self.mean, self.std, scale=1.0)

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


def _standardise(
    pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], scale: float
) -> Tensor:
    """(scale * pixels - mean) / std per channel, in place."""
    if not len(mean) == len(std) == pixels.shape[1]:
        raise InputError(
            "Mean and std need one number per channel",
            f"Got {len(mean)} and {len(std)} numbers for images of shape {list(pixels.shape)}",
        )
    means, stds = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return pixels.mul_(scale / stds).sub_(means / stds)


def _crop(images: Tensor, draws: torch.Generator) -> Tensor:
    """Pad with black and cut a window of the old size out at a random place, per image."""
    height, width = images.shape[2:]
    pad = max(1, round(width / 8))
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=draws)
    return windows[torch.arange(len(images)), :, top, left].contiguous()


def _colour(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Jitter the colours of most images and make some grey; ``float32`` in 0..1."""
    from kornia import color

    jitter = _coin(len(pixels), _JITTER_SHARE, draws).flatten()
    grey = _coin(len(pixels), _GREY_SHARE, draws)
    if bool(jitter.any()):
        pixels[jitter] = _jitter(pixels[jitter], draws)
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
    for step in torch.randperm(4, generator=draws).tolist():
        pixels = steps[step](pixels, factors[step])
    return pixels


def _coin(count: int, chance: float, draws: torch.Generator) -> Tensor:
    """Draw one bool per image, shaped ``[count, 1, 1, 1]``."""
    return (torch.rand(count, generator=draws) < chance).view(-1, 1, 1, 1)


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
