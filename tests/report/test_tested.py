"""What the final test found, in a report: right numbers, nothing too long, nothing that is markup."""

import base64
import json

import pytest
import torch

from run_folders import make_run
from scpl.data.images.png import png
from scpl.engine.ranks import OneRank
from scpl.engine.scores import Counts, Scores
from scpl.errors import CheckpointError
from scpl.report import in_brief, write_run_report
from scpl.runs import RunFolder, RunRecord
from scpl.tasks import Classes, MultiLabel, Regression
from test_report import check_page


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
