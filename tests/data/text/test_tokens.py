import json
import re
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.data.text.tokenizer import (
    KINDS,
    Subwords,
    Words,
    from_json,
    paper_words,
    plain,
    read_vectors,
    train_tokenizer,
    width_of,
    words,
)
from scpl.errors import DataError, InputError
from text_files import tickets

TEXTS = [row["body"] for row in tickets(200)]
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
SIZES = {"words": 50, "paper-words": 50, "subwords": 600}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return train_tokenizer(request.param, TEXTS, SIZES[request.param])


class TestCleaning:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Don't stop, it's GREAT!", "dont stop its great"),
            ("good.<br /><br />Bad/ugly", "good bad ugly"),
            ("a &amp; b &lt;i&gt;c&lt;/i&gt;", "a b c"),
            ("3 < 4 and 5 > 2", "3 4 and 5 2"),
            ("caf\u0065\u0301 \u201cquoted\u201d \u2013 na\u00efve", "caf\u00e9 quoted na\u00efve"),
            ("\u0939\u093f\u0928\u094d\u0926\u0940!", "\u0939\u093f\u0928\u094d\u0926\u0940"),
            ("tab\tline\nnul\0end", "tab line nul end"),
            ("_under_score", "under score"),
            ("!!! ...", ""),
        ],
    )
    def test_words(self, text, expected):
        assert words(text) == expected.split()

    def test_words_as_the_paper_cuts_them(self):
        assert paper_words("good.<br /><br />Bad/ugly, don't") == ["goodbadugly", "dont"]
        assert paper_words("a &amp; b") == ["a", "amp", "b"]

    @given(text=st.text("<>a \n", max_size=20))
    def test_tags_are_those_of_the_papers_expression(self, text):
        assert (
            paper_words(text) == re.sub("<.*?>", "", text).replace("<", "").replace(">", "").split()
        )

    @pytest.mark.parametrize("letter", ["<", ">", "&", "'", "<a", "&#", "x", "!", "\u0301"])
    def test_no_text_takes_long(self, letter):
        """A bracket that is never closed made a search for tags start a million times."""
        text = (letter * 1_000_000)[:1_000_000]
        begun = time.process_time()
        words(text)
        paper_words(text)
        assert time.process_time() - begun < 10

    @given(text=ANY_TEXT)
    def test_a_word_is_a_word(self, text):
        for word in words(text):
            assert words(word) == [word] or not word.isascii()


class TestEveryTokenizer:
    def test_numbers_are_those_of_the_vocabulary(self, tokenizer):
        assert tokenizer.vocab_size == len(tokenizer.words) == len(set(tokenizer.words))
        assert tokenizer.words[:2] == ("<pad>", "<unk>")
        for row in tokenizer.encode(TEXTS, 350):
            assert min(row) >= 1
            assert max(row) < tokenizer.vocab_size

    def test_it_survives_being_written(self, tokenizer):
        again = from_json(tokenizer.to_json(), "here")
        assert (again.kind, again.words) == (tokenizer.kind, tokenizer.words)
        texts = [*TEXTS, "", "<pad> Something <b>new</b> \U0001f600"]
        assert again.encode(texts, 5) == tokenizer.encode(texts, 5)
        assert again.to_json() == tokenizer.to_json()

    def test_the_same_texts_make_the_same_vocabulary(self, tokenizer):
        size = SIZES[tokenizer.kind]
        assert train_tokenizer(tokenizer.kind, TEXTS, size).to_json() == tokenizer.to_json()
        backwards = train_tokenizer(tokenizer.kind, TEXTS[::-1], size)
        assert backwards.words == tokenizer.words

    def test_an_empty_text_is_one_unknown_token(self, tokenizer):
        assert tokenizer.encode(["", "  \n"], 3) == [[1], [1]]

    def test_numbers_become_a_text_again(self, tokenizer):
        text = plain(TEXTS[0])
        (numbers,) = tokenizer.encode([text], 300)
        found = " ".join(tokenizer.words[number] for number in numbers)
        whole = " ".join(text.split())  # no text is unknown to subwords
        assert tokenizer.decode(numbers) == (whole if tokenizer.kind == "subwords" else found)

    def test_a_text_cannot_name_padding(self, tokenizer):
        for row in tokenizer.encode(["<pad>", "a <pad> b <unk>", "[PAD]"], 350):
            assert 0 not in row

    def test_long_texts_are_cut(self, tokenizer):
        long = tokenizer.encode([TEXTS[0] * 1000], 7)[0]
        assert len(long) == 7
        assert long == tokenizer.encode([TEXTS[0] * 1000], 20)[0][:7]

    @given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
    def test_a_text_is_encoded_alone(self, tokenizer, texts):
        """Who else is encoded, and what was before, makes no difference."""
        together = tokenizer.encode(texts, 30)
        assert together == [tokenizer.encode([text], 30)[0] for text in texts]
        assert all(1 <= len(row) <= 30 and min(row) >= 1 for row in together)

    def test_damaged_files_are_refused(self, tokenizer):
        for text in (tokenizer.to_json()[:-9], "[]", "{}", '{"words": ["a"], "kind": "words"}'):
            with pytest.raises((DataError, InputError)):
                from_json(text, "here")


