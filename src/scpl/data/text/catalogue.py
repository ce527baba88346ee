"""The text data sets known by name, as the Hugging Face hub has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["TEXT_SETS", "TextSet"]


@dataclasses.dataclass(frozen=True)
class TextSet:
    """A text data set known by name.

    Args:
        repo: Its repository on the hub.
        folder: The usual name of its folder.
        subfolder: Where the hub keeps the files.
        text: Names the text column may have, the hub's first.
        classes: Names of the classes; labels are indices into it.
        num_train: Rows of the official training split.
        num_test: Rows of the split that is tested on.
        test: Which split that is.
    """

    repo: str
    folder: str
    subfolder: str
    text: tuple[str, ...]
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    test: str = "test"


_DBPEDIA = (
    "Company",
    "EducationalInstitution",
    "Artist",
    "Athlete",
    "OfficeHolder",
    "MeanOfTransportation",
    "Building",
    "NaturalPlace",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "WrittenWork",
)

TEXT_SETS: Mapping[str, TextSet] = {
    "ag_news": TextSet(
        repo="fancyzhx/ag_news",
        folder="ag_news",
        subfolder="data",
        text=("text",),
        classes=("World", "Sports", "Business", "Sci/Tech"),
        num_train=120_000,
        num_test=7_600,
    ),
    "dbpedia_14": TextSet(
        repo="fancyzhx/dbpedia_14",
        folder="dbpedia_14",
        subfolder="dbpedia_14",
        text=("content",),  # without the title, as the paper's
        classes=_DBPEDIA,
        num_train=560_000,
        num_test=70_000,
    ),
    "imdb": TextSet(
        repo="stanfordnlp/imdb",
        folder="imdb",
        subfolder="plain_text",
        text=("text",),
        classes=("neg", "pos"),
        num_train=25_000,
        num_test=25_000,
    ),
    # The hub hides the labels of the test split; the literature tests on the validation split.
    "sst2": TextSet(
        repo="stanfordnlp/sst2",
        folder="sst2",
        subfolder="data",
        text=("sentence", "text"),
        classes=("negative", "positive"),
        num_train=67_349,
        num_test=872,
        test="validation",
    ),
}
