import errno
import json

import pytest

from scpl.errors import CheckpointError, InputError
from scpl.runs import RunFolder
from scpl.runs.lock import LOCK_FILE


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


class TestCreate:
    def test_default_names_are_numbered(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        names = [RunFolder.create(None, "a", force=False).path for _ in range(3)]
        assert [str(name) for name in names] == ["runs/a", "runs/a-2", "runs/a-3"]

    def test_an_empty_folder_is_taken(self, tmp_path):
        assert RunFolder.create(tmp_path, "a", force=False).path == tmp_path

    @pytest.mark.parametrize("force", [False, True])
    def test_what_is_no_run_folder_is_never_touched(self, tmp_path, force):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(InputError, match="`out`"):
            RunFolder.create(tmp_path, "a", force=force)
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file_is_never_touched(self, tmp_path, force):
        path = tmp_path / "a"
        path.write_text("mine")
        with pytest.raises(InputError, match="`out`"):
            RunFolder.create(path, "a", force=force)
        assert path.read_text() == "mine"

    def test_force_empties_a_run_folder(self, tmp_path):
        for name in ("config.toml", "model.safetensors"):
            (tmp_path / name).write_text("old")
        with pytest.raises(InputError, match=f"`resume` {tmp_path}.*`force`"):
            RunFolder.create(tmp_path, "a", force=False)
        RunFolder.create(tmp_path, "a", force=True)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]

    def test_one_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"must be writable.*file.*`out`"):
            RunFolder.create(tmp_path / "file" / "run", "a", force=False)


class TestFiles:
    def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(self, folder, monkeypatch):
        folder.write_text(folder.metrics, "old")

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            folder.write_text(folder.metrics, "new")
        assert [path.read_text() for path in folder.path.iterdir()] == ["old"]

    def test_a_full_disk_is_told_when_logging(self, folder):
        folder.log.symlink_to("/dev/full")
        with pytest.raises(CheckpointError, match=r"log\.txt.*No space left on device"):
            folder.append_log("hello")

    def test_a_half_written_step_is_dropped(self, folder):
        folder.append_steps([{"step": 1}, {"step": 2}])
        with folder.steps.open("a") as file:
            file.write('{"step": ')
        assert folder.read_steps(5) == [{"step": 1}, {"step": 2}]
        assert folder.read_steps(1) == [{"step": 1}]

    @pytest.mark.parametrize("line", ['{"step": ', "[]", "{}", '{"step": "x"}'])
    def test_a_damaged_step_is_named(self, folder, line):
        """What was logged after it must not be lost without a word."""
        folder.steps.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(CheckpointError, match=r"steps\.jsonl must hold .*in line 2"):
            folder.read_steps(5)

    def test_the_table_of_epochs_is_read_back_as_text(self, folder):
        folder.write_metrics([{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.30000000000000004}])
        rows = folder.read_metrics(1)
        assert rows == [{"epoch": "1", "loss": "0.1"}]
        assert float(folder.read_metrics(2)[1]["loss"]) == 0.30000000000000004

    def test_no_table_yet(self, folder):
        assert folder.read_metrics(3) == []
        assert folder.read_steps(3) == []

    @pytest.mark.parametrize("text", ["", "{", "[]", json.dumps("x")])
    def test_a_damaged_json_file_is_named(self, folder, text):
        folder.summary.write_text(text)
        with pytest.raises(CheckpointError, match=r"summary\.json"):
            folder.read_json(folder.summary)


@pytest.mark.parametrize("exists", [True, False])
def test_only_a_run_folder_is_opened(tmp_path, exists):
    path = tmp_path if exists else tmp_path / "nothing"
    with pytest.raises(CheckpointError, match=r"must hold config\.toml") as caught:
        RunFolder.open(path)
    assert ("does not exist" in str(caught.value)) == (not exists)
