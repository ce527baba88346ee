"""What a data set of labelled images is, and how subsets of it are drawn.

Images stay bytes until a batch is made: 60,000 CIFAR images take 184 MB as ``uint8`` and four times
that as ``float32``. More than memory holds stay encoded on disk, see ``ondemand``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from scpl.data.identity import Identity, of_samples, shared, short
from scpl.data.images.decode import EIGHT_BITS, WhiteLevels, check_room
from scpl.data.images.ondemand import OnDemand, pixel_sums, with_channels
from scpl.data.sampling import stratified
from scpl.errors import DataError, InputError
from scpl.seeding import generator

__all__ = [
    "Counted",
    "ImageData",
    "Split",
    "carve_validation",
    "channel_stats",
    "check_classes",
    "check_normalisation",
    "limit",
    "resize",
    "sentence",
    "shared_images",
]


_CHUNK_BYTES = 8 << 20  # of images whose pixels are summed up at once, in eight times the memory


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Args:
        images: ``uint8``, shape ``[N, C, H, W]``, with N >= 1; in memory, or decoded on demand.
        labels: ``int64``, shape ``[N]``, none negative.
        place: Which images these are, for messages, e.g. ``"photos/train"``.
        names: What each is: a file, or a row of one; nothing where they have no names.
        digests: ``int64 [N]``, of each image as it was before it was decoded or resized; None where
            nobody asks.

    Raises:
        DataError: A shape or type is another, the counts differ, or there is no image.
    """

    images: Tensor | OnDemand
    labels: Tensor
    place: str = ""
    names: Sequence[object] = ()
    digests: Tensor | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError("Images must be uint8 of shape [N, C, H, W]", _got(images))
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError("Labels must be int64 of shape [N]", _got(labels))
        if len(images) != len(labels):
            raise DataError(
                "There must be one label for each image",
                f"Got {len(images)} images and {len(labels)} labels",
            )
        if images.shape.numel() == 0:
            raise DataError("A split must hold at least one image", _got(images))
        if int(labels.min()) < 0:
            raise DataError(
                "Labels must be 0 or more",
                f"Got {int(labels.min())} at index {int(labels.argmin())}",
                "A label of -1 often marks an unlabelled test set; use the labelled one",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """Return the images at ``indices`` (``int64 [M]``), in that order; in memory, as a copy."""
        images = self.images
        chosen = images.subset(indices) if isinstance(images, OnDemand) else images[indices]
        names = [self.names[index] for index in indices.tolist()] if self.names else ()
        digests = None if self.digests is None else self.digests[indices]
        return Split(chosen, self.labels[indices], self.place, names, digests)

    def name(self, index: int) -> str:
        """Say which image it is: its file, or its number from 1."""
        return str(self.names[index]) if self.names else f"image {index + 1:,} of {len(self):,}"

    def batches(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``uint8 [M, C, H, W]`` and labels of each batch of indices ``int64 [M]``.

        What must be decoded is decoded ahead.
        """
        images, places = self.images, list(batches)
        if isinstance(images, OnDemand):
            pixels = images.each(places)
        else:
            pixels = (images[each] for each in places)
        yield from zip(pixels, (self.labels[each] for each in places), strict=True)

    def with_channels(self, channels: int) -> Split:
        """Return the same in grey (1) or colour (3)."""
        images = self.images
        changed = (
            images.with_channels(channels)
            if isinstance(images, OnDemand)
            else with_channels(images, channels)
        )
        return dataclasses.replace(self, images=changed)

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    def to(self, device: torch.device | str) -> Split:
        """Return the same on a device.

        Raises:
            InputError: The images are not in memory.
        """
        if isinstance(self.images, OnDemand):
            raise InputError("Images that are decoded on demand must stay where they are", "")
        return dataclasses.replace(
            self, images=self.images.to(device), labels=self.labels.to(device)
        )

    def identified(self) -> Split:
        """Return the same with digests; those of the pixels, if it has none yet."""
        if self.digests is not None:
            return self
        pixels = self.images[:].contiguous().numpy()
        digests = torch.tensor([short(image.data) for image in pixels], dtype=torch.int64)
        return dataclasses.replace(self, digests=digests)

    def identity(self, names: Sequence[str]) -> Identity:
        """Say what it is, with the names of its classes."""
        digests = self.identified().digests
        assert digests is not None
        return of_samples(digests, self.labels, names)


def _got(tensor: Tensor | OnDemand) -> str:
    return f"Got {tensor.dtype} of shape {list(tensor.shape)}"


class Counted(Protocol):
    """Images, decoded or not, of which is known where they come from."""

    @property
    def place(self) -> str:
        """Which images these are, for messages."""

    def __len__(self) -> int: ...


def sentence(**splits: Counted | None) -> str:
    """Say how many images of which folders or files a split has, for each that there is."""
    return ", ".join(
        f"{name}: {len(split):,} image{'s' * (len(split) != 1)} of {split.place or 'the data'}"
        for name, split in splits.items()
        if split is not None
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: two splits of square images, class names, and how to normalise.

    Args:
        name: Name of the set, for reports.
        train: Images to learn from.
        test: Images to score on, of the same shape.
        classes: Name of each class; a label is an index into it.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        flip: Whether a mirrored image still belongs to its class (not so for characters).
        valid: Images to validate on, if the data set says which.
        notes: What the user should know of the data.
        white: What values of more than 8 bits were scaled by.

    Raises:
        DataError: A label has no class, or the shapes of the parts do not fit each other.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    valid: Split | None = None
    notes: tuple[str, ...] = ()
    white: WhiteLevels = EIGHT_BITS

    def __post_init__(self) -> None:
        check_classes(self.classes, self.name)
        train = list(self.train.images.shape[1:])
        for split in self._splits:
            if train != list(split.images.shape[1:]):
                raise DataError(
                    f"Train and test images of {self.name} must have one shape [C, H, W]",
                    f"Got {train} and {list(split.images.shape[1:])}",
                    "Give `image_size` to bring all to one size",
                )
        if train[1] != train[2]:
            raise DataError(
                f"Images of {self.name} must be square",
                f"Got height {train[1]} and width {train[2]}",
                "Give `image_size`: the shorter side is resized to it and the centre cut out",
            )
        for kind, split in zip(("train", "test", "valid"), self._splits, strict=False):
            if int(split.labels.max()) >= len(self.classes):
                raise DataError(
                    f"Labels of {self.name} must be 0..{len(self.classes) - 1}, "
                    f"one for each of its {len(self.classes)} classes",
                    f"Got {int(split.labels.max())} in the {kind} split",
                )
        check_normalisation(self.mean, self.std, self.channels, self.name)

    @property
    def _splits(self) -> list[Split]:
        return [self.train, self.test] + ([] if self.valid is None else [self.valid])

    def each(self, change: Callable[[Split], Split], **others: Any) -> ImageData:
        """Return the same with every split changed in one way, and these other values."""
        train, test, *valid = map(change, self._splits)
        held_out = valid[0] if valid else None
        return dataclasses.replace(self, train=train, test=test, valid=held_out, **others)

    @property
    def identities(self) -> dict[str, Identity]:
        """What the splits are, by name."""
        return {
            name: of_samples(split.digests, split.labels, self.classes)
            for name, split in zip(("train", "test", "valid"), self._splits, strict=False)
            if split.digests is not None
        }

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.train.images.shape[2])


def check_classes(classes: Sequence[str], place: str) -> None:
    """Check that there is something to tell apart.

    Raises:
        DataError: There is not; ``place`` is for the message.
    """
    if len(classes) < 2:
        raise DataError(
            "There must be images of at least two classes, to tell them apart",
            f"Got only {', '.join(classes) or 'nothing'} in {place}",
            "Add images of another class, in a folder of their own",
        )


def check_normalisation(
    mean: Sequence[float], std: Sequence[float], channels: int, name: str
) -> None:
    """Check that pixels of some data set can be normalised so.

    Raises:
        DataError: They cannot; ``name`` is for the message.
    """
    fits = len(mean) == len(std) == channels and all(map(math.isfinite, (*mean, *std)))
    if not fits or any(value <= 0 for value in std):
        raise DataError(
            f"Mean and std of {name} need one finite number for each of its {channels} channels, "
            "and each std must be above 0",
            f"Got mean {mean} and std {std}",
        )


def carve_validation(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a validation split off, with the same share of every class; one image of each stays.

    Args:
        split: What to cut; it is not changed.
        fraction: Share of the images that goes to validation, between 0 and 1.
        seed: The same seed cuts the same images; the global random state is not used.

    Returns:
        The rest to train on and the validation split: disjoint, both in the original order.

    Raises:
        InputError: The fraction is not between 0 and 1.
        DataError: One of the two would be empty, or the first lack a class.
    """
    if not 0 < fraction < 1:
        raise InputError("The validation fraction must be above 0 and below 1", f"Got {fraction}")
    chosen = stratified(split.labels, round(len(split) * fraction), generator(seed, "carve"))
    left = torch.bincount(split.labels[~chosen], minlength=int(split.labels.max()) + 1)
    chosen &= left[split.labels] > 0  # the only image of a class stays
    if not chosen.any():
        raise DataError(
            "Both parts of a split must keep at least one image, and the first one of every class",
            f"Got a fraction of {fraction} of {len(split)} images",
            "Use more images or another fraction",
        )
    rest, carved = (split.take(torch.nonzero(mask)[:, 0]) for mask in (~chosen, chosen))
    return rest, dataclasses.replace(carved, place=f"{split.place} (held out)")


def limit(split: Split, n: int, seed: int) -> Split:
    """Keep at most ``n`` images, with the same share of every class, in their original order.

    Raises:
        InputError: ``n`` is below 1.
    """
    if n < 1:
        raise InputError("The number of images to keep must be at least 1", f"Got {n}")
    if n >= len(split):
        return split
    chosen = stratified(split.labels, n, generator(seed, "limit"))
    return split.take(torch.nonzero(chosen)[:, 0])


def resize(split: Split, size: int) -> Split:
    """Resize square images to ``size`` x ``size`` pixels (bilinear, antialiased)."""
    if split.images.shape[2:] == (size, size):
        return split
    check_room(*split.images.shape[:2], size, size)
    images = F.interpolate(split.images[:], (size, size), mode="bilinear", antialias=True)
    return dataclasses.replace(split, images=images)


def shared_images(train: Split, valid: Split | None, test: Split) -> tuple[str, ...]:
    """Say how many images to validate and test on are learnt from as well."""
    keys = {
        name: split.digests
        for name, split in (("train", train), ("validation", valid), ("test", test))
        if split is not None and split.digests is not None
    }
    return tuple(shared("images", **keys)) if "train" in keys else ()


def channel_stats(images: Tensor | OnDemand) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``uint8 [N, C, H, W]``, scaled to 0..1."""
    count, channels, height, width = images.shape
    if isinstance(images, OnDemand) and images.sums is not None:
        total, squares = images.sums[images.rows].sum(0)[:, :channels].double()
    else:
        rows = max(1, _CHUNK_BYTES // (channels * height * width))
        chunks = (images[start : start + rows] for start in range(0, count, rows))
        total, squares = torch.stack([pixel_sums(chunk).sum(0) for chunk in chunks]).sum(0).double()
    count *= height * width
    mean = total / (255 * count)
    variance = (squares / (255**2 * count) - mean.square()).clamp(min=0)
    std = variance.sqrt().clamp(min=1 / 255)  # a constant channel must not divide by zero
    return tuple(mean.tolist()), tuple(std.tolist())
