"""The examples run as a user runs them: as scripts, alone and as ranks, once under torchrun."""

import difflib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import run_forked, run_started

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, num_ranks=1, by=run_forked):
    done = by(num_ranks, EXAMPLES / script, *arguments, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_accuracy(out):
    return float(re.findall(r"([\d.]+)%", out)[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run on one process says, and the file it leaves."""
    path = tmp_path_factory.mktemp("alone") / "alone.pt"
    return run("own_network.py", path), path


def test_own_network_learns(alone):
    out, path = alone
    assert last_accuracy(out) > 80
    assert "stem.0.weight" in torch.load(path)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_own_network_ends_with_the_same_weights_on_two_ranks(tmp_path, alone):
    out, path = alone
    ranks = run("own_network.py", tmp_path / "ranks.pt", num_ranks=2, by=run_started)
    assert ranks == out
    one, two = torch.load(path), torch.load(tmp_path / "ranks.pt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_own_method_learns():
    out = run("own_method.py")
    assert last_accuracy(out) > 80


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A tiny pre-trained network and two tables, as arguments of the scripts."""
    from pretrained_files import write_bert
    from text_files import tickets, write_table

    folder = tmp_path_factory.mktemp("texts")
    arguments = [write_bert(folder / "bert")]
    for name, seed in (("train", 0), ("test", 1)):
        rows = [
            {"text": r["body"], "label": r["queue"]} for r in tickets(160, classes=3, seed=seed)
        ]
        write_table(folder / f"{name}.csv", rows)
        arguments.append(folder / f"{name}.csv")
    return arguments


def test_fine_tuning_with_scpl_is_at_most_twelve_lines_apart():
    plain, ours = ((EXAMPLES / f"fine_tune{e}.py").read_text().splitlines() for e in ("", "_scpl"))
    assert len(plain) <= 60
    assert len([line for line in difflib.ndiff(plain, ours) if line.startswith("+ ")]) <= 12


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, texts):
    """What a script says and the folder that it leaves; each of them runs once."""
    known = {}

    def run_once(script):
        if script not in known:
            folder = tmp_path_factory.mktemp("tuned")
            known[script] = run(script, *texts, folder), folder
        return known[script]

    return run_once


@pytest.mark.parametrize("script", ["fine_tune.py", "fine_tune_scpl.py"])
def test_fine_tuning_changes_all_layers_and_leaves_a_folder_for_transformers(texts, tuned, script):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out, folder = tuned(script)
    assert re.fullmatch(r"(epoch \d: [\d.]+% of 160 texts\n){3}", out)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 3
    assert AutoTokenizer.from_pretrained(folder)("the printer")["input_ids"]
    before = load_file(texts[0] / "model.safetensors")
    changed = {key for key, value in model.state_dict().items() if key in before
               and not torch.equal(value, before[key])}  # fmt: skip
    layers = {key for key in before if key.startswith("bert.encoder.layer")}
    assert layers - changed <= {key for key in layers if "key.bias" in key}  # no gradient: softmax


@pytest.mark.slow
def test_fine_tuning_ends_with_the_same_weights_on_two_ranks(tmp_path, texts, tuned):
    _, alone = tuned("fine_tune_scpl.py")
    run("fine_tune_scpl.py", *texts, tmp_path, num_ranks=2)
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)
