import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pretended_workers
import pytest
import torch
from torch import nn

import scpl
from cli_runs import TINY, fork, refused
from cli_runs import scpl as command
from scpl.app.bench import bench as module
from scpl.app.bench.bench import synthetic_batches, synthetic_data
from scpl.app.bench.measure import Block, train_block
from scpl.app.bench.workers import Workers
from scpl.app.config import TrainConfig
from scpl.engine.timeline import Timeline
from scpl.errors import LinkError
from scpl.methods import SCPL, Backpropagation, DataParallel, GPipe
from scpl.report.formats import TIMES

FAST = [*TINY, "--repeats", "2", "--steps", "2"]
NAMES = {"mean", "sd", "median", "min", "max", "n"}


def bench(*arguments):
    return command("bench", *FAST, *arguments)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing may be written where a benchmark runs."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.glob("*")) == []


@pytest.fixture
def actors(monkeypatch):
    """Processes that only pretend to train: tests of everything around them take no time."""
    scripts = {}

    def act(**given):
        scripts.update({name.replace("_", "-"): script for name, script in given.items()})
        monkeypatch.setattr(module, "serve", partial(pretended_workers.serve, scripts))

    return act


class TestNumbers:
    def test_methods_on_one_and_several_processes(self):
        """The whole way once, with real processes: the only slow one."""
        found = bench("--processes", "2", "--methods", "scpl,bp-wide", "--json")
        assert found.status == 0, found.err
        answer = json.loads(found.out)
        assert found.out.count("\n") == 1
        assert answer["failures"] == {}
        assert answer["synthetic"] is False
        assert "versions" in answer["environment"]
        ours, wide = answer["results"]
        assert (ours["method"], wide["method"]) == ("scpl", "bp-wide")
        assert (ours["processes"], ours["threads"], ours["stages"]) == (2, 1, 4)
        assert (wide["processes"], wide["threads"], wide["stages"]) == (1, 2, 1)
        for result in answer["results"]:
            assert set(result["samples_per_second"]) == NAMES
            assert result["samples_per_second"]["n"] == len(result["rounds"]) == 2
            assert min(result["rounds"]) > 0
            assert len(result["peak_memory_bytes"]) == result["processes"]
            assert all(10e6 < size < 10e9 for size in result["peak_memory_bytes"])
            assert len(result["bytes_per_step"]) == result["processes"]
            assert len(result["wait_share"]) == result["processes"]
            assert all(0 <= share <= 1 for share in result["wait_share"])
        assert ours["bytes_per_step"][0] > 4 * 20 * 8 > ours["bytes_per_step"][1] == 0
        assert found.err.count("samples/s:") == 2

    def test_ratios_are_taken_round_by_round(self, actors):
        actors(scpl=[1, 10, 40], bp=[1, 5, 10])
        answer = json.loads(bench("--methods", "scpl,bp", "--json").out)
        ours, bp = answer["results"]
        assert ours["rounds"] == [200, 800]  # 20 images per mini-batch
        assert ours["samples_per_second"]["median"] == 500
        assert bp["samples_per_second"]["median"] == 150
        assert ours["ratio_to"]["bp"]["median"] == 3  # of 2 and 4, not 500 / 150
        assert (ours["ratio_to"]["bp"]["min"], ours["ratio_to"]["bp"]["max"]) == (2, 4)
        assert ours["wait_share"] == [0.25]

    def test_the_table(self, actors):
        actors(scpl=[1, 10, 40], bp=[1, 5, 10])
        found = bench("--methods", "scpl,bp")
        rows = [line.split("  ") for line in found.out.splitlines()]
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        assert cells[0][:4] == ["method", f"processes {TIMES} threads", "samples/s", "ratio to bp"]
        assert cells[2][:4] == ["scpl", f"1 {TIMES} 1", "500 (200-800)", "3.00 (2.00-4.00)"]
        assert cells[3][:4] == ["bp", f"1 {TIMES} 1", "150 (100-200)", "1 (reference)"]

    def test_what_the_processes_print_goes_to_stderr(self, actors, capfd):
        actors(bp=["print", "print", "print"])
        assert json.loads(bench("--methods", "bp", "--json").out)["results"]
        assert capfd.readouterr() == ("", "something\n" * 3)

    def test_without_bp_the_first_is_the_reference(self, actors):
        actors(scpl=[1, 10, 40], early_exit=[1, 20, 80])
        assert "ratio to scpl" in bench("--methods", "scpl,early-exit").out


