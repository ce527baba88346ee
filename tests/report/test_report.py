"""Reports from synthetic run folders: the files are real, whole and safe to open."""

import builtins
import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from run_folders import make_run, make_summary, make_timeline
from scpl.report import Absent, Comparison, write_comparison_report, write_run_report
from scpl.report.comparison import ComparisonTable
from scpl.report.formats import count, duration, memory, percent, traffic
from scpl.report.pages import flatten

pytestmark = pytest.mark.pictures

VOID = {"meta", "br", "hr", "img"}


class Balance(HTMLParser):
    """Checks that every tag is closed, and collects ids and tag names."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.names, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check_page(path):
    page = Balance()
    text = path.read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "two elements share an id"
    assert "script" not in page.names
    text = text.replace('src="data:image/png;base64,', "")
    for outside in ("src=", "<link", "@import", 'href="http', "url(http"):
        assert outside not in text
    return page


def check_png(path):
    from matplotlib import image

    pixels = image.imread(path)
    assert path.stat().st_size > 10_000
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.01


@pytest.mark.parametrize("stages", [1, 12])
def test_report_of_one_run(tmp_path, stages):
    folder = make_run(tmp_path / "run", stages=stages, num_steps=700)
    png, html = write_run_report(folder)
    assert (png.name, html.name) == ("results.png", "report.html")
    check_png(png)
    page = check_page(html)
    words = " ".join(page.texts)
    assert page.names.count("svg") == 6
    assert "91.70 %" in words
    for shown in ("Processes", "Traffic", "4 MiB", "time waited", "31.0 %"):
        assert shown in words
    assert "lr = 1e-3" in words
    assert "scpl train --data fashion-mnist" in words
    assert "Example CPU" in words
    assert not list(folder.glob(".*")), "a draft was left behind"


def test_what_the_objectives_observed_is_drawn_and_tabled(tmp_path):
    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=20)
    before = check_page(write_run_report(folder)[1]).names.count("svg")
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    names = ["above_chance_stage0", "spread_stage0", "spread_stage1", "mine_stage1"]
    header += "".join(f",observed_{name}" for name in names)
    lines = [f"{line},-0.5,0.9,,0.1234" for line in lines]
    (folder / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    page = check_page(write_run_report(folder)[1])
    assert page.names.count("svg") == before + 2
    words = " ".join(page.texts)
    for word in ("Contrast against chance", "Spread of the projections", "mine", "0.1234"):
        assert word in words


def test_report_is_deterministic(tmp_path):
    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=50)
    first = [path.read_bytes() for path in write_run_report(folder)]
    assert [path.read_bytes() for path in write_run_report(folder)] == first


def test_report_of_a_comparison(tmp_path):
    runs = [
        make_run(tmp_path / f"{method}-{seed}", method, seed, num_steps=20, notes=["Odd batches"])
        for seed in range(3)
        for method in ("bp", "scpl", "early-exit")
    ]
    absent = [
        Absent("ddp", "The batch must be divisible. Got 65.", failed=False),
        Absent("scpl-seed3", "exit status 1: it broke", failed=True),
    ]
    comparison = Comparison.read(
        runs, title="Three methods", absent=absent, command="scpl compare --seeds 0,1,2"
    )
    png, html = write_comparison_report(tmp_path / "out" / "deep", comparison)
    check_png(png)
    page = check_page(html)
    words = " ".join(page.texts)
    pictures = ["Accuracy against wall-clock time", "Validation accuracy per epoch",
                "Training throughput", "The same time span of every method",
                "Time to 91.5 % validation accuracy", "Peak memory", "Traffic",
                "Time spent waiting"]  # fmt: skip
    assert [text for text in page.texts if text in pictures] == pictures
    assert page.names.count("svg") == len(pictures)
    for shown in ("91.90 ± 0.20 %", "(1.34-1.35)", "4 MiB", "What differs in the configurations",
                  "cannot run here: The batch must be divisible. Got 65.", "Odd batches.",
                  "failed: exit status 1: it broke", "scpl compare --seeds 0,1,2"):  # fmt: skip
        assert shown in words


def test_names_of_users_do_not_become_markup(tmp_path):
    evil = '<script>alert("x")</script> & $x_1$ "y"'
    folder = make_run(
        tmp_path / "run <b>", stages=2, data=evil, model=evil, notes=[evil], num_steps=5, epochs=2
    )
    events = make_timeline(2, num_steps=2)
    events[-1]["activity"] = evil
    (folder / "timeline.json").write_text(json.dumps(events))
    (folder / "config.toml").write_text(f"data = '{evil}'\n")
    (folder / "env.json").write_text(json.dumps({evil: {"host": evil}, "command": [evil, "a b"]}))
    own = make_run(tmp_path / "other", method=evil, stages=2, timeline=False, num_steps=5, epochs=2)
    for path in (
        *write_run_report(folder),
        *write_comparison_report(
            tmp_path / "out <i>",
            Comparison.read(
                [folder, own], evil, absent=[Absent(evil, evil, failed=True)], command=evil
            ),
        ),
    ):
        if path.suffix == ".html":
            page = check_page(path)
            assert evil in "".join(page.texts)
            assert "<script" not in path.read_text(encoding="utf-8")


def test_run_with_only_a_summary_or_only_metrics(tmp_path):
    folder = make_run(tmp_path / "run", stages=2, num_steps=5)
    for name in ("config.toml", "env.json", "steps.jsonl", "timeline.json"):
        (folder / name).unlink()
    check_png(write_run_report(folder)[0])
    (folder / "metrics.csv").rename(tmp_path / "metrics.csv")
    assert [path.name for path in write_run_report(folder)] == ["results.png", "report.html"]
    (folder / "summary.json").unlink()
    (tmp_path / "metrics.csv").rename(folder / "metrics.csv")
    assert "has not finished" in " ".join(check_page(write_run_report(folder)[1]).texts)


def test_run_of_nulls_draws_nothing_but_reports(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    summary = dict.fromkeys(make_summary())
    (folder / "summary.json").write_text(json.dumps(summary))
    assert [path.name for path in write_run_report(folder)] == ["report.html"]
    (page,) = write_comparison_report(tmp_path / "out", Comparison.read([folder]))
    check_page(page)
    assert "None" not in ComparisonTable([summary]).text() + "".join(check_page(page).texts)


def test_single_epoch_and_nan(tmp_path):
    folder = make_run(tmp_path / "run", epochs=1, num_steps=1, test_accuracy=math.nan)
    rows = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(rows.replace(",0.001,", ",inf,").replace(",0.25,", ",nan,"))
    steps = '{"step": 2, "epoch": 1, "seconds": 1, "losses": [{"a": NaN}, {"a": null}, null, {}]}\n'
    with (folder / "steps.jsonl").open("a") as file:
        file.write(steps)
    check_png(write_run_report(folder)[0])
    check_page(folder / "report.html")
    write_comparison_report(tmp_path / "out", Comparison.read([folder]))


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=5)
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (html,) = write_run_report(folder)
    assert "pip install 'scpl[plots]'" in " ".join(check_page(html).texts)
    assert len(write_comparison_report(tmp_path / "out", Comparison.read([folder]))) == 1


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=5, epochs=2)
    (folder / "report.html").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("scpl.report.pages.panel_svg", lambda panel: "<svg></svg>")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not list(folder.glob(".*"))


def test_import_is_light():
    code = (
        "import sys, scpl.report; "
        "print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_formats():
    assert [duration(s) for s in (0.421, 45.23, 725, 11220)] == [
        "0.42 s",
        "45.2 s",
        "12 min 05 s",
        "3 h 07 min",
    ]
    assert (percent(0.9123), count(12345.4), count(56.31)) == ("91.2 %", "12,345", "56.3")
    assert (memory(812 * 2**20), memory(1.5 * 2**30)) == ("812 MiB", "1.5 GiB")
    assert [traffic(b) for b in (0, 2048, 4 * 2**20)] == ["0", "2 KiB", "4 MiB"]
    nothing = {write(math.nan) for write in (percent, traffic, count, duration, memory)}
    assert nothing == {"\N{EN DASH}"}


def test_nested_settings_are_written_in_one_line_each():
    assert flatten({"gpus": [{"name": "x"}, {"name": "y"}]}) == {
        "gpus.0.name": "x",
        "gpus.1.name": "y",
    }
    assert flatten({"a": {"b": [1, 2], "c": None}}) == {"a.b": "1, 2", "a.c": "\N{EN DASH}"}
