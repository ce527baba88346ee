import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl.data import tables
from scpl.data.classes import label_of, sorted_labels
from scpl.data.notes import Faults
from scpl.data.tables import (
    BAD_JSON,
    HALVES,
    LONGEST_LINE,
    LONGEST_TEXT,
    NOT_UTF8,
    RAGGED,
    class_names,
    columns_of,
    rows_of,
    text_lines,
    text_of,
)
from scpl.errors import DataError
from text_files import SUFFIXES, tickets, write_set, write_table

EACH_SUFFIX = pytest.mark.parametrize("suffix", SUFFIXES)
# What a cell of a table can hold, but for a NUL and for halves of characters.
CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


def read(path, *columns):
    faults = Faults()
    return [values for _, values in rows_of(path, columns, faults)], faults


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@EACH_SUFFIX
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = tickets()
    path = write_table(tmp_path / f"t{suffix}", rows)
    assert columns_of(path) == ["subject", "body", "queue"]
    found, faults = read(path, "queue", "body")
    assert found == [[row["queue"], row["body"]] for row in rows]
    assert faults.notes() == []
    assert [number for number, _ in rows_of(path, ["body"], Faults())] == list(range(1, 61))


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_cells_survive_whatever_they_hold(rows, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"t{suffix}")
        write_table(path, [{"a": a, "b": b} for a, b in rows])
        assert read(path, "a", "b")[0] == [list(row) for row in rows]


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_tab_separated_cells_survive_but_for_line_ends(rows):
    rows = [tuple(" ".join(cell.split("\n")).replace("\r", " ") for cell in row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.tsv")
        write_table(path, [{"a": a, "b": b} for a, b in rows])
        assert read(path, "a", "b")[0] == [list(row) for row in rows]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_that_of_its_header(tmp_path, delimiter):
    path = write(tmp_path / "t.csv", f'"a,;|b"{delimiter}c\n1{delimiter}2\n')
    assert read(path, "c")[0] == [["2"]]


def test_quotes_of_a_tsv_may_be_text(tmp_path):
    path = write(
        tmp_path / "t.tsv", 'a\tb\n" it \'s\t1\n"x\ty"\t2\n"say ""so"""\t3\n5" wide "\t4\n'
    )
    assert read(path, "a", "b")[0] == [
        ["\" it 's", "1"], ["x\ty", "2"], ['say "so"', "3"], ['5" wide "', "4"],
    ]  # fmt: skip


def test_blank_lines_and_spaces_in_the_header_do_not_count(tmp_path):
    path = write(tmp_path / "t.csv", "\n a , b \r\n\r\n1,2\r\n\n3,4")
    assert read(path, "a", "b")[0] == [["1", "2"], ["3", "4"]]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", "é"), ("utf-8-sig", "é"), ("utf-16", "é"), ("utf-32", "é"), ("cp1252", "é…")],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_encodings(tmp_path, encoding, text, suffix):
    path = write_table(tmp_path / f"t{suffix}", [{"a": text}, {"a": "plain"}])
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    found, faults = read(path, "a")
    assert found == [[text], ["plain"]]
    assert faults.count(NOT_UTF8) == (encoding == "cp1252")


def test_only_the_damaged_line_is_read_otherwise(tmp_path):
    path = write(tmp_path / "t.csv", "a\nä\n".encode() + b"caf\xe9\x81\n" + "ö\n".encode())
    found, faults = read(path, "a")
    assert found == [["ä"], ["café\ufffd"], ["ö"]]
    assert faults.notes() == [f"{NOT_UTF8}: 1 (first: t.csv line 3)"]


def test_ragged_rows_are_counted_and_left_out(tmp_path):
    path = write(tmp_path / "t.csv", 'a,b\n1,2\n3\n"x\ny",6\n7,8,9\n')
    found, faults = read(path, "a", "b")
    assert found == [["1", "2"], ["x\ny", "6"]]
    assert faults.notes() == [f"{RAGGED}: 2 (first: t.csv line 3)"]
    assert [number for number, _ in rows_of(path, ["a"], Faults())] == [1, 3]


def test_bad_json_lines_are_counted_and_left_out(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"a": 1}\nnot json\n[2]\n{"b": 3}\n' + "[" * 100_000)
    found, faults = read(path, "a")
    assert found == [[1], [None]]
    assert faults.count(BAD_JSON) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "must not be empty"),
        ("t.csv", b" \n\n", "must not be empty"),
        ("t.tsv", b"", "must not be empty"),
        ("t.jsonl", b"\n", "must not be empty"),
        ("t.parquet", b"", "complete and intact"),
        ("t.parquet", b"PAR1 but no more", "complete and intact"),
        ("t.csv", b"a,b\n1,\0\n", "NUL bytes. Got one in .*, line 2"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), "NUL bytes"),
        ("t.csv", b"\xff\xfea", "UTF-16 must be that"),
        ("t.csv", b'a,b\n1,2\n"open,3\n4,5\n', "begins in line 3"),
        ("t.csv", b'a,b\n"x"y,2\n', "begins in line 2"),
        ("t.json", b'[{"a": 1}]', "JSON lines"),
        ("t.xlsx", b"", "must be one of: .csv"),
        ("t.csv", b"b,c\n1,2\n", "Its columns are: b, c"),
        ("t.csv", b"a,a\n1,2\n", "must have one column 'a'"),
        ("t.csv", b"A,c\n1,2\n", "must have a column 'a'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        read(write(tmp_path / name, content), "a")


def test_missing_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match="existing file"):
        columns_of(tmp_path / "t.csv")
    with pytest.raises(DataError, match="must be readable"):
        list(text_lines(tmp_path, Faults()))


