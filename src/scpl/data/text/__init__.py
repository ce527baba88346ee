"""Labelled texts: known data sets, the user's own tables, tokens and mini-batches."""

from scpl.data.text.catalogue import TEXT_SETS
from scpl.data.text.encoded import Encoded, pad
from scpl.data.text.files import is_text
from scpl.data.text.load import TextData, TextSettings, load_text
from scpl.data.text.loader import TextLoader
from scpl.data.text.splits import SplitSettings
from scpl.data.text.tokenizer import Tokenizer, from_json
from scpl.data.text.vectors import WordVectors, read_vectors

__all__ = [
    "TEXT_SETS",
    "Encoded",
    "SplitSettings",
    "TextData",
    "TextLoader",
    "TextSettings",
    "Tokenizer",
    "WordVectors",
    "from_json",
    "is_text",
    "load_text",
    "pad",
    "read_vectors",
]
