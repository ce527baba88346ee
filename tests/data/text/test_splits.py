import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.data.images import load
from scpl.data.text import TEXT_SETS, is_text
from scpl.data.text.splits import (
    Columns,
    SplitSettings,
    Texts,
    _hold_out,
    _limited,
    choose_columns,
    find_files,
    labelled,
    read_splits,
)
from scpl.errors import DataError, InputError
from text_files import tickets, write_set, write_table

COLUMNS = Columns(("body",), ("queue",))
DEFAULTS = SplitSettings()
LABELS = st.lists(st.integers(0, 4), min_size=12, max_size=60)


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch):
    """Neither the user's data nor a network may answer in these tests."""
    monkeypatch.delenv("SCPL_DATA", raising=False)

    def offline(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)


def split(path, columns=COLUMNS, **settings):
    return read_splits(find_files(str(path)), columns, SplitSettings(**settings))


def table(tmp_path, rows, name="t.csv"):
    return write_table(tmp_path / name, rows)


class TestFiles:
    @pytest.mark.parametrize("name", TEXT_SETS)
    @pytest.mark.parametrize("where", ["root", "folder", "hub"])
    def test_known_sets_are_found(self, tmp_path, name, where):
        spec = TEXT_SETS[name]
        folder = tmp_path / spec.folders[0]
        place = folder / spec.subfolder if where == "hub" else folder
        write_set(place, spec.text[0], test=spec.test, classes=len(spec.classes), n=60)
        root = folder if where == "root" else tmp_path
        files = find_files(name, data_dir=root)
        assert [path.name.partition("-")[0] for path in files.all] == ["train", spec.test]
        splits = read_splits(files, choose_columns(files, (), ()), DEFAULTS)
        assert splits.classes == spec.classes
        assert f"should have {spec.num_train:,} training" in " ".join(splits.notes)

    def test_they_are_fetched_from_the_hub(self, tmp_path, monkeypatch):
        asked = {}

        def download(repo, **options):
            asked.update(options, repo=repo)
            write_set(tmp_path / "plain_text")
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert find_files("imdb").train[0].parent == tmp_path / "plain_text"
        assert asked["repo"] == "stanfordnlp/imdb"
        # The unlabelled part of the set is as large as the rest.
        assert asked["allow_patterns"] == [
            "plain_text/train-*.parquet",
            "plain_text/test-*.parquet",
        ]

    def test_without_a_network_the_way_out_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"download failed.*folder imdb.*SCPL_DATA"):
            find_files("imdb", data_dir=tmp_path)
        with pytest.raises(DataError, match="must be on this machine"):
            find_files("imdb", download=False)
        with pytest.raises(DataError, match="existing folder"):
            find_files("imdb", data_dir=tmp_path / "none")

    def test_a_missing_shard_is_noticed(self, tmp_path):
        write_set(tmp_path / "imdb")
        (tmp_path / "imdb" / "train-00000-of-00001.parquet").rename(
            tmp_path / "imdb" / "train-00000-of-00002.parquet"
        )
        with pytest.raises(DataError, match="All shards"):
            find_files("imdb", data_dir=tmp_path)

    def test_a_part_of_ag_news_is_taken_with_a_note(self, tmp_path):
        write_set(tmp_path / "ag_news", train="train_partial")
        assert "a part of ag_news" in find_files("ag_news", data_dir=tmp_path).notes[0]

    def test_sst2_is_tested_on_its_validation_split(self, tmp_path):
        write_set(tmp_path / "sst2", "sentence", test="validation")
        (note,) = find_files("sst2", data_dir=tmp_path).notes
        assert "not used" not in note
        write_set(tmp_path / "sst2", "sentence")
        files = find_files("sst2", data_dir=tmp_path)
        assert files.test[0].name.startswith("validation")
        assert "test-*.parquet is not used" in files.notes[0]

    @pytest.mark.parametrize(
        ("names", "valid", "test"),
        [
            (["train.csv"], 0, 0),
            (["train.csv", "test.csv"], 0, 1),
            (["train.csv", "dev.tsv", "test.jsonl"], 1, 1),
            (["train.csv", "valid.csv"], 0, 1),
            (["data/train.parquet", "data/test.parquet"], 0, 1),
        ],
    )
    def test_folders_of_tables(self, tmp_path, names, valid, test):
        for name in names:
            write_table(tmp_path / "own" / name, tickets())
        files = find_files(str(tmp_path / "own"))
        assert (files.name, len(files.valid), len(files.test)) == ("own", valid, test)
        assert len(files.notes) == (names[-1] == "valid.csv")
        assert is_text(str(tmp_path / "own"))

    def test_a_test_table_without_labels_is_passed_over_unless_it_is_wanted(self, tmp_path):
        write_table(tmp_path / "train.csv", tickets())
        bare = write_table(tmp_path / "test.csv", [{"body": "a taxi"}])
        files = labelled(find_files(str(tmp_path)), COLUMNS, None)
        assert (files.test, files.notes) == (
            (),
            (f"{bare} is passed over, as it has no column 'queue'",),
        )
        wanted = find_files(str(tmp_path), test_data=bare)
        assert labelled(wanted, COLUMNS, bare).test == (bare,)

    def test_what_is_text(self, tmp_path):
        assert is_text("imdb")
        assert is_text("no/such/table.csv")
        assert not is_text("cifar10")
        assert not is_text("digits")
        assert not is_text(str(tmp_path))
        write_table(tmp_path / "train.parquet", [{"image": "x", "label": 1}])
        assert not is_text(str(tmp_path))

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match=r"imdb, ag_news, dbpedia_14, sst2.*Got 'imbd'"):
            find_files("imbd")
        with pytest.raises(InputError, match=r"imdb.*Got 'imbd'"):
            load("imbd")
        with pytest.raises(DataError, match="one named train"):
            find_files(str(tmp_path))
        path = table(tmp_path, tickets())
        with pytest.raises(DataError, match="`test_data`"):
            find_files(str(path), test_data=tmp_path / "none.csv")


