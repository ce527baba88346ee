"""The checks for a GPU, made on a CPU: they pass, and each kind of them finds a planted fault."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
FAULTS = Path(__file__).with_name("gpu_faults.py")

GOOD = [
    "network/mlp", "network/lstm", "method/al-small-cnn", "method/bp-transformer",
    "optimizer/transformer", "precision/fp16-transformer",
    "precision/bf16-send-bf16-transformer", "overflow", "channels-last/vgg8",
    "deterministic/scpl-transformer", "checkpoint/scpl-small-cnn", "export/scpl-small-cnn",
    "command-line", "shared/scpl-transformer", "shared-killed/last", "memory/transformer",
]  # fmt: skip
ONLY_ON_A_GPU = ["graphs/scpl-vgg8", "sync/scpl-lstm", "pinned/transformer", "nccl-alone"]
WRONG = {
    "method/early-exit-small-cnn": "losses",
    "deterministic/bp-transformer": "equal bit for bit",
    "checkpoint/al-small-cnn": "every entry must be restored",
    "export/dgl-small-cnn": "logits",
    "overflow": "must stay as they were",
    "command-line": "eval must find train's accuracy",
    "shared/early-exit-transformer": "equal bit for bit",
    "fault/raise": "RuntimeError: what follows from it",
    "fault/crash": "ended with status -11",
    "fault-hang": "no end after 2 s: killed",
}
STILL_RIGHT = ["network/mlp", "export/scpl-small-cnn"]


def run(*arguments, timeout=200, **variables):
    return subprocess.run(
        [sys.executable, str(GPU / "check.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def made(folder, *arguments):
    """Make checks on a CPU; returns what was printed, and the rows of the file by name."""
    done = run("--device", "cpu", "--jobs", "2", "--json", folder / "rows.json", *arguments)
    found = json.loads((folder / "rows.json").read_text())
    assert found["not_made"] == []
    assert found["environment"]["versions"]["torch"] == torch.__version__
    return done, {row["name"]: row for row in found["rows"]}


def lives(process):
    """Whether a process runs; one that ended may still be listed."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_kind_of_check_passes_on_a_cpu_or_says_what_it_lacks(tmp_path):
    done, rows = made(tmp_path, "--only", *GOOD, *ONLY_ON_A_GPU)
    assert {name: row["found"] for name, row in rows.items() if row["status"] == "FAILED"} == {}
    assert done.returncode == 0, done.stderr
    assert {name for name, row in rows.items() if row["status"] == "ok"} == set(GOOD)
    assert all(rows[name]["status"] == "skipped" for name in ONLY_ON_A_GPU)
    assert all(done.stdout.count(name) == 2 for name in rows)  # as it is done, and in the table
    assert rows["nccl-alone"]["found"] == "there is nothing to see without CUDA"
    assert f"{len(GOOD)} ok, {len(ONLY_ON_A_GPU)} skipped, in " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_planted_faults_are_found_and_stop_no_other_check(tmp_path):
    done, rows = made(tmp_path, "--load", FAULTS, "--only", *WRONG, *STILL_RIGHT)
    assert done.returncode == 1
    failed = {name: row["found"] for name, row in rows.items() if row["status"] == "FAILED"}
    assert failed.keys() == WRONG.keys()
    for name, reason in WRONG.items():
        assert reason in failed[name]
        assert f"FAILED {name}: " in done.stdout
    assert all(rows[name]["status"] == "ok" for name in STILL_RIGHT)
    # The line that failed comes last, and a process that is gone leaves its last words.
    assert rows["fault/raise"]["trace"].endswith("ValueError: the first cause")
    assert "the last words" in rows["fault/crash"]["trace"]
    assert rows["fault-hang"]["trace"].endswith("in hang")
    left = int(rows["fault-hang"]["trace"].split("started ")[1].split()[0])
    assert not lives(left), "what a check started must end with it"


def test_the_list_names_every_check_and_what_it_proves():
    listed = run("--list", "--device", "cpu").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert len(set(names)) == len(names) > 100
    assert set(names) >= {*GOOD, *ONLY_ON_A_GPU}
    assert all(len(line.split()) > 5 for line in listed)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "cpu", "--only", "netwrk"], "must name checks or themes. Got: netwrk"),
        (["--device", "cuda"], "needs a CUDA device. torch"),
        (["--device", "cpu", "--load", "/no/such/file.py"], "No such file"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_a_reason(arguments, reason):
    done = run(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("found", "expected", "apart"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([[1.0], [3.0]], [[2.0], [3.0]], 0.5),
        ([1.0], [1.0, 1.0], float("inf")),
        ([float("nan")], [1.0], float("inf")),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0.0),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, float("inf")),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, float("inf")),
        ({"a": torch.ones(2), "b": 1}, {"a": torch.ones(2), "b": 2}, float("inf")),
        ({"a": None}, {"a": "text"}, float("inf")),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0),
    ],
)
def test_a_distance_is_a_share_of_the_largest_number(monkeypatch, found, expected, apart):
    monkeypatch.syspath_prepend(GPU)
    from checks.base import distance

    assert distance(found, expected) == apart


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "arguments",
    [["check.py", "--only", "network"], ["speed.py", "--networks", "vgg8"], ["learn.py", "--out"]],
    ids=lambda arguments: arguments[0],
)
def test_ctrl_c_ends_a_script_without_a_traceback(arguments, tmp_path):
    name, *flags = arguments
    if name == "learn.py":
        flags = [*flags, str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-u", str(GPU / name), "--device", "cpu", "--quick", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell has what it starts in the background ignore Ctrl-C, also these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as script:  # fmt: skip
        try:
            assert script.stdout.readline()  # it is at work
            script.send_signal(signal.SIGINT)
            told, _ = script.communicate(timeout=30)
        finally:
            script.kill()
    assert "Traceback" not in told
    assert script.returncode == 130


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--device", "cuda:99"], "--device must name a device of this machine. Got 'cuda:99'"),
     (["--rounds", "0"], "--rounds and --steps must be at least 1")],
)  # fmt: skip
def test_speed_says_what_flags_cannot_be(flags, told):
    done = subprocess.run(
        [sys.executable, str(GPU / "speed.py"), *flags], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
