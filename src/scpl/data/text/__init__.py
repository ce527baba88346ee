"""Labelled texts: known data sets, the user's own tables, tokens and mini-batches."""

from scpl.data.text.catalogue import TEXT_SETS
from scpl.data.text.cells import text_of
from scpl.data.text.encoded import Encoded, pad
from scpl.data.text.faults import Faults
from scpl.data.text.files import is_text
from scpl.data.text.labelled import Columns
from scpl.data.text.load import TextData, TextSettings, load_text
from scpl.data.text.loader import TextLoader
from scpl.data.text.splits import SplitSettings
from scpl.data.text.tables import LEFT_OUT, check_columns, columns_of, is_table, rows_of
from scpl.data.text.testing import load_test
from scpl.data.text.tokenizer import Tokenizer, from_json
from scpl.data.text.vectors import WordVectors, read_vectors, width_of

__all__ = [
    "LEFT_OUT",
    "TEXT_SETS",
    "Columns",
    "Encoded",
    "Faults",
    "SplitSettings",
    "TextData",
    "TextLoader",
    "TextSettings",
    "Tokenizer",
    "WordVectors",
    "check_columns",
    "columns_of",
    "from_json",
    "is_table",
    "is_text",
    "load_test",
    "load_text",
    "pad",
    "read_vectors",
    "rows_of",
    "text_of",
    "width_of",
]
