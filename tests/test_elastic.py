"""Machines come and go under torch's elastic launcher; each agent stands for a machine here."""

import json
import os
import signal
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from cli_runs import TINY, finish, result, scpl, steps
from processes import Forked, environment
from scpl.engine.notes import SECRET
from scpl.runs import RunFolder

LONG = [*TINY, "--epochs", 120, "--stages", 3, "--checkpoint-every", 20, "--quiet"]
"""Long enough for three to meet while two are training."""


@pytest.fixture
def cluster(tmp_path):
    """Starts an agent of a run; the store where agents meet outlives each of them."""
    meeting = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    agents = []
    rules = "is_host=0,last_call_timeout=1,join_timeout=60,keep_alive_interval=1"
    launcher = [
        "-m", "torch.distributed.run", "--nnodes", "2:3", "--nproc-per-node", 1,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting.port}",
        "--rdzv-id", "job", "--rdzv-conf", rules, "--max-restarts", 5,
        "--local-addr", "127.0.0.1", "-m", "scpl", "train",
    ]  # fmt: skip
    variables = environment(
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", GLOO_SOCKET_IFNAME="lo", **{SECRET: "ours"}
    )

    def start(*arguments):
        agents.append(Forked([*launcher, *arguments], variables))
        return agents[-1]

    yield start
    for agent in agents:
        _kill(agent)


def _kill(agent):
    """As if its machine had lost its power: the agent, and the rank it started."""
    children = []
    if agent.poll() is None:
        path = f"/proc/{agent.pid}/task/{agent.pid}/children"
        with open(path) as file:
            children = [int(child) for child in file.read().split()]
    agent.end()
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(reached, agents, timeout=80):
    deadline = time.monotonic() + timeout
    while not reached():
        for agent in agents:
            assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < deadline, [agent.written() for agent in agents]
        time.sleep(0.05)


@pytest.mark.parametrize("damaged", ["3", '"name"', "null", "[[], {}, 1]"])
def test_damaged_names_of_launchers_are_nobodys(damaged, tmp_path):
    (tmp_path / "env.json").write_text(f'{{"launchers": {damaged}}}')
    assert RunFolder(tmp_path).launchers == frozenset()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_machine_that_joins_and_one_that_is_lost_change_no_number(cluster, tmp_path):
    """Which rank was lost, and on which machine the first rank is now, does not matter."""
    folder = tmp_path / "run"
    assert scpl("train", *LONG, "--out", tmp_path / "undisturbed").status == 0

    def reached(step):
        return lambda: len(steps(folder)) >= step

    def known(number):
        path = folder / "env.json"
        return lambda: len(json.loads(path.read_text())["launchers"]) == number

    first, second = (cluster(*LONG, "--out", folder) for _ in range(2))
    wait_until(reached(10), [first, second])
    third = cluster(*LONG, "--resume", folder)  # as the others are told only where it begins
    wait_until(known(3), [first, second, third])
    together = len(steps(folder))
    wait_until(reached(together + 10), [first, second, third])
    _kill(first)
    lost = len(steps(folder))
    wait_until(reached(lost + 10), [second, third])
    assert lost < len(steps(folder)) < 120 * 9, "it was over too early to show anything"
    ends = [finish(agent, 100) for agent in (second, third)]
    assert [end.status for end in ends] == [0, 0], ends
    assert result(folder) == result(tmp_path / "undisturbed")
