"""Texts from end to end: the command line on the user's own tables."""

import csv
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cli_runs import refused, result, scpl
from processes import run_forked
from scpl.app.network import load_network
from scpl.runs import RunFolder
from text_files import SUFFIXES, tickets, write_set, write_table

SMALL = [
    "--text", "subject", "body", "--label", "queue", "--hidden", "16", "--batch-size", "16",
    "--epochs", "3", "--lr", "0.03", "--warmup", "0", "--threads", "1", "--device", "cpu",
    "--quiet",
]  # fmt: skip
LSTM = ["--model", "lstm", *SMALL]
TRANSFORMER = ["--model", "transformer", "--heads", "4", *SMALL]
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def no_other_data(tmp_path, monkeypatch):
    monkeypatch.delenv("SCPL_DATA", raising=False)
    monkeypatch.setenv("SCPL_CACHE", "off")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing it takes longer than most runs here; processes of their own write it."""
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each network; tests must not change them."""
    root = tmp_path_factory.mktemp("texts")
    table, made = write_table(root / "tickets.csv", tickets(160, longest=30)), {}

    def get(name="lstm"):
        if name not in made:
            flags = {"lstm": LSTM, "transformer": TRANSFORMER}[name.partition("-")[0]]
            more = ["--tokens", "subwords", "--vocab-size", "600"] if "subwords" in name else []
            out = root / name
            done = scpl("train", "--data", table, "--out", out, *flags, *more)
            assert done.status == 0, done.err
            made[name] = out
        return made[name]

    get.table = table
    return get


def predicted(run, *inputs):
    done = scpl("predict", run, *inputs)
    assert done.status == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out)))


def chances(rows):
    return torch.tensor([float(row["probability"]) for row in rows])


class TestTrain:
    def test_it_learns_and_says_what_it_needs(self, runs):
        run = RunFolder(runs())
        about = run.read_json(run.description)
        assert (about["kind"], about["classes"]) == ("text", ["hardware", "software"])
        assert (about["text_columns"], about["sizes"]) == (["subject", "body"], {"width": 16})
        assert run.read_json(run.summary)["test_accuracy"] > 0.9
        log = run.log.read_text()
        assert "classes in train: software 58, hardware 57" in log
        assert "texts to train" in log
        assert "texts/s" in log

    def test_the_format_makes_no_difference(self, tmp_path):
        found = []
        for suffix in SUFFIXES:
            table = write_table(tmp_path / f"tickets{suffix}", tickets(40))
            about = json.loads(scpl("train", "--data", table, "--dry-run", "--json", *LSTM).out)
            found.append({**about, "data": ""})
        assert found == [found[0]] * len(SUFFIXES)

    def test_a_folder_of_train_and_test(self, tmp_path):
        for name, seed in (("train", 0), ("test", 1)):
            write_table(tmp_path / "own" / f"{name}.csv", tickets(seed=seed))
        done = scpl("train", "--data", tmp_path / "own", "--dry-run", "--json", *LSTM)
        about = json.loads(done.out)
        assert [about[f"{k}_texts"] for k in ("train", "valid", "test")] == [54, 6, 60]

    def test_a_table_to_test_on(self, tmp_path):
        for name in ("a", "b"):
            write_table(tmp_path / f"{name}.csv", tickets(40))
        done = scpl("train", "--data", tmp_path / "a.csv", "--test-data", tmp_path / "b.csv",
                    "--dry-run", "--json", *LSTM)  # fmt: skip
        about = json.loads(done.out)
        assert [about[f"{k}_texts"] for k in ("train", "valid", "test")] == [36, 4, 40]
        assert "36 of the 40 test texts occur in train as well" in about["notes"]

    def test_a_known_set(self, tmp_path):
        write_set(tmp_path / "imdb", n=40)
        done = scpl("train", "--data", "imdb", "--data-dir", tmp_path, "--dry-run", "--json",
                    "--model", "lstm", "--hidden", "8", "--threads", "1")  # fmt: skip
        about = json.loads(done.out)
        assert about["train_texts"] == 36
        assert "imdb should have 25,000 training" in about["notes"][0]

    def test_word_vectors_are_where_the_network_begins(self, runs, tmp_path):
        path = tmp_path / "vectors.txt"
        path.write_text("printer 1 2 3\nnowhere 7 7 7\nlogin 4 5 6\n")
        out = tmp_path / "run"
        done = scpl("train", "--data", runs.table, "--vectors", path, "--out", out, *LSTM,
                    "--lr", "1e-12", "--end-lr", "0")  # fmt: skip
        assert done.status == 0, done.err
        assert "2 of 100 words have a vector" in (out / "log.txt").read_text().replace(
            str(len(json.loads((out / "tokenizer.json").read_text())["words"]) - 2), "100"
        )
        words = json.loads((out / "tokenizer.json").read_text())["words"]
        weight = load_file(out / "model.safetensors")["embedding.weight"]
        assert weight.shape == (len(words), 3)
        for word, vector in (("printer", [1, 2, 3]), ("login", [4, 5, 6])):
            assert torch.allclose(weight[words.index(word)], torch.tensor(vector).float())

    def test_processes_change_no_number(self, runs, tmp_path):
        arguments = ["train", "--data", runs.table, "--out", tmp_path / "run", *LSTM]
        done = run_forked(2, "-m", "scpl", *arguments, timeout=60)
        assert done.returncode == 0, done.stderr
        assert result(tmp_path / "run") == result(runs())
        assert (tmp_path / "run" / "report.html").exists()
        assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (
            runs() / "tokenizer.json"
        ).read_bytes()

    def test_texts_in_files_change_no_number(self, runs, tmp_path):
        """Tokens that are read from a file train and test to the same bits."""
        out = tmp_path / "run"
        done = scpl("train", "--data", runs.table, "--out", out, *LSTM, "--in-memory", "no")
        assert done.status == 0, done.err
        assert "Tokens are read from a file" in (out / "log.txt").read_text()
        assert result(out) == result(runs())
        assert (out / "tokenizer.json").read_bytes() == (runs() / "tokenizer.json").read_bytes()
        found, other = (json.loads(scpl("eval", run, "--json").out) for run in (out, runs()))
        assert (found["test_loss"], found["test_accuracy"]) == (
            other["test_loss"], other["test_accuracy"]
        )  # fmt: skip


