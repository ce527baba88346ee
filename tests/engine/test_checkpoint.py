import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from scpl.engine import checkpoint
from scpl.engine.checkpoint import (
    MANIFEST,
    Checkpoints,
    CheckpointWriter,
    read_manifest,
    read_part,
    survey,
)
from scpl.engine.messages import CheckpointMark
from scpl.errors import CheckpointError, InputError

STAGES = 3
ALL = range(STAGES)


def state(step, index):
    """What a stage would save."""
    return {
        "layers": [f"layer{index}"],
        "body": {"w": torch.full((4,), float(step))},
        "objective": {},
        "optimizer": {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "scheduler": None,
        "scaler": None,
        "random": {"cpu": torch.Generator().manual_seed(0).get_state()},
    }


def write(folder, *steps, keep=9, stages=ALL, run="a run", attempt="first"):
    writer = CheckpointWriter(Checkpoints(folder, keep=keep), STAGES)
    for step in steps:
        for index in stages:
            writer.write(index, mark(step, run, attempt), state(step, index))
    writer.close()


def mark(step, run="a run", attempt="first", **note):
    return CheckpointMark(step, step // 10, 0, note, run=run, attempt=attempt)


def intact_steps(folder, stages, run=None):
    return [one.step for one in survey(folder, stages, STAGES, run) if not one.fault]


def newest(folder):
    return max(intact_steps(folder, ALL), default=None)


def fault(folder, step, run=None):
    """What keeps a step from being used, and whether that is damage."""
    found = {one.step: one for one in survey(folder, ALL, STAGES, run)}[step]
    return found.fault, found.damaged


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    write(tmp_path, 7)
    assert newest(tmp_path) == 7
    for index in ALL:
        found = read_part(tmp_path, 7, index)
        assert torch.equal(found["body"]["w"], torch.full((4,), 7.0))
        assert found["layers"] == [f"layer{index}"]
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
    (tmp_path / "step-0000000009").mkdir()
    assert [one.step for one in survey(tmp_path, ALL, STAGES)] == [3]


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
    damage(path)
    assert newest(tmp_path) == 10
    told, damaged = fault(tmp_path, 20)
    assert f"stage {index} " in told
    assert path.with_suffix("").name in told
    # A file that is not there may never have been finished; one without a manifest has lost it.
    assert damaged == (suffix == ".json" or damage not in (delete, as_draft))
    with pytest.raises(CheckpointError, match="stage-"):
        read_part(tmp_path, 20, index)


def test_every_bit_of_a_manifest_counts(tmp_path):
    """A flipped bit is found, or changes nothing: a blank became another blank."""
    write(tmp_path, 10)
    path = tmp_path / "step-000000010" / "stage-1.json"
    whole, said = path.read_bytes(), json.loads(path.read_text())
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if newest(tmp_path) == 10:
            assert json.loads(path.read_text()) == said, bit


VALUES = [None, True, -1, 0, 10**6, 1.5, "", "x", [], {}, {"torch": 3}, float("nan")]


@pytest.mark.parametrize("name", MANIFEST)
def test_an_odd_value_in_a_manifest_is_a_fault_even_if_the_checksum_is_right(tmp_path, name):
    write(tmp_path, 10)
    path = tmp_path / "step-000000010" / "stage-1.json"
    said = json.loads(path.read_text())
    del said["sha256"]
    for value in VALUES:
        odd = {**said, name: value}
        odd.setdefault("sha256", checkpoint._checksum(odd, path.with_suffix(".pt")))
        path.write_text(json.dumps(odd))
        if (name, value) in (("epoch", 0), ("epoch", 10**6), ("batch", 0), ("batch", 10**6)):
            continue  # as good as any
        if (name, value) == ("versions", {}):
            continue  # of nobody knows which
        if (name, value) == ("num_stages", 10**6):
            with pytest.raises(CheckpointError, match="Got 1000000 in"):
                newest(tmp_path)
            continue
        assert newest(tmp_path) is None, value


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", "{}", '{"format": 1}', "{", "[" * 100_000, "9" * 5000, " " * (2 << 20)],
    ids=lambda text: text[:14],
)
def test_a_manifest_of_the_wrong_kind_is_a_damaged_part(tmp_path, text):
    write(tmp_path, 10, 20)
    (tmp_path / "step-000000020" / "stage-1.json").write_text(text)
    assert newest(tmp_path) == 10
    assert fault(tmp_path, 20)[1]
    with pytest.raises(CheckpointError, match="readable manifest"):
        read_manifest(tmp_path, 20, 1)


@pytest.mark.parametrize("suffixes", [[".pt", ".json"], [".pt"], [".json"]])
def test_a_part_of_another_step_is_not_believed(tmp_path, suffixes):
    write(tmp_path, 10, 20)
    for suffix in suffixes:
        old, new = (tmp_path / f"step-{s:09d}" / f"stage-1{suffix}" for s in (10, 20))
        shutil.copy(old, new)
    assert newest(tmp_path) == 10
    assert fault(tmp_path, 20)[1]


def test_a_part_of_another_stage_is_not_believed(tmp_path):
    write(tmp_path, 10, 20)
    for suffix in (".pt", ".json"):
        step = tmp_path / "step-000000020"
        shutil.copy(step / f"stage-0{suffix}", step / f"stage-1{suffix}")
    assert newest(tmp_path) == 10
    assert "it is that of stage 0 at step 20" in fault(tmp_path, 20)[0]


def test_a_part_of_another_run_is_not_believed(tmp_path):
    """Same flags, another seed: all else fits."""
    write(tmp_path / "mine", 10, 20)
    write(tmp_path / "other", 20, run="another run")
    for suffix in (".pt", ".json"):
        part = Path("step-000000020") / f"stage-2{suffix}"
        shutil.copy(tmp_path / "other" / part, tmp_path / "mine" / part)
    assert newest(tmp_path / "mine") == 10
    assert fault(tmp_path / "mine", 20) == ("stage 2 is of another run", True)


def test_a_whole_step_of_another_run_is_not_believed_by_a_run_with_a_name(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 20, run="another run")
    assert intact_steps(tmp_path, ALL, "a run") == [10]
    assert fault(tmp_path, 20, "a run") == ("stage 0 is of another run", True)


def test_what_another_run_left_does_not_replace_ours(tmp_path):
    """A run that begins in the folder of an older one keeps as many of its own."""
    write(tmp_path, 5, 15, run="an older run")
    write(tmp_path, 10, keep=2)
    write(tmp_path, 20, keep=2)
    assert intact_steps(tmp_path, ALL, "a run") == [10, 20]


def test_parts_of_two_attempts_are_no_checkpoint(tmp_path):
    """One was killed when it had saved some stages, and the next when it had saved the others: the
    run went on from a step up to which neither had logged."""
    write(tmp_path, 10)
    write(tmp_path, 20, stages=[1, 2])
    write(tmp_path, 20, stages=[0], attempt="second")
    assert newest(tmp_path) == 10
    said, damaged = fault(tmp_path, 20)
    assert "parts of several attempts" in said
    assert not damaged
    write(tmp_path, 20, stages=[1, 2], attempt="second")
    assert newest(tmp_path) == 20


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("disks", [1, 3])
def test_whoever_goes_on_from_a_checkpoint_finds_its_best(tmp_path, keep, disks):
    """On every machine, whatever each of them was killed at; and no other is kept for it."""
    folders = [tmp_path / str(disk) for disk in range(disks)]
    writers = [CheckpointWriter(Checkpoints(folder, keep=keep), STAGES) for folder in folders]
    mine = [ALL] if disks == 1 else [[index] for index in ALL]
    bests = {10: 10, 20: 20, 30: 20, 40: 20, 50: 20, 60: 60, 70: 60, 80: 60, 90: 60}
    for step, best in bests.items():
        for writer, folder, stages in zip(writers, folders, mine, strict=True):
            for index in stages:
                writer.write(index, mark(step, best_step=best), state(step, index))
                writer.wait()
                common = [set(intact_steps(f, s)) for f, s in zip(folders, mine, strict=True)]
                usable = set.intersection(*common)
                assert {bests[each] for each in usable} <= usable, (step, index)
            assert len(intact_steps(folder, stages)) <= keep + 1
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("keep", [1, 2])
def test_parts_of_two_attempts_replace_no_checkpoint(tmp_path, keep):
    write(tmp_path, 10, keep=keep)
    write(tmp_path, 20, 30, keep=9, stages=[1, 2])
    write(tmp_path, 20, 30, keep=keep, stages=[0], attempt="second")
    assert newest(tmp_path) == 10


KINDS = ["layers", "body", "objective", "optimizer", "scheduler", "scaler", "random"]


@pytest.mark.parametrize("name", KINDS)
def test_a_part_that_is_no_state_of_a_stage_is_told(tmp_path, name):
    """With the right checksum: somebody, or another program, wrote it so."""
    for odd in (3, "x", [3], {3: 4}, {"param_groups": 3}, {"cpu": torch.zeros(3)}):
        written = {**state(5, 0), name: odd}
        free = name in ("body", "objective", "scheduler", "scaler")
        if free and isinstance(odd, dict) and 3 not in odd:
            continue  # any names may be there
        writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
        writer.write(0, mark(5), written)
        writer.close()
        with pytest.raises(CheckpointError, match="must hold the state of a stage"):
            read_part(tmp_path, 5, 0)


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
    assert intact_steps(tmp_path, ALL) == list(range(8 - keep, 8))
    assert len(list(tmp_path.iterdir())) == keep


@pytest.mark.parametrize("keep", [1, 2])
def test_ranks_with_their_own_disks_keep_as_many(tmp_path, keep):
    write(tmp_path, *range(1, 8), keep=keep, stages=[1, 2])
    assert intact_steps(tmp_path, [1, 2]) == list(range(8 - keep, 8))
    assert len(list(tmp_path.iterdir())) == keep


def test_two_ranks_on_one_disk_keep_as_many(tmp_path):
    writers = [CheckpointWriter(Checkpoints(tmp_path), STAGES) for _ in range(2)]
    for step in range(1, 8):
        for writer, stages in zip(writers, ([0], [1, 2]), strict=True):
            for index in stages:
                writer.write(index, mark(step), state(step, index))
    for writer in writers:
        writer.close()
    assert set(intact_steps(tmp_path, ALL)) >= {6, 7}


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
    assert intact_steps(tmp_path, ALL) == [999_999_999, 1_000_000_000]


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
    assert not (tmp_path / "step-000000020").exists()
    write(tmp_path, 30, keep=1)
    assert intact_steps(tmp_path, ALL) == [30]


def test_a_disk_that_fills_while_torch_writes_is_called_full(tmp_path):
    """Torch raises an error of its own over that of the disk: "unexpected pos 897472"."""
    write(tmp_path, 10)
    draft = tmp_path / "step-000000020" / f".stage-0.pt.{os.getpid()}.tmp"
    draft.parent.mkdir()
    draft.symlink_to("/dev/full")
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    writer.write(0, mark(20), {**state(20, 0), "body": {"w": torch.zeros(300_000)}})
    with pytest.raises(CheckpointError) as caught:
        writer.close()
    assert re.search(
        r"step-000000020/stage-0\.pt: No space left on device "
        r"\(1,2\d\d,\d{3} bytes needed, [\d,]+ bytes free\)",
        str(caught.value),
    )
    assert newest(tmp_path) == 10
    assert not draft.parent.exists()


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_space", lambda path: 3_999)
    monkeypatch.setattr("scpl.files.free_space", lambda path: 3_999)
    monkeypatch.setattr(checkpoint, "_save", None)
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    writer.write(0, mark(20), {"body": [{"w": torch.zeros(1000)}]})
    with pytest.raises(CheckpointError, match=r"4,000 bytes needed, 3,999 bytes free"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [3.5, 2.5])
def test_a_disk_that_will_be_full_is_told_once_before_it_is(tmp_path, monkeypatch, room):
    """Two are kept, and a third one is there while it is written."""

    def used():
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    write(tmp_path / "example", 1)
    disk = int(room * used())
    shutil.rmtree(tmp_path / "example")
    monkeypatch.setattr(checkpoint, "free_space", lambda path: disk - used())
    heard = []
    writer = CheckpointWriter(Checkpoints(tmp_path / "run", tell=heard.append), STAGES)

    def save(*steps):
        for step in steps:
            for index in ALL:
                writer.write(index, mark(step), state(step, index))
            writer.wait()

    save(1)
    if room > 3:
        save(*range(2, 6))
        assert heard == []
    else:
        writer.write(0, mark(2), state(2, 0))
        assert len(heard) == 1
        assert "nearly full: before one is removed it must hold 2 more" in heard[0]
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(2, 3)
        assert newest(tmp_path / "run") == 2
        assert len(heard) == 1
    writer._pool.shutdown()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_why_a_disk_takes_nothing_is_told(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "save", refuse)
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    writer.write(0, mark(20), state(20, 0))
    with pytest.raises(CheckpointError, match=rf"stage-0\.pt: {os.strerror(number)}"):
        writer.close()


@pytest.mark.parametrize("note", [{"x": object()}, {"x": "y" * 600_000}])
def test_a_note_that_cannot_be_read_back_is_refused_at_once(tmp_path, note):
    writer = CheckpointWriter(Checkpoints(tmp_path), STAGES)
    with pytest.raises(CheckpointError, match="A note must"):
        writer.write(0, mark(1, **note), state(1, 0))
    writer.close()


@pytest.mark.parametrize("name", [".pt", ".json"])
def test_a_kill_between_the_two_files_of_a_part_is_no_damage(tmp_path, monkeypatch, name):
    """So a run that was killed in its first checkpoint may begin anew."""
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(f"stage-1{name}"):
            raise RuntimeError("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(CheckpointError, match="killed"):
        write(tmp_path, 10)
    monkeypatch.undo()
    assert not fault(tmp_path, 10)[1]
    assert "stage 1 is missing" in fault(tmp_path, 10)[0]


def test_names_are_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    """A power cut takes back what was not synced: the new part must be safe before the old goes."""
    order, unlink, remove = [], checkpoint.sync_folder, checkpoint._remove
    sync = lambda path: (order.append(f"sync {path.name}"), unlink(path))  # noqa: E731
    monkeypatch.setattr("scpl.files.sync_folder", sync)
    monkeypatch.setattr(checkpoint, "sync_folder", sync)
    monkeypatch.setattr(
        checkpoint, "_remove", lambda *what: (order.append("remove"), remove(*what))
    )
    write(tmp_path / "kept", 1, 2, keep=1, stages=[0])
    step = ["sync step-00000000{}"] * 2  # the manifest, the part
    first = [*step, "sync kept", f"sync {tmp_path.name}"]
    assert order == [
        *(each.format(1) for each in first),
        *(each.format(2) for each in [*step, "sync kept"]),
        "remove",
    ]


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
        survey(tmp_path, [0], 4)


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
