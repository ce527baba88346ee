"""Networks that a function of the user makes, from end to end."""

import csv
import io
import json
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cli_runs import refused, scpl
from text_files import tickets, write_table

NETS = '''
from pathlib import Path
from torch import nn

Path(__file__).with_name("was-run").touch()


class Images(nn.Module):
    """A skip over a layer, and logits in a mapping: no chain."""

    def __init__(self, num_classes, in_channels, width=8):
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        values = self.first(images).relu()
        values = values + self.norm(self.second(values)).relu()
        return {"logits": self.head(values.mean((2, 3)))}


class Texts(nn.Module):
    def __init__(self, num_classes, vocab_size, width=12):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=0)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens):
        mask = (tokens != 0).unsqueeze(2)
        values = self.embedding(tokens)
        values = values + self.first(values).tanh()
        values = values + self.second(values).tanh()
        return self.head((values * mask).sum(1) / mask.sum(1))


def build(num_classes, in_channels, **sizes):
    return Images(num_classes, in_channels, **sizes)


def seven(in_channels):
    return Images(7, in_channels)


def number():
    return 3


def broken(num_classes):
    raise RuntimeError("no such width")


constant = 3
'''
SHORT = ["--epochs", "1", "--threads", "1", "--device", "cpu", "--quiet", "--stages", "2"]
IMAGES = ["--limit-train", "100", "--batch-size", "20", *SHORT]
TEXTS = ["--text", "body", "--label", "queue", "--batch-size", "16", *SHORT]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with the user's module, in which the command runs."""
    monkeypatch.setenv("SCPL_CACHE", "off")
    monkeypatch.setattr("scpl.report.write_run_report", lambda folder: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the user's network of images; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scpl.report.write_run_report", lambda folder: [])
        patch.setattr(sys, "path", [path for path in sys.path if path])
        patch.chdir(folder)
        (folder / "nets.py").write_text(NETS)
        trained("--model", "nets:build", *IMAGES)
    forget()
    return folder / "run"


@pytest.fixture
def run(finished, here):
    """A copy of it where the command runs."""
    return shutil.copytree(finished, here / "run")


def trained(*arguments):
    done = scpl("train", *arguments, "--out", "run")
    assert done.status == 0, done.err


def forget():
    """Make sure that the module was not imported before."""
    sys.modules.pop("nets", None)


def test_images(here):
    trained("--model", "nets:build", "--model-args", "width=12", *IMAGES)
    assert load_file("run/model.safetensors")["first.weight"].shape == (12, 1, 3, 3)
    test = json.loads(scpl("eval", "run", "--model", "nets:build", "--json").out)
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert test["test_accuracy"] == summary["test_accuracy"]
    assert test["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_texts(here):
    write_table(here / "tickets.csv", tickets(80))
    trained("--model", "nets:Texts", "--data", "tickets.csv", *TEXTS)
    done = scpl("predict", "run", "printer login", "--model", "nets:Texts", "--top", "2")
    row = next(csv.DictReader(io.StringIO(done.out)))
    assert {row["label"], row["label2"]} == {"hardware", "software"}


def test_initial_weights_follow_from_the_seed():
    losses = [
        scpl("train", "--model", "nets:build", *IMAGES, "--dry-run", "--json", "--seed", seed).out
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_cuts_are_names_of_its_layers():
    cut = ["train", "--model", "nets:build", *IMAGES, "--dry-run"]
    assert "stage 1: second" in scpl(*cut, "--cuts", "second").out
    refused(scpl(*cut, "--cuts", "secnod"), "no layer 'secnod'", "did you mean 'second'?")


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "words"),
        [
            ("nots:build", ["a module nots", "in the folder that holds it"]),
            ("nets.inner:build", ["a module nets.inner"]),
            ("nets:biuld", ["function or class 'biuld'", "Did you mean 'build'?"]),
            ("nets:constant", ["'constant' is no function"]),
            ("nets:", ["package.module:function", "Got 'nets:'"]),
            ("nets:number", ["returned int", "a torch.nn.Module"]),
            ("nets:broken", ["RuntimeError: no such width", "nets.py, line", "num_classes=10"]),
            ("nets:seven", ["a logit for each of the 10 classes", "Got 7"]),
            ("nets:Texts", ["missing a required argument: 'vocab_size'", "--model-args"]),
            ("timm:resnet18", ["needs the package 'timm'"]),
        ],
    )
    def test_a_network_that_cannot_be_made(self, model, words):
        refused(scpl("train", "--model", model, *IMAGES, "--dry-run"), *words)

    def test_a_module_that_cannot_be_imported_says_where(self, here):
        (here / "fault.py").write_text("import nets\n\nprint(1 / 0)\n")
        done = scpl("train", "--model", "fault:build", *IMAGES, "--dry-run")
        refused(done, "ZeroDivisionError", "fault.py, line 3", "import fault")

    def test_arguments(self):
        command = ["train", *IMAGES, "--dry-run", "--model"]
        refused(scpl(*command, "nets:build", "--model-args", "width"), "as in width=32")
        refused(scpl(*command, "nets:Images", "--model-args", "wdith=3"), "width=8", "'wdith'")
        refused(scpl(*command, "mlp", "--model-args", "width=3"), "of your own", "--model mlp")

    def test_flags_of_our_networks(self):
        done = scpl("train", "--model", "nets:build", *IMAGES, "--width", "2", "--dry-run")
        refused(done, "--width must go with a network that comes with scpl", "--model-args")


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "run"],
        ["eval", "run", "--probe"],
        ["predict", "run", "picture.png"],
        ["export", "run", "--to", "weights.safetensors"],
        ["train", "--resume", "run"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_run_folder_does_not_run_code(here, run, command):
    """A folder may come from someone else; importing its module would be enough to do harm."""
    refused(scpl(*command), "named by you", "--model nets:build")
    refused(scpl(*command, "--model", "other:build"), "other:build")
    assert not (here / "was-run").exists()
    if command[0] != "predict":
        done = scpl(*command, "--model", "nets:build")
        assert done.status == 0, done.err


def test_a_description_that_hides_the_code_in_its_recipe(here):
    """A method with a readout of its own builds the network that the recipe names."""
    trained("--model", "mlp", "--method", "al", *IMAGES)
    path = here / "run" / "model.json"
    description = json.loads(path.read_text())
    description["recipe"]["model"] = "nets:build"
    path.write_text(json.dumps(description))
    forget()
    refused(scpl("eval", "run"), "named by you")
    assert not (here / "was-run").exists()


class TestExport:
    def test_weights(self, run):
        done = scpl("export", "run", "--to", "a.safetensors", "--model", "nets:build")
        assert done.status == 0, done.err
        import nets

        network = nets.build(10, 1)
        network.load_state_dict(load_file("a.safetensors"))

    def test_a_program_takes_any_number_of_rows(self, run):
        done = scpl("export", "run", "--to", "a.pt2", "--format", "torch-export", "--model",
                    "nets:build", "--json")  # fmt: skip
        told = json.loads(done.out)
        assert told["checked"] == "batches of 5 and 1 rows, test data of digits"
        assert told["largest_difference"] < 1e-4
        program = torch.export.load("a.pt2").module()
        assert program(torch.zeros(17, 1, 16, 16)).shape == (17, 10)

    def test_a_network_that_is_bound_to_its_batch_size_is_refused(self, here, run):
        forward = "\n\nImages.forward = lambda self, x: self.head(self.first(x).view(3, -1)[:, :8])"
        (here / "nets.py").write_text(NETS + forward)
        done = scpl("export", "run", "--to", "a.pt2", "--format", "torch-export", "--model",
                    "nets:build")  # fmt: skip
        refused(done, "for any batch size")
        assert not (here / "a.pt2").exists()

    def test_without_the_packages_of_onnx(self, monkeypatch):
        trained("--model", "mlp", *IMAGES)
        monkeypatch.setitem(sys.modules, "onnx", None)
        done = scpl("export", "run", "--to", "a.onnx", "--format", "onnx")
        refused(done, "'onnx' and 'onnxscript'", "--format torch-export")


def test_timm_makes_networks_by_name(monkeypatch):
    """It need not be installed here: what matters is what it is asked for."""
    asked = {}

    def create_model(name, **arguments):
        if name != "resnet9":
            raise RuntimeError(f"Unknown model ({name})")
        asked.update(arguments)
        return nn.Sequential(
            nn.Conv2d(arguments["in_chans"], 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
            nn.Linear(4 * 144, arguments["num_classes"]),
        )  # fmt: skip

    fake = types.SimpleNamespace(create_model=create_model, list_models=lambda: ["resnet9", "vit"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    trained("--model", "timm:resnet9", "--model-args", "drop_rate=0.1", *IMAGES)
    assert asked == {"num_classes": 10, "in_chans": 1, "drop_rate": 0.1}
    refused(scpl("train", "--model", "timm:resent9", *IMAGES, "--dry-run"), "mean 'resnet9'?")
