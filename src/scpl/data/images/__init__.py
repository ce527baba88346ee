"""Labelled images: known data sets, the user's own files, augmentation and mini-batches."""

from scpl.data.images.dataset import (
    ImageData,
    Split,
    carve_validation,
    limit,
    sentence,
    shared_images,
)
from scpl.data.images.decode import (
    EXTENSIONS,
    Reading,
    WhiteLevels,
    decode_images,
    decode_readable,
)
from scpl.data.images.folders import image_files
from scpl.data.images.load import known, load, load_test
from scpl.data.images.loader import AUGMENTATIONS, Augmentation, Loader, normalise
from scpl.data.images.ondemand import OnDemand, with_channels
from scpl.data.images.tables import Naming, TableSettings, names_images, naming_of
from scpl.data.known import EMBEDDED, IMAGE_SETS

__all__ = [
    "AUGMENTATIONS",
    "EMBEDDED",
    "EXTENSIONS",
    "IMAGE_SETS",
    "Augmentation",
    "ImageData",
    "Loader",
    "Naming",
    "OnDemand",
    "Reading",
    "Split",
    "TableSettings",
    "WhiteLevels",
    "carve_validation",
    "decode_images",
    "decode_readable",
    "image_files",
    "known",
    "limit",
    "load",
    "load_test",
    "names_images",
    "naming_of",
    "normalise",
    "sentence",
    "shared_images",
    "with_channels",
]
