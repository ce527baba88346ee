import dataclasses
import json
import logging
import os
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from scpl.data import spool
from scpl.data.text import (
    WITH_ZEROS,
    Columns,
    SplitSettings,
    TextLoader,
    TextSettings,
    from_json,
    is_text,
    load_test,
    load_text,
)
from scpl.data.text import load as module
from scpl.errors import DataError, InputError
from text_files import SUFFIXES, save_to_disk, tickets, write_set, write_table

SETTINGS = TextSettings(("body",), ("queue",), vocab_size=100, max_tokens=8)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SCPL_DATA", raising=False)
    monkeypatch.setattr(module, "_MIN_TOKENS", 0)
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "tickets.csv", tickets(100))


@pytest.fixture
def made(monkeypatch):
    """Counts how often texts are read and tokenised."""
    calls, make = [], module._made

    def counted(*arguments):
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(module, "_made", counted)
    return calls


def same(first, second):
    parts = [(getattr(first, part), getattr(second, part)) for part in ("train", "valid", "test")]
    return (
        first.tokenizer.to_json() == second.tokenizer.to_json()
        and (first.classes, first.notes) == (second.classes, second.notes)
        and all(
            torch.equal(getattr(a, field), getattr(b, field))
            for a, b in parts
            for field in ("tokens", "starts", "labels")
        )
    )


def load(path, settings=SETTINGS, **options):
    return load_text(str(path), settings, **options)


def test_what_is_loaded(table):
    data = load(table)
    assert (data.name, data.classes) == ("tickets", ("hardware", "software"))
    assert [len(part) for part in (data.train, data.valid, data.test)] == [72, 8, 20]
    assert int(data.train.lengths.max()) <= 8
    row = data.train.batch(torch.tensor([0]), WITH_ZEROS)[0].tolist()
    assert {data.tokenizer.words[number] for number in row} <= {*data.tokenizer.words}
    assert f"{data.tokenizer.vocab_size} words" in data.notes[-1]


def test_the_vocabulary_is_of_the_training_texts_alone(tmp_path):
    """Each text has a number as a word of its own: those of held-out texts must be unknown."""
    data = load(write_table(tmp_path / "t.csv", tickets(100)),
                TextSettings(("body",), ("queue",), vocab_size=10_000))  # fmt: skip
    numbers = {word for word in data.tokenizer.words if word.isdecimal()}
    assert len(numbers) == len(data.train) == 72
    for part in (data.valid, data.test):
        assert all((row == 1).any() for row in part.batch(torch.arange(len(part)), WITH_ZEROS))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_data(table, tmp_path, suffix):
    other = write_table(tmp_path / f"other{suffix}", tickets(100))
    assert same(load(other), load(table))


@pytest.mark.parametrize("tokens", ["words", "subwords"])
def test_the_second_time_comes_from_the_cache(table, made, tokens):
    settings = TextSettings(("body",), ("queue",), tokens=tokens, vocab_size=600)
    first, second = load(table, settings), load(table, settings)
    assert len(made) == 1
    assert same(first, second)


def test_no_validation_split_comes_from_the_cache_as_well(table, made):
    settings = TextSettings(("body",), ("queue",), splits=SplitSettings(validation=0.0))
    assert load(table, settings).valid is None
    assert load(table, settings).valid is None
    assert len(made) == 1


def test_the_name_counts_not_the_place(table, tmp_path, made):
    (tmp_path / "moved").mkdir()
    load(table)
    load(table.rename(tmp_path / "moved" / table.name))
    assert len(made) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"text": ("subject", "body")},
        {"splits": SplitSettings(seed=1)},
        {"splits": SplitSettings(limit_train=20)},
        {"splits": SplitSettings(test_share=0.3)},
        {"tokens": "paper-words"},
        {"vocab_size": 50},
        {"max_tokens": 4},
    ],
)
def test_other_settings_are_another_entry(table, made, changes):
    load(table)
    settings = {
        "text": ("body",),
        "label": ("queue",),
        "vocab_size": 100,
        "max_tokens": 8,
        **changes,
    }
    data = load(table, TextSettings(**settings))
    assert len(made) == 2
    assert not same(data, load(table))


