"""Labelled images: known data sets, the user's own files, augmentation and mini-batches."""

from scpl.data.images.dataset import (
    ImageData,
    Split,
    carve_validation,
    limit,
    sentence,
    shared_images,
)
from scpl.data.images.decode import EXTENSIONS, decode_images
from scpl.data.images.load import known, load
from scpl.data.images.loader import AUGMENTATIONS, Augmentation, Loader, normalise
from scpl.data.known import EMBEDDED, IMAGE_SETS

__all__ = [
    "AUGMENTATIONS",
    "EMBEDDED",
    "EXTENSIONS",
    "IMAGE_SETS",
    "Augmentation",
    "ImageData",
    "Loader",
    "Split",
    "carve_validation",
    "decode_images",
    "known",
    "limit",
    "load",
    "normalise",
    "sentence",
    "shared_images",
]
