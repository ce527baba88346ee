import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from data_files import write_folder, write_mnist
from scpl import __version__
from scpl.app import doctor as module
from scpl.app.cli import run as cli
from scpl.app.commands import DoctorConfig
from scpl.app.doctor import _Report, doctor

GPU = {
    "version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "threads": 4,
    "devices": ["NVIDIA H200"], "gloo": True, "nccl": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*module._TORCHRUN, "TORCHELASTIC_RUN_ID", "SCPL_DATA", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def probed(monkeypatch):
    """Let the probe of torch say what a test wants."""

    def answer(**changes):
        monkeypatch.setattr(
            module, "_run_python", lambda code: ("", "noise\n" + json.dumps(GPU | changes))
        )
        report = _Report(DoctorConfig())
        module._torch(report)
        return report

    return answer


def checked(check, **config):
    report = _Report(DoctorConfig(**config))
    check(report)
    return report


class TestWhole:
    def test_a_sound_machine(self, tmp_path, monkeypatch, capsys):
        write_mnist(tmp_path / "fashion-mnist")
        write_folder(tmp_path / "cifar10" / "train", "abc")
        monkeypatch.chdir(tmp_path)
        status = cli(["doctor", "--data-dir", str(tmp_path), "--json"])
        findings = json.loads(capsys.readouterr().out)
        problems = findings.pop("problems")
        assert all(isinstance(text, str) for text in findings.values())
        assert findings["scpl"] == __version__
        assert findings["torch"].startswith(torch.__version__)
        assert "gloo available" in findings["backends"]
        assert findings["localhost"] == "TCP works"
        assert f"fashion-mnist in {tmp_path / 'fashion-mnist'}" in findings["data sets"]
        assert f"cifar10 in {tmp_path / 'cifar10'}" in findings["data sets"]
        assert "mnist, cifar100, tiny-imagenet" in findings["data sets not found"]
        assert str(tmp_path) in findings["free disk"]
        # What this machine lacks may be a problem, but none is of the test's own making.
        assert not [text for text in problems if "failed" in text or "torch must" in text]
        assert status == (1 if problems else 0)

    def test_it_comes_to_its_end_whatever_fails(self, monkeypatch):
        def no(*_, **__):
            raise RuntimeError("no")

        def torch_is_broken(code):
            return "ImportError: libtorch_cpu.so: cannot open shared object file", ""

        monkeypatch.setattr(module, "_run_python", torch_is_broken)
        monkeypatch.setattr(importlib.metadata, "version", no)
        monkeypatch.setattr(shutil, "disk_usage", no)
        monkeypatch.setattr(socket, "create_server", no)
        monkeypatch.setattr(os, "sched_getaffinity", no, raising=False)
        findings, healthy = doctor(DoctorConfig())
        assert not healthy
        assert findings["torch"] == "unusable"
        assert findings["scpl"] == __version__
        assert "libtorch_cpu.so" in findings["problems"][0]
        assert "pytorch.org" in findings["problems"][0]
        failed = [text for text in findings["problems"] if text.startswith("The check of ")]
        assert len(failed) == 6
        assert "The check of shared memory failed: RuntimeError: no. Please report this." in failed


class TestTorch:
    def test_a_gpu(self, probed):
        report = probed()
        assert report.findings["torch"] == "2.13.0+cu130, CUDA 13.0 build"
        assert report.findings["devices"] == "cpu, NVIDIA H200"
        assert report.findings["backends"] == "gloo available, nccl available"
        assert not report.problems

    def test_missing_backends(self, probed):
        one = probed(gloo=False, nccl=False)
        assert ["gloo" in text for text in one.problems] == [True]
        two = probed(devices=["a", "b"], nccl=False)
        assert ["nccl" in text for text in two.problems] == [True]

    @pytest.mark.parametrize(
        ("changes", "links"),
        [
            ({}, "nccl where each has a GPU to itself, else gloo, through the host's memory"),
            ({"nccl": False}, "gloo, through the host's memory"),
            ({"devices": []}, None),
        ],
    )
    def test_what_links_processes_on_gpus(self, probed, changes, links):
        assert probed(**changes).findings.get("links of processes on GPUs") == links

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cuda": None, "devices": []}, "torch is a CPU build"),
            ({"devices": []}, "built for CUDA 13.0 finds no device"),
        ],
    )
    def test_a_driver_that_torch_does_not_use(self, probed, monkeypatch, changes, message):
        driver = "/proc/driver/nvidia/version"
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: str(path) == driver or exists(path))
        assert message in probed(**changes).problems[0]
        assert not probed().problems


class TestRunPython:
    def test_what_it_printed(self):
        assert module._run_python("print('hello')") == ("", "hello\n")

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("raise ValueError('deep trouble.')", "ValueError: deep trouble"),
            ("sys.exit(3)", "It ended with status 3"),
            ("import os; os.abort()", "It ended with status -6"),
        ],
    )
    def test_why_it_failed(self, code, reason):
        assert module._run_python(code)[0] == reason

    def test_it_does_not_hang(self, monkeypatch):
        monkeypatch.setattr(module, "TIME_LIMIT", 1.0)
        started = time.monotonic()
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        assert "did not come back within 1 seconds" in module._run_python(code)[0]
        assert time.monotonic() - started < 10

    def test_files_of_the_current_folder_are_not_imported(self, tmp_path, monkeypatch):
        (tmp_path / "csv.py").write_text("raise RuntimeError('the wrong one')")
        monkeypatch.chdir(tmp_path)
        assert module._run_python("import csv") == ("", "")


