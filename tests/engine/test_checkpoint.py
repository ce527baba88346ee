import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from scpl.engine.checkpoint import (
    Checkpoints,
    CheckpointWriter,
    intact_steps,
    read_manifest,
    read_part,
)
from scpl.engine.messages import CheckpointMark
from scpl.errors import CheckpointError, InputError

STAGES = 3
ALL = range(STAGES)


def state(step, index):
    return {"body": {"w": torch.full((4,), float(step))}, "index": index}


def write(folder, *steps, keep=9, stages=ALL):
    writer = CheckpointWriter(Checkpoints(folder, keep=keep), STAGES)
    for step in steps:
        for index in stages:
            writer.write(index, mark(step), state(step, index))
    writer.close()


def mark(step, **note):
    return CheckpointMark(step, step // 10, 0, note)


def newest(folder):
    return max(intact_steps(folder, ALL, STAGES), default=None)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    write(tmp_path, 7)
    assert newest(tmp_path) == 7
    for index in ALL:
        found = read_part(tmp_path, 7, index)
        assert torch.equal(found["body"]["w"], torch.full((4,), 7.0))
        assert found["index"] == index
        manifest = read_manifest(tmp_path, 7, index)
        assert (manifest["step"], manifest["stage"], manifest["num_stages"]) == (7, index, STAGES)
    assert sorted(p.suffix for p in (tmp_path / "step-000000007").iterdir()) == [
        *[".json"] * 3,
        *[".pt"] * 3,
    ]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_no_checkpoint_is_none(tmp_path, folder):
    if folder == "empty":
        (tmp_path / folder).mkdir()
    assert newest(tmp_path / folder) is None


def test_other_files_in_the_folder_are_ignored(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "step-12").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "step-000000009").write_text("a file")
    assert newest(tmp_path) == 3


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_draft(path):
    path.rename(path.with_name(path.name + ".tmp"))


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip, as_draft])
@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("index", ALL)
def test_a_damaged_part_makes_an_older_checkpoint_count(tmp_path, damage, suffix, index):
    write(tmp_path, 10, 20)
    path = tmp_path / "step-000000020" / f"stage-{index}{suffix}"
    before = path.read_bytes()
    damage(path)
    if damage is flip and suffix == ".json" and is_same_manifest(before, path.read_bytes()):
        pytest.skip("the bit lies in a note")
    assert newest(tmp_path) == 10
    with pytest.raises(CheckpointError, match="stage-"):
        read_part(tmp_path, 20, index)


def is_same_manifest(before, after):
    try:
        keys = ("format", "bytes", "sha256")
        return all(json.loads(before)[key] == json.loads(after)[key] for key in keys)
    except (ValueError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"format": 1}', "{"])
def test_a_manifest_of_the_wrong_kind_is_a_damaged_part(tmp_path, text):
    write(tmp_path, 10, 20)
    (tmp_path / "step-000000020" / "stage-1.json").write_text(text)
    assert newest(tmp_path) == 10
    if not text.startswith("{") or text == "{":
        with pytest.raises(CheckpointError, match="readable manifest"):
            read_manifest(tmp_path, 20, 1)


def test_a_run_killed_between_parts_leaves_the_older_checkpoint(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20, stages=[0, 1])
    assert newest(tmp_path) == 10


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("parts", ALL)
def test_a_kill_at_any_part_never_costs_the_last_checkpoint(tmp_path, keep, parts):
    write(tmp_path, *range(10, 60, 10), keep=keep)
    write(tmp_path, 60, keep=keep, stages=range(parts))
    assert newest(tmp_path) == 50


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    write(tmp_path, *range(1, 8), keep=keep)
    assert intact_steps(tmp_path, ALL, STAGES) == list(range(8 - keep, 8))
    assert len(list(tmp_path.iterdir())) == keep


@pytest.mark.parametrize("keep", [1, 2])
def test_ranks_with_their_own_disks_keep_as_many(tmp_path, keep):
    write(tmp_path, *range(1, 8), keep=keep, stages=[1, 2])
    assert intact_steps(tmp_path, [1, 2], STAGES) == list(range(8 - keep, 8))
    assert len(list(tmp_path.iterdir())) == keep


def test_two_ranks_on_one_disk_keep_as_many(tmp_path):
    writers = [CheckpointWriter(Checkpoints(tmp_path), STAGES) for _ in range(2)]
    for step in range(1, 8):
        for writer, stages in zip(writers, ([0], [1, 2]), strict=True):
            for index in stages:
                writer.write(index, mark(step), state(step, index))
    for writer in writers:
        writer.close()
    assert set(intact_steps(tmp_path, ALL, STAGES)) >= {6, 7}


