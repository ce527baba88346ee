"""Labels, numbers and unbalanced classes, from a table to predictions and reports."""

import csv
import io
import json
import random

import pytest
import torch

from cli_runs import finish, fork, refused, scpl
from pretrained_files import write_bert
from scpl.tasks import MultiLabel, Regression
from text_files import TOPICS, write_table

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(120)

SHORT = [
    "--text", "body", "--epochs", "2", "--batch-size", "8", "--threads", "1", "--device", "cpu",
    "--stages", "2", "--lr", "0.002",
]  # fmt: skip
KINDS = {
    "labels": ["--task", "multi-label", "--label", "topics"],
    "columns": ["--task", "multi-label", "--label", *TOPICS, "--class-weights", "balanced"],
    "numbers": ["--task", "regression", "--label", "hours", "cost"],
    "sampled": ["--label", "first", "--sampling", "balanced"],
    "weighted": ["--label", "first", "--class-weights", "balanced"],
}


def rows(count=80):
    draws, found = random.Random(3), []
    for number in range(count):
        topics = [name for name in TOPICS if draws.random() < 0.5]
        words = [w for name in topics for w in draws.choices(TOPICS[name].split(), k=3)]
        draws.shuffle(words)
        found.append(
            {
                "body": f"{' '.join(words)} number {number}",
                "topics": json.dumps(topics) if number % 2 else ";".join(topics) or "[]",
                "hours": 2 * len(topics) + draws.random() if number % 20 else "",
                "cost": 1000 * ("hardware" in topics) - 500,
                "first": topics[0] if topics else "none",
                **{name: int(name in topics) for name in TOPICS},
            }
        )
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    write_bert(root / "bert")
    write_table(root / "t.csv", rows())
    return root


@pytest.fixture(scope="module")
def run(root):
    """Finished runs of each kind, made when they are asked for; tests must not change them."""

    def made(kind):
        out = root / kind
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SCPL_CACHE", "off")
                if kind not in ("labels", "numbers"):
                    patch.setattr("scpl.report.write_run_report", lambda folder: [])
                done = scpl("train", *given(root, kind), "--out", out)
            assert done.status == 0, done.err
        return out

    return made


