"""`scpl predict` on very many inputs: a stream in, a stream out."""

import csv
import io
import json
import os
import signal
import threading
import tracemalloc

import pyarrow.parquet
import pytest

from cli_runs import refused, scpl
from data_files import picture
from made_runs import made_run, made_text_run
from scpl.app.commands import PredictConfig
from scpl.app.inputs import images
from scpl.app.predict import predict
from scpl.data.notes import Faults
from scpl.errors import DataError, Interrupted


@pytest.fixture
def run(tmp_path):
    made_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures, of which one is damaged, and one has the name of a formula."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(18):
        picture((16, 16), seed=number).save(folder / f"{number:02}.png")
    picture((16, 16)).save(folder / "=cmd.png")
    (folder / "bad.png").write_bytes(b"none")
    return folder


@pytest.fixture
def stdin(monkeypatch):
    """Lets a test type what commands read from standard input."""
    read, write = os.pipe()
    with open(read) as end:
        monkeypatch.setattr("sys.stdin", end)

        def typed(content):
            os.write(write, content)
            os.close(write)

        yield typed


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


class TestStandardInput:
    def test_paths_of_images(self, run, photos, stdin):
        names = [f"{photos}/01.png", f"{photos}/gone.png", f"{photos}/00.png"]
        stdin("\r\n".join([*names, "", ""]).encode())
        done = scpl("predict", run, "-")
        assert [row["path"] for row in rows(done.out)] == [names[0], names[2]]
        assert (done.status, "gone.png: FileNotFoundError" in done.err) == (2, True)
        assert "1 of 3 were not" in done.err
        named = scpl("predict", run, names[0], names[2])
        assert named.out == done.out

    def test_a_text_per_line(self, tmp_path, stdin):
        run = made_text_run(tmp_path / "texts")
        stdin("the printer\n\nH\u00f6tel\n".encode("cp1252"))
        done = scpl("predict", run, "-")
        assert [(r["source"], r["row"]) for r in rows(done.out)] == [
            ("the printer", "1"), ("", "2"), ("H\u00f6tel", "3")
        ]  # fmt: skip
        assert done.err.endswith("read as Windows-1252: 1 (first: standard input line 3)\n")
        assert done.status == 0
        assert rows(scpl("predict", run, "the printer").out)[0] == rows(done.out)[0]

    def test_a_table_if_told(self, tmp_path, stdin):
        run = made_text_run(tmp_path / "texts", columns=("text", "more"))
        table = tmp_path / "t.jsonl"
        table.write_text('{"more": "taxi", "text": "printer"}\n{"text": "screen"}\n')
        stdin(table.read_bytes())
        done = scpl("predict", run, "-", "--stdin", "jsonl")
        found = rows(done.out)
        assert [row.pop("source") for row in found] == ["-", "-"]
        wanted = rows(scpl("predict", run, table).out)
        assert found == [{k: v for k, v in row.items() if k != "source"} for row in wanted]

    @pytest.mark.parametrize("line", ["text;more", '"more"\t"text"', '{"text": "a", "more": 1}'])
    def test_what_looks_like_a_table_is_told(self, tmp_path, stdin, line):
        run = made_text_run(tmp_path / "texts", columns=("text", "more"))
        stdin(f"{line}\n".encode())
        assert "names text, more: if it is a table" in scpl("predict", run, "-").err

    def test_no_table_of_images(self, run):
        refused(scpl("predict", run, "-", "--stdin", "csv"), "paths, one per line", "csv")

    def test_a_file_of_that_name(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        picture((16, 16)).save("-", "PNG")
        assert [row["path"] for row in rows(scpl("predict", run, "./-").out)] == ["-"]


class TestKeep:
    """What a user joins predictions with his own table by."""

    def test_columns_of_a_table_of_texts(self, tmp_path):
        run, table = made_text_run(tmp_path / "texts"), tmp_path / "t.csv"
        table.write_text("nr;label;text\n007;printer;the printer\n;;a taxi\n")
        found = rows(scpl("predict", run, table, "--keep", "nr", "label").out)
        assert [(row["nr"], row["label"]) for row in found] == [("007", "printer"), ("", "")]
        alone = rows(scpl("predict", run, table).out)
        assert [row["predicted label"] for row in found] == [row["label"] for row in alone]
        out = tmp_path / "p.parquet"
        scpl("predict", run, table, "--keep", "nr", "--out", out)
        assert pyarrow.parquet.read_table(out).to_pylist()[0]["nr"] == "007"
        refused(scpl("predict", run, table, "--keep", "no"), "must have a column 'no'", "nr, label")
        refused(scpl("predict", run, "a taxi", "--keep", "nr"), "inputs that are tables", "a taxi")

    def test_of_images_that_a_table_names(self, run, photos, tmp_path):
        table = tmp_path / "t.csv"
        table.write_text("id,name\n7,03\n8,bad\n9,04\n")
        done = scpl("predict", run, table, "--keep", "id", "--batch-size", "2")
        assert done.status == 2
        assert "bad.png" in done.err
        found = rows(done.out)
        assert [row.pop("id") for row in found] == ["7", "9"]
        alone = scpl("predict", run, photos / "03.png", photos / "04.png")
        assert found == rows(alone.out)


class TestFiles:
    def test_all_formats_hold_the_same_rows(self, run, photos, tmp_path):
        found = {}
        for kind in ("csv", "jsonl", "parquet"):
            done = scpl("predict", run, photos, "--out", tmp_path / f"p.{kind}", "--top", "2")
            assert (done.status, done.out) == (2, "")  # one was damaged, the others are written
            assert f"p.{kind}: 19 images in 0 s\n" in done.err
            found[kind] = tmp_path / f"p.{kind}"
        table = pyarrow.parquet.read_table(found["parquet"]).to_pylist()
        assert [json.loads(line) for line in found["jsonl"].read_text().splitlines()] == table
        assert table[-1]["path"] == f"{photos}/=cmd.png"
        assert rows(found["csv"].read_text()) == [{k: str(v) for k, v in r.items()} for r in table]
        assert rows(scpl("predict", run, photos, "--top", "2").out) == rows(
            found["csv"].read_text()
        )

    def test_classes_that_are_formulas(self, tmp_path):
        run = made_text_run(tmp_path / "texts", ("=hardware", "=travel"))
        (row,) = rows(scpl("predict", run, "@printer").out)
        assert row["source"] == "'@printer"
        assert row["label"].startswith("'=")
        as_json = json.loads(scpl("predict", run, "@printer", "--json").out)
        assert as_json["label"] == row["label"][1:]

    def test_a_table_that_breaks_off_leaves_no_file(self, tmp_path):
        run = made_text_run(tmp_path / "texts")
        (tmp_path / "t.csv").write_text('text\nprinter\n"hotel\n')
        refused(scpl("predict", run, tmp_path / "t.csv", "--out", tmp_path / "p.csv"), "Quotes")
        assert not (tmp_path / "p.csv").exists()

    def test_json_is_for_printing(self, run, photos, tmp_path):
        done = scpl("predict", run, photos, "--json", "--out", tmp_path / "p.csv")
        refused(done, "--json is for what is printed", ".jsonl")


class TestMemory:
    def test_no_names_are_kept(self, monkeypatch):
        """Only those of one folder at a time, in order to sort them."""
        folders = [(f"in/{i}", [], [f"{j:06}.png" for j in range(100)]) for i in range(40)]
        monkeypatch.setattr("os.walk", lambda folder, onerror: iter(folders))
        monkeypatch.setattr("pathlib.Path.is_dir", lambda path: path.name == "in")
        monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
        wanted = images._Wanted(["before.png", "in"], {}, ())
        tracemalloc.start()
        try:
            assert sum(1 for _ in images._files(wanted, Faults())) == 4001
            assert tracemalloc.get_traced_memory()[1] < 200_000  # bytes; 4,000 paths take 1 MB
        finally:
            tracemalloc.stop()

    def test_only_a_few_batches_are_read_ahead(self, run, tmp_path, monkeypatch):
        for number in range(40):
            picture((16, 16), seed=number).save(tmp_path / f"{number:02}.png")
        decoded, at_write = [], []
        decode = images.decode_readable
        monkeypatch.setattr(
            images,
            "decode_readable",
            lambda *given, **more: decoded.extend(given[0]) or decode(*given, **more),
        )

        class Out(io.StringIO):
            def flush(self):
                at_write.append(len(decoded) - self.getvalue().count("\n") + 1)

        predict(PredictConfig(run, (str(tmp_path),), batch_size=2), Out())
        assert len(at_write) == 20
        assert max(at_write) <= 3 * 2  # two wait, and one is in the thread's hands

    def test_images_are_read_while_the_network_computes(self, run, tmp_path, monkeypatch):
        picture((16, 16)).save(tmp_path / "a.png")
        threads = []
        decode = images.decode_readable
        monkeypatch.setattr(
            images, "decode_readable",
            lambda *given, **more: threads.append(threading.current_thread().name)
            or decode(*given, **more),
        )  # fmt: skip
        predict(PredictConfig(run, (str(tmp_path / "a.png"),)), io.StringIO())
        assert threads == ["scpl-prefetch"]


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_what_was_printed_are_whole_rows(self, run, photos, number):
        class Out(io.StringIO):
            def write(self, text):
                if ".png" in text:
                    signal.raise_signal(number)  # in the middle of a batch
                return super().write(text)

        out = Out()
        with pytest.raises(Interrupted, match=r"after 4 images.*whole rows") as caught:
            predict(PredictConfig(run, (str(photos),), batch_size=4), out)
        assert caught.value.signal == number
        lines = out.getvalue().splitlines()
        assert len(lines) == 5
        assert all(line.count(",") == 2 for line in lines)

    def test_no_file_is_left(self, run, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "scpl.app.predict.compute_logits", lambda *_: signal.raise_signal(signal.SIGINT)
        )
        done = scpl("predict", run, photos, "--out", tmp_path / "p.csv")
        assert done.status == 130
        assert "Interrupted after 0 images" in done.err
        assert "p.csv was not written" in done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]

    def test_while_standard_input_is_silent(self, tmp_path, monkeypatch):
        run, (read, write) = made_text_run(tmp_path / "texts"), os.pipe()
        with open(read) as end, open(write, "w") as typed:
            monkeypatch.setattr("sys.stdin", end)
            timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
            timer.start()
            assert scpl("predict", run, "-").status == 130
            typed.close()
            timer.join()

    def test_a_closed_pipe_ends_it(self, run, photos):
        class Out(io.StringIO):
            def flush(self):
                raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            predict(PredictConfig(run, (str(photos),)), Out())


def test_a_table_of_parquet_tells_how_many_rows_are_to_come(tmp_path):
    import pyarrow

    from scpl.app.inputs import modality_named
    from scpl.app.network import load_network
    from scpl.runs import RunFolder

    folder = RunFolder(made_text_run(tmp_path / "texts"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 7}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("text\na\n")
    description = load_network(folder)[1]

    def total(*inputs):
        config = PredictConfig(folder.path, tuple(map(str, inputs)))
        return modality_named(description).pending(config, folder, description).total

    assert total("one", tmp_path / "t.parquet", "two") == 9
    assert total("one", tmp_path / "t.csv") is None
    with pytest.raises(DataError):
        total(tmp_path / "gone.csv")
