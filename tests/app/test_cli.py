import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from cli_runs import (
    COMPLETE,
    KEYS,
    TINY,
    command,
    finish,
    fork,
    refused,
    scpl,
    train,
    tree,
)
from data_files import write_folder, write_mnist
from scpl import __version__
from scpl.app.cli import COMMANDS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default names are relative: nothing may land in the source tree."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
    def test_the_overview_names_every_command(self, arguments):
        found = scpl(*arguments)
        assert found.status == 0
        assert found.err == ""
        for name in COMMANDS:
            assert re.search(rf"^  {name} ", found.out, re.MULTILINE)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_explains_itself(self, name):
        found = scpl(name, "--help")
        assert found.status == 0
        assert "usage: scpl" in found.out
        assert found.err == ""

    @pytest.mark.parametrize("flag", ["--version", "-V"])
    def test_version(self, flag):
        assert scpl(flag).out == f"scpl {__version__}\n"

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]]
    )
    def test_torch_is_not_imported_to_answer(self, arguments):
        code = (
            "import sys\nfrom scpl.app.cli import run\n"
            f"try:\n    run({arguments})\nexcept SystemExit:\n    pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["command must be one of: train, ", "'trian'"]),
        (["--data"], ["command must be one of"]),
        (
            ["train", *TINY, "--data", "digit"],
            ["must be one of: digits, ag_news, cifar10", "'digit'"],
        ),
        (["train", *TINY, "--model", "vgg9"], ["must be one of: vgg8, ", "Did you mean 'vgg8'?"]),
        (["train", *TINY, "--method", "scp"], ["must be one of: scpl, ", "Did you mean 'scpl'?"]),
        (["train", *TINY, "--processes", "5"], ["--processes", "5 processes for 4 stages"]),
        (["train", *TINY, "--stages", "99"], ["99 stages", "at most 4"]),
        (["train", *TINY, "--model", "vgg8", "--image-size", "3"], ["at least 8 x 8", "3 x 3"]),
        (["train", *TINY, "--limit-train", "1"], ["at least one image"]),
        (["train", *TINY, "--device", "tpu"], ["--device", "'tpu'"]),
        (["train", *TINY, "--resume", "gone"], ["config.toml", "gone, which does not exist"]),
        (["compare", "--methods", "scpl,scp"], ["--methods must be one of: scpl, ", "'scp'"]),
        (["compare", "--methods", "scpl,scpl"], ["--methods must be different"]),
        (["compare", "--seeds", "0,x"], ["--seeds must be whole numbers", "'x'"]),
        (["bench", "--methods", "scpl,scp"], ["--methods must be one of: scpl, ", "'scp'"]),
        (["bench", "--methods", "bp,bp"], ["--methods must be different"]),
        (["bench", "--repeats", "0"], ["--repeats must be more than 0", "0"]),
        (["bench", "--steps", "-1"], ["--steps must be more than 0", "-1"]),
        (["bench", "--resume", "gone"], ["writes nothing", "--resume"]),
        (["bench", "--dry-run"], ["writes nothing", "--dry-run"]),
        (["bench", "--model", "vgg9"], ["must be one of: vgg8, ", "Did you mean 'vgg8'?"]),
        (["bench", "--data", "digit"], ["--data must be one of: digits, ", "'digit'"]),
        (["bench", "--cuts", "nothing"], ["no layer 'nothing'"]),
        (
            ["bench", "--data", "digits", "--processes", "5"],
            ["--processes", "5 processes for 4 stages"],
        ),
        (["bench", "gone.toml"], ["must be one of", "'gone.toml'"]),
        (["eval", "gone"], ["config.toml", "gone"]),
        (["export", "gone", "--to", "x"], ["config.toml", "gone"]),
        (["predict", "gone", "x.png"], ["config.toml", "gone"]),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, arguments, words):
    refused(scpl(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_all_faults_of_the_cuts_are_told_at_once():
    found = train("--cuts", "layer3", "layer2", "nothing")
    refused(found, "no layer 'nothing'", "'layer2'", "The layers are: flatten, layer1")


class TestData:
    def test_a_truncated_file_is_named(self, tmp_path):
        write_mnist(tmp_path / "mnist", compress=False)
        path = tmp_path / "mnist" / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-7])
        refused(train("--data", "mnist", "--data-dir", tmp_path), path.name)

    def test_a_corrupt_file_is_named(self, tmp_path):
        write_mnist(tmp_path / "mnist")
        path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
        path.write_bytes(b"\x1f\x8b" + path.read_bytes()[20:])
        refused(train("--data", "mnist", "--data-dir", tmp_path), path.name)

    def test_labels_out_of_range_are_named(self, tmp_path):
        write_mnist(tmp_path / "mnist", compress=False)
        path = tmp_path / "mnist" / "train-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\x0c")
        refused(train("--data", "mnist", "--data-dir", tmp_path), "12")

    def test_an_empty_set_is_refused(self, tmp_path):
        write_mnist(tmp_path / "mnist", n=0)
        refused(train("--data", "mnist", "--data-dir", tmp_path))

    def test_an_empty_class_is_refused(self, tmp_path):
        write_folder(tmp_path / "pets")
        (tmp_path / "pets" / "fish").mkdir()
        refused(train("--data", tmp_path / "pets"), "fish")

    def test_images_of_several_sizes_are_refused(self, tmp_path):
        write_folder(tmp_path / "pets", classes=("cat",))
        write_folder(tmp_path / "pets", classes=("dog",), size=(9, 9))
        refused(train("--data", tmp_path / "pets"), "--image-size", "9 x 9")


