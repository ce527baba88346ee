import csv
import io
import json

import pyarrow.parquet
import pytest

from scpl.app.rows import CsvRows, harmless, new_file
from scpl.errors import InputError

ROWS = [
    {"source": "=cmd|' /C calc'!A0", "row": 1, "labels": ["@home", "b"], "score": -0.5},
    {"source": "\u00fcber, \ud800", "row": 2, "labels": [], "score": 1e-7},
]
EXAMPLE = {"source": "", "row": 1, "labels": [""], "score": 0.0}


def written(path, rows=ROWS, **settings):
    with new_file(path, EXAMPLE, **settings) as out:
        for row in rows:
            out.write([row])
    return path


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+49 170 cmd", "'+49 170 cmd"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("-1", "-1"),
        ("+4.25", "+4.25"),
        ("-", "-"),
        ("-1e3+cmd", "'-1e3+cmd"),
        ("a=1", "a=1"),
        ("", ""),
    ],
)
def test_a_spreadsheet_takes_no_text_for_a_formula(text, cell):
    assert harmless(text) == cell


def test_in_csv_texts_labels_and_names_of_columns_are_harmless_and_numbers_stay():
    out = io.StringIO()
    CsvRows(out, ["=source", "row", "labels", "score"]).write(ROWS[:1])
    header, row = csv.reader(io.StringIO(out.getvalue()))
    assert header == ["'=source", "row", "labels", "score"]
    assert row == ["'=cmd|' /C calc'!A0", "1", "'@home;b", "-0.5"]


def test_csv_json_and_parquet_hold_the_same(tmp_path):
    cells = list(csv.reader(io.StringIO(written(tmp_path / "a.csv").read_text("utf-8"))))
    assert cells[2] == ["\u00fcber, \\ud800", "2", "", "1e-07"]
    lines = written(tmp_path / "a.JSONL").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    table = pyarrow.parquet.read_table(written(tmp_path / "a.parquet"))
    assert table.to_pylist() == [ROWS[0], {**ROWS[1], "source": "\u00fcber, \\ud800"}]


def test_parquet_is_written_in_groups_with_its_types_even_if_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("scpl.app.rows._ROWS_OF_GROUP", 4)
    file = pyarrow.parquet.ParquetFile(written(tmp_path / "a.parquet", ROWS[1:] * 10))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [4, 4, 2]
    empty = pyarrow.parquet.read_table(written(tmp_path / "b.parquet", []))
    assert empty.schema == file.schema_arrow
    assert list(map(str, empty.schema.types))[1:] == ["int64", "list<element: string>", "double"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, name, error):
    def broken_off():
        yield from ROWS
        raise error

    with pytest.raises(error):
        written(tmp_path / name, broken_off())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_told(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("precious")
    with pytest.raises(InputError, match=r"must not exist yet.*--force"):
        written(path)
    assert path.read_text() == "precious"
    assert written(path, force=True).read_text().startswith("source,row")


def test_names_and_places_that_will_not_do(tmp_path):
    with pytest.raises(InputError, match=r"--out must end in one of: \.csv, \.jsonl"):
        written(tmp_path / "a.xlsx")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"must be writable.*--out"):
        written(tmp_path / "file" / "a.csv")
