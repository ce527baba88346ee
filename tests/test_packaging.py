"""What is built can be used without the source tree."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import scpl
from cli_runs import COMPLETE, TINY

SOURCE = Path(scpl.__file__).parents[2]
DATA = {"scpl/py.typed", "scpl/recipes/quick/digits.toml", "scpl/recipes/paper/vgg8-cifar10.toml",
        "scpl/report/scpl.mplstyle", "scpl/report/templates/report.css",
        "scpl/report/templates/run.html", "scpl/report/templates/comparison.html",
        "scpl/report/templates/page.html", "scpl/report/templates/macros.html"}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive and the wheel that is built from it, without a network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    if not (SOURCE / "pyproject.toml").exists():
        pytest.skip("not run from a source tree")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, SOURCE],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_wheel_holds_all_modules_and_data(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert names >= DATA
    modules = {path.relative_to(SOURCE / "src").as_posix() for path in SOURCE.glob("src/**/*.py")}
    assert names >= modules
    assert not [name for name in names if not name.startswith(("scpl/", "scpl-"))]
    assert not [name for name in names if "__pycache__" in name]


def test_the_source_archive_holds_what_is_needed_to_test_it(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"}
    assert not [name for name in names if name.startswith(("runs/", ".venv/", "build/"))]


def test_the_wheel_trains_from_another_folder(built, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(built[1]).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, text=True,
            cwd=elsewhere, env=environment, timeout=60,
        ).stdout  # fmt: skip

    assert run("-c", "import scpl; print(scpl.__file__)").startswith(str(site))
    assert run("-m", "scpl", "--version") == f"scpl {scpl.__version__}\n"
    assert "quick/digits" in run("-m", "scpl", "recipes", "ls")
    script = "import sys; from importlib.metadata import distribution as d; "
    entry = "print([e.value for e in d('scpl').entry_points if e.name == 'scpl'])"
    assert run("-c", script + entry) == "['scpl.app.cli:main']\n"
    summary = json.loads(run("-m", "scpl", "train", *TINY, "--json", "--out", "run"))
    assert summary["data"] == "digits"
    assert {path.name for path in (elsewhere / "run").iterdir()} >= COMPLETE
