"""Classifiers of ``transformers`` on the command line, from a folder to a folder."""

import csv
import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import scpl as library
from cli_runs import refused, scpl
from data_files import picture
from pretrained_files import POSITIONS, write_bert, write_vit
from processes import run_forked
from scpl.app.build import (
    build_loaders,
    build_method,
    build_partition,
    build_pipeline,
    freeze,
)
from scpl.app.config import TrainConfig
from scpl.data.text import Padding
from scpl.errors import InputError
from scpl.models.pretrained import config_text, load_pretrained
from scpl.partition.values import tensors_of
from text_files import tickets, write_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHORT = ["--epochs", "1", "--threads", "1", "--device", "cpu", "--quiet", "--stages", "2"]
COLUMNS = ["--text", "body", "--label", "queue", "--batch-size", "16"]
IMAGES = ["--limit-train", "100", "--batch-size", "20", *SHORT]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("SCPL_CACHE", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Networks, a table of texts, and finished runs; tests must not change them."""
    root = tmp_path_factory.mktemp("pretrained")
    write_bert(root / "bert")
    write_bert(root / "bare", weights=False)
    write_vit(root / "vit")
    write_table(root / "tickets.csv", tickets(80, longest=30))
    return root


@pytest.fixture(scope="module")
def run(root):
    """A run of the network for texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scpl.report.write_run_report", lambda folder: [])
        done = scpl("train", "--model", f"hf:{root / 'bert'}", *texts(root), "--out", root / "run")
    assert done.status == 0, done.err
    return root / "run"


def texts(root):
    return ["--data", root / "tickets.csv", *COLUMNS, *SHORT]


def assert_same_predictions(run, folder, max_tokens):
    """What scpl says of the run is what transformers says of a folder, to 1e-5."""
    sentences = ["the printer is on fire", "login", "my ticket please " * 20]
    done = scpl("predict", run, *sentences, "--json")
    assert done.status == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        sentences, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    with torch.no_grad():
        best = network(**batch).logits.softmax(1).max(1)
    labels = [network.config.id2label[index] for index in best.indices.tolist()]
    assert [row["label"] for row in found] == labels
    chances = [row["probability"] for row in found]
    assert chances == pytest.approx(best.values.tolist(), abs=1e-5)


def dry(*arguments):
    return scpl("train", *arguments, "--dry-run", "--json")


class TestTexts:
    def test_the_run_is_a_folder_that_transformers_loads(self, run):
        network = AutoModelForSequenceClassification.from_pretrained(run)
        weights = load_file(run / "model.safetensors")
        assert network.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[k]) for k, value in network.state_dict().items())
        assert network.config.id2label == {0: "hardware", 1: "software"}
        assert network.config.label2id == {"hardware": 0, "software": 1}

    def test_the_run_folder_names_its_defaults(self, run):
        """Other networks have others; who reads the folder must not have to know them."""
        kept = tomllib.loads((run / "config.toml").read_text())
        wanted = {
            "optimizer": "adamw", "lr": 1e-4, "head_lr": 1e-3, "schedule": "linear",
            "warmup": 0.1, "end_lr": 0.0, "weight_decay": 0.01, "exempt_norms": True,
            "clip_norm": 1.0, "max_tokens": POSITIONS, "epochs": 1, "batch_size": 16,
        }  # fmt: skip
        assert {name: kept[name] for name in wanted} == wanted

    def test_the_checkpoint_says_how_many_tokens_are_read(self, root, tmp_path):
        """A file of sentence-transformers gives less than the network has room for."""
        folder = shutil.copytree(root / "bert", tmp_path / "sentences")
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
        network = ["--model", f"hf:{folder}", *texts(root)]

        def noted(*more):
            notes = json.loads(dry(*network, *more).out)["notes"]
            return [note for note in notes if " tokens of a text are read" in note], notes

        (said,), notes = noted()
        assert said == (
            "12 tokens of a text are read (max_seq_length in sentence_bert_config.json; "
            "--max-tokens)"
        )
        assert any("% of the training texts have 12 tokens" in note for note in notes)
        assert noted("--max-tokens", "20")[0] == []
        (said,), _ = noted("--max-tokens", "1000")
        assert said.startswith(f"{POSITIONS} tokens of a text are read (max_position_embeddings;")
        (folder / "sentence_bert_config.json").write_text("[]")
        (said,), _ = noted()
        assert said.startswith(f"{POSITIONS} tokens")

    def test_dropout_is_that_of_the_checkpoint_and_on_in_training_alone(self, root):
        def stage(*arguments):
            config = TrainConfig.of(
                model=f"hf:{root / 'bert'}", data=str(root / "tickets.csv"), text=("body",),
                label=("queue",), stages=2, device="cpu", threads=1, model_args=arguments,
            )  # fmt: skip
            loaders = build_loaders(config)
            parts = build_partition(config, loaders.inputs, len(loaders.classes))
            pipeline = build_pipeline(config, parts, build_method(config.method), 10)
            return pipeline.stages[0], parts.form.arrange(next(iter(loaders.test))[0])

        def twice(first, batch):
            return [tensors_of(first.forward(batch))[0] for _ in range(2)]

        first, batch = stage()
        drawn = twice(first, batch)
        assert not torch.equal(*drawn)
        again, batch = stage()
        assert all(map(torch.equal, drawn, twice(again, batch)))  # of the seed alone
        evaluated = first.body.eval()
        first_time, second_time = (tensors_of(evaluated(batch))[0] for _ in range(2))
        assert torch.equal(first_time, second_time)
        off = ("hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
        assert torch.equal(*twice(*stage(*off)))

    def test_embeddings_are_frozen_by_what_they_are(self, root):
        """Whatever the network calls them: here bert.embeddings, with positions and a norm."""
        network = load_pretrained(str(root / "bert"), "text", 2, {}, lambda line: None)
        freeze(network, ["embeddings"])
        kept = {key for key, value in network.named_parameters() if not value.requires_grad}
        assert kept == {key for key in network.state_dict() if key.startswith("bert.embeddings.")}
        vit = load_pretrained(str(root / "vit"), "image", 2, {}, lambda line: None)
        freeze(vit, ["embeddings"])
        assert not vit.vit.embeddings.patch_embeddings.projection.weight.requires_grad
        sizes = {"vocab_size": 9, "n_positions": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        gpt = GPT2ForSequenceClassification(GPT2Config(**sizes))
        freeze(gpt, ["embeddings"])
        kept = {key for key, value in gpt.named_parameters() if not value.requires_grad}
        assert kept == {"transformer.wte.weight"}
        with pytest.raises(InputError, match="--freeze must be one of"):
            freeze(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["embeddings"])

    def test_frozen_embeddings_on_the_command_line(self, root, run, tmp_path):
        out = tmp_path / "frozen"
        done = scpl("train", "--model", f"hf:{root / 'bert'}", *texts(root), "--freeze",
                    "embeddings", "--out", out)  # fmt: skip
        assert done.status == 0, done.err
        before, after, free = (
            load_file(folder / "model.safetensors") for folder in (root / "bert", out, run)
        )
        name = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(after[name], before[name])
        assert not torch.equal(free[name], before[name])
        name = "bert.encoder.layer.0.output.dense.weight"
        assert not torch.equal(after[name], before[name])

    def test_what_is_new_and_what_is_left_out_is_named(self, run):
        log = (run / "log.txt").read_text()
        assert "New weights, which" in log
        assert "bert.pooler.dense.weight, classifier.bias, classifier.weight" in log
        assert "Left out, for no part of the classifier: cls.predictions.bias" in log
        assert f"{POSITIONS} tokens of a text are read" in log

    def test_it_predicts_what_transformers_predicts(self, run, tmp_path):
        assert_same_predictions(run, run, POSITIONS)
        assert scpl("export", run, "--to", tmp_path / "out").status == 0
        assert_same_predictions(run, tmp_path / "out", POSITIONS)

    def test_eval_finds_the_numbers_of_the_run(self, run):
        told = json.loads(scpl("eval", run, "--json").out)
        summary = json.loads((run / "summary.json").read_text())
        assert told["test_accuracy"] == summary["test_accuracy"]
        assert told["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)

    def test_early_exits(self, run):
        told = json.loads(scpl("eval", run, "--exit-threshold", "0.9", "--json").out)
        assert sum(told["exit_share"]) == pytest.approx(1)
        told = json.loads(scpl("eval", run, "--exit-thresholds", "0.1", "1", "--json").out)
        assert [row["stages_per_sample"] for row in told["exits"]] == [1.0, 2.0]
        assert told["exits"][0]["accuracy"] == told["exit_accuracy"][0]
        assert told["exits"][1]["accuracy"] == told["test_accuracy"]

    def test_export_gives_a_folder_for_transformers(self, run, tmp_path):
        done = scpl("export", run, "--to", tmp_path / "out")
        assert done.status == 0, done.err
        network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        weights = load_file(run / "model.safetensors")
        assert all(torch.equal(value, weights[k]) for k, value in network.state_dict().items())
        ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", run))
        assert ours("my printer")["input_ids"] == theirs("my printer")["input_ids"]
        refused(scpl("export", run, "--to", tmp_path / "out"), "must not exist yet", "--force")

    def test_a_program_takes_texts_of_any_number_and_length(self, run, tmp_path):
        path = tmp_path / "bert.pt2"
        done = scpl("export", run, "--to", path, "--format", "torch-export", "--json")
        assert json.loads(done.out)["largest_difference"] < 1e-4
        program = torch.export.load(path).module()
        for rows, length in ((1, 5), (9, POSITIONS)):
            ids = torch.ones(rows, length, dtype=torch.int64)
            types = torch.zeros_like(ids)
            logits = program(input_ids=ids, attention_mask=ids, token_type_ids=types)
            assert logits.shape == (rows, 2)

    def test_two_processes_give_the_same_bits(self, root, run, tmp_path):
        """Each loads the files, and all must draw the same new head."""
        network = f"hf:{root / 'bert'}"
        arguments = ["--model", network, *texts(root), "--out", tmp_path / "two"]
        done = run_forked(2, "-m", "scpl", "train", *arguments, timeout=100)
        assert done.returncode == 0, done.stderr
        one, two = (folder / "model.safetensors" for folder in (run, tmp_path / "two"))
        assert one.read_bytes() == two.read_bytes()

    def test_resuming(self, root, run):
        done = scpl("train", "--resume", run, "--json")
        assert json.loads(done.out)["model"] == f"hf:{root / 'bert'}"

    def test_a_method_with_its_own_read_out(self, root, tmp_path):
        """Its weights are not those of the network's class, so no folder says they are."""
        out = tmp_path / "al"
        done = scpl("train", "--model", f"hf:{root / 'bert'}", *texts(root), "--method", "al",
                    "--out", out)  # fmt: skip
        assert done.status == 0, done.err
        assert not (out / "config.json").exists()
        row = next(csv.DictReader(io.StringIO(scpl("predict", out, "printer").out)))
        assert row["label"] in ("hardware", "software")

    def test_a_folder_without_weights_starts_from_drawn_ones(self, root):
        notes, drawn = [], []
        for seed in (0, 0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = load_pretrained(str(root / "bare"), "text", 2, {}, notes.append)
            drawn.append(network.state_dict()["bert.encoder.layer.1.output.dense.weight"])
        assert (
            notes == [f"{root / 'bare'} holds no weights: the network starts from drawn ones"] * 3
        )
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_weights_of_half_precision(self, root, tmp_path):
        """Trained in float32, they were read back as bfloat16, for the configuration said so."""
        half = AutoModelForSequenceClassification.from_pretrained(root / "bert").bfloat16()
        half.save_pretrained(tmp_path / "half")
        network = load_pretrained(str(tmp_path / "half"), "text", 2, {}, lambda line: None)
        assert {value.dtype for value in network.state_dict().values()} <= {
            torch.float32,
            torch.int64,
        }
        assert json.loads(config_text(network, ["a", "b"]))["dtype"] == "float32"

    def test_settings_of_its_configuration(self, root):
        network = ["--model", f"hf:{root / 'bert'}", *texts(root)]
        done = dry(*network, "--model-args", "hidden_drop=0.5")
        refused(done, "Did you mean 'hidden_dropout_prob'?")
        done = dry(*network, "--model-args", "hidden_size=32")
        refused(done, "must fit its config.json", "--model-args")

    def test_refused(self, root, tmp_path):
        bert, data = f"hf:{root / 'bert'}", texts(root)
        refused(dry("--model", bert, *data, "--tokens", "subwords"), "--tokens must go with")
        refused(dry("--model", bert, "--data", "digits"), "a network for texts")
        refused(dry("--model", f"hf:{root / 'vit'}", *data), "a network for images")
        refused(dry("--model", f"hf:{tmp_path / 'none'}", *data), "a folder here, or a name")
        no_tokenizer = shutil.copytree(root / "bert", tmp_path / "no-tokenizer")
        for path in no_tokenizer.glob("tokenizer*"):
            path.unlink()
        # transformers makes one that knows nothing but its special tokens, and says nothing.
        refused(dry("--model", f"hf:{no_tokenizer}", *data), "a tokenizer with a vocabulary")

    def test_weights_of_another_network_are_refused(self, root, tmp_path):
        """Loaded anyway, every weight would be a drawn one, and nobody would know."""
        other = shutil.copytree(root / "bert", tmp_path / "other")
        save_file(
            {"something.weight": torch.zeros(3)}, other / "model.safetensors", {"format": "pt"}
        )
        refused(dry("--model", f"hf:{other}", *texts(root)), "None of its", "is there")

    def test_code_beside_the_weights_is_never_run(self, root, tmp_path):
        evil = shutil.copytree(root / "bert", tmp_path / "evil")
        config = json.loads((evil / "config.json").read_text())
        names = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
        config |= {"model_type": "strange", "auto_map": names}
        (evil / "config.json").write_text(json.dumps(config))
        (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        refused(dry("--model", f"hf:{evil}", *texts(root)), "that transformers can load")
        assert not (tmp_path / "ran").exists()


MINILM = os.environ.get("SCPL_MINILM")
"""The folder of all-MiniLM-L6-v2."""


@pytest.mark.skipif(MINILM is None, reason="SCPL_MINILM names no folder")
def test_a_network_that_was_really_trained_before(root, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    done = scpl("train", "--model", f"hf:{MINILM}", *texts(root), "--out", run)
    assert done.status == 0, done.err
    log = (run / "log.txt").read_text()
    assert "256 tokens of a text are read (max_seq_length in sentence_bert_config.json" in log
    assert json.loads((run / "summary.json").read_text())["test_accuracy"] > 0.9
    assert scpl("export", run, "--to", out).status == 0
    assert_same_predictions(run, out, 256)


class TestImages:
    def test_from_a_folder_to_a_folder(self, root, tmp_path):
        out = tmp_path / "run"
        done = scpl("train", "--model", f"hf:{root / 'vit'}", *IMAGES, "--out", out)
        assert done.status == 0, done.err
        log = (out / "log.txt").read_text()
        assert "classifier.bias, classifier.weight" in log  # of 5 classes; here there are 10
        about = json.loads((out / "model.json").read_text())
        assert (about["in_channels"], about["image_size"]) == (3, 16)
        assert (about["mean"], about["std"]) == ([0.5, 0.4, 0.3], [0.5, 0.4, 0.3])
        network = AutoModelForImageClassification.from_pretrained(out)
        weights = load_file(out / "model.safetensors")
        assert all(torch.equal(value, weights[k]) for k, value in network.state_dict().items())
        assert (out / "preprocessor_config.json").is_file()
        told = json.loads(scpl("eval", out, "--json").out)
        summary = json.loads((out / "summary.json").read_text())
        assert told["test_accuracy"] == summary["test_accuracy"]
        picture((20, 30), "L").save(tmp_path / "grey.png")
        assert scpl("predict", out, tmp_path / "grey.png").status == 0


def test_what_the_library_exports_is_the_users_class(root, tmp_path):
    network = AutoModelForSequenceClassification.from_pretrained(root / "bert", num_labels=2)
    batch = AutoTokenizer.from_pretrained(root / "bert")(
        ["my printer", "the login please"], padding=True, return_tensors="pt"
    )
    parts = library.split(network, before=["bert.encoder.layer.1"], example=batch)
    with library.Pipeline(parts, library.SCPL(), lambda p: torch.optim.SGD(p, lr=0.1)) as pipeline:
        pipeline.train([(dict(batch), torch.tensor([0, 1]))])
        exported = pipeline.export()
    assert type(exported) is type(network)
    exported.save_pretrained(tmp_path / "tuned")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    trained = network.state_dict()
    assert again.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in again.state_dict().items())


class TestPadding:
    def test_on_the_right_and_on_the_left(self):
        rows = [[5], [6, 7, 8]]
        right = Padding(9, parts=("input_ids", "attention_mask")).rows(rows)
        assert right["input_ids"].tolist() == [[5, 9, 9], [6, 7, 8]]
        assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
        left = Padding(9, left=True, parts=("input_ids", "attention_mask")).rows(rows)
        assert left["input_ids"].tolist() == [[9, 9, 5], [6, 7, 8]]
        assert left["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