class TestColumns:
    def test_usual_names(self, tmp_path):
        for name in ("text", "sentence", "content"):
            path = table(tmp_path, [{"id": 1, name: "x", "label": 1}], f"{name}.csv")
            files = find_files(str(path))
            assert choose_columns(files, (), ()) == Columns((name,), ("label",))

    def test_the_columns_are_the_answer(self, tmp_path):
        files = find_files(str(table(tmp_path, tickets())))
        for text, label in (((), ("queue",)), (("bodi",), ("queue",)), (("body",), ())):
            with pytest.raises(DataError, match="Its columns are: subject, body, queue"):
                choose_columns(files, text, label)
        with pytest.raises(InputError, match="read the answer"):
            choose_columns(files, ("body", "queue"), ("queue",))


class TestSplits:
    def test_one_table_is_divided_by_class(self, tmp_path):
        path = table(tmp_path, tickets(200))
        splits = split(path)
        assert splits.classes == ("hardware", "software")
        assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [144, 16, 40]
        for part in (splits.train, splits.valid, splits.test):
            assert part.labels.bincount().tolist() == [len(part) / 2] * 2
        texts = [*splits.train.texts, *splits.valid.texts, *splits.test.texts]
        assert sorted(texts) == sorted(row["body"] for row in tickets(200))

    def test_the_test_split_does_not_depend_on_the_seed(self, tmp_path):
        path = table(tmp_path, tickets(100))
        first, other = split(path, seed=1), split(path, seed=2)
        assert first.test.texts == other.test.texts
        assert first.valid.texts != other.valid.texts
        assert first.valid.texts == split(path, seed=1).valid.texts

    def test_several_columns_and_given_splits(self, tmp_path):
        for name, seed in (("train.csv", 0), ("valid.tsv", 1), ("test.parquet", 2)):
            write_table(tmp_path / name, tickets(seed=seed))
        splits = split(tmp_path, Columns(("subject", "body"), ("queue",)))
        rows = tickets(seed=2)
        assert splits.test.texts == [f"{row['subject']} {row['body']}" for row in rows]
        assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [60, 60, 60]
        assert split(tmp_path, validation=0.0).valid is not None

    def test_empty_texts_are_left_out_of_training_only(self, tmp_path):
        train, test = tickets(60), tickets(10, seed=1)
        train[3]["body"], train[4]["body"], test[0]["body"] = "", None, " "
        write_table(tmp_path / "train.csv", train)
        write_table(tmp_path / "test.csv", test)
        splits = split(tmp_path, validation=0.0)
        assert (len(splits.train), len(splits.test)) == (58, 10)
        assert "training texts that are empty left out: 2 (first: train.csv)" in splits.notes

    def test_rows_without_a_label_are_left_out(self, tmp_path):
        rows = tickets(60)
        rows[7]["queue"] = ""
        splits = split(table(tmp_path, rows))
        assert sum(len(part) for part in (splits.train, splits.valid, splits.test)) == 59
        assert "rows without a label left out: 1 (first: t.csv row 8)" in splits.notes

    def test_texts_in_two_splits_are_counted(self, tmp_path):
        train, test = tickets(60), tickets(10, seed=1)
        test[0]["body"] = train[0]["body"].upper() + " "
        write_table(tmp_path / "train.csv", train)
        write_table(tmp_path / "test.csv", test)
        notes = split(tmp_path, validation=0.0).notes
        assert "1 of the 10 test texts occur in train as well" in notes

    def test_a_rare_class_stays_in_training(self, tmp_path):
        rows = tickets(60)
        rows[0]["queue"] = "rare"
        for seed in range(5):
            splits = split(table(tmp_path, rows), seed=seed, limit_train=10)
            assert (splits.train.labels == splits.classes.index("rare")).sum() == 1
        assert "rare 1" in splits.notes[-2]
        assert splits.notes[-1] == "no test text is of rare"

    def test_the_texts_of_a_limited_test_are_the_same_in_every_run(self, tmp_path):
        path = table(tmp_path, tickets(100))
        whole, first, second = (
            split(path, seed=seed, limit_test=limit).test
            for seed, limit in ((0, None), (0, 8), (1, 8))
        )
        assert first.texts == second.texts
        assert set(first.texts) < set(whole.texts)
        assert first.labels.bincount().tolist() == [4, 4]
        with pytest.raises(DataError, match="`limit_test`"):
            split(path, limit_test=1)

    def test_many_classes_are_summed_up(self, tmp_path):
        rows = [{"body": f"text {n}", "queue": n % 12} for n in range(130)]
        notes = split(table(tmp_path, rows), test_share=0.1).notes
        assert notes[-1].startswith("classes in train: 12, from ")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda row: row.update(queue="one"), "at least two classes. Got only 'one'"),
            (lambda row: row.update(queue=""), "labelled rows"),
            (lambda row: row.update(queue=row["body"]), "column of classes"),
        ],
    )
    def test_useless_labels_are_refused(self, tmp_path, change, words):
        rows = tickets(210)
        for row in rows:
            change(row)
        with pytest.raises(DataError, match=words):
            split(table(tmp_path, rows))

    def test_a_class_that_is_only_tested_is_refused(self, tmp_path):
        write_table(tmp_path / "train.csv", tickets(60))
        write_table(tmp_path / "test.csv", tickets(60, classes=3))
        with pytest.raises(DataError, match=r"hardware, software. Got also 'travel' in test.csv"):
            split(tmp_path)

    def test_a_class_whose_texts_are_all_empty_is_refused(self, tmp_path):
        rows = tickets(60, classes=3)
        for row in rows[2::3]:
            row["body"] = ""
        with pytest.raises(DataError, match="Got none of 'travel'"):
            split(table(tmp_path, rows))

    def test_shares_and_limits_must_leave_something(self, tmp_path):
        path = table(tmp_path, tickets(6))
        with pytest.raises(DataError, match=r"`test_share` 0.9 of 6"):
            split(path, test_share=0.9)
        with pytest.raises(DataError, match="`validation`"):
            split(path, validation=0.01)
        with pytest.raises(InputError, match="`test_share`"):
            split(path, test_share=1.0)
        with pytest.raises(DataError, match="`limit_train`"):
            split(path, limit_train=1)


@given(labels=LABELS, share=st.floats(0.1, 0.5), seed=st.integers(0, 9))
def test_nothing_is_lost_and_no_class_leaves_training(labels, share, seed):
    rows = Texts([str(place) for place in range(len(labels))], torch.tensor(labels))
    rest, held = _hold_out(rows, share, SplitSettings(seed=seed), "test", "test_share")
    assert sorted(rest.texts + held.texts, key=int) == rows.texts
    assert set(rest.labels.tolist()) == set(labels)
    assert len(held) == round(len(rows) * share)
    settings = SplitSettings(seed=seed, limit_train=len(set(labels)))
    few = _limited(rest, "limit_train", settings)
    assert sorted(few.labels.tolist()) == sorted(set(labels))
