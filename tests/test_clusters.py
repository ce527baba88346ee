"""What docs/clusters.md says: its scripts start the right ranks, with stand-ins for a cluster."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from scpl.app.cli import _parse
from scpl.app.config import TrainConfig
from test_docs import blocks

PAGE = Path(__file__).parents[1] / "docs/clusters.md"
CALL = 'printf "%s\\n" "$@" > "$CALLS/$$"\necho "${SCPL_SECRET}" >> "$CALLS/$$"\n'
STAND_INS = {
    "torchrun": CALL,
    "scpl": CALL,
    "ssh": 'shift\ncd "$WHERE" && exec bash -c "$1"\n',
    "srun": 'for node in 0 1 2 3; do SLURM_NODEID=$node bash -c "${@:3:1}" "${@:4}"; done\n',
    "scontrol": "printf 'node-a\\nnode-b\\n'\n",
}


@pytest.fixture
def cluster(tmp_path):
    """A folder with stand-ins; runs a script, and returns what each torchrun was called with."""
    calls, programs = tmp_path / "calls", tmp_path / "work/.venv/bin"
    calls.mkdir()
    programs.mkdir(parents=True)
    for name, lines in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{lines}")
        (programs / name).chmod(0o755)

    def run(script, **variables):
        found = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": calls, "WHERE": tmp_path}
        environment = {name: str(value) for name, value in {**found, **variables}.items()}
        done = subprocess.run(
            ["bash", "-eu", "-c", script], env=environment, cwd=tmp_path, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [path.read_text().splitlines() for path in calls.iterdir()]

    return run


def after(words, flag):
    return words[words.index(flag) + 1]


def check_ranks(calls, master):
    """Four nodes, each once, which meet at the first and share a secret."""
    assert sorted(after(words, "--node-rank") for words in calls) == ["0", "1", "2", "3"]
    assert {after(words, "--nnodes") for words in calls} == {"4"}
    assert {after(words, "--master-addr") for words in calls} == {master}
    assert len({words[-1] for words in calls}) == 1
    assert len(calls[0][-1]) == 32


def check_command(words):
    """What follows `scpl` is understood, and has a stage for each of four ranks."""
    command, *flags = words[words.index("scpl") + 1 :]
    assert command == "train"
    config = _parse(TrainConfig, command, flags, TrainConfig())
    config.check()
    assert config.network.num_stages == 4


def test_ssh(cluster):
    script = next(block for block in blocks(PAGE, "sh") if "HOSTS=(" in block)
    calls = cluster(script)
    check_ranks(calls, "pc1")
    check_command(calls[0][:-1])


def test_slurm_goes_on_where_a_job_was_ended(cluster, tmp_path):
    script = next(block for block in blocks(PAGE, "sh") if "#SBATCH" in block)
    slurm = {"SLURM_NNODES": 4, "SLURM_CPUS_PER_TASK": 8, "SLURM_JOB_NODELIST": "node-[a-d]"}
    calls = cluster(script, **slurm)
    check_ranks(calls, "node-a")
    check_command(calls[0][:-1])
    assert after(calls[0], "--out") == "runs/cluster"
    (tmp_path / "runs/cluster").mkdir(parents=True)
    assert any("--resume" in words for words in cluster(script, **slurm))


def test_machines_that_come_and_go(cluster, tmp_path):
    """What the launcher does with it is tested in test_elastic.py, under the same variables."""
    script = next(block for block in blocks(PAGE, "sh") if "--nnodes 2:4" in block)
    script = script.replace("/shared", str(tmp_path))
    (tmp_path / "secret").write_text("the same everywhere")
    (call,) = cluster(script)
    assert call[-1] == "the same everywhere"
    assert after(call, "--out") == str(tmp_path / "runs/tickets")
    check_command(call[:-1])
    (tmp_path / "runs/tickets").mkdir(parents=True)
    (tmp_path / "runs/tickets/config.toml").touch()
    assert any("--resume" in words for words in cluster(script))


def test_kubernetes(cluster, tmp_path):
    """A pod that was started again began the run anew, and was refused for ever."""
    yaml = pytest.importorskip("yaml")
    (text,) = blocks(PAGE, "yaml")
    specs = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
    assert specs["Worker"]["template"] == specs["Master"]["template"]
    (container,) = specs["Master"]["template"]["spec"]["containers"]
    shell, flag, script = container["command"]
    assert (shell, flag) == ("sh", "-c")
    script = script.replace("/runs", str(tmp_path))
    (call,) = cluster(script, SCPL_SECRET="")
    check_command(["scpl", *call[:-1]])
    (tmp_path / "cluster").mkdir()
    assert ["train", "--resume", str(tmp_path / "cluster"), ""] in cluster(script, SCPL_SECRET="")
    ranks = sum(spec["replicas"] for spec in specs.values())
    assert ranks == 4
    assert json.dumps(container["env"]).count("SCPL_SECRET") == 1