def test_a_folder_removed_by_a_rank_far_ahead_is_made_again(tmp_path, monkeypatch):
    make, removed = Path.mkdir, []

    def removed_once(path, **options):
        make(path, **options)
        if path.name == "step-000000005" and not removed:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_once)
    write(tmp_path, 5)
    assert newest(tmp_path) == 5
    assert removed


def test_the_same_state_gives_the_same_bytes_whoever_writes_it(tmp_path, monkeypatch):
    """Torch writes the name of the file, once that of a process's draft, into the archive."""
    for number, name in enumerate(("one", "other")):
        monkeypatch.setattr(os, "getpid", lambda number=number: 1000 + number)
        write(tmp_path / name, 5)
    one, other = (tmp_path / name / "step-000000005" / "stage-0.pt" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_what_another_rank_is_writing_is_not_removed(tmp_path):
    write(tmp_path, 10, stages=[0])
    draft = tmp_path / "step-000000010" / "stage-1.pt.tmp"
    draft.write_bytes(b"half")
    write(tmp_path, 20, 30, 40, keep=1, stages=[0])
    assert draft.exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_going_back_past_a_damaged_checkpoint_keeps_what_comes_after(tmp_path, keep):
    write(tmp_path, 10, 20)
    truncate(tmp_path / "step-000000020" / "stage-1.pt")
    write(tmp_path, 15, keep=keep)
    assert newest(tmp_path) == 15
    write(tmp_path, 18, keep=keep)
    assert newest(tmp_path) == 18


def test_steps_are_ordered_as_numbers(tmp_path):
    write(tmp_path, 999_999_999, 1_000_000_000)
    assert intact_steps(tmp_path, ALL, STAGES) == [999_999_999, 1_000_000_000]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_a_full_disk_is_told_and_costs_no_older_checkpoint(tmp_path, monkeypatch, error):
    write(tmp_path, 10)

    def full(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    writer = CheckpointWriter(Checkpoints(tmp_path, keep=1), STAGES)
    writer.write(0, mark(20), state(20, 0))
    with pytest.raises(CheckpointError, match=r"must be written completely.*Free some space"):
        writer.close()
    monkeypatch.undo()
    assert newest(tmp_path) == 10
    assert not list((tmp_path / "step-000000020").iterdir())
    write(tmp_path, 30, keep=1)
    assert intact_steps(tmp_path, ALL, STAGES) == [30]


def test_a_failure_is_told_at_the_next_write(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    writer.write(0, mark(1), state(1, 0))
    writer._waiting[0].exception(timeout=10)
    with pytest.raises(CheckpointError, match="gone"):
        writer.write(1, mark(1), state(1, 1))
    writer.close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    writer = CheckpointWriter(Checkpoints(tmp_path / "file"), STAGES)
    writer.write(0, mark(1), state(1, 0))
    with pytest.raises(CheckpointError, match=r"stage-0\.pt"):
        writer.close()


class Bomb:
    fuse = None

    def __reduce__(self):
        return os.mkdir, (str(self.fuse),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    Bomb.fuse = tmp_path / "boom"
    write(tmp_path / "run", 5)
    writer = CheckpointWriter(Checkpoints(tmp_path / "run"), STAGES)
    writer.write(0, mark(6), {"body": Bomb()})
    writer.close()
    with pytest.raises(CheckpointError, match="tensors and plain values only"):
        read_part(tmp_path / "run", 6, 0)
    assert not Bomb.fuse.exists()


def test_a_note_cannot_pose_as_the_manifest(tmp_path):
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    with pytest.raises(CheckpointError, match="Got bytes, epoch"):
        writer.write(0, mark(1, bytes=3, epoch=9, x=1), state(1, 0))
    writer.close()


def test_a_checkpoint_of_another_number_of_stages_is_refused(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"Got 3 in .*, 4 here"):
        intact_steps(tmp_path, [0], 4)


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_is_kept(tmp_path, keep):
    with pytest.raises(InputError, match=f"must be at least 1.*keep={keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_a_missing_step_is_told(tmp_path):
    write(tmp_path, 5)
    shutil.rmtree(tmp_path / "step-000000005")
    for read in (read_manifest, read_part):
        with pytest.raises(CheckpointError, match="step-000000005"):
            read(tmp_path, 5, 0)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "step-000000005").mkdir()
    half = tmp_path / "step-000000005" / ".stage-0.pt.99999.tmp"
    half.write_text("half")
    write(tmp_path, 5)
    assert not half.exists()


def test_a_checkpoint_is_due_every_so_many_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=3)
    assert [step for step in range(1, 10) if checkpoints.is_due(step)] == [3, 6, 9]
    assert not any(Checkpoints(tmp_path).is_due(step) for step in range(1, 10))
    with pytest.raises(InputError, match="every=0"):
        Checkpoints(tmp_path, every=0)
