"""Labelled texts: known data sets, the user's own tables, tokens and mini-batches."""

from scpl.data.known import TEXT_SETS, TextSet
from scpl.data.tables import (
    LEFT_OUT,
    LONGEST_TEXT,
    check_columns,
    columns_of,
    count_rows,
    is_table,
    lines_of,
    rows_of,
    text_of,
)
from scpl.data.text.load import TextData, TextSettings, load_test, load_text
from scpl.data.text.loader import WITH_ZEROS, Encoded, Padding, TextLoader
from scpl.data.text.pretrained import PretrainedTokenizer
from scpl.data.text.splits import Columns, SplitSettings, is_text
from scpl.data.text.tokenizer import Tokenizer, WordVectors, from_json, read_vectors, width_of

__all__ = [
    "LEFT_OUT",
    "LONGEST_TEXT",
    "TEXT_SETS",
    "WITH_ZEROS",
    "Columns",
    "Encoded",
    "Padding",
    "PretrainedTokenizer",
    "SplitSettings",
    "TextData",
    "TextLoader",
    "TextSet",
    "TextSettings",
    "Tokenizer",
    "WordVectors",
    "check_columns",
    "columns_of",
    "count_rows",
    "from_json",
    "is_table",
    "is_text",
    "lines_of",
    "load_test",
    "load_text",
    "read_vectors",
    "rows_of",
    "text_of",
    "width_of",
]
