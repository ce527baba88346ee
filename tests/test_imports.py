"""Imports point one way: from what users touch down to formulas and errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scpl

ROOT = Path(scpl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EACH_FILE = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES]
)

LAYERS = [
    {"errors"},
    {"chain", "message", "randomness", "rows", "state", "timeline"},
    {"functional", "row_losses"},
    {"observations"},
    {"finite", "heads", "objectives", "summary"},
    {"association", "auxiliary", "similarity"},
    {"methods"},
    {"balance", "agreement"},
    {"partition"},
    {"exits", "stage"},
    {"mesh", "source", "watchdog"},
    {"control"},
    {"wire"},
    {"ranks"},
    {"link", "scores"},
    {"checkpoint", "worker"},
    {"baselines", "recovery"},
    {"assembly"},
    {"export", "line"},
    {"pipeline"},
    {"run"},
    {"cli"},
]
"""Lowest first. A module imports from lower layers and from its own package, nothing else."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ASIDE = {"models": {"errors"}, "data": {"errors"}, "report": {"errors"}}
"""Packages beside the engine, and all they may know of it."""
USERS_OF_ASIDE = {"run", "cli"}
ENTRY = {"__init__", "__main__"}
"""The package's own front door, which names everything lazily."""


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The parts of scpl a file imports, wherever in the file, and the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, *rest = name.split(".")
            if head == "scpl":
                found.append((rest[0] if rest else "", node.lineno))
    return [(name, line) for name, line in found if not name.startswith("__")]


def may_import(importer, name):
    if importer == name:
        return True
    if importer in ASIDE:
        return name in ASIDE[importer]
    if name in ASIDE:
        return importer in USERS_OF_ASIDE
    return name in RANK and RANK[name] < RANK[importer]


@EACH_FILE
def test_a_module_imports_only_from_lower_layers(path):
    importer = part_of(path)
    if importer in ENTRY:
        return
    assert importer in RANK or importer in ASIDE, f"give {importer!r} its place in LAYERS"
    wrong = [
        f"line {line}: {importer} -> {name or 'scpl'}"
        for name, line in imported(path)
        if not may_import(importer, name)
    ]
    assert not wrong


def test_the_check_sees_lazy_and_conditional_imports(tmp_path):
    file = tmp_path / "late.py"
    file.write_text("def f():\n    if True:\n        from scpl.pipeline import Pipeline\n")
    assert imported(file) == [("pipeline", 3)]
    assert not may_import("stage", "pipeline")
    assert not may_import("models", "functional")
    assert not may_import("worker", "checkpoint")
    assert may_import("pipeline", "worker")


@EACH_FILE
def test_a_module_fits_in_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@EACH_FILE
def test_the_library_never_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


def test_there_is_no_utils_module():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    "module", ["scpl.functional", "scpl.models", "scpl.models.vgg", "scpl.heads"]
)
def test_formulas_and_networks_do_not_load_the_engine(module):
    loaded = loaded_after(f"import {module}")
    engine = {f"scpl.{name}" for name in ("stage", "worker", "pipeline", "partition", "message")}
    assert not loaded & engine


@pytest.mark.parametrize(
    "statement",
    [
        "import scpl",
        "import scpl.cli",
        "import scpl.run.config",
        "import scpl.cli; scpl.cli.run(['--help'])",
        "import scpl.cli; scpl.cli.run(['--version'])",
        "import scpl.cli; scpl.cli.run(['no-such-command'])",
        "import scpl.cli\ntry: scpl.cli.run(['train', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_help_does_not_load_torch(statement):
    assert "torch" not in loaded_after(statement)


def test_every_public_name_can_be_loaded():
    for name in scpl.__all__:
        assert getattr(scpl, name).__name__ == name
    assert set(scpl.__all__) <= set(dir(scpl))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = scpl.Pipelin


def loaded_after(statement):
    code = f"{statement}\nimport sys; sys.stderr.write('LOADED ' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stderr.rpartition("LOADED ")[2].split())
