"""The examples run as a user runs them: as scripts, alone and under torchrun."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command, timeout):
    """Run Python; at the timeout end it with all processes that it started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err
    return out


def last_accuracy(out):
    return float(re.findall(r"([\d.]+)%", out)[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run on one process says, and the file it leaves."""
    path = tmp_path_factory.mktemp("alone") / "alone.pt"
    return run(EXAMPLES / "own_network.py", path, timeout=60), path


def test_own_network_learns(alone):
    out, path = alone
    assert last_accuracy(out) > 80
    assert "stem.0.weight" in torch.load(path)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_own_network_ends_with_the_same_weights_on_two_ranks(tmp_path, alone):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = EXAMPLES / "own_network.py"
    out, path = alone
    assert run(*launcher, script, tmp_path / "ranks.pt", timeout=60) == out
    one, two = torch.load(path), torch.load(tmp_path / "ranks.pt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_own_method_learns():
    out = run(EXAMPLES / "own_method.py", timeout=60)
    assert last_accuracy(out) > 80
