import base64
import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blank_pictures import BLANK
from data_files import picture, write_folder
from made_runs import made_run
from scpl import models
from scpl.app.cli import run as cli
from scpl.app.commands import EvalConfig, ExportConfig, PredictConfig
from scpl.app.config import TrainConfig
from scpl.app.evaluate import evaluate
from scpl.app.exits import exits
from scpl.app.export import export
from scpl.app.network import load_exits, load_network
from scpl.app.predict import predict
from scpl.app.train.run import train
from scpl.data import images as data
from scpl.data.images import normalise
from scpl.errors import CheckpointError, DataError, InputError
from scpl.runs import RunFolder

BATCH = 100
EVAL_KEYS = [
    "method", "data", "model", "stages", "processes", "epochs", "weights_epoch", "seed", "task",
    "metric", "test_accuracy", "test_macro_f1", "test_accuracy_interval", "test_loss",
    "samples_per_second", "wall_seconds", "peak_memory_bytes", "run", "table", "confusion",
    "calibration", "mistakes",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs by name, trained when they are first asked for; tests must not change them."""
    root, trained = tmp_path_factory.mktemp("runs"), {}

    def get(method="scpl", **settings):
        key = "-".join([method, *map(str, settings.values())])
        if key not in trained:
            shared = {"epochs": 1, "limit_train": 300, "batch_size": BATCH, "image_size": 8}
            settings = {**shared, "lr": 1e-3, "warmup": 0.0, **settings}
            config = TrainConfig.of(
                method=method, threads=1, device="cpu", out=root / key, quiet=True, **settings
            )
            trained[key] = train(config)
        return root / key, trained[key]

    return get


@pytest.fixture
def copy(runs, tmp_path):
    """A finished run to damage."""
    return shutil.copytree(runs()[0], tmp_path / "copy")


def rows_of(run, *inputs, **settings):
    out = io.StringIO()
    predict(PredictConfig(run, tuple(inputs), **settings), out)
    if settings.get("json"):
        return [json.loads(line) for line in out.getvalue().splitlines()]
    return list(csv.DictReader(io.StringIO(out.getvalue())))


class TestLoad:
    def test_it_is_the_trained_network_in_eval_mode(self, runs):
        path, _ = runs()
        network, description = load_network(RunFolder.open(path))
        assert not network.training
        assert description["classes"] == [str(i) for i in range(10)]
        for name, value in load_file(path / "model.safetensors").items():
            assert torch.equal(network.state_dict()[name], value)

    def test_the_random_state_is_left_alone(self, runs):
        before = torch.get_rng_state()
        load_network(RunFolder(runs()[0]))
        assert torch.equal(torch.get_rng_state(), before)

    def test_an_unfinished_run_says_how_to_finish_it(self, copy):
        (copy / "model.safetensors").unlink()
        (copy / "summary.json").unlink()
        with pytest.raises(CheckpointError, match=r"not finished.*scpl train --resume \S*copy"):
            load_network(RunFolder(copy))

    def test_lost_weights_are_not_called_unfinished(self, copy):
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"lost its model.safetensors.*Train it again"):
            load_network(RunFolder(copy))

    def test_no_run_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"must hold config\.toml"):
            evaluate(EvalConfig(tmp_path / "none"))

    @pytest.mark.parametrize("length", [0, 5, 1000, -1])
    def test_truncated_weights(self, copy, length):
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])
        one_sentence(copy, "must be intact.*Copy the files")

    def test_weights_that_are_something_else(self, copy):
        (copy / "model.safetensors").write_bytes(b"PK\3\4 this is no such file " * 100)
        one_sentence(copy, "must be intact")

    def test_keys_of_another_network(self, copy):
        save_file(models.build("mlp", num_classes=10).state_dict(), copy / "model.safetensors")
        one_sentence(copy, "those of the network that is described.*Missing key.*block1")

    def test_shapes_of_another_network(self, copy):
        other = models.build("small-cnn", num_classes=7, in_channels=1, image_size=8)
        save_file(other.state_dict(), copy / "model.safetensors")
        one_sentence(copy, r"size mismatch for classifier.weight")

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "no-such-network"},
            {"num_classes": "ten"},
            {"num_classes": 9},
            {"mean": []},
            {"std": None},
            {"image_size": None},
            {"width": 2},
            {"width": "wide"},
            {"classes": 10},
        ],
        ids=str,
    )
    def test_a_wrong_description(self, copy, change):
        path = copy / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        one_sentence(copy, "must be intact")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
    def test_a_damaged_description(self, copy, text):
        (copy / "model.json").write_text(text)
        one_sentence(copy, "model.json")


def one_sentence(run, message):
    """Loading fails with a message that matches, on one line, and not endless."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(RunFolder(run))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


class TestEvaluate:
    @pytest.mark.parametrize("method", ["scpl", "early-exit", "al", "bp"])
    def test_it_gives_the_number_of_the_run_again(self, runs, method):
        path, summary = runs(method)
        result = evaluate(EvalConfig(path, batch_size=BATCH))
        assert result["test_accuracy"] == summary["test_accuracy"]
        assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-12)
        for name in ("method", "data", "model", "stages", "processes", "epochs", "seed", "run"):
            assert result[name] == summary[name], name

    def test_mixed_precision_is_that_of_the_run(self, runs):
        path, summary = runs("bp", precision="bfloat16")
        result = evaluate(EvalConfig(path, batch_size=BATCH))
        assert result["test_accuracy"] == summary["test_accuracy"]
        assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-12)

    def test_another_batch_size_changes_next_to_nothing(self, runs):
        path, summary = runs()
        result = evaluate(EvalConfig(path, batch_size=37))
        assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)

    def test_a_network_of_another_width_is_rebuilt(self, runs):
        path, summary = runs(width=0.5, head="conv", cross_entropy=0.5)
        network, description = load_network(RunFolder(path))
        assert description["width"] == 0.5
        assert network.block1[0].out_channels == 4
        assert evaluate(EvalConfig(path, batch_size=BATCH))["test_loss"] == pytest.approx(
            summary["test_loss"], rel=1e-12
        )

    def test_it_needs_no_summary(self, runs, copy):
        (copy / "summary.json").unlink()
        assert evaluate(EvalConfig(copy))["stages"] == 4

    def test_keys_and_units(self, runs):
        result = evaluate(EvalConfig(runs()[0]))
        assert list(result) == EVAL_KEYS
        assert result["samples_per_second"] > 0
        assert 0 < result["wall_seconds"] < 60
        assert result["peak_memory_bytes"][0] > 1 << 20
        json.dumps(result)

    def test_it_finds_the_mistakes_that_the_run_wrote_down(self, runs):
        """The same table, confusions and samples, in the same order; the run has pictures, too."""
        path, _ = runs()
        result, kept = evaluate(EvalConfig(path)), json.loads((path / "test.json").read_text())
        assert {key: result[key] for key in ("table", "confusion")} == {
            key: kept[key] for key in ("table", "confusion")
        }
        right = sum(row[i] for i, row in enumerate(result["confusion"]))
        count = sum(map(sum, result["confusion"]))
        assert result["test_accuracy"] == right / count
        low, high = result["test_accuracy_interval"]
        assert low < right / count < high
        pictures = [row.pop("picture") for row in kept["mistakes"]]
        assert kept["mistakes"] == result["mistakes"] != []
        test = data.load("digits", image_size=8).test
        for row, shown in zip(kept["mistakes"], pictures, strict=True):
            number = int(row["sample"].removeprefix("image ").partition(" of ")[0]) - 1
            assert row["true"] == str(int(test.labels[number]))
            pixels = Image.open(io.BytesIO(base64.b64decode(shown)))
            assert list(pixels.tobytes()) == test.images[number].flatten().tolist()
        header, *lines = (path / "test.csv").read_text().splitlines()
        assert header == "class,samples,predicted,right,precision,recall,f1"
        assert len(lines) == 10

    def test_other_data_is_brought_to_the_size_of_the_network(self, tmp_path):
        made_run(tmp_path / "run", size=16, classes="abc")
        for part in ("train", "test"):
            write_folder(tmp_path / "own" / part, classes="abc", n=2, size=(20, 30))
        result = evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / "own")))
        assert result["data"] == str(tmp_path / "own")
        assert result["test_accuracy"] in [i / 6 for i in range(7)]

    def test_values_are_read_by_the_white_of_the_run(self, tmp_path, capsys):
        """An image means the same in training, evaluation and prediction: upright, on white, deep.

        Alone, each of these has 10 bits; the network learnt from 12.
        """
        _, description = made_run(tmp_path / "run", channels=1, classes="abc")
        description["white"] = [4095, 1.0]
        (tmp_path / "run" / "model.json").write_text(json.dumps(description))
        for value, own in ((900, "deep"), (56, "eight")):  # 255 * 900 / 4095
            pixels = np.full((16, 16), value, np.uint16 if own == "deep" else np.uint8)
            for name in "abc":
                (tmp_path / own / name).mkdir(parents=True)
                for number in range(3):
                    Image.fromarray(pixels).save(tmp_path / own / name / f"{number}.png")
        found = [evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / own)))["test_loss"]
                 for own in ("deep", "eight")]  # fmt: skip
        assert found[0] == found[1]
        one, other = (rows_of(tmp_path / "run", str(tmp_path / own / "a" / "0.png"))[0]
                      for own in ("deep", "eight"))  # fmt: skip
        assert one["probability"] == other["probability"]
        Image.fromarray(np.full((16, 16), 5000, np.uint16)).save(tmp_path / "beyond.png")
        with pytest.raises(DataError, match="1 of 1 were not"):
            rows_of(tmp_path / "run", str(tmp_path / "beyond.png"))
        assert (
            "5,000 .. 5,000, must lie within black, 0, and white, 4,095" in capsys.readouterr().err
        )
        description["white"] = [4095, "1"]
        (tmp_path / "run" / "model.json").write_text(json.dumps(description))
        with pytest.raises(CheckpointError):
            evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / "deep")))

    @pytest.mark.parametrize(("has", "wants"), [("L", 3), ("RGB", 1)])
    def test_grey_and_colour_are_converted_as_predict_does(self, tmp_path, capsys, has, wants):
        """Grey pictures were refused for a colour run, and predicted of all the same."""
        made_run(tmp_path / "run", channels=wants, num_classes=2, classes=("cat", "dog"))
        write_folder(tmp_path / "own", n=3, size=(16, 16), mode=has)
        result = evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / "own")))
        assert f"test: 6 images of {tmp_path}/own" in capsys.readouterr().err
        rows = rows_of(tmp_path / "run", str(tmp_path / "own"))
        right = sum(row["label"] in row["path"].split("/") for row in rows)
        assert result["test_accuracy"] == pytest.approx(right / 6)

    def test_a_part_of_the_classes_is_matched_by_name(self, tmp_path, capsys):
        """By number, the red pictures of a folder of red alone were taken for green ones."""
        made_run(tmp_path / "run", num_classes=2, classes=("green", "red"))
        write_folder(tmp_path / "own", classes=("red",), n=4, size=(16, 16))
        result = evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / "own")))
        predicted = [row["label"] for row in rows_of(tmp_path / "run", str(tmp_path / "own"))]
        assert result["test_accuracy"] == predicted.count("red") / 4
        assert "no test image of green" in capsys.readouterr().err
        (tmp_path / "own" / "red").rename(tmp_path / "own" / "zebra")
        with pytest.raises(DataError, match=r"learnt: green, red\. Got also 'zebra'"):
            evaluate(EvalConfig(tmp_path / "run", data=str(tmp_path / "own")))

    def test_data_of_another_size_are_brought_to_that_of_the_network(self, tmp_path):
        digits = {"num_classes": 10, "classes": "0123456789", "data": "digits"}
        made_run(tmp_path / "run", channels=1, **digits)
        assert 0 <= evaluate(EvalConfig(tmp_path / "run"))["test_accuracy"] <= 1

    def test_data_of_other_classes(self, tmp_path):
        made_run(tmp_path / "run", channels=1)
        with pytest.raises(DataError, match=r"learnt: class 0, class 1, class 2\. Got also '0'"):
            evaluate(EvalConfig(tmp_path / "run", data="digits"))

    def test_a_moved_run_says_where_its_data_was_looked_for(self, tmp_path, monkeypatch):
        made_run(tmp_path / "run", data="photos")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=rf"nothing at {tmp_path}/photos.*--data"):
            evaluate(EvalConfig(tmp_path / "run"))

    def test_missing_data(self, tmp_path):
        made_run(tmp_path / "run", data=str(tmp_path / "gone"))
        with pytest.raises(InputError, match="gone"):
            evaluate(EvalConfig(tmp_path / "run"))

    def test_the_command(self, runs, capsys):
        path, summary = runs()
        assert cli(["eval", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["test_accuracy"] == summary["test_accuracy"]
        assert cli(["eval", str(path.parent)]) == 2
        assert "Traceback" not in capsys.readouterr().err


class TestEarlyExits:
    @pytest.mark.parametrize("method", ["early-exit", "al"])
    def test_the_numbers_are_those_of_the_network_with_exits(self, runs, method):
        """Threshold, shares and accuracy, from all logits of all exits."""
        path, _ = runs(method)
        network, description = load_exits(RunFolder(path))
        source = data.load("digits")
        mean, std = tuple(description["mean"]), tuple(description["std"])
        features, target = normalise(source.test.images, mean, std), source.test.labels
        logits = []
        with torch.no_grad():
            for body, reader in zip(network._bodies, network._exits, strict=True):
                features = body(features)
                logits.append(reader(features))
        sure = torch.stack([part.softmax(1).amax(1) for part in logits])
        threshold = float(sure[0].median())  # so that about half leave at the first stage
        sure[-1] = 1.0
        stages = (sure >= threshold).int().argmax(0)
        answers = torch.stack(logits).argmax(2)[stages, torch.arange(len(target))]

        result = evaluate(EvalConfig(path, exit_threshold=threshold))
        shares = [float((stages == stage).float().mean()) for stage in range(4)]
        assert result["exit_share"] == pytest.approx(shares, abs=2 / len(target))
        assert 0.4 < result["exit_share"][0] < 0.6
        run = sum(share * number for number, share in enumerate(result["exit_share"], start=1))
        assert result["stages_per_sample"] == pytest.approx(run)
        assert result["stages_saved"] == pytest.approx(1 - run / 4)
        expected = float((answers == target).float().mean())
        assert result["test_accuracy"] == pytest.approx(expected, abs=2 / len(target))
        assert torch.equal(logits[-1].argmax(1), network(normalise(
            source.test.images, mean, std)).argmax(1))  # fmt: skip
        assert [key for key in result if key not in EVAL_KEYS] == [
            "exit_threshold", "exit_share", "stages_per_sample", "stages_saved"
        ]  # fmt: skip

    @pytest.mark.parametrize("method", ["early-exit", "al"])
    def test_at_threshold_one_almost_all_go_to_the_end(self, runs, method):
        path, summary = runs(method)
        result = evaluate(EvalConfig(path, exit_threshold=1.0, batch_size=BATCH))
        assert result["exit_share"] == [0.0, 0.0, 0.0, 1.0]
        assert result["test_accuracy"] == summary["test_accuracy"]
        assert result["stages_saved"] == 0.0

    def test_the_command(self, runs, capsys):
        path, _ = runs("early-exit")
        assert cli(["eval", str(path), "--exit-threshold", "0.2"]) == 0
        assert "stages_saved" in capsys.readouterr().out
        assert cli(["eval", str(path), "--exit-threshold", "2"]) == 2
        assert "a probability, above 0 and at most 1" in capsys.readouterr().err

    def test_several_thresholds_in_one_pass_are_what_each_of_them_comes_to(self, runs):
        path, summary = runs("early-exit")
        network, description = load_exits(RunFolder(path))
        images = normalise(data.load("digits").test.images, tuple(description["mean"]),
                           tuple(description["std"]))  # fmt: skip
        with torch.no_grad():
            sure = network.every_exit(images)[0].softmax(1).amax(1)
        low, high = (float(sure.quantile(share)) for share in (0.3, 0.7))
        found = exits(EvalConfig(path, exit_thresholds=(1.0, low, high)))
        assert [row["threshold"] for row in found["exits"]] == [low, high, 1.0]
        for row in found["exits"]:
            alone = evaluate(EvalConfig(path, exit_threshold=row["threshold"]))
            assert row["accuracy"] == pytest.approx(alone["test_accuracy"], abs=2 / 300)
            assert row["exit_share"] == pytest.approx(alone["exit_share"], abs=2 / 300)
            assert row["stages_per_sample"] == pytest.approx(
                alone["stages_per_sample"], abs=4 / 300
            )
        shares = [row["exit_share"][0] for row in found["exits"]]
        assert shares == pytest.approx([0.7, 0.3, 0.0], abs=0.02)
        assert found["exits"][-1]["accuracy"] == found["exit_accuracy"][-1]
        assert found["exit_accuracy"][-1] == pytest.approx(summary["test_accuracy"], abs=1e-9)
        lowest = exits(EvalConfig(path, exit_thresholds=(1e-9,)))
        assert lowest["exits"][0]["accuracy"] == found["exit_accuracy"][0]
        assert lowest["exits"][0]["exit_share"] == [1.0, 0.0, 0.0, 0.0]

    def test_a_table_and_a_picture_of_them(self, runs, tmp_path, capsys):
        path, _ = runs("early-exit")
        picture, more = tmp_path / "exits.png", ["--exit-thresholds", "0.2", "0.9"]
        assert cli(["eval", str(path), "--picture", str(picture), *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        start = lines.index("exits:")
        assert lines[start + 1].split() == [
            "threshold", "accuracy", "stages_per_sample", "exit_share"
        ]  # fmt: skip
        assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["0.2000", "0.9000"]
        assert picture.read_bytes() == BLANK["png"]
        assert cli(["eval", str(path), "--exit-thresholds", "0.5", "2"]) == 2
        assert "above 0 and at most 1" in capsys.readouterr().err
        assert cli(["eval", str(path), "--picture", str(picture)]) == 2
        assert "Add some, for instance --exit-thresholds" in capsys.readouterr().err

    def test_predictions_may_leave_early_and_say_where(self, runs, tmp_path):
        path, _ = runs("early-exit")
        image = tmp_path / "a.png"
        picture((8, 8), "L").save(image)
        for threshold, stages in ((1e-9, "1"), (1.0, "4")):
            (row,) = rows_of(path, str(image), exit_threshold=threshold)
            assert row["stages"] == stages
        assert "stages" not in rows_of(path, str(image))[0]

    def test_a_run_without_exits(self, runs):
        with pytest.raises(InputError, match=r"exits\.safetensors.*such as early-exit"):
            evaluate(EvalConfig(runs("bp")[0], exit_threshold=0.9))

    def test_exits_of_another_network(self, runs, tmp_path):
        run = shutil.copytree(runs("early-exit")[0], tmp_path / "run")
        shutil.copy(runs("al")[0] / "exits.safetensors", run)
        with pytest.raises(CheckpointError, match=r"exits\.safetensors.*must be intact"):
            load_exits(RunFolder(run))

    def test_a_recipe_that_says_something_else(self, runs, tmp_path):
        run = shutil.copytree(runs("al")[0], tmp_path / "run")
        description = json.loads((run / "model.json").read_text())
        for key, value in (("method", "no-such-method"), ("label_features", 7), ("cuts", ["x"])):
            wrong = {**description, "recipe": {**description["recipe"], key: value}}
            (run / "model.json").write_text(json.dumps(wrong))
            one_sentence(run, "must be intact")

    def test_a_method_with_its_own_read_out_is_rebuilt_from_the_folder(self, runs):
        path, _ = runs("al")
        network, description = load_network(RunFolder(path))
        assert description["recipe"]["method"] == "al"
        plain = models.build("small-cnn", num_classes=10, in_channels=1, image_size=8)
        keys = [key for key in plain.state_dict() if not key.startswith("classifier")]
        state = load_file(path / "model.safetensors")
        assert {key for key in state if not key.startswith("exits.3.")} == set(keys)
        assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())

    def test_predicting_and_exporting_with_a_read_out_of_its_own(self, runs, digit_files, tmp_path):
        path, _ = runs("al")
        folder, images = digit_files
        network, description = load_network(RunFolder(path))
        inputs = normalise(images, tuple(description["mean"]), tuple(description["std"]))
        with torch.no_grad():
            expected = network(inputs).argmax(1).tolist()
        assert [int(row["label"]) for row in rows_of(path, folder)] == expected
        export(ExportConfig(path, tmp_path / "net.safetensors"))
        assert load_file(tmp_path / "net.safetensors").keys() == network.state_dict().keys()


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """The first 30 test digits as files, with their pixels."""
    folder = tmp_path_factory.mktemp("digits")
    images = data.load("digits").test.images[:30]
    for number, pixels in enumerate(images):
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number:02}.png")
    return folder, images


class TestPredict:
    def test_it_says_what_the_network_says(self, runs, digit_files):
        path, _ = runs()
        folder, images = digit_files
        network, description = load_network(RunFolder(path))
        inputs = normalise(images, tuple(description["mean"]), tuple(description["std"]))
        with torch.no_grad():
            best = network(inputs).softmax(1).max(1)
        rows = rows_of(path, folder)
        assert [row["path"] for row in rows] == [str(p) for p in sorted(folder.iterdir())]
        assert [int(row["label"]) for row in rows] == best.indices.tolist()
        assert [float(row["probability"]) for row in rows] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )

    def test_top_and_json(self, runs, digit_files):
        path, folder = runs()[0], digit_files[0]
        rows = rows_of(path, folder, top=3)
        columns = ["path", "label", "probability", "label2", "probability2", "label3"]
        assert list(rows[0]) == [*columns, "probability3"]
        lines = rows_of(path, folder, top=3, json=True)
        assert [{k: str(v) for k, v in line.items()} for line in lines] == rows
        for line in lines:
            chances = [line["probability"], line["probability2"], line["probability3"]]
            assert chances == sorted(chances, reverse=True)
        everything = rows_of(path, folder, top=10, json=True)[0]
        total = sum(v for k, v in everything.items() if k.startswith("prob"))
        assert total == pytest.approx(1, abs=10 * 0.5e-6)  # each of ten is rounded to 6 digits

    @pytest.mark.parametrize("batch_size", [1, 7, 30, 31])
    def test_batches_do_not_matter(self, runs, digit_files, batch_size):
        rows = rows_of(runs()[0], digit_files[0], batch_size=batch_size)
        wanted = rows_of(runs()[0], digit_files[0])
        assert [r["path"] for r in rows] == [r["path"] for r in wanted]
        assert [r["label"] for r in rows] == [r["label"] for r in wanted]

    def test_batches_are_written_before_all_are_read(self, runs, digit_files, tmp_path):
        folder = shutil.copytree(digit_files[0], tmp_path / "digits")
        seen = []

        class Out(io.StringIO):
            def flush(self):
                seen.append(self.getvalue().count("\n"))
                (folder / "29.png").write_bytes(b"")  # the last file, not yet read

        with pytest.raises(DataError, match="1 of 30"):
            predict(PredictConfig(runs()[0], (folder,), batch_size=5), Out())
        assert seen == [6, 11, 16, 21, 26, 30]

    def test_folders_are_searched_and_files_taken_as_they_are(self, runs, tmp_path):
        for name in ("b/2.png", "b/1.JPG", "a/c/3.png", ".hidden/4.png", "b/.5.png"):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture().save(path, "PNG")
        (tmp_path / "in" / "b" / "notes.txt").write_text("no image")
        picture().save(tmp_path / "no-suffix", "PNG")
        rows = rows_of(runs()[0], tmp_path / "no-suffix", tmp_path / "in", tmp_path / "no-suffix")
        found = [os.path.relpath(row["path"], tmp_path) for row in rows]
        assert found == ["no-suffix", "in/a/c/3.png", "in/b/1.JPG", "in/b/2.png"]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_image_becomes_what_the_network_takes(self, tmp_path, channels):
        """Grey and colour, in every size, alone and in one batch, as Pillow converts them."""
        network, description = made_run(tmp_path / "run", channels)
        folder = tmp_path / "in"
        folder.mkdir()
        pictures = [
            picture((16, 16), "L"),
            picture((16, 16), "RGB", seed=1),
            picture((16, 16), "RGB", seed=2).convert("P"),
            picture((16, 16), "L", seed=3).convert("RGBA"),
        ]
        wanted = []
        for number, image in enumerate(pictures):
            image.save(folder / f"{number}.png")
            plain = image.convert("RGB").convert("L" if channels == 1 else "RGB")
            pixels = torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8)
            inputs = normalise(
                pixels.view(1, 16, 16, channels).permute(0, 3, 1, 2),
                tuple(description["mean"]),
                tuple(description["std"]),
            )
            with torch.no_grad():
                wanted.append(float(network(inputs).softmax(1).max()))
        for batch_size in (1, 4):
            rows = rows_of(tmp_path / "run", folder, batch_size=batch_size)
            got = [float(row["probability"]) for row in rows]
            assert got == pytest.approx(wanted, abs=1e-5)

    def test_other_sizes_are_resized_and_cut(self, tmp_path):
        made_run(tmp_path / "run")
        square = Image.new("RGB", (32, 32), (200, 30, 30))
        wide = Image.new("RGB", (64, 32))  # black at the sides, which are cut off
        wide.paste(square, (16, 0))
        square.save(tmp_path / "square.png")
        wide.save(tmp_path / "wide.png")
        rows = rows_of(tmp_path / "run", tmp_path / "square.png", tmp_path / "wide.png")
        first, second = (float(row["probability"]) for row in rows)
        assert first == pytest.approx(second, abs=0.01)

    def test_unreadable_images_do_not_stop_the_others(self, runs, digit_files, tmp_path, capsys):
        folder = shutil.copytree(digit_files[0], tmp_path / "digits")
        for name in ("00.png", "05.png", "29.png"):
            (folder / name).write_bytes((folder / name).read_bytes()[:20])
        out = io.StringIO()
        with pytest.raises(DataError, match="3 of 30 were not"):
            predict(PredictConfig(runs()[0], (folder,), batch_size=4), out)
        rows = list(csv.DictReader(io.StringIO(out.getvalue())))
        wanted = rows_of(runs()[0], digit_files[0])
        kept = [row for number, row in enumerate(wanted) if number not in (0, 5, 29)]
        assert [row["label"] for row in rows] == [row["label"] for row in kept]
        errors = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in errors] == [
            str(folder / name) for name in ("00.png", "05.png", "29.png")
        ]

    def test_only_unreadable_images(self, runs, tmp_path, capsys):
        (tmp_path / "a.png").write_bytes(b"")
        assert cli(["predict", str(runs()[0]), str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "path,label,probability\n"
        assert "1 of 1 were not" in captured.err

    def test_names_with_commas_and_bytes_that_are_no_text(self, runs, tmp_path):
        picture().save(tmp_path / "a,b.png")
        raw = os.fsencode(tmp_path) + b"/z\xff.png"
        shutil.copy(tmp_path / "a,b.png", raw)
        names = [row["path"] for row in rows_of(runs()[0], tmp_path)]
        assert names == [str(tmp_path / "a,b.png"), str(tmp_path) + "/z\\xff.png"]

    def test_wrong_input_is_found_before_anything_is_written(self, runs, tmp_path, digit_files):
        (tmp_path / "notes.txt").write_text("no image")
        (tmp_path / "empty").mkdir()
        run, good = runs()[0], digit_files[0]
        cases = [
            ((good, tmp_path / "gone"), {}, r"Every input must exist.*gone"),
            ((tmp_path,), {}, r"at least one image.*\.png"),
            ((tmp_path / "empty",), {}, "at least one image"),
            ((), {}, "at least one image"),
            ((good,), {"top": 0}, r"--top must lie in 1 \.\. 10. Got 0"),
            ((good,), {"top": 11}, "--top must lie"),
            ((good,), {"batch_size": 0}, "--batch-size must lie"),
            ((good,), {"device": "abacus"}, "--device must name"),
        ]
        for inputs, settings, message in cases:
            out = io.StringIO()
            with pytest.raises(InputError, match=message):
                predict(PredictConfig(run, inputs, **settings), out)
            assert out.getvalue() == ""


class TestExport:
    def test_it_loads_into_the_plain_network_without_scpl_run(self, runs, tmp_path):
        path, _ = runs()
        result = export(ExportConfig(path, tmp_path / "new" / "net.safetensors"))
        with safe_open(tmp_path / "new" / "net.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        described = json.loads(metadata["scpl"])
        assert described == json.loads((path / "model.json").read_text())
        network = models.build(
            described["model"],
            num_classes=described["num_classes"],
            in_channels=described["in_channels"],
            image_size=described["image_size"],
        )
        state = load_file(tmp_path / "new" / "net.safetensors")
        network.load_state_dict(state, strict=True)
        trained = load_file(path / "model.safetensors")
        assert all(torch.equal(trained[name], value) for name, value in state.items())
        assert result == {
            "file": str(tmp_path / "new" / "net.safetensors"),
            "parameters": sum(p.numel() for p in network.parameters()),
            "keys": len(trained),
            "weights_epoch": 1,
        }
        assert os.listdir(tmp_path / "new") == ["net.safetensors"]

    def test_it_overwrites_only_when_told(self, runs, tmp_path):
        target = tmp_path / "net.safetensors"
        target.write_text("precious")
        with pytest.raises(InputError, match=r"must not exist yet.*--force"):
            export(ExportConfig(runs()[0], target))
        assert target.read_text() == "precious"
        export(ExportConfig(runs()[0], target, force=True))
        assert load_file(target)

    def test_others_may_read_it_as_any_new_file(self, runs, tmp_path):
        export(ExportConfig(runs()[0], tmp_path / "net.safetensors"))
        (tmp_path / "plain").touch()
        modes = [path.stat().st_mode for path in tmp_path.iterdir()]
        assert modes[0] == modes[1]

    def test_a_place_that_cannot_be_written(self, runs, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        for target in (tmp_path / "file" / "net.safetensors", tmp_path / "folder"):
            with pytest.raises(InputError, match=r"must be writable.*--to"):
                export(ExportConfig(runs()[0], target, force=True))
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def test_a_damaged_run_writes_nothing(self, copy, tmp_path):
        (copy / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError):
            export(ExportConfig(copy, tmp_path / "net.safetensors"))
        assert not (tmp_path / "net.safetensors").exists()

    def test_the_command(self, runs, tmp_path, capsys):
        arguments = ["export", str(runs()[0]), "--to", str(tmp_path / "net.safetensors")]
        assert cli([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["keys"] > 5
        assert cli(arguments) == 2
        assert "--force" in capsys.readouterr().err


class TestAFolderFromSomeoneElse:
    """What ``model.json`` says decides neither time nor memory before it is compared."""

    @pytest.mark.parametrize(
        "change",
        [{"width": 500}, {"image_size": 1_000_000}, {"in_channels": 10**9, "mean": [0.0] * 9}],
    )
    def test_a_network_is_not_built_larger_than_its_weights(self, tmp_path, change):
        _, description = made_run(tmp_path / "run")
        (tmp_path / "run" / "model.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(CheckpointError, match=r"takes more than|must be|need one"):
            load_network(RunFolder(tmp_path / "run"))

    def test_layers_without_end_end(self, tmp_path):
        pytest.importorskip("transformers")
        bert = {
            "model_type": "bert", "hidden_size": 64, "num_attention_heads": 1, "vocab_size": 9,
            "intermediate_size": 64, "num_hidden_layers": 10**9, "num_labels": 3,
        }  # fmt: skip
        text = {
            "kind": "text", "vocab_size": 9, "max_tokens": 4, "text_columns": ["text"],
            "label_columns": ["label"], "sizes": {},
        }  # fmt: skip
        made_run(tmp_path / "run")
        path = tmp_path / "run" / "model.json"
        described = {"model": "hf:x", "num_classes": 3, "classes": list("abc"), **text}
        path.write_text(json.dumps({**described, "config": bert}))
        with pytest.raises(CheckpointError, match="takes more than"):
            load_network(RunFolder(tmp_path / "run"))

    @pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), 1e999, "x", None])
    def test_pixels_are_not_divided_by_nothing(self, tmp_path, std):
        """Every prediction was NaN, or one class."""
        _, description = made_run(tmp_path / "run")
        description["std"][1] = std
        (tmp_path / "run" / "model.json").write_text(json.dumps(description))
        with pytest.raises(CheckpointError):
            load_network(RunFolder(tmp_path / "run"))

    def test_settings_of_its_config_have_bounds_too(self, tmp_path):
        """100,000 threads, which `scpl eval` took from there, were a segmentation fault."""
        made_run(tmp_path / "run")
        config = tmp_path / "run" / "config.toml"
        config.write_text(config.read_text().replace("threads = 1", "threads = 100000"))
        with pytest.raises(InputError, match=r"--threads must be more than 0 and at most 1,024"):
            evaluate(EvalConfig(tmp_path / "run", data="digits"))