class TestResume:
    FLAGS = ("--checkpoint-every", "3", "--keep", "99")

    @pytest.fixture
    def half(self, runs, tmp_path):
        """A whole run, and a copy of it that ends in the middle of an epoch."""
        whole, half = tmp_path / "whole", tmp_path / "half"
        table = shutil.copy(runs.table, tmp_path / "tickets.csv")
        scpl("train", "--data", table, "--out", whole, *LSTM, *self.FLAGS)
        shutil.copytree(whole, half)
        for path in (half / "checkpoints").glob("step-*"):
            if int(path.name[len("step-") :]) > 3:
                shutil.rmtree(path)
        (half / "summary.json").unlink()
        (half / "model.safetensors").unlink()
        return whole, half

    def test_bit_for_bit_from_the_middle_of_an_epoch(self, half):
        whole, part = half
        done = scpl("train", "--resume", part)
        assert done.status == 0, done.err
        assert result(part) == result(whole)

    def test_changed_data_is_refused(self, half, tmp_path):
        with (tmp_path / "tickets.csv").open("a") as file:
            file.write("a,b,hardware\n")
        words = refused(scpl("train", "--resume", half[1]), "as it was when it began")
        assert "train: " in words
        assert "(hardware +1)" in words


class TestEval:
    def test_it_repeats_the_test(self, runs):
        folder = RunFolder(runs())
        done = scpl("eval", runs(), "--json")
        found, kept = json.loads(done.out), folder.read_json(folder.summary)
        assert found["test_accuracy"] == kept["test_accuracy"]
        assert found["test_loss"] == pytest.approx(kept["test_loss"], abs=CLOSE)

    def test_sure_texts_leave_early(self, runs, tmp_path):
        run = tmp_path / "early"
        flags = [*TRANSFORMER, "--method", "early-exit", "--lr", "0.01"]
        done = scpl("train", "--data", runs.table, "--out", run, *flags)
        assert done.status == 0, done.err
        whole, never, early = (
            json.loads(scpl("eval", run, "--json", *flags).out)
            for flags in ([], ["--exit-threshold", "1.0"], ["--exit-threshold", "0.1"])
        )
        assert early["exit_share"] == [1.0, 0.0, 0.0]  # of a few classes one is always that sure
        assert sum(never["exit_share"]) == pytest.approx(1.0)
        assert never["exit_share"][0] < 1.0  # the others' probability is not rounded to 1
        assert never["test_accuracy"] == whole["test_accuracy"]

    def test_another_table_is_tested_whole(self, runs, tmp_path):
        rows = tickets(50, seed=9)
        rows[0]["queue"] = ""
        other = write_table(tmp_path / "other.jsonl", rows)
        done = scpl("eval", runs(), "--data", other, "--json")
        assert json.loads(done.out)["test_accuracy"] > 0.9
        assert "rows without a label left out: 1" in done.err

    def test_the_runs_own_data_must_be_the_same(self, runs, tmp_path):
        copy = shutil.copytree(runs(), tmp_path / "copy")
        config = copy / "config.toml"
        other = write_table(tmp_path / "tickets.csv", tickets(100))
        config.write_text(config.read_text().replace(str(runs.table), str(other)))
        refused(scpl("eval", copy), "has changed since", "(hardware -6, ", f"--data {other}")

    @pytest.mark.parametrize("content", [None, "{}", "not json"])
    def test_a_tokenizer_that_is_lost_or_damaged(self, runs, tmp_path, content):
        copy = shutil.copytree(runs(), tmp_path / "copy")
        (copy / "tokenizer.json").unlink()
        if content is not None:
            (copy / "tokenizer.json").write_text(content)
        refused(scpl("eval", copy), "tokenizer")


