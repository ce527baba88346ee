import fcntl
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from cli_runs import (
    COMPLETE,
    NUM_STEPS,
    TINY,
    command,
    finish,
    fork,
    rank_of,
    refused,
    result,
    scpl,
    steps,
    train,
    tree,
    wait_for_steps,
)
from processes import environment, run_forked
from scpl.app.config import TrainConfig
from scpl.app.train.recorder import Recorder
from scpl.app.train.run import _Run, resumed_config

EPOCHS = 4
MANY = [*TINY, "--epochs", EPOCHS, "--quiet"]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scpl.report.write_run_report", lambda folder: [])
        assert scpl("train", *MANY, "--out", folder).status == 0
    return folder


def signal_at(monkeypatch, step, number):
    """Send this process a signal when it has done so many steps."""
    add = Recorder.add

    def patched(self, seconds, report):
        add(self, seconds, report)
        if report.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Recorder, "add", patched)


class TestSameNumbers:
    def test_one_seed_one_result(self, whole, tmp_path):
        scpl("train", *MANY, "--out", tmp_path / "again")
        assert result(tmp_path / "again") == result(whole)

    def test_another_seed_another_result(self, whole, tmp_path):
        scpl("train", *MANY, "--out", tmp_path / "other", "--seed", 1)
        assert result(tmp_path / "other")["weights"] != result(whole)["weights"]

    def test_the_written_configuration_gives_the_run_again(self, whole, tmp_path):
        found = scpl("train", whole / "config.toml", "--out", tmp_path / "again")
        assert found.status == 0
        assert result(tmp_path / "again") == result(whole)

    def test_checkpoints_change_nothing(self, whole, tmp_path):
        scpl("train", *MANY, "--out", tmp_path / "run", "--checkpoint-every", 2, "--keep", 3)
        assert result(tmp_path / "run") == result(whole)
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3

    def test_two_processes_give_the_result_of_one(self, whole, tmp_path):
        """As a launcher of the user's starts them; ours is in `TestRestarts`."""
        folder = tmp_path / "run"
        found = run_forked(2, "-m", "scpl", "train", *MANY, "--out", folder, "--json", timeout=80)
        assert found.returncode == 0, found.stderr
        summary = json.loads(found.stdout)
        assert summary["processes"] == len(summary["peak_memory_bytes"]) == 2
        assert len(summary["wait_share"]) == 4
        assert result(folder) == result(whole)
        assert {path.name for path in folder.iterdir()} >= COMPLETE


class TestFiles:
    def test_the_rate_that_is_logged_is_the_one_before_factors(self, tmp_path):
        """The last rank logs; whichever its stages are, all have one schedule."""
        assert train("--lr-factors", 0.5, 1, 2, 3, "--out", tmp_path / "run").status == 0
        assert train("--out", tmp_path / "plain").status == 0
        rows = [result(tmp_path / name)["metrics"][0] for name in ("run", "plain")]
        assert float(rows[0]["lr"]) == pytest.approx(float(rows[1]["lr"]))
        assert rows[0]["train_loss_stage0"] != rows[1]["train_loss_stage0"]

    def test_the_configuration_says_nothing_of_how_the_run_was_shown(self, whole):
        run = TrainConfig.read(whole / "config.toml").run
        assert not any((run.quiet, run.json, run.force, run.out, run.resume))

    def test_every_step_and_epoch_is_logged(self, whole):
        rows = result(whole)["steps"]
        assert [row["step"] for row in rows] == list(range(1, EPOCHS * NUM_STEPS + 1))
        assert [row["epoch"] for row in rows] == [e + 1 for e in range(EPOCHS) for _ in range(9)]
        assert sum(row["samples"] for row in rows) == EPOCHS * 180
        table = result(whole)["metrics"]
        assert [row["epoch"] for row in table] == [str(e + 1) for e in range(EPOCHS)]
        assert [row["step"] for row in table] == [str(9 * (e + 1)) for e in range(EPOCHS)]
        for stage in range(4):
            mean = sum(sum(r["losses"][stage].values()) * r["samples"] for r in rows[:9]) / 180
            assert float(table[0][f"train_loss_stage{stage}"]) == pytest.approx(mean)
            seen = sum(r["observed"][stage]["spread"] * r["samples"] for r in rows[:9]) / 180
            assert float(table[0][f"observed_spread_stage{stage}"]) == pytest.approx(seen)
            assert 0 < seen < 1

    def test_the_log_is_written_even_when_quiet(self, whole):
        assert "test accuracy" in (whole / "log.txt").read_text()