def test_a_changed_file_is_noticed_even_if_it_looks_the_same(table, made):
    """Same path, size and time of change, as after `cp --preserve` of another version."""
    state, before = table.stat(), load(table)
    table.write_bytes(table.read_bytes().replace(b"printer", b"tractor"))
    os.utime(table, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (table.stat().st_size, table.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = load(table)
    assert len(made) == 2
    assert after.identities["train"].digest != before.identities["train"].digest
    assert "tractor" in after.tokenizer.words


def test_a_file_that_changes_while_it_is_read_is_refused(table, monkeypatch):
    make = module._made

    def slowly(*arguments):
        data = make(*arguments)
        with table.open("a") as file:
            file.write("a,b,hardware\n")
        return data

    monkeypatch.setattr(module, "_made", slowly)
    with pytest.raises(DataError, match="must not change while it is read"):
        load(table)


def test_a_damaged_cache_is_made_again(table, made, a_cache_of_its_own, caplog):
    first = load(table)
    (entry,) = a_cache_of_its_own.glob("texts-*.safetensors")
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert same(load(table), first)
    assert "damaged and will be made again" in caplog.text
    assert len(made) == 2


def test_it_works_without_a_cache(table, made, monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", "off")
    assert same(load(table), load(table))
    assert len(made) == 2


def test_a_tokenizer_that_is_given_is_used(table, tmp_path):
    first = load(table)
    other = load(table, tokenizer=from_json('{"kind": "words", "words": ["<pad>", "<unk>", "the"]}',
                                            ""))  # fmt: skip
    assert other.tokenizer.vocab_size == 3
    assert int(other.test.tokens.max()) <= 2
    assert same(load(table, tokenizer=first.tokenizer), first)


def write_labels(path, labels):
    rows = "".join(f"the text {number} of {label},{label}\n" for number, label in labels)
    path.write_text(f"text,label\n{rows}")
    return str(path)


def test_a_table_that_counts_from_0_is_none_that_counts_from_1(tmp_path):
    """Every label was read, three of four as another one: 25 % right, and no word."""
    ours = write_labels(tmp_path / "one.csv", [(n, n % 4 + 1) for n in range(80)])
    theirs = write_labels(tmp_path / "zero.csv", [(n, n % 4) for n in range(80)])
    data = load_text(ours, TextSettings())
    assert data.classes == ("1", "2", "3", "4")
    with pytest.raises(DataError, match=r"1, 2, 3, 4\. Got also '0' in zero\.csv.*counts.* from 0"):
        load_test(theirs, data.tokenizer, data.classes, data.columns, 8)
    with pytest.raises(DataError, match=r"Got also .0. in zero\.csv"):
        load_text(ours, TextSettings(), test_data=Path(theirs))


def test_what_labels_were_taken_for_is_told(tmp_path):
    part = write_labels(tmp_path / "part.csv", [(n, n % 3 + 1) for n in range(60)])
    ours = write_labels(tmp_path / "ours.csv", [(n, n % 4 + 1) for n in range(80)])
    data = load_text(ours, TextSettings(), test_data=Path(part))
    assert "no test text is of 4" in data.notes
    given = (data.tokenizer, ("a", "b", "c", "d"), data.columns, 8)
    labels, notes = load_test(part, *given)
    assert labels.labels.bincount().tolist() == [0, 20, 20, 20]
    assert notes == [
        "numbers as labels are places in the list: 1 is b",
        "classes in test: b 20, c 20, d 20, a 0",
        "no test text is of a",
    ]


def test_a_known_set(tmp_path):
    write_set(tmp_path / "imdb")
    data = load_text("imdb", TextSettings(), data_dir=tmp_path)
    assert data.classes == ("neg", "pos")
    assert data.columns == Columns(("text",), ("label",))


@pytest.mark.parametrize("changes", [{"tokens": "letters"}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(InputError):
        TextSettings(**changes)


class TestTesting:
    """`load_test`: another table or set for a trained network."""

    def test_all_rows_of_a_table(self, table):
        data = load(table)
        found, notes = load_test(str(table), data.tokenizer, data.classes, data.columns, 8)
        assert len(found) == 100
        assert found.labels.bincount().tolist() == [50, 50]
        assert notes == ["classes in test: hardware 50, software 50"]

    def test_the_test_split_of_a_known_set(self, tmp_path, table):
        write_set(tmp_path / "imdb", n=30)
        data = load(table)
        found, _ = load_test(
            "imdb", data.tokenizer, ("neg", "pos"), data.columns, 8, data_dir=tmp_path
        )
        assert len(found) == 30

    def test_labels_that_the_network_does_not_know(self, tmp_path, table):
        data = load(table)
        other = write_table(tmp_path / "other.csv", tickets(30, classes=3))
        with pytest.raises(DataError, match=r"hardware, software.*Got 'travel' in other.csv row 3"):
            load_test(str(other), data.tokenizer, data.classes, data.columns, 8)

    def test_a_folder_without_test(self, tmp_path, table):
        data = load(table)
        write_table(tmp_path / "own" / "train.csv", tickets())
        with pytest.raises(DataError, match="table named test"):
            load_test(str(tmp_path / "own"), data.tokenizer, data.classes, data.columns, 8)

    def test_a_table_without_labels_is_refused_by_its_columns(self, tmp_path, table):
        """The advice once was to choose columns, which a trained network has done."""
        data = load(table)
        other = tmp_path / "new.csv"
        other.write_text("id,body\n1,abc\n")
        with pytest.raises(DataError, match=r"have a column 'queue'.*can only be predicted"):
            load_test(str(other), data.tokenizer, data.classes, data.columns, 8)


# Texts that are held in files

EMPTY = {"subject": "", "body": "", "queue": "hardware"}

EMPTY = {"subject": "", "body": "", "queue": "hardware"}


def both(monkeypatch, path, settings):
    """Load from the table itself with all in memory, and with all in files."""
    monkeypatch.setattr(module, "_MIN_TOKENS", 1 << 60)  # nothing is kept
    monkeypatch.setattr(module, "_CHUNK", 7)
    return (load(path, settings, in_memory=which) for which in ("yes", "no"))


@pytest.mark.parametrize(
    ("label", "how"),
    [
        ("queue", {}),
        ("queue", {"tokens": "subwords", "vocab_size": 600}),
        ("queue", {"splits": SplitSettings(limit_train=50, limit_test=9)}),
        ("tags", {"splits": SplitSettings(task="multi-label")}),
        ("hours", {"splits": SplitSettings(task="regression")}),
    ],
)
def test_texts_in_files_are_the_same_data_and_mini_batches(tmp_path, monkeypatch, label, how):
    """The loader reads tokens from a file that is mapped; no bit of a batch may depend on it."""
    rows = [
        {**row, "tags": f"{row['queue']};{row['queue'][0]}", "hours": len(row["body"]) / 7}
        for row in [*tickets(100), *tickets(20), *9 * [EMPTY]]
    ]
    table = write_table(tmp_path / "t.jsonl", rows)
    settings = TextSettings(("subject", "body"), (label,), **how)
    held, filed = both(monkeypatch, table, settings)
    told, *notes = filed.notes
    assert told.startswith("Tokens are read from a file when a mini-batch needs them")
    assert same(held, dataclasses.replace(filed, notes=tuple(notes)))
    assert any("texts occur in train as well" in note for note in notes)
    assert any("training texts that are empty left out" in note for note in notes)
    assert held.identities == filed.identities
    for each, other in ((held.train, filed.train), (held.test, filed.test)):
        loaders = (TextLoader(split, batch_size=8, shuffle=True) for split in (each, other))
        for (inputs, targets), (mapped, same_targets) in zip(*loaders, strict=True):
            assert torch.equal(inputs, mapped)
            assert torch.equal(targets, same_targets)
    columns = Columns(settings.text, settings.label)
    (one, _), (two, _) = (
        load_test(str(table), held.tokenizer, held.classes, columns, 8,
                  task=settings.splits.task, in_memory=which)
        for which in ("yes", "no")
    )  # fmt: skip
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.labels, two.labels)


def test_of_texts_in_files_memory_holds_none(tmp_path, monkeypatch):
    """100 texts of 20 kB, 2 MB: a few of them are in memory at a time."""
    rows = [{**row, "body": 2_000 * "aaaaaaaaa " + row["body"]} for row in tickets(100)]
    table = write_table(tmp_path / "t.jsonl", rows)
    peaks = []
    loads = both(monkeypatch, table, SETTINGS)
    monkeypatch.setattr(module, "_digest", str)  # it reads blocks of a megabyte
    tracemalloc.start()
    for _ in range(2):
        tracemalloc.reset_peak()
        next(loads)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    held, filed = peaks
    assert held > 2e6
    assert filed < 1e6


def test_memory_decides_where_texts_are_held_unless_it_is_said(table, monkeypatch):
    taken = module._OF_A_BYTE * table.stat().st_size
    for free, held in ((4 * taken, True), (4 * taken - 4, False)):
        monkeypatch.setattr(spool, "available_memory", lambda free=free: free)
        for which, there in (("auto", held), ("yes", True), ("no", False)):
            notes = load(table, in_memory=which).notes
            assert any("--in-memory" in note for note in notes) != there


def test_a_disk_without_room_is_told_before_anything_is_read(table, monkeypatch):
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    with pytest.raises(DataError, match="room for a copy") as caught:
        load(table, in_memory="no")
    assert "0 MB are needed and 0 MB are free" in caught.value.got
    assert "SCPL_CACHE" in caught.value.fix


# What datasets saved with save_to_disk


def queues(rows):
    """A table with named classes, as datasets writes them."""
    names = ["hardware", "software"]
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    columns = {
        "text": [row["body"] for row in rows],
        "label": [names.index(row["queue"]) for row in rows],
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})


def test_splits_that_datasets_saved_are_those_of_tables(tmp_path):
    """Shards are read in the order of state.json, classes by the names in the files."""
    parts = {"train": tickets(60), "validation": tickets(10, seed=1), "test": tickets(20, seed=2)}
    for name, rows in parts.items():
        save_to_disk(tmp_path / "saved" / name, queues(rows), shards=1 + 2 * (name == "train"))
        write_table(tmp_path / "tables" / f"{name}.csv",
                    [{"text": row["body"], "label": row["queue"]} for row in rows])  # fmt: skip
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    saved, tables = (load(tmp_path / name, TextSettings()) for name in ("saved", "tables"))
    assert is_text(str(tmp_path / "saved"))
    assert same(saved, tables)
    assert (saved.classes, len(saved.train)) == (("hardware", "software"), 60)


def test_a_single_split_that_datasets_saved_is_divided_as_a_table(tmp_path):
    save_to_disk(tmp_path / "one", queues(tickets(100)), shards=2)
    data = load(tmp_path / "one", TextSettings())
    assert [len(part) for part in (data.train, data.valid, data.test)] == [72, 8, 20]
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="missing: data-00001-of-00002"):
        load(tmp_path / "one", TextSettings())


@pytest.mark.parametrize("odd", ["compressed", "dictionary", "cut"])
def test_arrow_that_could_unpack_or_lies_outside_is_refused(tmp_path, odd):
    table = queues(tickets(50))
    if odd == "dictionary":
        table = table.set_column(0, "text", table["text"].dictionary_encode())
    options = pa.ipc.IpcWriteOptions(compression="zstd" if odd == "compressed" else None)
    path = tmp_path / "t.arrow"
    with pa.ipc.new_stream(path, table.schema, options=options) as stream:
        stream.write_table(table)
    if odd == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="An Arrow stream must be complete and intact"):
        load(path, TextSettings())