def test_the_closest_column_is_named(tmp_path):
    path = write(tmp_path / "t.csv", "subject,body\n1,2\n")
    with pytest.raises(DataError, match="Did you mean 'subject'"):
        read(path, "subjct")


@EACH_SUFFIX
def test_a_row_of_ten_megabytes_is_read(tmp_path, suffix):
    path = write_table(tmp_path / f"t{suffix}", [{"a": "x" * 10_000_000, "b": "1"}])
    ((text, _),) = read(path, "a", "b")[0]
    assert len(text) == 10_000_000
    assert len(text_of([text], ["a"], "")) == LONGEST_TEXT


def test_a_file_without_line_ends_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.seek(LONGEST_LINE + 10)
        file.write(b"x")
    with pytest.raises(DataError, match=r"NUL|at most 64 MB"):
        read(path, "a")


def test_names_of_classes_in_parquet(tmp_path):
    write_set(tmp_path, names=["no", "yes"])
    path = tmp_path / "train-00000-of-00001.parquet"
    assert class_names(path, "label") == ("no", "yes")
    assert class_names(path, "text") is None
    assert class_names(write(tmp_path / "t.csv", "label\n1\n"), "label") is None


def test_texts_that_were_cut_inside_a_character_are_kept_and_counted(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        r"""{"a": "fine"}
{"a": "cut \ud83d"}
{"a": "\ud83d\ude00"}
""",
    )
    rows, faults = read(path, "a")
    assert rows == [["fine"], ["cut \ufffd"], ["\N{GRINNING FACE}"]]
    assert faults.count(HALVES) == 1


def test_texts_are_joined_without_missing_cells():
    columns = ["a", "b", "c", "d"]
    assert text_of(["x", None, 3, float("nan")], columns, "") == "x 3"
    assert text_of(["", " ", None, ""], columns, "") == ""
    with pytest.raises(DataError, match=r"Column 'b' must hold text. Got list in t.csv row 3"):
        text_of(["x", ["y"]], ["a", "b"], "t.csv row 3")


@pytest.mark.parametrize(
    ("value", "label"),
    [("a", "a"), (" a ", "a"), (1, "1"), (1.0, "1"), (1.5, "1.5"), (True, "True"),
     (None, None), ("", None), (float("nan"), None)],
)  # fmt: skip
def test_labels(value, label):
    assert label_of(value, None, "") == label


def test_numbers_are_looked_up_where_classes_have_names():
    names = ("neg", "pos")
    assert [label_of(value, names, "") for value in (0, "1", 1.0, "pos")] == [
        "neg", "pos", "pos", "pos",
    ]  # fmt: skip
    for wrong in (-1, 2, "other", 0.5):
        with pytest.raises(DataError, match="neg, pos, or 0"):
            label_of(wrong, names, "")
    with pytest.raises(DataError, match="a name or a number"):
        label_of([1], names, "")


def test_names_that_are_numbers_are_never_counted_through():
    """0 was the first of 1, 2, 3, and 1 was itself: both one class."""
    assert [label_of(value, ("1", "2", "3"), "") for value in (0, 1, "3", 2.0)] == list("0132")


def test_numbered_labels_are_sorted_by_value():
    assert sorted_labels(["10", "9", "1"]) == ("1", "9", "10")
    assert sorted_labels(["b", "a", "10"]) == ("10", "a", "b")


def test_tables_are_known_by_their_names():
    assert tables.is_table(Path("a/T.CSV"))
    assert not tables.is_table(Path("a.txt"))


def test_a_bomb_of_repeated_texts_is_refused_before_it_unpacks(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "bomb.parquet"
    parquet.write_table(arrow.table({"text": ["a" * (1 << 20)] * 100}), path, compression="zstd")
    assert path.stat().st_size < 2000
    with pytest.raises(DataError, match="must unpack to at most"):
        list(rows_of(path, ["text"], Faults()))
    # Values that take no bytes at all are rows all the same.
    parquet.write_table(arrow.table({"text": arrow.nulls(5_000_000)}), path, compression="zstd")
    with pytest.raises(DataError, match="Got at least 80,000,000"):
        columns_of(path)


def test_many_texts_that_all_differ_are_no_bomb(tmp_path):
    """They were counted again and again, with every thousand rows, and refused."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path, texts = tmp_path / "t.parquet", [f"{number:064x}" for number in range(50_000)]
    parquet.write_table(arrow.table({"text": texts}), path, compression="zstd")
    assert [cells for _, cells in rows_of(path, ["text"], Faults())] == [[t] for t in texts]