class TestTorchvision:
    @pytest.fixture
    def install(self, tmp_path, monkeypatch):
        """Install a torchvision that does what a test wants when it is imported."""

        def install(body):
            info = tmp_path / "torchvision-0.28.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\n"
                                           "Version: 0.28.0\n")  # fmt: skip
            (tmp_path / "torchvision.py").write_text(body)
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
            return checked(module._torchvision)

        return install

    def test_none(self, monkeypatch):
        monkeypatch.setattr(module, "_version", lambda package: None)
        report = checked(module._torchvision)
        assert "not installed" in report.findings["torchvision"]
        assert not report.problems

    def test_one_that_works(self, install):
        report = install("")
        assert report.findings["torchvision"] == "0.28.0, usable"
        assert not report.problems

    def test_one_of_another_torch(self, install):
        report = install("raise RuntimeError('operator torchvision::nms does not exist')")
        assert report.findings["torchvision"] == "0.28.0, unusable"
        (problem,) = report.problems
        assert "was built for another torch" in problem
        assert "pip uninstall torchvision" in problem

    def test_one_that_crashes(self, install):
        (problem,) = install("import os; os.abort()").problems
        assert "status -6" in problem

    def test_one_that_hangs(self, install, monkeypatch):
        monkeypatch.setattr(module, "TIME_LIMIT", 1.0)
        (problem,) = install("import time; time.sleep(60)").problems
        assert "did not come back" in problem


class TestPackages:
    def test_extras_come_from_the_metadata(self):
        extras = module._extras()
        assert extras["matplotlib"] == "plots"
        assert extras["pillow"] == "images"
        assert extras["pyarrow"] in ("hub", "parquet", "text")
        assert extras["nvidia-ml-py"] == "profile"
        assert not {"torch", "numpy", "tyro", "ruff", "scpl"} & set(extras)

    def test_missing_packages_are_named_with_their_extra(self, monkeypatch):
        monkeypatch.setattr(
            module, "_version", lambda name: None if name in ("kornia", "psutil") else "1.0"
        )
        report = checked(module._optional_packages)
        missing = report.findings["not installed"]
        assert missing == (
            "kornia (pip install 'scpl[images]'), psutil (pip install 'scpl[profile]')"
        )
        assert "matplotlib 1.0" in report.findings["optional packages"]
        assert not report.problems

    def test_a_checkout_that_is_not_installed(self, monkeypatch):
        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "requires", missing)
        assert checked(module._optional_packages).findings["not installed"] == "none"


class TestMachine:
    def test_folders_of_data_that_are_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SCPL_DATA", str(tmp_path / "gone"))
        report = checked(module._data_sets, data_dir=tmp_path)
        assert report.problems == [
            f"--data-dir and SCPL_DATA must name existing folders. There is no {tmp_path / 'gone'}."
        ]
        assert "data sets" not in report.findings  # torch was not probed, and the readers need it

    def test_no_folder_of_data_is_no_problem(self):
        report = checked(module._data_sets)
        assert report.findings["data folders"].startswith("none; name one with --data-dir")
        assert not report.problems

    @pytest.mark.parametrize("value", ["1", "", None])
    def test_a_good_number_of_threads(self, monkeypatch, value):
        if value is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", value)
        report = checked(module._processor)
        assert report.findings["OMP_NUM_THREADS"] == (value or "not set")
        assert not report.problems

    @pytest.mark.parametrize("value", ["0", "many", "100000"])
    def test_a_bad_number_of_threads(self, monkeypatch, value):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        (problem,) = checked(module._processor).problems
        assert f"OMP_NUM_THREADS is {value!r}" in problem
        assert "unset OMP_NUM_THREADS" in problem

    def test_variables_of_torchrun(self, monkeypatch):
        assert checked(module._environment).findings == {"torchrun variables": "not set"}
        monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
        monkeypatch.setenv("RANK", "0")
        report = checked(module._environment)
        assert report.findings == {"torchrun variables": "RANK, MASTER_ADDR"}
        assert report.problems[0].endswith("unset RANK MASTER_ADDR")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        assert not checked(module._environment).problems

    def test_little_space(self, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
        (problem,) = checked(module._disk).problems
        assert "0.06 GiB are free" in problem
        assert "--out" in problem
        report = _Report(DoctorConfig(), torch=GPU)
        module._shared_memory(report)
        assert not report.problems  # one GPU shares with nobody
        report.torch = GPU | {"devices": ["a", "b"]}
        module._shared_memory(report)
        assert "--shm-size=1g" in report.problems[0]

    def test_a_folder_that_is_not_writable(self, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        (problem,) = checked(module._disk).problems
        assert "nothing may be written" in problem

    def test_no_shared_memory(self, monkeypatch):
        def missing(path):
            raise FileNotFoundError(path)

        monkeypatch.setattr(shutil, "disk_usage", missing)
        assert checked(module._shared_memory).findings == {}

    def test_no_network(self, monkeypatch):
        def refused(address):
            raise PermissionError("not allowed")

        monkeypatch.setattr(socket, "create_server", refused)
        report = checked(module._network)
        assert report.findings["localhost"] == "unusable"
        assert "not allowed" in report.problems[0]
        assert "--processes 1" in report.problems[0]


def test_importing_it_does_not_load_torch():
    failure, _ = module._run_python(
        f"sys.path.insert(0, {str(Path(module.__file__).parents[2])!r})\n"
        "import scpl.app.doctor; sys.exit('torch' in sys.modules)"
    )
    assert failure == ""
    assert "torch" in sys.modules