class TestPredict:
    def test_texts_and_tables(self, runs):
        rows = predicted(runs(), "the printer, my printer", "login password", runs.table)
        assert [row["label"] for row in rows[:2]] == ["hardware", "software"]
        assert [row["source"] for row in rows[:3]] == [
            "the printer, my printer", "login password", str(runs.table),
        ]  # fmt: skip
        assert [int(row["row"]) for row in rows[2:]] == list(range(1, 161))
        right = [row["label"] == want["queue"]
                 for row, want in zip(rows[2:], tickets(160), strict=True)]  # fmt: skip
        assert sum(right) > 150

    @pytest.mark.parametrize("name", ["lstm", "transformer", "lstm-subwords"])
    def test_a_prediction_does_not_depend_on_its_neighbours(self, runs, tmp_path, name):
        rows = [*tickets(30, seed=3, longest=40), {"subject": "", "body": "", "queue": ""}]
        forth = write_table(tmp_path / "forth.csv", rows)
        back = write_table(tmp_path / "back.csv", rows[::-1])
        together = chances(predicted(runs(name), forth))
        for other in (
            chances(predicted(runs(name), back)).flip(0),
            chances(predicted(runs(name), forth, "--batch-size", "1")),
            chances(predicted(runs(name), forth, "--batch-size", "7")),
        ):
            assert (together - other).abs().max() <= CLOSE
        assert len(together) == 31

    def test_it_agrees_with_the_network(self, runs):
        network, about = load_network(RunFolder(runs()))
        words = json.loads((runs() / "tokenizer.json").read_text())["words"]
        tokens = torch.tensor([[words.index("printer"), words.index("cable"), 1]])
        want = network(tokens).softmax(1)[0].tolist()
        done = scpl("predict", runs(), "Printer CABLE zzz", "--json", "--top", "2")
        row = json.loads(done.out)
        found = {row["label"]: row["probability"], row["label2"]: row["probability2"]}
        assert found == pytest.approx(dict(zip(about["classes"], want, strict=True)), abs=2e-6)

    def test_only_the_text_columns_are_needed(self, runs, tmp_path):
        table = write_table(tmp_path / "t.csv", [{"body": "printer", "subject": "mouse"}])
        (row,) = predicted(runs(), table)
        assert row["label"] == "hardware"
        other = write_table(tmp_path / "o.csv", [{"message": "printer mouse"}])
        refused(scpl("predict", runs(), other), "must have a column 'subject'", "message")
        (again,) = predicted(runs(), other, "--text", "message")
        assert again["label"] == "hardware"

    def test_bad_rows_are_told_and_the_others_go_on(self, runs, tmp_path):
        table = tmp_path / "t.csv"
        table.write_bytes(b"subject,body\na,printer\nb\nc,caf\xe9\n")
        done = scpl("predict", runs(), table)
        assert done.status == 2
        assert [row["row"] for row in csv.DictReader(io.StringIO(done.out))] == ["1", "3"]
        assert (
            "another number of cells than the header left out: 1 (first: t.csv line 3)" in done.err
        )
        assert "Windows-1252: 1 (first: t.csv line 4)" in done.err

    def test_no_row_gives_no_line(self, runs, tmp_path):
        table = tmp_path / "t.csv"
        table.write_text("subject,body\n")
        assert scpl("predict", runs(), table).out == "source,row,label,probability\n"

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("none.csv", None, "existing file"),
            ("t.csv", b"", "must not be empty"),
            ("t.csv", b"subject,body\n\0,b\n", "NUL"),
            ("t.parquet", b"PAR1", "intact"),
            ("t.txt", b"x", "must be one of: .csv"),
        ],
    )
    def test_bad_files(self, runs, tmp_path, name, content, words):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = scpl("predict", runs(), tmp_path / name)
        assert (done.status, "Traceback" in done.err) == (2, False)
        assert words in done.err

    def test_odd_texts(self, runs):
        texts = ["", " ", "?!", "x" * 100_000, "nul\0", "<pad>", "\U0001f600 \u65e5\u672c"]
        assert len(predicted(runs(), *texts)) == len(texts)

    def test_memory_does_not_grow_with_the_table(self, runs, tmp_path):
        """A table of 40 MB must not take 40 MB."""
        table = tmp_path / "large.csv"
        with table.open("w") as file:
            file.write("subject,body\n")
            for _ in range(800):
                file.write(f"printer,{'mouse ' * 8000}\n")
        code = (
            "import io, resource, sys\n"
            "from pathlib import Path\n"
            "from scpl.app.predict import predict\n"
            "from scpl.app.commands import PredictConfig\n"
            "def peak(*names):\n"
            "    predict(PredictConfig(Path(sys.argv[1]), names, batch_size=64), io.StringIO())\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "print(peak(*['mouse ' * 8000] * 200), peak(sys.argv[2]))\n"
        )
        (tmp_path / "peaks.py").write_text(code)
        done = run_forked(1, tmp_path / "peaks.py", runs(), table, timeout=100)
        assert done.returncode == 0, done.stderr
        before, after = map(int, done.stdout.split())
        assert after - before < 20_000  # KiB