def given(root, kind):
    return ["--model", f"hf:{root / 'bert'}", "--data", root / "t.csv", *SHORT, *KINDS[kind]]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def outputs_of(folder, sentences):
    """What transformers makes of a folder."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        return network(**batch).logits, network.config


METRICS = {
    "labels": MultiLabel.metrics, "columns": MultiLabel.metrics, "numbers": Regression.metrics,
    "sampled": ("accuracy", "macro_f1"), "weighted": ("accuracy", "macro_f1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_in_every_file_and_eval_finds_them_again(run, kind):
    folder, names = run(kind), METRICS[kind]
    found = summary(folder)
    assert found["metric"] == names[0]
    with (folder / "metrics.csv").open(newline="") as file:
        (*_, last) = csv.DictReader(file)
    assert all(float(last[f"valid_{name}"]) == found[f"valid_{name}"] for name in names)
    assert f"valid_{names[0]}_stage0" in last
    told = json.loads(scpl("eval", folder, "--json").out)
    for name in names:
        assert told[f"test_{name}"] == pytest.approx(found[f"test_{name}"], abs=1e-5)
    assert told["test_loss"] == pytest.approx(found["test_loss"], rel=1e-4)
    assert told["task"] == found["task"]


def test_the_log_says_what_is_learnt_and_weighed(run):
    said = {kind: (run(kind) / "log.txt").read_text() for kind in KINDS}
    assert "labels in train: " in said["labels"]
    assert "% of the texts have none" in said["labels"]
    assert "valid macro F1 " in said["labels"]
    assert "Weights of the loss by label: " in said["columns"]
    assert "numbers in train: hours " in said["numbers"]
    assert "rows without a label left out: 4 (first: t.csv row 1)" in said["numbers"]
    assert "valid R² " in said["numbers"]
    assert "Weights of the loss by class: " in said["weighted"]
    assert "Every epoch draws equally often from each class" in said["sampled"]


def test_labels_are_predicted_as_transformers_predicts_them(run):
    sentences = ["printer screen login", "hotel", "nothing"]
    done = scpl("predict", run("labels"), *sentences, "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    logits, config = outputs_of(run("labels"), sentences)
    assert config.problem_type == "multi_label_classification"
    assert sorted(config.id2label.values()) == sorted(TOPICS)
    for row, chances in zip(found, logits.sigmoid().tolist(), strict=True):
        there = {config.id2label[i]: c for i, c in enumerate(chances) if c > 0.5}
        assert dict(zip(row["labels"], row["probabilities"], strict=True)) == pytest.approx(
            there, abs=1e-5
        )
    table = list(csv.DictReader(io.StringIO(scpl("predict", run("labels"), *sentences).out)))
    assert [row["labels"] for row in table] == [";".join(row["labels"]) for row in found]
    assert list(table[0]) == ["source", "row", "labels", "probabilities"]
    refused(scpl("predict", run("labels"), "x", "--top", "2"), "--top is for classes", "labels")


def test_numbers_come_in_the_units_of_the_table(run, tmp_path):
    sentences = ["printer screen login", "hotel", "nothing"]
    done = scpl("predict", run("numbers"), *sentences, "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    values = [[row["hours"], row["cost"]] for row in found]
    # The run's own folder holds what was trained, and the scale beside it.
    logits, config = outputs_of(run("numbers"), sentences)
    assert config.problem_type == "regression"
    scale, shift = torch.tensor(config.target_std), torch.tensor(config.target_mean)
    torch.testing.assert_close(logits * scale + shift, torch.tensor(values), rtol=1e-4, atol=1e-3)
    # The exported one has it in its last layer.
    done = scpl("export", run("numbers"), "--to", tmp_path / "out", "--json")
    told = json.loads(done.out)
    assert told["outputs"] == "numbers in the units of the data; classifier holds their scale"
    logits, config = outputs_of(tmp_path / "out", sentences)
    assert not hasattr(config, "target_mean")
    assert config.id2label == {0: "hours", 1: "cost"}
    torch.testing.assert_close(logits, torch.tensor(values), rtol=1e-4, atol=1e-3)


def test_a_program_gives_numbers_in_their_units(run, tmp_path):
    done = scpl("export", run("numbers"), "--to", tmp_path / "p.pt2", "--format", "torch-export")
    assert done.status == 0, done.err
    program = torch.export.load(tmp_path / "p.pt2").module()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run("numbers"))
    found = program(**tokenizer(["printer screen", "hotel taxi"], return_tensors="pt"))
    done = scpl("predict", run("numbers"), "printer screen", "hotel taxi", "--json")
    values = [[row["hours"], row["cost"]] for row in map(json.loads, done.out.splitlines())]
    torch.testing.assert_close(found, torch.tensor(values), rtol=1e-4, atol=1e-3)


def test_an_export_of_labels_is_the_run(run, tmp_path):
    done = scpl("export", run("labels"), "--to", tmp_path / "out")
    assert done.status == 0, done.err
    (here, _), (there, _) = (outputs_of(f, ["login"]) for f in (run("labels"), tmp_path / "out"))
    assert torch.equal(here, there)


def test_early_exits_where_predictions_say_how_sure_they_are(run):
    def told(threshold):
        done = scpl("eval", run("labels"), "--exit-threshold", threshold, "--json")
        return json.loads(done.out)

    assert told(0.5)["exit_share"] == [1, 0]  # a label is there or not
    sure = told(0.99)
    assert sure["exit_share"][1] > 0.9
    assert sure["test_macro_f1"] == pytest.approx(summary(run("labels"))["test_macro_f1"], abs=0.1)
    refused(
        scpl("eval", run("numbers"), "--exit-threshold", "0.6"),
        "predictions must say how sure they are", "Got a network for regression", "Leave",
    )  # fmt: skip
    refused(scpl("eval", run("numbers"), "--probe"), "for runs on classes", "regression")


def test_eval_on_another_table(run, tmp_path):
    write_table(tmp_path / "other.csv", rows(30)[10:])
    for kind in ("labels", "numbers"):
        told = json.loads(scpl("eval", run(kind), "--data", tmp_path / "other.csv", "--json").out)
        assert f"test_{METRICS[kind][0]}" in told
    strange = [{**row, "topics": "weather"} for row in rows(5)]
    write_table(tmp_path / "strange.csv", strange)
    refused(
        scpl("eval", run("labels"), "--data", tmp_path / "strange.csv"),
        "must be a class that is learnt", "'weather'",
    )  # fmt: skip


def test_reports_show_the_main_metric(run):
    page = (run("numbers") / "report.html").read_text()
    assert "Validation R² per epoch" in page
    assert "Test mean absolute error" in page
    assert "Test accuracy" not in page
    assert "alidation accuracy" not in page
    page = (run("labels") / "report.html").read_text()
    assert "Test macro F1" in page
    assert "validation macro F1 of its read-out" in page


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_comparison_measures_the_main_metric(root, tmp_path):
    out = tmp_path / "compare"
    process = fork(
        "compare", "--methods", "scpl,bp,predsim", *given(root, "numbers"), "--out", out, "--json"
    )
    done = finish(process, timeout=300)
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert [result["metric"] for result in told["results"]] == ["r2", "r2"]
    assert told["results"][0]["test_spearman"]["n"] == 1
    assert set(told["target"]) == {"r2", "origin"}
    assert "predsim learns classes" in told["not_runnable"]["predsim"]
    assert "test R²" in done.err
    assert "test accuracy" not in done.err
    assert "R² against wall-clock time" in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["numbers", "sampled"])  # all kinds go one way
def test_two_processes_and_a_resumed_run_give_the_same_bits(root, run, tmp_path, kind):
    out = tmp_path / "two"
    done = finish(fork("train", *given(root, kind), "--processes", "2", "--out", out), timeout=300)
    assert done.status == 0, done.err
    expected, found = (summary(folder) for folder in (run(kind), out))
    for name in METRICS[kind]:
        assert found[f"test_{name}"] == expected[f"test_{name}"]
    assert (out / "model.safetensors").read_bytes() == (
        run(kind) / "model.safetensors"
    ).read_bytes()
    assert (out / "model.json").read_bytes() == (run(kind) / "model.json").read_bytes()
    for file in ("summary.json", "model.safetensors"):
        (out / file).unlink()
    newest = max((out / "checkpoints").glob("step-*"))
    for part in newest.iterdir():  # so that it goes on from the end of the first epoch
        part.unlink()
    newest.rmdir()
    done = finish(fork("train", "--resume", out), timeout=300)
    assert done.status == 0, done.err
    assert (out / "model.safetensors").read_bytes() == (
        run(kind) / "model.safetensors"
    ).read_bytes()
    assert {k: v for k, v in summary(out).items() if "test_" in k} == {
        k: v for k, v in expected.items() if "test_" in k
    }


def test_images_can_be_balanced():
    arguments = [
        "train",
        "--data",
        "digits",
        "--model",
        "mlp",
        "--limit-train",
        "100",
        "--threads",
        "1",
    ]
    for more, word in (
        (["--sampling", "balanced"], "Every epoch draws equally often"),
        (["--class-weights", "balanced"], "Weights of the loss by class"),
    ):
        done = scpl(*arguments, *more, "--dry-run", "--json")
        assert done.status == 0, done.err
        assert any(word in note for note in json.loads(done.out)["notes"])


def test_what_cannot_be_is_refused(root):
    data = [
        "train",
        "--data",
        root / "t.csv",
        "--text",
        "body",
        "--model",
        "lstm",
        "--dry-run",
        "--threads",
        "1",
    ]
    for arguments, words in (
        (["--task", "regression", "--label", "cost", "--sampling", "balanced"],
         ["--sampling balanced is for classes and labels", "--task regression"]),
        (["--task", "regression", "--label", "cost", "--label-smoothing", "0.1"],
         ["--label-smoothing 0.1 is for classes and labels", "--task regression"]),
        (["--label", "first", "--sampling", "balanced", "--class-weights", "balanced"],
         ["made up for once", "Leave one of them out"]),
        (["--label", "first", "topics"], ["A class must stand in one column", "multi-label"]),
        (["--task", "multi-label", "--label", "hardware"], ["one for each label", "Name the"]),
        (["--task", "multi-label", "--label", "hardware", "cost"],
         ["must hold 0 or 1", "Got '500'", "column 'cost', t.csv row"]),
        (["--task", "regression", "--label", "first"],
         ["must be a finite number", "column 'first', t.csv row 1"]),
        (["--task", "regression", "--label", "cost", "--method", "predsim"],
         ["predsim learns classes", "Got a network for regression"]),
    ):  # fmt: skip
        refused(scpl(*data, *arguments), *words)
    refused(
        scpl("train", "--data", "digits", "--task", "regression", "--dry-run", "--threads", "1"),
        "--task must go with a data set of texts",
    )