class TestFailures:
    def test_a_method_that_cannot_run_is_told_and_the_others_go_on(self, actors):
        actors(scpl=["It must fit. Got a misfit."], bp=[1, 5, 10])
        found = bench("--methods", "scpl,bp", "--json")
        assert found.status == 1
        answer = json.loads(found.out)
        assert answer["failures"] == {"scpl": "It must fit. Got a misfit."}
        assert [result["method"] for result in answer["results"]] == ["bp"]
        assert answer["results"][0]["ratio_to"] == {}
        assert "scpl cannot run: It must fit. Got a misfit." in found.err

    def test_one_that_fails_in_the_middle(self, actors):
        actors(scpl=[1, 10, "The loss must be finite."], bp=[1, 5, 10])
        found = bench("--methods", "scpl,bp")
        assert found.status == 1
        assert "scpl cannot run: The loss must be finite." in found.err
        assert "500" not in found.out
        assert "150 (100-200)" in found.out

    def test_when_all_fail_there_is_no_table(self, actors):
        actors(scpl=["No."], bp=["No."])
        assert (
            refused(bench("--methods", "scpl,bp"), "at least one method", "No.").count("No.") == 1
        )

    def test_one_that_is_killed_ends_the_benchmark(self, actors):
        actors(scpl=[1, "die"], bp=[1, 5, 10])
        refused(bench("--methods", "scpl,bp"), "One of scpl", "SIGKILL", status=1)

    def test_a_real_failure_on_several_processes(self):
        """Not the symptom on the other rank is told, but the cause."""
        found = bench("--processes", "2", "--methods", "scpl", "--lr", "1e30", "--repeats", "9")
        refused(found, "loss of every stage must be finite", status=2)


class TestEnds:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_all_processes(self, actors, number):
        """That none is left is checked after every test."""
        actors(scpl=[1], bp=[1])
        handler = signal.getsignal(number)

        def press():
            while len(children(os.getpid())) < 2:
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(os.getpid(), number)

        timer = threading.Thread(target=press, daemon=True)
        timer.start()
        found = bench("--methods", "scpl,bp", "--repeats", "1000000")
        timer.join()
        assert found.status == 128 + number
        assert found.err.splitlines()[-1] == "The benchmark was interrupted."
        assert signal.getsignal(number) is handler

    @pytest.mark.parametrize("seen", ["starting", "round 2/"])
    @pytest.mark.timeout(300)
    def test_processes_do_not_outlive_a_benchmark_that_is_killed(self, seen):
        process = fork(
            "bench", *FAST, "--repeats", "1000000", "--methods", "scpl", "--processes", 2
        )
        deadline = time.monotonic() + 200
        try:
            while seen not in process.written()[1]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while len(ranks := children(process.pid)) < 2:
                assert time.monotonic() < deadline
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() < deadline + 30
            time.sleep(0.05)


