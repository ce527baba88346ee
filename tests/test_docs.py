"""What the documents say is so: code runs, names and flags exist, links lead somewhere."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import scpl
from scpl.app.cli import COMMANDS
from scpl.app.commands import (
    BenchConfig,
    CompareConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PredictConfig,
)
from scpl.app.config import TrainConfig, method_options
from scpl.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
FLAGS = {
    "train": [],
    "compare": [CompareConfig],
    "bench": [BenchConfig],
    "plan": [PlanConfig],
    "eval": [EvalConfig],
    "predict": [PredictConfig],
    "export": [ExportConfig],
    "doctor": [DoctorConfig],
    "recipes": [],
}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def execute(code, names):
    exec(compile(code, "document", "exec"), names)


def network():
    return nn.Sequential(
        *[nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)],
        nn.Linear(8, 10),
    )


def named_network():
    model = nn.Sequential()
    for name, layer in zip(("block1", "block2", "block3", "classifier"), network(), strict=True):
        model.add_module(name, layer)
    return model


def surroundings():
    """What a user's script holds before the lines that the README shows."""
    batches = [(torch.randn(20, 5), torch.arange(20) % 10) for _ in range(2)]
    return {
        "make_network": named_network,
        "model": named_network(),
        "example": batches[0][0][:2],
        "train_loader": batches,
        "valid_loader": batches,
        "torch": torch,
        "scpl": scpl,
    }


# Code


@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_readmes_diff_run(side, capsys):
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", side, "")]
    names = surroundings()
    before = names["make_network"]().state_dict().keys()
    execute("\n".join(lines), names)
    assert names["model"].state_dict().keys() == before
    assert ("accuracy" in capsys.readouterr().out) == (side == "+")


def test_the_readmes_python_runs(capsys):
    names = surroundings()
    code = blocks(ROOT / "README.md", "python")
    assert code
    for block in code:
        execute(block, names)
    assert "block2" in capsys.readouterr().out


def test_the_guides_python_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for block in blocks(ROOT / "docs/guide.md", "python"):
        execute(block, names)
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"print\(.*\)  # (.*)", block)
        for line in (line for line in said if not re.search(r"\.\.\.|numbers", line)):
            assert line in printed


# Names


def test_every_public_name_is_described():
    text = (ROOT / "docs/api.md").read_text()
    headings = re.findall(r"^### scpl\.(\w+)$", text, re.MULTILINE)
    assert sorted(headings) == sorted(scpl.__all__)


@pytest.mark.parametrize(
    "name",
    [
        "split",
        "Pipeline",
        "Checkpoints",
        "connect",
        *(kind.__name__ for kind in METHODS.values() if kind.__name__ in scpl.__all__),
    ],
)
def test_every_argument_is_described(name):
    text = (ROOT / "docs/api.md").read_text()
    section = text.partition(f"### scpl.{name}\n")[2].partition("\n### ")[0]
    for argument in inspect.signature(getattr(scpl, name)).parameters:
        assert re.search(rf"\b{argument}\b", section), argument


def test_every_method_of_the_pipeline_is_described():
    text = (ROOT / "docs/api.md").read_text()
    for name, _ in inspect.getmembers(scpl.Pipeline):
        if not name.startswith("_"):
            assert f"`{name}" in text, name


# Commands


def test_the_readme_lists_every_command():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `scpl (\w+)", text, re.MULTILINE)) == set(COMMANDS)


@EACH
def test_commands_and_flags_exist(path):
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "scpl" not in words or words[:1] == ["git"]:
                continue
            command, *rest = words[words.index("scpl") + 1 :]
            known = {f.name for kind in FLAGS[command] for f in dataclasses.fields(kind)}
            if command in ("train", "compare", "bench", "plan"):
                known |= {*TrainConfig().settings(), *method_options()}
            for word in rest:
                if word.startswith("--"):
                    assert word[2:].replace("-", "_") in known, line


# Links


@EACH
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_tests_that_show_a_promise_exist():
    named = set()
    for page in ("docs/guarantees.md", "SECURITY.md"):
        named |= set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"def (test_\w+)\(", written))
