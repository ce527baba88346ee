"""Labelled images: known data sets, the user's own files, augmentation and mini-batches."""

from scpl.data.augment import AUGMENTATIONS, Augmentation
from scpl.data.images import ImageData, Split, carve_validation, limit
from scpl.data.loader import Loader
from scpl.data.registry import is_here, known, load

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