class TestOutput:
    def test_json_is_one_object_on_stdout(self, no_report):
        found = train("--json")
        assert found.status == 0
        assert found.out.count("\n") == 1
        summary = json.loads(found.out)
        assert set(summary) >= KEYS
        assert "test accuracy" in found.err
        assert json.loads(found.out) == json.loads(Path(summary["run"], "summary.json").read_text())

    def test_without_json_stdout_is_empty(self, no_report):
        found = train()
        assert found.out == ""
        assert "epoch 1/1" in found.err

    def test_quiet(self, no_report):
        found = train("--quiet")
        assert (found.status, found.out, found.err) == (0, "", "")

    @pytest.mark.parametrize("as_json", [True, False])
    def test_dry_run_writes_nothing(self, tmp_path, as_json):
        found = train("--dry-run", *(["--json"] if as_json else []))
        assert found.status == 0
        assert list(tmp_path.iterdir()) == []
        if as_json:
            plan = json.loads(found.out)
            assert plan["steps"] == 9
            assert len(plan["first_losses"]) == 4
        else:
            assert "  stage 3: layer4" in found.out.splitlines()[-2]

    def test_a_reader_that_goes_away_is_no_error(self, monkeypatch):
        def gone(*_):
            raise BrokenPipeError

        monkeypatch.setitem(COMMANDS, "train", gone)
        monkeypatch.setattr("os.dup2", lambda *_: None)
        monkeypatch.setattr("os.open", lambda *_: 0)
        monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
        from scpl.app.cli import run

        assert run(["train"]) == 141


