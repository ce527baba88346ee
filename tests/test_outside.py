import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl.outside import most_unpacked, parse_json, parse_toml, read_text, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**200), 10**200) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_ordinary_json_is_read_as_ever(value):
    import json

    assert parse_json(json.dumps(value)) == value


def test_halves_of_characters_are_replaced():
    """Nothing can write them: a label with one ended a run in a traceback, half of it written."""
    told = []
    text = r'{"a\ud83d": ["cut \uD83D", "whole \ud83d\ude00", "a path: \\ud800", 1]}'
    found = parse_json(text, lambda: told.append(1))
    assert found == {"a\ufffd": ["cut \ufffd", "whole \N{GRINNING FACE}", r"a path: \ud800", 1]}
    assert told == [1]
    assert parse_json(r'"\ud83d\ude00"', told.clear) == "\N{GRINNING FACE}"
    assert told == [1]


def test_names_of_files_can_be_shown_whatever_they_are_made_of():
    assert shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert shown("Größe") == "Größe"
    assert shown("\ud800") == r"\ud800"


# Each of these ended in a traceback, or kept the machine busy, before there was one reader.
HOSTILE_JSON = {
    "100,000 lists in each other: RecursionError": "[" * 100_000,
    "lists that Python reads, but nobody walks through": "[" * 500 + "]" * 500,
    "objects": '{"a":' * 200 + "1" + "}" * 200,
    "a number that int() refuses: ValueError, but no JSONDecodeError": "1" * 5000,
    "a number that float() cannot hold: OverflowError": "1" * 400,
    "such a number deep inside": '{"a": [{"b": -' + "9" * 301 + "}]}",
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON.keys())
def test_hostile_json_is_a_fault_of_the_text(text):
    with pytest.raises(ValueError, match=r"deeper|digits|int string"):
        parse_json(text)


HOSTILE_TOML = {
    "a dotted key of 50,000 parts: 73 s and 9.5 GB": "a" + ".a" * 50_000 + " = 1",
    "with quotes and spaces": "\n[" + ' "a" .' * 20 + "b]\n",
    "inside a table": "t = {" + "a." * 20 + "a = 1}",
    "lists in each other": "a = " + "[" * 10_000,
    "fewer of them": "a = " + "[" * 100 + "]" * 100,
    "digits that int() reads one by one": "a = 0x" + "f" * 5000,
    "more than a recipe can need": "a = 1\n" * 200_000,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", HOSTILE_TOML.values(), ids=HOSTILE_TOML.keys())
def test_hostile_toml_is_a_fault_of_the_text_and_costs_nothing(text):
    with pytest.raises(ValueError, match=r"deeper|digits|parts|characters"):
        parse_toml(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["a" * (1 << 20), "a" + " " * 1_000_000, '"' * 1_000_000, "a." * 500_000]
)
def test_looking_for_long_keys_takes_no_time_itself(text):
    with pytest.raises(ValueError, match=r"Expected|Invalid|Unterminated|parts|Illegal"):
        parse_toml(text)


def test_names_of_layers_and_numbers_are_no_long_keys():
    text = (
        'cuts = ["bert.encoder.layer.2.intermediate.dense"]\nlr_factors = [0.1, 0.2]\na.b.c = 1.5\n'
    )
    assert parse_toml(text)["a"] == {"b": {"c": 1.5}}


def test_what_a_file_of_a_run_may_weigh_is_bounded(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(file) == "one\ntwo\nthree\n"  # as Path.read_text
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_text(file, 10)


def test_small_files_may_unpack_to_what_they_like_large_ones_to_a_hundred_times():
    assert most_unpacked(10) == 64 << 20
    assert most_unpacked(4_000_000) == 400_000_000
