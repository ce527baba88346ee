"""Forked processes are what tests take them for."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from processes import Forked, environment, run_forked, run_started

RANK = """
import json, os, sys
loaded, threads = "torch" in sys.modules, len(os.listdir("/proc/self/task"))
import torch
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
names += ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"]
found = {
    "loaded": loaded,
    "threads": [threads, torch.get_num_threads()],
    "name": __name__,
    "argv": sys.argv[1:],
    "folder": os.getcwd(),
    "variables": [os.environ.get(name) for name in names],
    "pid": os.getpid(),
    "group": os.getpgid(0),
}
sys.stdout.write(json.dumps(found) + "\\n")
"""
PARENT = """
import json, multiprocessing, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
pipe = os.pipe()
with subprocess.Popen(
    [sys.executable, "-m", "child", "a"], stdout=subprocess.PIPE, env={**os.environ, "B": "b"}
) as child:
    found = json.loads(child.stdout.read())
spawned = multiprocessing.get_context("spawn").Process(target=lambda: sys.exit(4))
spawned.start()
spawned.join()
found |= {"statuses": [child.returncode, spawned.exitcode], "parent is": os.getpid()}
sys.stdout.write(json.dumps(found))
"""
CHILD = """
import json, os, signal, sys
found = {
    "loaded": "torch" in sys.modules,
    "said": [sys.argv[1:], os.environ["B"]],
    "parent": os.getppid(),
    "files": [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/dev/fd/{name}")],
    "ended by": signal.getsignal(signal.SIGTERM).name,
}
sys.stdout.write(json.dumps(found))
sys.exit(3)
"""
FAILING = """
import os, sys, time
rank = int(os.environ["RANK"])
sys.stderr.write(f"rank {rank} is {os.getpid()}.\\n")
sys.stderr.flush()
if rank == 1:
    sys.exit(7)
time.sleep(3 if "late" in sys.argv else 600)
sys.exit(8)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "job.py"
        path.write_text(text)
        return path

    return write


def gone(pid):
    try:
        return "(zombie)" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_a_process_alone(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = run_forked(1, script(RANK), "a", 2, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["loaded"], "the server must be warm"
    assert found["threads"] == [1, 1], "it is only safe to fork where there is one thread"
    assert found["pid"] == found["group"] != os.getpid()
    assert (found["name"], found["argv"]) == ("__main__", ["a", "2"])
    assert found["folder"] == str(tmp_path)
    assert found["variables"] == [None, None, None, None, "1", None, None]


def test_what_a_process_starts_is_forked_and_finds_what_a_new_one_finds(script, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    done = run_forked(1, script(PARENT), timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found == {
        "loaded": True,
        "said": [["a"], "b"],
        "parent": found["parent is"],
        "parent is": found["parent is"],
        "files": ["0", "1", "2"],
        "ended by": "SIG_DFL",
        "statuses": [3, 4],
    }


@pytest.mark.slow
def test_ranks_find_what_the_launcher_gives(script):
    job = script(RANK)
    forked, started = (
        [json.loads(line) for line in run(2, job, timeout=100).stdout.splitlines()]
        for run in (run_forked, run_started)
    )
    started.sort(key=lambda rank: rank["variables"])
    assert len({rank["pid"] for rank in [*forked, *started]}) == 4
    for mine, other in zip(forked, started, strict=True):
        assert mine["variables"] == other["variables"]
    assert not any(rank["loaded"] for rank in started)


def test_the_first_failure_counts_and_all_is_told(script):
    done = run_forked(2, script(FAILING), "late", timeout=100)
    assert done.returncode == 7
    assert done.stderr.count(" is ") == 2


def test_no_process_is_left_after_a_failure(script):
    done = run_forked(3, script(FAILING), timeout=100, to_end=2)
    assert done.returncode == 7
    pids = [line.rstrip(".").split()[-1] for line in done.stderr.splitlines()]
    assert len(pids) == 3
    assert all(map(gone, pids))


def test_no_process_is_left_after_the_timeout(script, tmp_path):
    assert run_forked(1, script(""), timeout=100).returncode == 0  # from here on it is warm
    job = script(
        "import os, signal, sys\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()} ')\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked(2, job, tmp_path / "pids", timeout=5)
    assert time.monotonic() - begin < 30
    assert all(map(gone, (tmp_path / "pids").read_text().split()))


def test_signals_and_statuses(script):
    process = Forked([script("import time; time.sleep(600)")], environment())
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(60) == ("", "")
    assert process.returncode == -signal.SIGTERM
    raised = run_forked(1, script("raise ValueError('so')"), timeout=60)
    assert raised.returncode == 1
    assert raised.stderr.rstrip().endswith("ValueError: so")
    assert run_forked(1, "-m", "scpl", "--version", timeout=60).stdout.startswith("scpl ")
