"""Whatever breaks, the run that is resumed ends as one that nothing happened to.

`benchmarks/faults/main.py` draws hundreds of these; here is one of each that takes no long time.
"""

import random

import pytest
from safetensors.torch import load, save_file

import trials
import victim
from cli_runs import tree
from scpl.engine.checkpoint import Checkpoints, CheckpointWriter
from scpl.engine.messages import CheckpointMark


@pytest.fixture(scope="module")
def all_trials(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trials.HERE)  # where the network is found
        yield trials.Trials(tmp_path_factory.mktemp("trials"), launcher=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kind",
    [
        "SIGKILL to a rank", "SIGTERM to a rank", "SIGSTOP for a while", "segmentation fault",
        "ends with status 0", "raises in backward", "raises in loader",
        "raises in checkpoint writer", "killed with half a part", "killed after the manifest",
        "bit flipped in a part", "part of an older step", "started twice",
    ],
)  # fmt: skip
def test_a_run_that_is_resumed_ends_as_an_undisturbed_one(all_trials, monkeypatch, kind):
    monkeypatch.chdir(trials.HERE)
    found = all_trials.trial(sum(kind.encode()), kind)
    assert found.faults, "nothing broke"
    assert not found.wrong


def test_a_ledger_that_is_wrong_is_seen(all_trials, tmp_path):
    weights = load(all_trials.expected)
    for change, told in [
        ({"0.count": weights["0.count"] + 1}, "stage 0 was trained 25 steps"),
        ({"0.ledger": weights["0.ledger"][[1, 1, *range(2, 24)]]}, "trained on twice in an epoch"),
        ({"0.ledger": weights["0.ledger"] * weights["2.ledger"]}, "on different samples"),
    ]:
        save_file(weights | change, tmp_path / "model.safetensors")
        assert told in trials.ledger_fault(tmp_path)


@pytest.mark.parametrize("kind", trials.DAMAGE)
def test_files_of_the_newest_checkpoint_are_damaged(tmp_path, kind):
    """Or a trial would see nothing because nothing had happened."""
    writer = CheckpointWriter(Checkpoints(tmp_path / "checkpoints", keep=9), victim.STAGES)
    for step in (2, 4):
        for stage in range(victim.STAGES):
            writer.write(stage, CheckpointMark(step, 0, step, run="one"), {"body": step})
    writer.close()
    before = tree(tmp_path)
    assert trials.damage(tmp_path, kind, random.Random(3))
    after = tree(tmp_path)
    changed = {path for path in before if before[path] != after.get(path)}
    assert changed
    assert {path.parent.name for path in changed} == {"step-000000004"}
