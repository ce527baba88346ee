"""What is taken off a text before it is cut into tokens."""

from __future__ import annotations

import html
import re
import string
import unicodedata

__all__ = ["TAG", "paper_words", "plain", "words"]

TAG = r"</?[A-Za-z!][^<>]*>"

_TAG = re.compile(TAG)
_PAPER_TAG = re.compile(r"<[^>]*>")
_PAPER_PUNCTUATION = str.maketrans("", "", string.punctuation)
_APOSTROPHES = "'\u2019\u02bc"


def plain(text: str) -> str:
    """Lower-case a text, resolve HTML entities, put a space in place of each tag, compose letters.

    Accents are composed with their letters (Unicode NFC), however they were typed.
    """
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = text.lower()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """Cut a text into words: "don't" becomes "dont", "well-made" becomes two."""
    return plain(text).translate(_SEPARATORS).split()


def paper_words(text: str) -> list[str]:
    """Cut a text into words as the paper's code does.

    Tags and ASCII punctuation are deleted, and what they separated is joined: ``good.<br>Bad`` is
    one word. A tag is ``<.*?>``, anything between two brackets of one line.
    """
    lines = (_without_tags(line) for line in text.lower().split("\n"))
    return "\n".join(lines).translate(_PAPER_PUNCTUATION).split()


def _without_tags(line: str) -> str:
    # Behind the last ">" there is no tag, though a search would try from every "<" there.
    head, bracket, tail = line.rpartition(">")
    return _PAPER_TAG.sub("", head + bracket) + tail


class _Separators(dict[int, str]):
    """For `str.translate`: apostrophes vanish, other punctuation and symbols become spaces.

    A mark that belongs to a letter stays, as in Hindi; so does a joiner inside a word.
    """

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)
        if letter in _APOSTROPHES:
            self[code] = ""
        else:
            self[code] = " " if kind[0] in "PSZ" or kind == "Cc" else letter
        return self[code]


_SEPARATORS = _Separators()
