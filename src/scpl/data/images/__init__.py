"""Labelled images: known data sets, the user's own files, augmentation and mini-batches."""

from scpl.data.images.augment import AUGMENTATIONS, Augmentation
from scpl.data.images.loader import Loader
from scpl.data.images.registry import is_here, known, load
from scpl.data.images.sets import ImageData, Split, carve_validation, limit

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "ImageData",
    "Loader",
    "Split",
    "carve_validation",
    "is_here",
    "known",
    "limit",
    "load",
]
