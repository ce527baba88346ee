"""One run at a time writes into a run folder, and a process that is gone holds nothing."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from scpl.errors import CheckpointError, InputError
from scpl.runs import RunFolder, lock

# Forked before anything has threads, by a process without torch: it takes a tenth of a second.
RACE = """
import multiprocessing, os, sys
from pathlib import Path
from scpl.errors import ScplError
from scpl.runs import RunFolder

def compete(number, ready, done, wins):
    for round in range(ROUNDS):
        ready.wait(10)
        try:
            folder = RunFolder.create(Path(f"run-{round}"), "x", force=round % 4 == 3)
            folder.write_text(folder.config, str(number))
            wins[round] += 1  # nobody else may be here
        except ScplError:
            folder = None
        done.wait(10)
        if folder is not None:
            folder.unlock()

ROUNDS, RACERS = map(int, sys.argv[1:])
fork = multiprocessing.get_context("fork")
for round in range(1, ROUNDS, 2):  # half of the folders are there already, and empty
    os.mkdir(f"run-{round}")
wins = fork.Array("i", ROUNDS)
ready, done = fork.Barrier(RACERS), fork.Barrier(RACERS)
racers = [fork.Process(target=compete, args=(n, ready, done, wins)) for n in range(RACERS)]
for racer in racers: racer.start()
for racer in racers: racer.join()
print([round for round in range(ROUNDS) if wins[round] != 1])
"""

HOLD = """
import sys
from pathlib import Path
from scpl.runs.lock import RunLock
held = [RunLock(Path(sys.argv[1]), int(rank)) for rank in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.read()
"""


def python(code, *arguments, **more):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)


@contextmanager
def held(folder, *ranks):
    """Another process holds the lock as these ranks do; killed at the end."""
    with python(HOLD, folder, *ranks, stdin=subprocess.PIPE) as owner:
        try:
            assert owner.stdout.readline() == "ready\n"
            yield owner
        finally:
            owner.kill()


@pytest.fixture
def folder(tmp_path):
    found = RunFolder(tmp_path)
    found.write_text(found.config, "")
    yield found
    found.unlock()


def test_of_runs_that_start_at_once_one_gets_the_folder(tmp_path):
    """Before, both of two found it missing in 8 of 200 races, and made it."""
    with python(RACE, 200, 3, cwd=tmp_path) as race:
        assert race.communicate(timeout=60)[0].strip() == "[]"


def test_a_run_in_progress_is_named_and_left_alone(folder, tmp_path):
    with held(tmp_path, 0) as owner:
        words = f"{tmp_path} is in use by process {owner.pid} on "
        with pytest.raises(CheckpointError, match=words):
            folder.lock()
        with pytest.raises(CheckpointError, match=words):
            RunFolder.create(tmp_path, "x", force=True)
        assert folder.config.exists()
        owner.kill()
        owner.wait()
        assert folder.lock().works  # no trace of how it ended is in the way


def test_what_an_earlier_run_left_is_waited_for(folder, tmp_path, monkeypatch):
    """Its first process is gone; the others need a moment to notice."""
    with held(tmp_path, 3) as survivor:
        monkeypatch.setattr(lock, "PATIENCE", 0.0)
        with pytest.raises(CheckpointError, match="is in use by another process"):
            folder.lock()
        monkeypatch.setattr(lock, "PATIENCE", 10.0)
        monkeypatch.setattr("time.sleep", lambda seconds: (survivor.kill(), survivor.wait()))
        assert folder.lock().works


def test_other_ranks_of_a_run_join_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with held(tmp_path, 0, 2):
        folder.lock(1)
        folder.unlock()
        with pytest.raises(CheckpointError, match="in use"):
            folder.lock(2)


def test_a_forked_process_does_not_keep_what_its_owner_held(tmp_path):
    code = HOLD + "import os, time\n"
    code = code.replace('print("ready"', 'os.fork() or time.sleep(60)\nprint("ready"')
    code = "import os, time\n" + code
    with python(code, tmp_path, 0, stdin=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == "ready\n"
        owner.stdin.close()
        child = int(_children(owner.pid)[0])
        try:
            owner.wait(10)
            RunFolder(tmp_path).lock()
        finally:
            os.kill(child, 9)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_disk_has_no_locks_making_the_folder_decides(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    first = RunFolder.create(tmp_path / "run", "x", force=False)
    assert not first.is_locked
    with pytest.raises(InputError, match="must not exist yet"):
        RunFolder.create(tmp_path / "run", "x", force=False)


def test_a_run_that_died_before_it_wrote_anything_is_not_in_the_way(tmp_path):
    """Nor one that was killed in its first file: neither resuming nor `force` took the folder."""
    RunFolder.create(tmp_path / "run", "x", force=False).unlock()
    draft = tmp_path / "run/.config.toml.7.tmp"
    draft.touch()
    RunFolder.create(tmp_path / "run", "x", force=False).unlock()
    assert not draft.exists()


def test_a_folder_that_is_not_writable_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"must be writable.*Read-only"):
        RunFolder(tmp_path).lock()
