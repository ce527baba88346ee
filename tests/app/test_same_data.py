"""A run remembers what it was trained and tested on; other data are never taken for the same."""

import shutil

import pytest

from cli_runs import TINY, refused, scpl, tree
from data_files import write_folder
from scpl.runs import RunFolder

FLAGS = [*TINY, "--limit-train", "100", "--validation", "0.2", "--batch-size", "8", "--quiet"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


def write_pets(folder, first, end):
    """Write pictures of both classes, of these numbers."""
    write_folder(folder, n=end)
    for path in folder.rglob("*.png"):
        if int(path.stem) < first:
            path.unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images of two classes, and a run on them; tests copy both."""
    root = tmp_path_factory.mktemp("made")
    write_pets(root / "pets" / "train", 0, 10)
    write_pets(root / "pets" / "test", 10, 15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scpl.report.write_run_report", lambda folder: [])
        found = scpl("train", *FLAGS, "--data", root / "pets", "--out", root / "run")
    assert found.status == 0, found.err
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """In a folder of its own that holds the images, and a run that still has to be tested."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "pets", "pets")
    shutil.copytree(made / "run", "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(made / "pets"), str(tmp_path / "pets")))
    return tmp_path


def move(root, split, count):
    for path in sorted((root / "pets" / split / "cat").iterdir())[:count]:
        path.rename(root / "pets" / split / "dog" / f"moved-{path.name}")


def test_it_is_written_down(made):
    data = RunFolder(made / "run").read_json(made / "run" / "model.json")["data"]
    assert {name: (each["count"], each["sizes"]) for name, each in data.items()} == {
        "train": (20, {"cat": 10, "dog": 10}),
        "test": (10, {"cat": 5, "dog": 5}),
    }


def test_a_resumed_run_finds_the_data_that_it_began_with(here):
    """Ten pictures in the other class, or other test pictures: it went on without a word."""
    (here / "run" / "summary.json").unlink()
    before = tree(here / "run")
    move(here, "train", 3)
    refused(scpl("train", "--resume", "run"), "as it was when it began",
            "train: 20 images, 20 before (cat -3, dog +3). ")  # fmt: skip
    assert tree(here / "run") == before
    shutil.rmtree(here / "pets" / "train")
    (here / "pets" / "test").rename(here / "pets" / "train")
    write_pets(here / "pets" / "test", 15, 20)
    refused(scpl("train", "--resume", "run"), "train: 10 images, 20 before (cat -5, dog -5)",
            "test: 10 images as before, but others")  # fmt: skip


def test_what_is_only_copied_is_the_same_data(here):
    """Other times of change, and another place: neither is a word worth."""
    (here / "run" / "summary.json").unlink()
    for path in (here / "pets").rglob("*.png"):
        path.touch()
    found = scpl("train", "--resume", "run")
    assert found.status == 0, found.err
    assert scpl("eval", "run").status == 0


def test_a_number_is_never_that_of_other_test_images(here):
    move(here, "train", 3)
    assert scpl("eval", "run").status == 0  # what it was tested on is still there
    (here / "pets" / "test" / "dog" / "012.png").unlink()
    refused(scpl("eval", "run"), "tested on", "test: 9 images, 10 before (dog -1)", "--data")
    assert scpl("eval", "run", "--data", here / "pets").status == 0


def test_a_comparison_that_goes_on_is_of_the_same_data(here):
    """Old runs stood beside new ones in one table."""
    (here / "all").mkdir()
    (here / "run").rename(here / "all" / "scpl-seed0")
    move(here, "train", 3)
    before = tree(here / "all")
    command = ["compare", *FLAGS, "--data", here / "pets", "--out", "all", "--methods", "scpl,dgl"]
    refused(scpl(*command), "of the same data", "scpl-seed0", "(cat -3, dog +3)", "--force")
    assert tree(here / "all") == before