class TestExport:
    def test_the_tokenizer_goes_along(self, runs, tmp_path):
        target = tmp_path / "model.safetensors"
        done = scpl("export", runs(), "--to", target, "--json")
        beside = tmp_path / "model.tokenizer.json"
        assert json.loads(done.out)["beside"] == [str(beside)]
        assert beside.read_bytes() == (runs() / "tokenizer.json").read_bytes()
        target.unlink()
        refused(scpl("export", runs(), "--to", target), "must not exist", str(beside))
        assert scpl("export", runs(), "--to", target, "--force").status == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--text", "bodi"], ["Its columns are: subject, body, queue", "'body'"]),
            (["--label", "nope"], ["must have a column 'nope'"]),
            (["--text", "queue"], ["read the answer"]),
            (["--model", "small-cnn"], ["lstm, transformer", "small-cnn"]),
            (["--augmentation", "basic", "--views", "2"], ["--augmentation, --views", "images"]),
            (["--image-size", "32"], ["--image-size"]),
            (["--heads", "4"], ["lstm", "--heads must go with --model transformer"]),
            (["--vocab-size", "2"], ["--vocab-size"]),
            (["--max-tokens", "0"], ["--max-tokens"]),
            (["--test-share", "1"], ["--test-share"]),
            (["--tokens", "subwords", "--vocab-size", "100"], ["at least 512"]),
            (["--vectors", "no/such/file"], ["--vectors must be a readable file"]),
            (["--tokens", "subwords", "--vectors", "v"], ["words as tokens"]),
            (["--test-data", "no/such.csv"], ["--test-data"]),
            (["--data", "no/such.csv"], ["existing file"]),
            (["--data", "digits"], ["text data set must be one of"]),
        ],
    )
    def test_flags(self, runs, tmp_path, flags, words):
        done = scpl("train", "--data", runs.table, *LSTM, "--out", tmp_path / "run", *flags)
        refused(done, *words)
        assert not (tmp_path / "run").exists()

    def test_images_take_no_network_for_texts_with_its_flags(self):
        done = scpl("train", "--data", "digits", "--threads", "1", "--heads", "2")
        refused(done, "--heads must go with --model transformer")

    @pytest.mark.parametrize(
        "flags", [["--test-share", "0.3"], ["--vectors", "x"], ["--hidden", "8"]]
    )
    def test_images_take_no_flags_of_texts(self, flags):
        refused(
            scpl("train", "--data", "digits", "--threads", "1", *flags),
            flags[0],
            "data set of texts",
        )

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "must not be empty"),
            (b"subject,body,queue\n", "labelled rows"),
            (b"subject,body,queue\na,b,c\n", "at least two classes"),
            (b"subject,body,queue\na,b,c\na,b,d\n", "--test-share"),
            (b"subject,body,queue\na,b,c\na,\0,d\n", "NUL bytes"),
            (b'subject,body,queue\na,"b,c\na,b,d\n', "begins in line 2"),
            (b"\x89PNG\0\r\n\x1a\n", "NUL bytes"),
        ],
    )
    def test_tables(self, tmp_path, content, words):
        (tmp_path / "t.csv").write_bytes(content)
        refused(scpl("train", "--data", tmp_path / "t.csv", *LSTM, "--dry-run"), words)
