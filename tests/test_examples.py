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


def test_own_network_learns(tmp_path):
    out = run(EXAMPLES / "own_network.py", tmp_path / "alone.pt", timeout=60)
    assert last_accuracy(out) > 80
    assert "stem.0.weight" in torch.load(tmp_path / "alone.pt")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_own_network_ends_with_the_same_weights_on_two_ranks(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    script = EXAMPLES / "own_network.py"
    alone = run(script, tmp_path / "alone.pt", timeout=60)
    assert run(*launcher, script, tmp_path / "ranks.pt", timeout=60) == alone
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "ranks"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_own_method_learns():
    out = run(EXAMPLES / "own_method.py", timeout=60)
    assert last_accuracy(out) > 80
