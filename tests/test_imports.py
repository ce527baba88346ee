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

CORE = {"errors", "seeding", "files", "outside"}
MAY_IMPORT = {
    "errors": set(),
    "seeding": set(),
    "files": {"errors"},
    "outside": set(),
    "measures": set(),
    "tasks": {"errors", "measures"},
    "partition": CORE | {"tasks"},
    "losses": CORE,
    "heads": CORE,
    "models": CORE,
    "data": CORE | {"tasks"},
    "runs": CORE,
    "report": CORE | {"runs"},
    "simulation": CORE,
    "methods": CORE | {"losses", "heads", "partition", "tasks"},
    "engine": CORE | {"measures", "methods", "partition", "simulation", "tasks"},
    "pipeline": CORE | {"engine", "methods", "partition"},
    "app": CORE
    | {"data", "engine", "heads", "methods", "models", "partition", "pipeline", "report", "runs",
       "simulation", "tasks"},
}  # fmt: skip
"""What each folder, and each file beside them, may import besides itself."""
INSIDE = {
    "engine": [{"randomness", "timeline", "mesh", "messages"}, {"stage", "batches", "watchdog"},
               {"ranks"}, {"channel", "scores", "checkpoint"}, {"trainers"}, {"worker"},
               {"build"}, {"export", "planning", "sending"},
               {"forecast"}],
    "app": [{"config", "environment"}, {"inputs"}, {"build"}, {"network"},
            {"bench"}, {"planning"}, {"train"}, {"evaluate", "exits", "export", "probe"},
            {"predict"}, {"compare"}, {"cli"}],
}  # fmt: skip
"""Within a folder of folders: lowest first; what is not named here is below all."""
ENTRY = {"__init__", "__main__"}
"""The package's own front door, which names everything lazily."""


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The modules of scpl a file imports, wherever in the file, and the line."""
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
                found.append((rest, node.lineno))
    return [(rest, line) for rest, line in found if rest and not rest[0].startswith("__")]


def may_import(importer, name):
    """Whether one folder may import another one."""
    return importer == name or name in MAY_IMPORT[importer]


def layer_of(folder, name):
    """The height of a file or folder within its folder."""
    return next((i for i, names in enumerate(INSIDE[folder]) if name in names), 0)


@EACH_FILE
def test_a_folder_imports_only_what_it_may(path):
    importer = part_of(path)
    if importer in ENTRY:
        return
    assert importer in MAY_IMPORT, f"say in MAY_IMPORT what {importer!r} may import"
    wrong = [
        f"line {line}: {importer} -> {rest[0]}"
        for rest, line in imported(path)
        if not may_import(importer, rest[0])
    ]
    assert not wrong


@EACH_FILE
def test_within_engine_and_app_imports_point_one_way(path):
    folder, *inside = path.relative_to(ROOT).with_suffix("").parts
    if folder not in INSIDE or inside == ["__init__"]:
        return
    own = layer_of(folder, inside[0])
    wrong = [
        f"line {line}: {inside[0]} -> {rest[1]}"
        for rest, line in imported(path)
        if rest[0] == folder and rest[1] != inside[0] and layer_of(folder, rest[1]) > own
    ]
    assert not wrong


@pytest.mark.parametrize("folder", sorted(set(MAY_IMPORT) - CORE - {"measures", "pipeline"}))
def test_every_folder_says_what_it_is_for_and_what_it_may_import(folder):
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    _, _, imports = said.partition("May import: ")
    wanted = MAY_IMPORT[folder] - CORE
    if folder == "app":
        assert imports == "everything else."
    else:
        assert imports.rstrip(".") == ", ".join(["errors", *sorted(wanted)])


def test_the_check_sees_lazy_and_conditional_imports(tmp_path):
    file = tmp_path / "late.py"
    file.write_text("def f():\n    if True:\n        from scpl.pipeline import Pipeline\n")
    assert imported(file) == [(["pipeline", "Pipeline"], 3)]
    assert not may_import("engine", "pipeline")
    assert not may_import("models", "losses")
    assert not may_import("report", "app")
    assert may_import("pipeline", "engine")


@EACH_FILE
def test_the_library_never_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


def test_there_is_no_utils_module():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


def test_formulas_and_networks_do_not_load_the_engine():
    modules = ("scpl.losses.contrastive", "scpl.models", "scpl.models.vgg", "scpl.heads")
    loaded = loaded_after(f"import {', '.join(modules)}")
    assert loaded.issuperset(modules)
    engine = ("scpl.engine", "scpl.pipeline", "scpl.partition", "scpl.methods")
    assert not [name for name in loaded if name.startswith(engine)]


@pytest.mark.parametrize(
    "statement",
    [
        "import scpl",
        "import scpl.app.cli",
        "import scpl.app.commands",
        "import scpl.app.cli; scpl.app.cli.run(['--help'])",
        "import scpl.app.cli; scpl.app.cli.run(['--version'])",
        "import scpl.app.cli; scpl.app.cli.run(['no-such-command'])",
        "import scpl.app.cli\ntry: scpl.app.cli.run(['train', '--help'])\nexcept SystemExit: pass",
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