def children(pid):
    """Without the helper of multiprocessing, which ends with the last process that uses it."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in found
        if alive(child) and "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()
    ]


def alive(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class TestEnvironment:
    def test_processes_become_ranks_and_the_benchmark_stays_as_it_is(self, monkeypatch):
        """Variables must be there before torch is imported; a fixture checks that ours are as
        they were."""
        monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
        workers = Workers("some", pretended_workers.tell_environment, None, processes=2, threads=3)
        try:
            workers.start()
            answers = workers.train()
        finally:
            workers.kill()
        ports = {answer.pop("MASTER_PORT") for answer in answers}
        assert len(ports) == 1
        for rank, answer in enumerate(answers):
            assert answer == {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3",
                "torch": False,
            }  # fmt: skip


class TestLost:
    def test_who_hangs_when_another_is_lost_is_not_waited_for(self, monkeypatch):
        """A rank that was stopped, and blamed by the other, was waited for without end."""
        monkeypatch.setattr("scpl.app.bench.workers.SECONDS_TO_END", 0.5)
        workers = Workers("some", pretended_workers.end_or_hang, None, processes=2)
        try:
            workers.start()
            with pytest.raises(LinkError, match="One of some ended without a word"):
                workers.train()
        finally:
            workers.kill()


class TestData:
    def test_without_its_files_a_data_set_is_imitated(self, actors):
        actors(bp=[1, 5, 10])
        found = bench("--methods", "bp", "--data", "cifar10", "--json")
        assert found.status == 0
        assert "random images of the shape of cifar10" in found.err
        assert "--data-dir" in found.err
        assert json.loads(found.out)["synthetic"] is True

    @pytest.mark.parametrize(
        ("name", "shape", "classes"),
        [
            ("digits", (1, 16, 16), 10),
            ("fashion-mnist", (1, 28, 28), 10),
            ("cifar100", (3, 32, 32), 100),
            ("tiny-imagenet", (3, 32, 32), 200),
        ],
    )
    def test_imitations_have_the_shape_of_the_set(self, name, shape, classes):
        config = TrainConfig.of(data=name, batch_size=4, views=2)
        data = synthetic_data(config)
        inputs, target = synthetic_batches(config, data)[0]
        assert inputs.shape == (8, *shape)
        assert data.num_classes == classes
        assert target.equal(target[:4].repeat(2))
        assert all(int(t.max()) < classes for _, t in synthetic_batches(config, data))

    def test_imitated_texts_are_as_long_as_can_be(self):
        config = TrainConfig.of(
            data="imdb", model="lstm", batch_size=4, max_tokens=30, vocab_size=9
        )
        data = synthetic_data(config)
        inputs, target = synthetic_batches(config, data)[0]
        assert (inputs.shape, inputs.dtype) == ((4, 30), torch.int64)
        assert 1 <= int(inputs.min()) <= int(inputs.max()) < 9
        assert (data.num_classes, target.shape) == (2, (4,))

    def test_blocks_hold_whole_groups_of_mini_batches(self):
        found = bench("--methods", "ddp", "--processes", "2", "--accumulation", "4")
        refused(found, "--steps must be a multiple of --accumulation", "2 and 4")

    def test_a_folder_cannot_be_imitated(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("images")
        refused(bench("--data", folder, "--synthetic"), "--data must be one of", "folder")


class TestBlocks:
    def test_the_clock_runs_while_the_line_is_full(self):
        """The first of three ranks may be 2 * 3 mini-batches ahead of the last one."""
        assert Block.of(10, SCPL(), 3, 2) == Block(10, warm=6, cool=6)

    @pytest.mark.parametrize(
        ("method", "num_ranks", "cool"),
        [(SCPL(), 1, 0), (Backpropagation(), 1, 0), (GPipe(), 3, 1), (DataParallel(), 2, 1)],
    )
    def test_where_all_ranks_end_a_step_together(self, method, num_ranks, cool):
        assert Block.of(10, method, num_ranks, 2) == Block(10, warm=3, cool=cool)

    def test_a_block_is_timed_without_what_comes_before_and_after(self, monkeypatch):
        rows = (torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        parts = scpl.split(network, num_stages=1, example=rows[0])
        pipeline = scpl.Pipeline(parts, SCPL(), lambda p: torch.optim.SGD(p, lr=0.1))
        clock = 0.0
        monkeypatch.setattr("scpl.app.bench.measure._now", lambda device: clock)

        def batches():
            nonlocal clock
            for index in range(9):
                clock += 1.0 if 2 <= index < 7 else 100.0
                yield rows

        timing = train_block(pipeline, batches(), Block(5, warm=2, cool=2))
        pipeline.close()
        assert list(timing.losses) == list(range(1, 10))
        assert (timing.steps, timing.seconds) == (9, 5.0)

    def test_shares_are_those_of_the_window(self):
        timeline = Timeline()
        for activity, begin, end in [("forward", 0, 4), ("wait", 4, 6), ("forward", 6, 20)]:
            timeline.add(activity, 0, 1, begin, end)
        assert timeline.during_window(3, 8) == {"forward": 3, "wait": 2}
