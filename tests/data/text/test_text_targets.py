"""What is to be predicted, read from the cells of tables."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl.data.sampling import evenly
from scpl.data.text import Encoded, TextLoader
from scpl.data.text.splits import Columns, SplitSettings, find_files, read_splits
from scpl.data.text.targets import targets_of
from scpl.errors import DataError, InputError
from text_files import write_table


def split(tmp_path, rows, label, task, name="t.csv", **settings):
    path = write_table(tmp_path / name, rows)
    columns = Columns(("body",), tuple(label))
    return read_splits(find_files(str(path)), columns, SplitSettings(task=task, **settings))


def labelled(count=60):
    every = ["a", "b", "c"]
    return [
        {"body": f"text {n}", "tags": [tag for i, tag in enumerate(every) if n >> i & 1]}
        for n in range(count)
    ]


class TestLabels:
    @pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
    def test_lists(self, tmp_path, name):
        splits = split(tmp_path, labelled(), ["tags"], "multi-label", name)
        assert splits.classes == ("a", "b", "c")
        assert splits.train.labels.dtype == torch.uint8
        for text, row in zip(splits.train.texts, splits.train.labels.tolist(), strict=True):
            number = int(text.split()[1])
            assert row == [number >> i & 1 for i in range(3)]

    @pytest.mark.parametrize(
        "written", [lambda t: ";".join(t) or "[]", lambda t: " | ".join(t) or "[]", str]
    )
    def test_written_lists(self, tmp_path, written):
        rows = [{**r, "tags": written(r["tags"]).replace("'", '"')} for r in labelled()]
        splits = split(tmp_path, rows, ["tags"], "multi-label")
        expected = split(tmp_path, labelled(), ["tags"], "multi-label", "t.jsonl")
        assert splits.train.texts == expected.train.texts
        assert torch.equal(splits.train.labels, expected.train.labels)
        assert splits.classes == expected.classes

    def test_columns_of_0_and_1(self, tmp_path):
        rows = [
            {"body": r["body"], "b": "1" if "b" in r["tags"] else "False",
             "a": "1.0" if "a" in r["tags"] else 0}
            for r in labelled()
        ]  # fmt: skip
        rows[5]["a"] = ""
        splits = split(tmp_path, rows, ["b", "a"], "multi-label")
        assert splits.classes == ("b", "a")
        for text, row in zip(splits.train.texts, splits.train.labels.tolist(), strict=True):
            number = int(text.split()[1])
            assert row == [number >> 1 & 1, number & 1]
        assert "rows without a label left out: 1 (first: t.csv row 6)" in splits.notes
        assert "labels in train: " in splits.notes[-1]

    def test_splits_have_their_share_of_every_label(self, tmp_path):
        rows = [{"body": f"t {n}", "tags": ["a"] * (n % 2) + ["b"] * (n % 10 == 0)}
                for n in range(200)]  # fmt: skip
        splits = split(tmp_path, rows, ["tags"], "multi-label", "t.jsonl")
        assert len(splits.test) == 40
        assert splits.test.labels.sum(0).tolist() == [20, 4]
        assert splits.valid.labels.sum(0).tolist() == [8, 2]

    def test_refused(self, tmp_path):
        for tags, message in (
            ('["a", ', r"must be JSON, or names .* row 8: .*Write for instance \[\"a\", \"b\"\]"),
            ('[{"a": 1}]', r"must hold names or whole numbers\. Got \{'a': 1\} in t.csv row 8"),
        ):
            rows = [{"body": r["body"], "tags": ";".join(r["tags"]) or "[]"} for r in labelled()]
            rows[7]["tags"] = tags
            with pytest.raises(DataError, match=message):
                split(tmp_path, rows, ["tags"], "multi-label")
        bare = [{"body": f"text {n}", "tags": n % 2} for n in range(20)]
        with pytest.raises(DataError, match=r"several must hold 0 or 1.* Got 0, 1 in column"):
            split(tmp_path, bare, ["tags"], "multi-label")
        many = [{"body": f"text {n}", "tags": f"own {n}"} for n in range(300)]
        with pytest.raises(DataError, match=r"labels, which many rows share\. Got 300"):
            split(tmp_path, many, ["tags"], "multi-label")
        never = [{"body": f"text {n}", "a": n % 2, "b": 0} for n in range(40)]
        with pytest.raises(DataError, match=r"Every label needs .* Got none of 'b'"):
            split(tmp_path, never, ["a", "b"], "multi-label")
        empty = [{"body": "x", "a": "", "b": ""}] * 3
        with pytest.raises(DataError, match=r"Got no row with a label in column 'a', 'b'"):
            split(tmp_path, empty, ["a", "b"], "multi-label")


class TestNumbers:
    @pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
    def test_missing_ones_are_counted_and_left_out(self, tmp_path, name):
        rows = [{"body": f"text {n}", "x": n + 0.5, "y": -1e6 * n} for n in range(100)]
        rows[3]["x"] = None
        rows[4]["y"] = math.nan
        splits = split(tmp_path, rows, ["x", "y"], "regression", name)
        assert splits.classes == ("x", "y")
        assert sum(len(part) for part in (splits.train, splits.valid, splits.test)) == 98
        assert f"rows without a label left out: 2 (first: {name} row 4)" in splits.notes
        for text, row in zip(splits.train.texts, splits.train.labels.tolist(), strict=True):
            assert row == [int(text.split()[1]) + 0.5, -1e6 * int(text.split()[1])]
        # Every tenth of the values has its share in the test.
        tenths = (splits.test.labels[:, 0] / 10).long().bincount(minlength=10)
        assert tenths.min() >= 1
        assert tenths.max() <= 3
        assert "numbers in train: x " in splits.notes[-1]

    def test_refused(self, tmp_path):
        rows = [{"body": f"text {n}", "x": n} for n in range(20)]
        for wrong in ("3,5", "many", "inf", "True"):
            rows[6]["x"] = wrong
            with pytest.raises(DataError, match=rf"Got '{wrong}' in column 'x', t.csv row 7"):
                split(tmp_path, rows, ["x"], "regression")
        same = [{"body": f"text {n}", "x": 5} for n in range(20)]
        with pytest.raises(DataError, match=r"must vary .* Got 5 in every row of column 'x'"):
            split(tmp_path, same, ["x"], "regression")


class TestClasses:
    def test_labels_that_look_like_numbers_get_a_hint(self, tmp_path):
        rows = [{"body": f"text {n}", "x": n % 5 / 2} for n in range(50)]
        notes = split(tmp_path, rows, ["x"], "classes").notes
        assert any("look like numbers" in note and "`task` regression" in note for note in notes)
        ratings = [{"body": f"text {n}", "x": n % 5} for n in range(50)]
        assert "look like" not in " ".join(split(tmp_path, ratings, ["x"], "classes").notes)
        values = [{"body": f"text {n}", "x": n * 1.25} for n in range(300)]
        with pytest.raises(DataError, match=r"They are numbers: learn them with `task` regression"):
            split(tmp_path, values, ["x"], "classes")

    def test_one_column(self):
        with pytest.raises(InputError, match=r"must stand in one column\. Got `label` a, b\. Name"):
            targets_of("classes", ["a", "b"], None)
        with pytest.raises(InputError, match=r"task"):
            SplitSettings(task="ranking")


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), seed=st.integers(0, 99))
def test_an_even_epoch_draws_equally_from_each_class(labels, seed):
    labels = torch.tensor(labels)
    drawn = evenly(labels, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(labels)
    sizes, there = labels[drawn].bincount(minlength=5), labels.bincount(minlength=5) > 0
    assert sizes[there].max() - sizes[there].min() <= 1
    assert (sizes[~there] == 0).all()
    for name in labels.unique():  # every row once before one comes again
        rows = torch.nonzero(labels == name)[:, 0]
        counts = drawn.bincount(minlength=len(labels))[rows]
        assert counts.max() - counts.min() <= 1


def test_a_loader_that_draws_evenly_resumes_anywhere():
    labels = torch.tensor([0] * 30 + [1] * 4)
    split = Encoded.of([[2 + n] * (1 + n % 5) for n in range(34)], labels, 100)

    def loader(epoch):
        made = TextLoader(split, batch_size=4, shuffle=True, seed=1, strata=labels, prefetch=0)
        made.set_epoch(epoch)
        return made

    whole, rest = list(loader(2)), list(loader(2).batches(3))
    assert [tokens.tolist() for tokens, _ in whole[3:]] == [tokens.tolist() for tokens, _ in rest]
    assert torch.cat([target for _, target in whole]).tolist().count(1) == 17
    other = torch.cat([tokens[:, 0] for tokens, _ in loader(3)])
    assert other.tolist() != torch.cat([tokens[:, 0] for tokens, _ in whole]).tolist()