class TestNotFinite:
    def test_stage_and_step_are_named_and_checkpoints_kept(self, tmp_path):
        folder = tmp_path / "run"
        found = train("--out", folder, "--lr", "1e30", "--checkpoint-every", 1, "--quiet")
        words = refused(found, "must be finite", "checkpoints are kept")
        assert re.search(r"[Ss]tage 0 .* step \d", words)
        assert not (folder / "summary.json").exists()

    def test_the_last_good_checkpoint_is_kept(self, tmp_path, monkeypatch):
        """Finite for an epoch, then not."""
        from scpl.data.images.loader import Loader

        batches = Loader.batches

        def spoilt(self, start=0):
            for number, (images, labels) in enumerate(batches(self, start)):
                if self.epoch == 1 and number == 4:
                    images = images * float("nan")
                yield images, labels

        monkeypatch.setattr(Loader, "batches", spoilt)
        folder = tmp_path / "run"
        found = scpl("train", *MANY, "--out", folder)
        refused(found, "data must be finite", f"step {NUM_STEPS + 5}", "checkpoints are kept")
        monkeypatch.undo()
        assert not (folder / "summary.json").exists()
        monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
        assert scpl("train", "--resume", folder).status == 0


class TestInterruptions:
    @pytest.mark.parametrize(("number", "status"), SIGNALS)
    @pytest.mark.parametrize("step", [NUM_STEPS + 4, 2 * NUM_STEPS, 1])
    def test_an_interrupted_run_ends_as_an_undisturbed_one(
        self, whole, tmp_path, monkeypatch, number, status, step
    ):
        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            signal_at(patch, step, number)
            found = scpl("train", *MANY, "--out", folder)
        assert found.status == status
        assert found.out == ""
        assert f"scpl train --resume {folder}" in found.err
        assert f"after step {step}" in found.err
        assert "Traceback" not in found.err
        assert (folder / "checkpoints" / f"step-{step:09d}" / "stage-3.json").exists()
        assert len(steps(folder)) == step
        assert scpl("train", "--resume", folder).status == 0
        assert result(folder) == result(whole)

    def test_many_interruptions(self, whole, tmp_path, monkeypatch):
        folder = tmp_path / "run"
        arguments = [*MANY, "--out", folder]
        for step in (3, 8, NUM_STEPS, NUM_STEPS + 1, 3 * NUM_STEPS + 1):
            with monkeypatch.context() as patch:
                signal_at(patch, step, signal.SIGINT)
                assert scpl("train", *arguments).status == 130
            arguments = ["--resume", folder]
        assert scpl("train", *arguments).status == 0
        assert result(folder) == result(whole)

    @pytest.mark.parametrize("every", [(), ("--checkpoint-every", 5)], ids=["epochs", "steps"])
    def test_the_final_test_can_be_interrupted(self, whole, tmp_path, monkeypatch, every):
        """It ended as if nothing had happened, with status 0, or unsaved."""
        folder, tested = tmp_path / "run", _Run._tested_on

        def interrupted(self):
            for number, batch in enumerate(tested(self)):
                yield batch
                if number == 0:
                    signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(_Run, "_tested_on", interrupted)
            found = scpl("train", *MANY, "--out", folder, *every)
        assert found.status == 130
        assert f"after step {EPOCHS * NUM_STEPS}" in found.err
        assert f"scpl train --resume {folder}" in found.err
        assert not (folder / "summary.json").exists()
        assert scpl("train", "--resume", folder).status == 0
        assert result(folder) == result(whole)
        assert len(steps(folder)) == EPOCHS * NUM_STEPS  # nothing was trained again

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "status"), [*SIGNALS, (signal.SIGKILL, -9)])
    def test_a_signal_from_outside(self, whole, tmp_path, number, status):
        folder = tmp_path / "run"
        process = fork("train", *MANY, "--out", folder, "--checkpoint-every", 3)
        wait_for_steps(folder, 3, process)
        process.send_signal(number)
        found = finish(process)
        assert found.status == status, found.err
        assert "Traceback" not in found.err
        assert scpl("train", "--resume", folder).status == 0
        assert result(folder) == result(whole)

    @pytest.mark.slow
    def test_a_terminal_that_is_closed(self, whole, tmp_path):
        """Its SIGHUP ended the run unsaved, and to tell so to nobody would have been an error."""
        folder, (ours, its) = tmp_path / "run", os.openpty()
        process = subprocess.Popen(
            command("train", *MANY, "--out", folder),
            stdin=its, stdout=its, stderr=its, start_new_session=True, env=environment(),
            preexec_fn=lambda: fcntl.ioctl(its, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(its)
        wait_for_steps(folder, 3, process)
        os.close(ours)
        assert process.wait(60) == 129
        assert scpl("train", "--resume", folder).status == 0
        assert result(folder) == result(whole)

    @pytest.mark.slow
    @pytest.mark.timeout(90)
    @pytest.mark.parametrize(
        ("rank", "number", "status"),
        [(None, signal.SIGINT, 130), (0, signal.SIGTERM, 143), (1, signal.SIGTERM, 143)],
    )
    def test_several_processes_are_interrupted_together(
        self, whole, tmp_path, rank, number, status
    ):
        """By a signal to any of them: a second machine that was to be switched off promised to
        save, and trained to the end."""
        folder = tmp_path / "run"
        process = fork("train", *MANY, "--out", folder, "--processes", 2)
        wait_for_steps(folder, NUM_STEPS, process)
        os.kill(process.pid if rank is None else rank_of(process.pid, rank), number)
        found = finish(process)
        assert found.status == status, found.err
        assert found.err.count(f"scpl train --resume {folder}") == 1
        assert "Traceback" not in found.err
        # On one process now: the stages may be spread anew.
        assert scpl("train", "--resume", folder, "--processes", 1).status == 0
        assert result(folder) == result(whole)


class TestStrangers:
    @pytest.mark.slow
    @pytest.mark.timeout(90)
    def test_who_reaches_the_ports_of_a_run_changes_nothing(self, tmp_path):
        """A stranger named a process in the store, and the first rank killed it."""
        folder, victim, long = tmp_path / "run", os.getpid(), [*MANY, "--epochs", 15]
        assert scpl("train", *long, "--out", tmp_path / "undisturbed").status == 0
        process = fork("train", *long, "--out", folder, "--processes", 2)
        ours = [process.pid, found_rank(process, 0), found_rank(process, 1)]
        while len(listening(ours[2])) < 4:  # process groups, which have met then
            assert process.poll() is None
        sockets = {where for one in ours for where in listening(one)}
        assert len(sockets) >= 5
        assert {address for address, _ in sockets} == {"127.0.0.1"}
        idle = [socket.create_connection(where, 5) for where in sockets]
        for where in sockets:
            with socket.create_connection(where, 5) as garbage:
                garbage.sendall(os.urandom(5000))
        ((_, port),) = listening(ours[0])
        store = TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=5))
        begun = [key for key in store.list_keys() if key.startswith("scpl/members/")]
        (name,) = {key.split("/")[2] for key in begun}
        written = PrefixStore(f"scpl/{name}", store)
        for rank in range(2):
            written.set(f"host/{rank}", json.dumps([socket.gethostname(), victim]))
            written.set(f"beat/{rank}", "x")
        for name in ("failure", "stop"):
            written.set(name, json.dumps({"rank": 0, "text": "gone", "silent": 1}))
        found = finish(process, 80)
        for one in idle:
            one.close()
        assert found.status == 0, found.err
        assert result(folder) == result(tmp_path / "undisturbed")

    @pytest.mark.slow
    @pytest.mark.timeout(90)
    def test_the_ports_of_a_run_cannot_be_reached_from_another_machine(self, tmp_path):
        """Two network namespaces, joined by a cable; the run is in one of them."""
        links = runpy.run_path(Path(__file__).parents[2] / "benchmarks/links.py")
        if reason := links["refusal"]():
            pytest.skip(reason)
        with links["Cable"]() as cable:
            here, there = cable.ends
            inside = ["nsenter", f"--net=/proc/{here.process}/ns/net"]
            run = command("train", *MANY, "--epochs", 99, "--out", tmp_path, "--processes", 2)
            process = subprocess.Popen([*inside, *run], env=environment())
            ours = [process.pid, found_rank(process, 0), found_rank(process, 1)]
            while len(listening(ours[2])) < 4:
                assert process.poll() is None
            ports = {port for one in ours for _, port in listening(one)}
            with ThreadPoolExecutor(1) as at_home, ThreadPoolExecutor(1) as elsewhere:
                at_home.submit(here.enter).result()
                elsewhere.submit(there.enter).result()
                # What listens there to everybody can be reached.
                with at_home.submit(socket.create_server, ("", 0)).result() as server:
                    where = (here.address, server.getsockname()[1])
                    elsewhere.submit(socket.create_connection, where, 5).result().close()
                for port in ports:
                    with pytest.raises(ConnectionRefusedError):
                        elsewhere.submit(socket.create_connection, (here.address, port), 5).result()
            process.terminate()
            assert process.wait(60) == 143

    @pytest.mark.timeout(60)
    def test_a_launcher_that_is_killed_leaves_no_rank_that_waits(self, tmp_path):
        """Ranks that had not met yet waited for nearly two minutes."""
        process = fork("train", *MANY, "--out", tmp_path / "run", "--processes", 2)
        rank = found_rank(process, 1)
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while alive(rank) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(rank)
        process.communicate()


