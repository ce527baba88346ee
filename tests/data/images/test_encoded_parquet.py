import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_files import encoded, picture, write_hub, write_parquet
from scpl.data.images.encoded import has_parquet, list_parquet
from scpl.errors import DataError, InputError


def read_parquet(root):
    return list_parquet(root).decoded()


def test_a_folder_as_on_the_hub(tmp_path):
    assert not has_parquet(tmp_path)
    write_hub(tmp_path, size=(8, 8), n=6, classes=3, image="img", names=["a", "b", "c"])
    assert has_parquet(tmp_path)
    train, test, classes, *_ = read_parquet(tmp_path)
    assert train.images.shape == test.images.shape == (6, 3, 8, 8)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert classes == ("a", "b", "c")
    expected = list(picture(seed=4).tobytes())
    assert train.images[4].permute(1, 2, 0).flatten().tolist() == expected


@pytest.mark.parametrize("label", ["label", "fine_label", "labels"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_columns_and_modes(tmp_path, label, mode):
    write_hub(tmp_path / "data", mode, (8, 8), n=4, label=label, names=list("abcdefghij"))
    train, _, classes, *_ = read_parquet(tmp_path)
    assert train.images.shape[1] == (1 if mode == "L" else 3)
    assert classes == tuple("abcdefghij")


def test_shards_are_read_in_order_and_all_needed(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / f"train-0000{i}-of-00003-ab.parquet", [picture(seed=i)], [i])
    write_parquet(tmp_path / "validation.parquet", [picture()], [0])
    train, test, _, *_ = read_parquet(tmp_path)
    assert train.labels.tolist() == [0, 1, 2]
    assert len(test) == 1
    (tmp_path / "train-00001-of-00003-ab.parquet").unlink()
    with pytest.raises(DataError, match=r"train-\* must be there\. Got 2 of 3; missing: 1"):
        read_parquet(tmp_path)


def test_a_test_file_is_preferred_to_a_validation_file(tmp_path):
    for i, kind in enumerate(("train", "valid", "test")):
        write_parquet(tmp_path / f"{kind}-00000-of-00001.parquet", [picture()], [i])
    assert read_parquet(tmp_path).test.labels.tolist() == [2]
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert read_parquet(tmp_path).test.labels.tolist() == [1]
    (tmp_path / "valid-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="Not both"):
        read_parquet(tmp_path)


@pytest.mark.parametrize("metadata", [True, False])
def test_names_come_from_classes_json_without_metadata(tmp_path, metadata):
    write_hub(tmp_path, size=(4, 4), n=2, classes=2, metadata=metadata)
    assert read_parquet(tmp_path).classes is None
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(["x", "y"]))
    assert read_parquet(tmp_path).classes == ("x", "y")
    file.write_text(json.dumps([{"label": 1, "name": "y"}, {"label": 0, "words": "x, z"}]))
    assert read_parquet(tmp_path).classes == ("x, z", "y")
    for damaged in ("{", '[{"label": 0}]', "3"):
        file.write_text(damaged)
        with pytest.raises(DataError, match=r"classes\.json"):
            read_parquet(tmp_path)


def test_damaged_contents_are_named(tmp_path):
    write_hub(tmp_path, size=(4, 4), n=2)
    train = tmp_path / "train-00000-of-00001.parquet"
    whole = train.read_bytes()
    train.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"complete and intact\. Got .*train-00000"):
        read_parquet(tmp_path)

    def rewrite(**columns):
        pq.write_table(pa.table(columns), train)

    good = encoded(picture((4, 4)))
    rewrite(image=[good], label=[1])
    assert read_parquet(tmp_path).train.labels.tolist() == [1]
    rewrite(picture=[good], label=[1])
    with pytest.raises(DataError, match="columns picture, label"):
        read_parquet(tmp_path)
    rewrite(image=[{"path": "a.png"}], label=[1])
    with pytest.raises(DataError, match="encoded images themselves"):
        read_parquet(tmp_path)
    rewrite(image=[good, b"junk"], label=[1, 1])
    with pytest.raises(DataError, match=r"row 1 of .*train-00000"):
        read_parquet(tmp_path)
    rewrite(image=[good, good], label=[1, None])
    with pytest.raises(DataError, match="Got None in row 1"):
        read_parquet(tmp_path)
    rewrite(image=[good], label=["cat"])
    with pytest.raises(DataError, match="Got 'cat' in row 0"):
        read_parquet(tmp_path)


def test_missing_pyarrow_is_explained(tmp_path, monkeypatch):
    write_hub(tmp_path, size=(4, 4), n=2)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'scpl\[parquet\]'"):
        read_parquet(tmp_path)


def test_a_bomb_of_repeated_values_is_refused_before_it_unpacks(tmp_path):
    """3 KB of parquet became 3.8 GB: one long value, and a count of how often it is repeated."""
    image = encoded(picture()) + bytes(1 << 20)
    for split in ("train", "test"):
        table = pa.table({"image": [{"bytes": image, "path": None}] * 200, "label": [0] * 200})
        pq.write_table(table, tmp_path / f"{split}.parquet", compression="zstd")
    assert (tmp_path / "train.parquet").stat().st_size < 4000
    with pytest.raises(DataError, match=r"at most 67,108,864. Got at least 2\d\d,\d{3},\d{3} in"):
        read_parquet(tmp_path)


def test_a_label_that_no_network_has_an_output_for_is_named(tmp_path):
    """One label of 2**40 asked for a name for each class below it."""
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [picture()], [1 << 40])
    with pytest.raises(DataError, match="Got 1099511627776 in row 0"):
        read_parquet(tmp_path)


def test_a_label_without_end_in_classes_json_is_a_damaged_file(tmp_path):
    """Python reads 1e999 as infinite, which `int` answers with an OverflowError."""
    write_hub(tmp_path, size=(4, 4), n=2, classes=2, metadata=False)
    (tmp_path / "classes.json").write_text('[{"label": 1e999, "name": "a"}]')
    with pytest.raises(DataError, match=r"classes\.json must be a list .* OverflowError"):
        read_parquet(tmp_path)