def test_names_that_the_terminal_lacks_are_shown_escaped(tmp_path):
    """With PYTHONIOENCODING=ascii, a class called Größe ended in a traceback."""
    code = (
        "import sys; from scpl.app import cli; "
        "cli.COMMANDS['doctor'] = lambda _: print('Größe \\udce9') or 0; cli.main(['doctor'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (found.returncode, found.stdout) == (0, rb"Gr\xf6\xdfe \udce9" + b"\n")


def test_settings_that_config_toml_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / os.fsdecode(b"run\xe9")
    refused = scpl("train", *TINY, "--out", str(out))
    assert refused.status == 2
    assert r"--out must be text in UTF-8" in refused.err
    assert r"run\xe9" in refused.err
    assert list(tmp_path.iterdir()) == []


class TestFolders:
    def test_a_run_leaves_everything_that_is_promised(self, tmp_path):
        found = train("--out", "a", "--trace")
        assert found.status == 0
        assert {path.name for path in (tmp_path / "a").iterdir()} >= {*COMPLETE, "trace.json"}
        assert not list((tmp_path / "a").rglob("*.tmp"))
        for path in (tmp_path / "a").rglob("*.json"):
            json.loads(path.read_text())

    def test_default_names_are_numbered(self, no_report):
        runs = [json.loads(train("--json").out)["run"] for _ in range(2)]
        assert runs == ["runs/digits-mlp-scpl", "runs/digits-mlp-scpl-2"]

    def test_an_existing_run_is_kept_without_force(self, tmp_path, no_report):
        train("--out", "a")
        before = tree(tmp_path)
        refused(train("--out", "a", "--seed", 1), "a", "--resume a", "--force")
        assert tree(tmp_path) == before
        assert train("--out", "a", "--seed", 1, "--force").status == 0
        assert tree(tmp_path).keys() == before.keys()
        weights = tmp_path / "a" / "model.safetensors"
        assert weights.read_bytes() != before[weights]

    def test_a_folder_that_is_no_run_is_kept_even_with_force(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis.txt").write_text("mine")
        before = tree(tmp_path)
        refused(train("--out", "a", "--force"), "--force overwrites run folders only")
        assert tree(tmp_path) == before

    def test_bad_input_does_not_empty_a_folder_that_force_would(self, tmp_path, no_report):
        train("--out", "a")
        before = tree(tmp_path)
        refused(train("--out", "a", "--force", "--model", "nothing"), "model")
        refused(train("--out", "a", "--force", "--cuts", "nothing"), "nothing")
        refused(train("--out", "a", "--force", "--epochs", "0"), "--epochs")
        refused(train("--out", "a", "--force", "--processes", "5"), "--processes")
        assert tree(tmp_path) == before

    def test_one_that_cannot_be_written_is_named(self):
        refused(train("--out", "/proc/run"), "must be writable", "/proc/run", "--out")

    @pytest.mark.parametrize("name", ["metrics.csv", "model.safetensors", "summary.json"])
    def test_a_full_disk_is_told(self, tmp_path, monkeypatch, no_report, name):
        write = Path.write_bytes

        def full(self, content):
            if name in self.name:
                raise OSError(28, "No space left on device")
            return write(self, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        refused(train("--out", "a"), name, "No space left on device")
        assert [path.name for path in (tmp_path / "a").glob(".*")] == [".lock"]

    def test_a_full_disk_is_told_when_only_the_report_is_missing(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device", "a/report.html")

        monkeypatch.setattr("scpl.report.write_run_report", full)
        refused(train("--out", "a"), "No space left on device", "report.html")
        assert (tmp_path / "a" / "summary.json").exists()


class TestTerminals:
    def test_no_control_characters_elsewhere(self):
        found = finish(fork("train", *TINY, "--epochs", 2, "--out", "a"))
        assert found.status == 0
        assert not re.search(r"[^\n\x20-\x7e]", found.err)

    def test_one_live_line_on_a_terminal(self, tmp_path):
        shown = on_terminal("train", *TINY, "--epochs", 2, "--out", "a")
        assert shown.count("test accuracy") == 1
        live = [part for part in re.split(r"[\r\n]", shown) if "  step " in part]
        assert live
        # A bar, then the place: once, or a line would have been written on top of another.
        assert all(part.count("epoch") == 1 for part in live)
        assert all(re.search(r" epoch [12]/2  step \d/9  ", part) for part in live)
        assert "\x1b[A" not in shown  # nothing moves up: one line at a time
        assert "\r" not in (tmp_path / "a" / "log.txt").read_text()


def on_terminal(*arguments):
    """Run a command on a terminal of its own; return what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 120, 0, 0))
    with subprocess.Popen(
        command(*arguments), stdout=theirs, stderr=theirs, stdin=theirs, close_fds=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            ready, *_ = select.select([ours], [], [], 60)
            assert ready, shown
            try:
                part = os.read(ours, 4096)
            except OSError:  # the terminal closes with its last process
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert child.wait(20) == 0, shown
    return shown.decode()
