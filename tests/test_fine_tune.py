"""Every command of docs/fine-tune.md runs, in order: a tiny BERT and a table stand for the real."""

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_runs import Outcome, finish, fork, scpl
from pretrained_files import POSITIONS, write_bert
from processes import environment, run_forked
from text_files import tickets, write_table

PAGE = Path(__file__).parents[1] / "docs/fine-tune.md"
ELSEWHERE = (["pip", "install"], ["scpl", "compare"], ["torchrun", "--nnodes"])
"""What does not run with the others: the last two have tests of their own."""
pytestmark = pytest.mark.timeout(400)  # a fixture runs the page, and the machine may be busy


def blocks(language):
    """The blocks of the page in a language, also those that are part of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE.read_text(), re.DOTALL | re.M)
    return [re.sub(rf"^{indent}", "", block, flags=re.M) for indent, block in found]


def commands():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_tables(folder):
    write_table(folder / "tickets.csv", tickets(120, longest=30))
    write_table(folder / "new-tickets.csv", tickets(20, seed=1))


@contextlib.contextmanager
def threads_kept():
    """The page says nothing of threads, so its commands take all cores, in this process too."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What each command left: its words and its outcome, and the folder; all ran, in order."""
    folder = tmp_path_factory.mktemp("page")
    write_tables(folder)
    outcomes = []
    with pytest.MonkeyPatch.context() as patch, threads_kept():
        patch.chdir(folder)
        patch.setenv("SCPL_CACHE", "off")
        patch.setenv("HF_HUB_OFFLINE", "1")
        for words in commands():
            if words[:2] in ELSEWHERE:
                continue
            if words[:2] == ["hf", "download"]:
                write_bert(folder / words[words.index("--local-dir") + 1])
                continue
            assert words[0] == "scpl", words
            if "--processes" in words:
                ranks = int(words[words.index("--processes") + 1])
                ended = run_forked(ranks, "-m", *words, timeout=110)
                outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
            else:
                outcome = scpl(*words[1:])
            outcomes.append((words[1:], outcome))
            if words[1] != "doctor":  # whose opinion of this machine is its own
                assert outcome.status == 0, (words, outcome)
    return folder, outcomes


def outcome_of(done, *words):
    (found,) = (each for given, each in done[1] if set(words) <= set(given))
    return found


def test_every_command_ran_and_left_what_the_page_says(done):
    folder, outcomes = done
    assert len(outcomes) > 10
    assert {words[0] for words, _ in outcomes} == {
        "doctor", "train", "eval", "predict", "export"
    }  # fmt: skip
    run = folder / "runs/tickets"
    for name in ("config.toml", "metrics.csv", "log.txt", "exits.safetensors", "exits.png"):
        assert (run / name).is_file(), name
    for name in ("report.html", "results.png"):
        assert (folder / "runs/one" / name).is_file(), name
    told = outcome_of(done, "--dry-run").out
    assert f"{POSITIONS} tokens of a text are read" in told
    assert "classes in train: hardware" in told


def test_two_processes_learn_what_one_does(done):
    """To rounding: one process computes with all cores, each of two with its share of them."""
    one, two = (done[0] / f"runs/{name}/model.safetensors" for name in ("one", "tickets"))
    assert load_file(one).keys() == load_file(two).keys()
    for key, value in load_file(one).items():
        assert torch.allclose(value, load_file(two)[key], atol=1e-5), key


def test_the_pages_python_prints_what_scpl_predicts(done, monkeypatch, capsys):
    monkeypatch.chdir(done[0])
    (code,) = blocks("python")
    # The tiny network has room for fewer tokens than the one of the page.
    exec(compile(code.replace("max_length=256", f"max_length={POSITIONS}"), "page", "exec"), {})
    said = dict(re.findall(r"'(\w+)': ([\d.e-]+)", capsys.readouterr().out))
    predicted = outcome_of(done, "predict", "the printer is on fire").out.splitlines()
    label, probability = predicted[1].split(",")[2:4]
    assert float(said[label]) == pytest.approx(float(probability), abs=1e-5)


def test_early_exits_are_a_table(done):
    lines = outcome_of(done, "--exit-thresholds").out.splitlines()
    rows = lines[lines.index("exits:") + 2 :][:6]
    assert [float(row.split()[0]) for row in rows] == [0.5, 0.7, 0.8, 0.9, 0.95, 1.0]
    assert outcome_of(done, "--exit-threshold").out.splitlines()[0].endswith(",stages")


@pytest.mark.slow
def test_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "minilm")
    write_tables(tmp_path)
    (words,) = (words for words in commands() if words[:2] == ["scpl", "compare"])
    outcome = finish(fork(*words[1:]), timeout=300)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "runs/compare/report.html").is_file()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def end(process):
    """End a launcher, which ends its ranks."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.kill()


@pytest.mark.slow
def test_two_pcs(tmp_path):
    """Each has a folder of its own, and only the first one has the data."""
    pcs, port, started = [], str(free_port()), []
    for rank, words in enumerate(words for words in commands() if words[0] == "torchrun"):
        assert words[words.index("--node-rank") + 1] == str(rank)
        pcs.append(tmp_path / f"pc{rank}")
        write_bert(pcs[-1] / "minilm")
        place = {"HOST": "127.0.0.1", "29500": port}
        arguments = [place.get(word, word) for word in words[1:]]
        started.append([sys.executable, "-m", "torch.distributed.run", *arguments])
    write_tables(pcs[0])
    variables = environment(SCPL_CACHE="off", HF_HUB_OFFLINE="1")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with contextlib.ExitStack() as stack:
        processes = []
        for words, pc in zip(started, pcs, strict=True):
            process = subprocess.Popen(words, cwd=pc, env=variables, **streams)
            processes.append(stack.enter_context(process))
            stack.callback(end, process)
        said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (pc / "runs/two-pcs" for pc in pcs)
    assert not (first / "model.safetensors").exists()
    assert json.loads((second / "summary.json").read_text())["processes"] == 2
    shutil.copytree(second, tmp_path / "moved")
    with threads_kept():
        assert scpl("predict", tmp_path / "moved", "printer").status == 0
