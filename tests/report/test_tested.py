"""What the final test found, in a report: right numbers, nothing too long, no markup of others."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import check_page

from run_folders import make_run
from scpl.data.images.png import png
from scpl.engine.ranks import OneRank
from scpl.engine.scores import Counts, Scores
from scpl.errors import CheckpointError
from scpl.report import in_brief, write_run_report
from scpl.runs import RunFolder, RunRecord
from scpl.tasks import Classes, MultiLabel, Regression

pytestmark = pytest.mark.pictures


def drawn(count, samples, task=None):
    """An account of the predictions of a network that is right in most cases."""
    draws = torch.Generator().manual_seed(0)
    task = task or Classes()
    target = task.draw(samples, count, draws)
    noise = torch.randn(samples, count, generator=draws)
    ideal = task.as_vector(task.prepare(target), count)
    signal = {"classes": 2.5, "multi-label": 3, "regression": 4}[task.kind]
    outputs = noise + signal * ideal
    if task.kind == "regression":
        outputs = outputs / signal
    counts = Counts(1, task)
    counts.add(0, outputs, task.prepare(target), last=True)
    names = [f"class number {i} of the data" if i % 3 else f"c{i}" for i in range(count)]
    return Scores(counts.stages, 1, OneRank(), task).details(names)


def with_pictures(details, side=16):
    for number, mistake in enumerate(details["mistakes"]):
        pixels = torch.full((3, side, side), 20 * number, dtype=torch.uint8)
        mistake |= {"sample": f"test/dog/{number}.png",
                    "picture": base64.b64encode(png(pixels)).decode()}  # fmt: skip
    return details


def with_texts(details, text):
    for number, mistake in enumerate(details["mistakes"]):
        mistake |= {"sample": f"text {number} of 80", "text": text}
    return details


def report_of(folder, details, **changes):
    RunFolder(make_run(folder, num_steps=5, stages=1, **changes)).write_test(details)
    page = check_page(write_run_report(folder)[1])
    return page, " ".join(page.texts)


def test_a_page_of_few_classes_has_all_of_it(tmp_path):
    details = with_pictures(drawn(10, 500))
    page, words = report_of(
        tmp_path / "run", details, test_accuracy=0.917, test_accuracy_interval=[0.8893, 0.9382]
    )
    assert "95 %: 88.9 to 93.8 %; in" in words
    titles = ["Which class is taken for which", "By class, the worst first", "The worst mistakes"]
    assert [text for text in page.texts if text in titles] == titles
    assert "The most frequent confusions" not in words  # the picture has all numbers
    assert page.names.count("img") == len(details["mistakes"]) == 10
    assert "test/dog/9.png" in words
    error = 100 * details["calibration"]["expected_calibration_error"]
    assert f"Expected calibration error over 15 bins: {error:.1f} %" in words
    # The worst class stands first, with its numbers.
    worst = min(details["table"], key=lambda row: row["f1"])
    begin = page.texts.index("By class, the worst first")
    cells = [text for text in page.texts[begin + 1 :] if text.strip()][7:14]
    assert cells[:4] == [
        worst["class"],
        *(f"{worst[k]}" for k in ("samples", "predicted", "right")),
    ]
    assert cells[6] == f"{100 * worst['f1']:.1f} %"


def test_a_page_of_many_classes_is_cut_and_says_so(tmp_path):
    details = with_pictures(drawn(200, 4000))
    page, words = report_of(tmp_path / "run", details)
    assert "20 of 200; all are in test.csv." in words
    most = max(
        (number, -i, -j)
        for i, row in enumerate(details["confusion"])
        for j, number in enumerate(row)
        if i != j
    )
    begin = page.texts.index("The most frequent confusions")
    cells = [text for text in page.texts[begin + 1 :] if text.strip()][4:7]
    names = [row["class"] for row in details["table"]]
    assert cells == [names[-most[1]], names[-most[2]], str(most[0])]
    lines = (tmp_path / "run" / "test.csv").read_text().splitlines()
    assert lines[0] == "class,samples,predicted,right,precision,recall,f1"
    assert len(lines) == 201
    assert (tmp_path / "run" / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        (MultiLabel(), ["By label, the worst first", "Reliability diagram", "yes"]),
        (Regression((5.0,), (2.0,)), ["By number, the worst first", "true and predicted", "R²"]),
    ],
)
def test_labels_and_numbers_have_what_applies_to_them(tmp_path, task, shown):
    details = with_texts(drawn(2, 80, task), "my printer")
    _, words = report_of(tmp_path / "run", details)
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(word in html for word in shown)
    assert "Which class is taken for which" not in words
    assert "my printer" in words


def test_names_and_texts_of_others_do_not_become_markup(tmp_path):
    evil = '<script>alert("x")</script> & $x_1$'
    details = with_texts(drawn(3, 200), evil)
    for row in details["table"]:
        row["class"] = evil
    for row in details["mistakes"]:
        row |= {"sample": evil, "true": evil}
    _, words = report_of(tmp_path / "run", details)
    assert evil in words
    assert "<script" not in (tmp_path / "run" / "report.html").read_text()


def test_a_result_is_short_in_a_terminal():
    result = {"test_accuracy": 0.75, **with_pictures(drawn(30, 900))}
    brief = in_brief(result)
    assert brief["test_accuracy"] == 0.75
    assert len(brief["table"]) == 20
    assert brief["not_shown"] == "10 better rows; --json has all"
    values = [float(row["f1"].removesuffix(" %")) for row in brief["table"]]
    assert values == sorted(values)
    assert list(brief["confusion"][0]) == ["true", "taken for", "samples", "of the true ones"]
    assert len(brief["confusion"]) == len(brief["mistakes"]) == 10


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"table": [{"class": "a"}, {"label": "b"}]},
        {"table": [7]},
        {"table": [{"class": "a"}], "confusion": [[1, 2], [3]]},
        {"table": [{"class": "a"}], "confusion": [[-1]]},
        {"table": [{"class": "a"}], "confusion": [[1, 0], [0, 1]]},
        {"mistakes": [{"picture": '"><script>'}]},
        {"points": [{"number": "x", "true": [1], "predicted": []}]},
        {"calibration": {"bins": [7]}},
    ],
)
def test_an_odd_account_is_an_error_that_names_the_file(tmp_path, values):
    folder = make_run(tmp_path / "run", num_steps=5)
    (folder / "test.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"test\.json"):
        RunRecord.read(folder)


def test_a_picture_comes_back_as_it_was():
    for shape in [(1, 5, 7), (3, 8, 8)]:
        pixels = torch.randint(256, shape, dtype=torch.uint8)
        image = Image.open(io.BytesIO(png(pixels)))
        assert torch.equal(torch.from_numpy(np.array(image)).view(*shape[1:], -1),
                           pixels.permute(1, 2, 0))  # fmt: skip
    assert Image.open(io.BytesIO(png(torch.zeros(3, 400, 200, dtype=torch.uint8)))).size == (48, 96)