def found_rank(process, rank):
    """The process of a rank, as soon as the launcher has started it."""
    while process.poll() is None:
        with suppress(IndexError):
            return rank_of(process.pid, rank)
    raise AssertionError("the launcher ended before that")


def listening(process):
    """Addresses and ports at which a process listens."""
    own, found = set(), set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            own.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    for file in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{file}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                address, port = fields[1].split(":")
                known = {"0100007F": "127.0.0.1"}.get(address, address)
                found.add((known, int(port, 16)))
    return found


def alive(process):
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


class TestRestarts:
    @pytest.mark.slow
    @pytest.mark.timeout(90)
    def test_a_killed_rank_is_made_good(self, whole, tmp_path):
        folder = tmp_path / "run"
        process = fork(
            "train", *MANY, "--out", folder, "--processes", 2, "--max-restarts", 1,
            "--checkpoint-every", 3, "--json",
        )  # fmt: skip
        wait_for_steps(folder, NUM_STEPS, process)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        found = finish(process, 80)
        assert found.status == 0, found.err
        assert "left without a word" in found.err
        assert "restarting all processes (1 of 1)" in found.err
        assert json.loads(found.out)["processes"] == 2
        assert result(folder) == result(whole)

    @pytest.mark.slow
    @pytest.mark.timeout(90)
    def test_bad_input_is_not_tried_again_nor_another_run_gone_on_with(self, whole, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        before = tree(folder)
        process = fork(
            "train", *MANY, "--seed", 1, "--out", folder, "--processes", 2, "--max-restarts", 1
        )
        found = finish(process)
        refused(found, "must not exist yet")
        assert "restarting" not in found.err
        assert tree(folder) == before


class TestResume:
    @pytest.fixture
    def half(self, tmp_path, monkeypatch):
        """A run that was interrupted."""
        with monkeypatch.context() as patch:
            signal_at(patch, 2 * NUM_STEPS + 4, signal.SIGINT)
            scpl("train", *MANY, "--out", tmp_path / "half")
        return tmp_path / "half"

    def test_a_finished_run_is_left_alone(self, whole):
        before = tree(whole)
        found = scpl("train", "--resume", whole, "--json")
        assert json.loads(found.out)["run"] == str(whole)
        assert tree(whole) == before

    def test_changed_settings_are_named(self, half):
        before = tree(half)
        found = scpl("train", "--resume", half, "--lr", "0.5", "--seed", 3)
        refused(found, "--lr 0.5 (was 0.003)", "--seed 3 (was 0)")
        assert tree(half) == before

    def test_it_goes_on_in_its_own_folder(self, half, tmp_path):
        """``--out`` was ignored."""
        before = tree(half)
        for flags in (["--out", tmp_path / "b"], ["--force"]):
            found = scpl("train", "--resume", half, *flags)
            refused(found, "in its own folder", *map(str, flags), f"--resume {half}", "copy")
        assert tree(half) == before
        assert not (tmp_path / "b").exists()
        config = TrainConfig.read(half / "config.toml").changed(out=half / "." / "")
        assert resumed_config(config, half).run.resume == half

    def test_what_does_not_change_the_numbers_may_change(self, half, whole):
        found = scpl("train", f"--resume={half}", "--checkpoint-every", 5, "--keep", 1, "--trace")
        assert found.status == 0
        assert result(half) == result(whole)

    def test_a_moved_run_goes_on_where_it_is(self, half, whole, tmp_path):
        half.rename(tmp_path / "moved")
        assert scpl("train", "--resume", tmp_path / "moved").status == 0
        assert result(tmp_path / "moved") == result(whole)
        assert not half.exists()

    def test_a_folder_that_is_no_run(self, tmp_path):
        refused(scpl("train", "--resume", tmp_path), "config.toml", str(tmp_path))

    def test_the_newest_damaged_checkpoint_is_passed_over(self, half, whole):
        newest = max((half / "checkpoints").iterdir())
        (newest / "stage-2.pt").write_bytes(b"x")
        found = scpl("train", "--resume", half)
        assert found.status == 0
        assert result(half) == result(whole)
        told = [line for line in (half / "log.txt").read_text().splitlines() if "Warning" in line]
        assert len(told) == 1
        assert f"Going on from step {2 * NUM_STEPS}" in told[0]
        assert f"{newest.name}/stage-2.pt" in told[0]

    def test_another_version_is_told(self, half, monkeypatch):
        monkeypatch.setattr("scpl.engine.checkpoint.__version__", "9.9.9")
        assert scpl("train", "--resume", half).status == 0
        assert "this is scpl 9.9.9" in (half / "log.txt").read_text()

    def test_checkpoints_of_another_seed_are_refused(self, half, tmp_path):
        """The same network, and all files intact: other weights, and nobody would notice."""
        other = tmp_path / "other"
        scpl("train", *MANY, "--seed", 1, "--out", other)
        shutil.rmtree(half / "checkpoints")
        shutil.copytree(other / "checkpoints", half / "checkpoints")
        before = tree(half)
        refused(scpl("train", "--resume", half), "intact checkpoint", "is of another run")
        assert tree(half) == before

    def test_a_run_that_goes_on_elsewhere_is_left_alone(self, half):
        before = tree(half)
        code = "import sys; from pathlib import Path; from scpl.runs.lock import RunLock;"
        code += "held = RunLock(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code, half], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as owner:
            owner.stdout.read(1)
            refused(scpl("train", "--resume", half), f"in use by process {owner.pid}")
            refused(scpl("train", *MANY, "--out", half, "--force"), "in use by process")
            owner.kill()
        (half / ".lock").write_bytes(before[half / ".lock"])
        assert tree(half) == before

    def test_no_intact_checkpoint_loses_nothing(self, half):
        for path in (half / "checkpoints").glob("*/stage-1.pt"):
            path.write_bytes(path.read_bytes()[:-1])
        before = tree(half)
        refused(scpl("train", "--resume", half), "intact checkpoint", "step-000000022")
        assert tree(half) == before

    def test_a_checkpoint_of_another_network(self, half, tmp_path):
        other = tmp_path / "other"
        train("--model", "small-cnn", "--out", other, "--quiet")
        shutil.rmtree(half / "checkpoints")
        shutil.copytree(other / "checkpoints", half / "checkpoints")
        before = tree(half)
        refused(scpl("train", "--resume", half), "checkpoint")
        assert tree(half) == before

    def test_no_checkpoint_yet(self, half, whole):
        shutil.rmtree(half / "checkpoints")
        assert scpl("train", "--resume", half).status == 0
        assert result(half) == result(whole)
        assert "No checkpoint yet: beginning with the first step" in (half / "log.txt").read_text()

    def test_the_configuration_is_damaged(self, half):
        (half / "config.toml").write_text("epochs = ")
        refused(scpl("train", "--resume", half), "TOML", "config.toml")