class TestWords:
    def test_the_most_common_words_come_first(self):
        made = Words.train(["b b a a c", "b d"], 5)
        assert made.words == ("<pad>", "<unk>", "b", "a", "c")
        assert made.encode(["a b e d"], 9) == [[3, 2, 1, 1]]

    def test_it_is_plain_json(self):
        assert json.loads(Words.train(["\u00e9"], 3).to_json()) == {
            "kind": "words", "words": ["<pad>", "<unk>", "\u00e9"],
        }  # fmt: skip

    def test_sizes(self):
        with pytest.raises(InputError, match="`vocab_size` must be at least 3"):
            Words.train(["a"], 2)
        with pytest.raises(InputError, match="at least 512 for subwords"):
            Subwords.train(["a"], 511)


class TestSubwords:
    def test_pieces_give_what_whole_texts_give(self, tmp_path):
        """The library, given whole texts, must answer the same: others read our file with it."""
        from tokenizers import Tokenizer

        ours = Subwords.train(TEXTS, 600)
        theirs = Tokenizer.from_str(ours.to_json())
        theirs.encode_special_tokens = True
        for text in [
            *TEXTS[:20],
            "It's <b>well</b>-made, isn't it? 12.5%",
            "na\u00efve \u65e5\u672c",
        ]:
            whole = " ".join(plain(text).split())
            assert ours.encode([text], 999)[0] == theirs.encode(whole).ids

    def test_a_long_word_takes_no_longer_than_short_ones(self):
        letters = "".join(chr(97 + (place * place) % 26) for place in range(500_000))
        begun = time.process_time()
        ours = Subwords.train([letters, "!" * 500_000, *TEXTS], 600)
        assert len(ours.encode([letters], 10**6)[0]) > 900
        assert time.process_time() - begun < 10

    def test_forgetting_changes_nothing(self, monkeypatch):
        ours = Subwords.train(TEXTS, 600)
        before = ours.encode(TEXTS, 99)
        monkeypatch.setattr("scpl.data.text.tokenizer._MOST_REMEMBERED", 0)
        monkeypatch.setattr("scpl.data.text.tokenizer._CHUNK", 3)
        assert ours.encode(TEXTS, 99) == before

    def test_the_library_may_be_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(InputError, match=r"pip install 'scpl\[text\]'"):
            Subwords.train(TEXTS, 600)


class TestVectors:
    WORDS = ("<pad>", "<unk>", "the", "cat", "sat")

    def write(self, tmp_path, *lines):
        path = tmp_path / "vectors.txt"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def test_every_word_gets_its_own_vector(self, tmp_path):
        """The trap: vectors stacked in another order than that of the numbers."""
        path = self.write(tmp_path, "sat 5 6", "dog 9 9", "the 1 2", "<pad> 7 7", "the 8 8")
        matrix = read_vectors(path, self.WORDS).matrix(5, seed=0)
        assert matrix[2].tolist() == [1, 2]
        assert matrix[4].tolist() == [5, 6]
        assert matrix[0].tolist() == [0, 0]
        assert bool((matrix[[1, 3]] != 0).all())  # drawn, for these have none
        assert torch.equal(matrix, read_vectors(path, self.WORDS).matrix(5, seed=0))

    def test_fasttext_has_a_first_line_and_spaces_at_the_end(self, tmp_path):
        path = self.write(tmp_path, "2 3", "cat 1 2 3 ", "the 4 5 6 ")
        assert width_of(path) == 3
        found = read_vectors(path, self.WORDS)
        assert found.numbers.tolist() == [2, 3]
        assert found.values.tolist() == [[4, 5, 6], [1, 2, 3]]

    def test_words_with_spaces_are_passed_over(self, tmp_path):
        path = self.write(tmp_path, ". 1 2", "the cat 1 2", "the 3 4")
        assert read_vectors(path, self.WORDS).values.tolist() == [[3, 4]]

    def test_coverage(self, tmp_path):
        path = self.write(tmp_path, "the 1 2", "sat 3 4")
        told = read_vectors(path, self.WORDS).coverage(self.WORDS, torch.tensor([2, 2, 3, 1]))
        assert told == "2 of 3 words have a vector (66.7 %), and 50.0 % of the training tokens"

    @pytest.mark.parametrize(
        ("lines", "words"),
        [
            ([], "must hold words and their numbers"),
            (["dog 1 2"], "Got none of 3"),
            (["dog 1 2", "cat 1 x"], "2 finite numbers. Got b'1 x.*line 2"),
            (["dog 1 2", "cat 1"], "2 finite numbers"),
            (["cat 1 nan"], "finite"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, lines, words):
        path = self.write(tmp_path, *lines)
        with pytest.raises(DataError, match=words):
            read_vectors(path, self.WORDS)

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="`vectors` must be a readable file"):
            read_vectors(tmp_path / "none", self.WORDS)
