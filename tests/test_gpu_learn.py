"""The benchmark that trains at full width and length, on narrow networks and few images."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import scpl
from data_files import random_split
from scpl import models
from scpl.data.images import ImageData
from scpl.errors import InputError
from scpl.models.resnet import ResidualBlock

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.append(str(GPU))

import learn  # noqa: E402
import learn_imitation  # noqa: E402
import learn_run  # noqa: E402
import learn_table  # noqa: E402
from learn_job import METHODS, Job, Place  # noqa: E402

JOB = Job(
    "random", "vgg8", "scpl", 0, epochs=2, batch_size=16, image_size=16, width=1 / 32,
    precision="float32", every=1,
)  # fmt: skip
MIDDLE = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 40 images to train on and 12 to test on."""
    path = tmp_path_factory.mktemp("data") / "random.safetensors"
    train, test = (random_split(count, shape=(3, 16, 16)) for count in (40, 12))
    learn_run.write(ImageData("random", train, test, tuple("abcd"), MIDDLE, MIDDLE, False), path)
    return path


def place(data, out, **changes):
    return replace(Place(str(data), str(out), None, "cpu", graphs=True), **changes)


def numbers(result):
    """What was learnt, without times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result["curve"]]


# ---- A job. --------------------------------------------------------------------------------------


def test_images_are_read_as_they_were_written(data):
    found = learn_run.read(data)
    assert (found.name, found.classes, found.mean, found.flip) == ("random", tuple("abcd"), MIDDLE,
                                                                   False)  # fmt: skip
    assert torch.equal(found.train.images, random_split(40, shape=(3, 16, 16)).images)
    assert len(found.test) == 12


@pytest.mark.parametrize("network", ["vgg8", "resnet18"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_leaves_a_curve_with_the_settings_of_the_run(method, network, data, tmp_path):
    job = replace(JOB, method=method, network=network)
    result = learn_run.Run(job, place(data, tmp_path, beside=3)).complete()
    assert result == json.loads((tmp_path / f"random-{network}-{method}-0.json").read_text())
    assert [row["epoch"] for row in result["curve"]] == [1, 2]
    stages = 1 if method == "bp" else 4
    for row in result["curve"]:
        assert len(row["loss"]) == len(row["stage_accuracy"]) == stages
        assert all(0 < loss < 100 for loss in row["loss"])
        assert 0 <= row["accuracy"] <= 1
    assert result["finished"]
    assert result["beside"] == 3
    assert 0 < result["seconds_per_epoch"] < result["curve"][-1]["seconds"]
    settings = result["settings"]
    assert (settings["lr"], settings["weight_decay"], settings["train_images"]) == (3e-3, 0.0, 40)
    assert settings["cuda_graphs"] is False  # asked for, but this is no GPU
    heads = {"scpl": "conv", "scpl-paper": "mlp", "scpl-imitate": "learn_imitation.py"}
    assert settings["options"].get("head") == heads.get(method)
    assert (result["parameters"]["with_objectives"] > result["parameters"]["network"]) == (
        method != "bp"
    )


def test_a_job_that_was_cut_short_goes_on_as_if_nothing_had_been(data, tmp_path):
    whole = learn_run.Run(JOB, place(data, tmp_path)).complete()
    saving = place(data, tmp_path, checkpoints=str(tmp_path / "kept"))
    cut = learn_run.Run(JOB, replace(saving, until=time.time(), beside=2)).complete()
    assert not cut["finished"]
    assert numbers(cut) == numbers(whole)[:1]
    with pytest.raises(InputError, match="checkpoint must be of the same settings"):
        learn_run.Run(replace(JOB, every=2), saving).complete()
    rest = learn_run.Run(JOB, saving).complete()
    assert rest["finished"]
    assert rest["beside"] == 2
    assert numbers(rest) == numbers(whole)
    assert rest["curve"][0] == cut["curve"][0]
    assert not any((tmp_path / "kept").iterdir())  # a finished job needs none


def test_without_checkpoints_a_job_that_was_cut_short_begins_anew(data, tmp_path):
    cut = learn_run.Run(JOB, place(data, tmp_path, until=time.time())).complete()
    assert "accuracy" in cut["curve"][-1]
    assert len(cut["curve"]) == 1
    assert len(learn_run.Run(JOB, place(data, tmp_path)).complete()["curve"]) == 2


def test_an_epoch_is_not_begun_that_would_take_too_long(data, tmp_path, monkeypatch):
    run = learn_run.Run(JOB, place(data, tmp_path, until=1000.0))
    monkeypatch.setattr(learn_run.time, "time", lambda: 900.0)
    assert run._has_time()  # nobody knows how long the first one takes
    run.curve = [{"seconds": 80.0}]
    assert run._has_time()
    run.curve = [{"seconds": 90.0}]
    assert not run._has_time()


def test_the_time_of_an_epoch_is_measured_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(learn_run, "WARM_STEPS", 2)
    monkeypatch.setattr(learn_run, "TIMED_STEPS", 4)
    found = learn_run.measure(JOB, place(data, tmp_path))
    assert found == json.loads((tmp_path / "time-random-vgg8-scpl.json").read_text())
    assert len(found["blocks"]) == 5
    assert found["seconds_per_epoch"] == pytest.approx(3 * found["seconds_per_step"])


# ---- The imitation of what follows. --------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "kind", "depths"),
    [("vgg8", torch.nn.Conv2d, [3, 2, 2]), ("resnet18", ResidualBlock, [3, 2, 2])],
)
def test_a_stage_learns_through_layers_like_those_that_follow(network, kind, depths):
    example = torch.randn(2, 3, 32, 32)
    model = models.build(network, num_classes=10, width=1 / 8)
    parts = scpl.split(model, num_stages=4, readout="classifier", example=example)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = learn_imitation.imitation(parts, scpl.SCPL(temperature=0.2), example)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = parts.feature_shapes[:3]
    heads = [build(shape) for build, shape in zip(made.heads[:3], shapes, strict=True)]
    assert [sum(isinstance(m, kind) for m in head.modules()) for head in heads] == depths
    own = {id(p) for head in heads for p in head.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    for head, shape in zip(heads, shapes, strict=True):
        assert head(torch.randn(2, *shape)).shape == (2, 128)
    # The last of them has as many channels as the network's own last layer.
    channels = parts.feature_shapes[-1][0] // (4 if network == "vgg8" else 1)
    for head in heads:
        last = [m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
        assert last.num_features == channels
    assert made.heads[3] is None


def test_layers_are_chosen_evenly_with_the_last_one_among_them():
    assert learn_imitation.evenly(range(1, 7), 3) == [2, 4, 6]
    assert learn_imitation.evenly(range(1, 5), 3) == [1, 3, 4]
    assert learn_imitation.evenly(range(1, 3), 3) == [1, 2]


# ---- The parent. ---------------------------------------------------------------------------------


class Finished:
    """A process that has ended."""

    def __init__(self, status=0):
        self.status = status

    def poll(self):
        return self.status

    wait = poll


class Forever(Finished):
    """A process that works until it is ended."""

    ended = False

    def poll(self):
        return 0 if self.ended else None

    def terminate(self):
        self.ended = True

    def kill(self):
        assert self.ended

    def wait(self, timeout=None):
        return self.poll()


def result_of(job, *, accuracy=(0.5, 0.75), finished=True, seconds=10.0, beside=0):
    curve = [
        {"epoch": job.every * number, "seconds": seconds * number, "loss": [1.0], "accuracy": share}
        for number, share in enumerate(accuracy, start=1)
    ]
    hardware = {"device": "cpu", "processor": "that one"}
    return {"job": asdict(job), "finished": finished, "beside": beside, "curve": curve,
            "seconds_per_epoch": seconds, "environment": {"hardware": hardware}}  # fmt: skip


def keep(out, job, **about):
    (out / f"{job.name}.json").write_text(json.dumps(result_of(job, **about)))


class Processes:
    """In place of processes: what they were told, and how they end."""

    def __init__(self, out):
        self.out, self.told, self.endings = out, {}, {}

    def start(self, what, log, arguments):
        self.told[what] = arguments
        log.write_text("working\nthe last line")
        if "prepare" in arguments:
            Path(arguments["prepare"]["path"]).touch()
            return learn.Worker(what, Finished(), log)
        process = self.endings.get(what, Finished())
        if process.poll() == 0 and not arguments["time"]:
            keep(self.out, Job(**arguments["job"]))
        return learn.Worker(what, process, log)

    @property
    def jobs(self):
        return [what for what in self.told if not what.startswith("Reading ")]


@pytest.fixture
def processes(monkeypatch, tmp_path):
    made = Processes(tmp_path)
    monkeypatch.setattr(learn.Worker, "start", made.start)
    monkeypatch.setattr(learn, "TICK", 0.001)
    return made


def run(out, *arguments):
    return learn.main(["--device", "cpu", "--out", str(out), *arguments])


TWO = ("--methods", "scpl", "bp", "--networks", "vgg8", "--datasets", "cifar10")


def test_what_decides_most_comes_first():
    chosen = learn.parsed(["--seeds", "0", "1"])
    names = [job.name for job in learn.jobs_of(chosen)]
    assert len(names) == 2 * 2 * 2 * 6
    assert names[:7] == [
        *(f"cifar10-vgg8-{method}-0" for method in METHODS),
        "cifar10-resnet18-bp-0",
    ]
    assert names[12] == "fashion-mnist-vgg8-bp-0"
    assert names[24] == "cifar10-vgg8-bp-1"
    first = next(learn.jobs_of(chosen))
    assert (first.epochs, first.batch_size, first.image_size, first.width) == (60, 128, 32, 1.0)
    assert (first.precision, first.lr, first.every, first.stages) == ("bfloat16", None, 5, 4)


def test_jobs_are_told_what_to_do_and_a_second_call_has_nothing_left(processes, tmp_path, capsys):
    assert run(tmp_path, *TWO, "--parallel", "2", "--seconds", "1000", "--no-graphs") == 0
    assert list(processes.told) == ["Reading cifar10", "cifar10-vgg8-bp-0", "cifar10-vgg8-scpl-0"]
    told = processes.told["cifar10-vgg8-scpl-0"]
    assert told["place"]["beside"] == 1
    assert told["place"]["data"] == processes.told["Reading cifar10"]["prepare"]["path"]
    assert not told["place"]["graphs"]
    assert 900 < told["place"]["until"] - time.time() < 1000
    assert "75.00 % after 10 of 60 epochs" in capsys.readouterr().err
    assert list(tmp_path.glob("*.log")) == []
    processes.told.clear()
    assert run(tmp_path, *TWO) == 0
    assert processes.told == {}
    assert "0 of 2 jobs to do" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(processes, tmp_path):
    assert run(tmp_path, *TWO) == 0
    with pytest.raises(InputError, match="epochs 60 instead of 30"):
        run(tmp_path, *TWO, "--epochs", "30")


def test_one_failure_stops_no_other_job(processes, tmp_path, capsys):
    processes.endings["cifar10-vgg8-bp-0"] = Finished(3)
    assert run(tmp_path, *TWO) == 1
    assert processes.jobs == ["cifar10-vgg8-bp-0", "cifar10-vgg8-scpl-0"]
    told = capsys.readouterr().err
    assert "cifar10-vgg8-bp-0 failed with status 3: the last line" in told
    assert (tmp_path / "cifar10-vgg8-bp-0.log").exists()


def test_a_job_that_cannot_finish_is_not_begun(processes, tmp_path, capsys):
    before = replace(next(learn.jobs_of(learn.parsed([*TWO]))), seed=7, method="scpl")
    keep(tmp_path, before, seconds=10.0)
    arguments = (*TWO, "--seeds", "0", "7", "--seconds")
    assert run(tmp_path, *arguments, "300") == 0  # 60 epochs of 10 s; bp of the same network, too
    assert processes.jobs == []
    told = capsys.readouterr().err
    assert "cifar10-vgg8-scpl-0: not begun, for it could not be finished in time" in told
    assert run(tmp_path, *arguments, "300", "--checkpoints", str(tmp_path / "kept")) == 0
    assert len(processes.jobs) == 3  # they are saved, to go on with in another call


@pytest.mark.parametrize(("seconds", "begun"), [(2.5, 1), (5.0, 0)])
def test_a_job_that_is_left_alone_is_expected_to_go_faster(processes, tmp_path, seconds, begun):
    """Two jobs had shared the GPU; the last one was left out though it would have had all of it."""
    before = replace(next(learn.jobs_of(learn.parsed([*TWO]))), seed=7, method="scpl")
    keep(tmp_path, before, seconds=seconds, beside=1)
    arguments = ("--methods", "scpl", *TWO[3:], "--seeds", "0", "7", "--seconds", "110")
    assert run(tmp_path, *arguments) == 0
    assert processes.jobs == ["cifar10-vgg8-scpl-0"][:begun]


def test_when_time_is_up_what_still_runs_is_ended(processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "START", 0.0)
    monkeypatch.setattr(learn, "TO_END", 0.0)
    endless = processes.endings["cifar10-vgg8-bp-0"] = Forever()
    assert run(tmp_path, *TWO, "--seconds", "0.3") == 0
    assert endless.ended
    assert "Time is up" in capsys.readouterr().err


# ---- The table. ----------------------------------------------------------------------------------


def test_the_table_is_made_of_whatever_is_there(tmp_path, capsys):
    job = replace(JOB, epochs=3)
    keep(tmp_path, job, accuracy=(0.1, 0.5, 0.90), beside=3)
    keep(tmp_path, replace(job, seed=1), accuracy=(0.1, 0.6, 0.94), beside=1)
    keep(tmp_path, replace(job, seed=2), accuracy=(0.7,), finished=False)
    keep(tmp_path, replace(job, method="predsim"), accuracy=(0.3, 0.4), finished=False)
    timed = {"job": asdict(job), "seconds_per_epoch": 2.5}
    (tmp_path / "time-random-vgg8-scpl.json").write_text(json.dumps(timed))
    assert learn.main(["--table", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("random, vgg8, 4 stages, 16 pixels, batch 16, float32, that one")
    rows = [line for line in lines if line.startswith("| ")]
    assert rows == [
        "| method | seeds | epochs | after 1 | after 2 | last | error | s per epoch, alone "
        "| s per epoch (others beside it) |",
        "| scpl | 2 | 3 | 10.00 ± 0.00 | 55.00 ± 7.07 | **92.00 ± 2.83** | 8.00 ± 2.83 | 2.50 "
        "| 10.00 (3) |",
        "| predsim | 1 | 2 of 3 | 30.00 | 40.00 | **40.00** | 60.00 |  | 10.00 (0) |",
    ]
    assert "5.58 %" in lines[-4]
    assert (tmp_path / learn_table.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_without_results_the_table_says_so(tmp_path, capsys):
    assert learn.main(["--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No results in {tmp_path}\n"


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_from_the_command_line_to_the_table(tmp_path):
    command = [
        *(sys.executable, str(GPU / "learn.py"), "--quick", "--device", "cpu", "--threads", "1"),
        *("--methods", "scpl-imitate", "--epochs", "1", "--seconds", "90", "--out", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "digits-vgg8-scpl-imitate-0.json").read_text())
    accuracy = 100 * result["curve"][0]["accuracy"]
    assert f"| scpl-imitate | 1 | 1 | **{accuracy:.2f}** |" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
