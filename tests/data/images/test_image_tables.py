"""Tables that name images and their classes, as competitions have them."""

import pytest
from PIL import Image

from scpl.app.config import TrainConfig
from scpl.app.inputs import images, modality_of, texts
from scpl.data.images import Reading, TableSettings, load, load_test, names_images
from scpl.errors import DataError, InputError

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def draw(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), COLOURS[colour]).save(path)


@pytest.fixture
def unpacked(tmp_path):
    """A competition's archive: train/ without folders of classes, beside a table of labels."""
    rows = [(f"a{i}", "red" if i % 3 else "blue") for i in range(12)]
    for name, colour in rows:
        draw(tmp_path / "train" / f"{name}.png", colour)
    draw(tmp_path / "test" / "b0.png", "red")
    lines = [f"{name},{colour}" for name, colour in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["id,colour", *lines, "a1,", ""]))
    (tmp_path / "sample_submission.csv").write_text("id,colour\nb0,red\n")
    return tmp_path


def shown_colours(split, classes):
    """The colour that each image has, and the class that it is said to be of."""
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        yield (
            ("red" if image[0].float().mean() > image[2].float().mean() else "blue"),
            classes[label],
        )


def test_a_table_of_names_without_endings_is_a_data_set(unpacked):
    table = str(unpacked / "labels.csv")
    data = load(table, table=TableSettings(label="colour"))
    assert (data.name, data.classes) == ("labels", ("blue", "red"))
    assert (len(data.train), len(data.test)) == (10, 2)
    pairs = [*shown_colours(data.train, data.classes), *shown_colours(data.test, data.classes)]
    assert all(seen == said for seen, said in pairs)
    assert sum(seen == "blue" for seen, _ in pairs) == 4
    assert any(f"column 'id' names images in {unpacked / 'train'}" in n for n in data.notes)
    assert any("rows without a label left out: 1" in note for note in data.notes)


def test_what_a_table_names_says_whether_it_is_of_images(unpacked):
    table = unpacked / "labels.csv"
    assert names_images(str(table))
    assert not names_images(str(unpacked / "none.csv"))
    assert modality_of(TrainConfig.of(data=str(table)).data) is images
    assert modality_of(TrainConfig.of(data=str(table), text=("id",)).data) is texts
    table.write_text("text,label\nshort and sweet,good\n")
    assert modality_of(TrainConfig.of(data=str(table)).data) is texts


def test_a_folder_with_tables_train_and_test(unpacked):
    """The test table of a competition has no labels: it is passed over, and a line says so."""
    rows = (unpacked / "labels.csv").read_text().splitlines()[1:-1]
    lines = [f"{row.split(',')[0]}.png,{row.split(',')[1]}" for row in rows]
    (unpacked / "train.csv").write_text("\n".join(["file_name,label", *lines]))
    (unpacked / "test.csv").write_text("file_name\nb0.png\n")
    data = load(str(unpacked))
    assert (len(data.train), len(data.test)) == (10, 2)
    assert any("test.csv is passed over, as it has no column 'label'" in n for n in data.notes)
    (unpacked / "test.csv").write_text("file_name,label\nb0.png,red\n")
    data = load(str(unpacked))
    assert (len(data.train), len(data.test)) == (12, 1)
    assert list(shown_colours(data.test, data.classes)) == [("red", "red")]


def test_what_is_not_there_is_named_or_left_out(unpacked):
    (unpacked / "train" / "a4.png").unlink()
    table, settings = str(unpacked / "labels.csv"), TableSettings(label="colour")
    with pytest.raises(DataError, match=r"1 of 12 are not: .*a4\.png\. .*`skip_unreadable`"):
        load(table, table=settings)
    reading = Reading(skip_unreadable=True)
    data = load(table, table=settings._replace(skip_missing=True), reading=reading)
    assert len(data.train) + len(data.test) == 11
    assert any("images that are not there left out: 1" in note for note in data.notes)


def test_two_folders_with_images_of_the_same_name_are_told_apart_or_refused(tmp_path):
    for folder, colour in (("x", "red"), ("y", "blue")):
        for number in range(2):
            draw(tmp_path / folder / f"{number}.png", colour)
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n0,a\n1,b\n")
    with pytest.raises(DataError, match="It must be clear which images a table names"):
        load(str(table))
    (tmp_path / "y").rename(tmp_path / "Train")
    split, _ = load_test(str(table), ("a", "b"), 4, own=False)
    assert split.images[0, :, 0, 0].tolist() == [0, 0, 255]


def test_tables_of_nothing_that_is_there_say_what_was_tried(unpacked):
    (unpacked / "labels.csv").write_text("id,label\nq1,red\nq2,blue\n")
    with pytest.raises(DataError, match=r"in column 'id'.*looked in .*train.*Write paths from"):
        load(str(unpacked / "labels.csv"), table=TableSettings(image="id"))


def test_folders_without_classes_lead_to_the_table(unpacked):
    for folder in (unpacked, unpacked / "train"):
        with pytest.raises(DataError, match=r"a table that names each image and its .*labels\.csv"):
            load(str(folder))


def test_what_is_for_tables_is_refused_elsewhere(tmp_path):
    for colour in COLOURS:
        for number in range(2):
            draw(tmp_path / colour / f"{number}.png", colour)
    with pytest.raises(InputError, match="`label` must go with a table"):
        load(str(tmp_path), table=TableSettings(label="colour"))
    with pytest.raises(InputError, match="must stand in one column"):
        images.loaders(TrainConfig.of(data=str(tmp_path), label=("a", "b")))
