"""Reports from synthetic run folders: the files are real, whole and safe to open."""

import builtins
import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from scpl.errors import InputError
from scpl.report import (
    Absent,
    Comparison,
    RunRecord,
    comparison_table,
    write_comparison_report,
    write_run_report,
)
from scpl.report.activities import bars, in_order, steady_window
from scpl.report.comparisons import comparison_panels, mean_curve
from scpl.report.formats import count, duration, memory, percent, traffic
from scpl.report.groups import Sample, baseline, group_runs, paired_ratio
from scpl.report.html import flatten, tag
from scpl.report.panels import panel_svg
from scpl.report.plots import condense, run_panels
from scpl.report.results import comparison_results
from scpl.report.side_by_side import side_by_side_panels
from scpl.report.style import method_styles, spread, stage_colours
from scpl.report.tables import ComparisonTable
from scpl.report.target import Target, choose_target, seconds_to
from scpl.report.timeline import activity_shares

VOID = {"meta", "br", "hr"}


SPEEDS = {"bp": 4000.0, "scpl": 5400.0, "early-exit": 5600.0, "bp-wide": 4900.0, "ddp": 4700.0,
          "gpipe": 3900.0, "1f1b": 4100.0, "bp-cut": 2400.0}  # fmt: skip
ONE_PROCESS = ("bp", "bp-wide")


def make_summary(method="scpl", seed=0, stages=4, **changes):
    speed = SPEEDS.get(method, 3000.0) + 37 * seed
    processes = 1 if method in ONE_PROCESS else 2
    return {
        "method": method,
        "data": "fashion-mnist",
        "model": "vgg8",
        "stages": stages,
        "processes": processes,
        "epochs": 6,
        "seed": seed,
        "test_accuracy": {"bp": 0.921, "scpl": 0.917}.get(method, 0.902) + 0.002 * seed,
        "valid_accuracy": 0.925,
        "samples_per_second": speed,
        "wall_seconds": 6 * 60000 / speed,
        "peak_memory_bytes": [812 * 2**20, 640 * 2**20][:processes],
        "bytes_per_step": [4_194_304, 0] if processes == 2 else [0],
        "wait_share": [0.31, 0.05, 0.02, 0.24][:stages] + [0.1] * (stages - 4),
        "run": f"runs/{method}-{seed}",
        **changes,
    }


def make_metrics(summary, epochs):
    stages, speed = summary["stages"], summary["samples_per_second"]
    columns = ["epoch", "step", "seconds", "train_seconds", "samples_per_second", "lr"]
    columns += [f"train_loss_stage{k}" for k in range(stages)]
    columns += ["valid_loss", "valid_accuracy"]
    columns += [f"valid_accuracy_stage{k}" for k in range(stages)]
    lines = [",".join(columns)]
    for epoch in range(1, epochs + 1):
        seconds = epoch * 60000 / speed
        final = summary["valid_accuracy"] - 0.3 * math.exp(-epoch * (1 + 0.1 * summary["seed"]))
        values = [epoch, 469 * epoch, seconds, seconds * 0.96, speed, 1e-3]
        values += [4.2 - 0.2 * k + 0.8 * math.exp(-epoch / 2) for k in range(stages)]
        values += [0.25, final]
        values += ["" if k == 0 else final - 0.03 * (stages - 1 - k) for k in range(stages)]
        lines.append(",".join(map(str, values)))
    return "\n".join(lines) + "\n"


def make_steps(stages, num_steps):
    lines = []
    for step in range(1, num_steps + 1):
        noise = 0.15 * math.sin(step * 12.9898) * math.cos(step * 78.233)
        losses = [
            {"supervised_contrastive": 4.2 - 0.2 * k + 0.8 * math.exp(-step / 300) + noise}
            for k in range(stages)
        ]
        losses[-1]["cross_entropy"] = 0.25 + 2 * math.exp(-step / 120) + noise / 4
        row = {"step": step, "epoch": 1 + step // 469, "seconds": step / 42, "losses": losses}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def make_timeline(stages, num_steps=20, period=0.02):
    events = []
    for step in range(num_steps):
        for stage in range(stages):
            begin = (step + stage) * period
            work = period * (0.95 - 0.12 * (stage % 3))
            spans = [
                ("forward", begin, begin + work / 3),
                ("learn", begin + work / 3, begin + work),
                ("wait", begin + work, begin + period),
            ]
            if stage:
                spans.append(("receive", begin - 0.3 * period, begin))
            events += [
                {
                    "rank": stage // 2,
                    "stage": stage,
                    "step": step,
                    "activity": a,
                    "begin": b,
                    "end": e,
                }
                for a, b, e in spans
            ]
    return events


def make_run(
    folder, method="scpl", seed=0, stages=4, epochs=6, num_steps=900, timeline=True, **changes
):
    """Write a run folder as `scpl train` does."""
    folder.mkdir(parents=True)
    summary = make_summary(method, seed, stages, **changes)
    (folder / "summary.json").write_text(json.dumps(summary))
    config = f'method = "{method}"\nseed = {seed}\n\n[optimizer]\nname = "adamw"\nlr = 1e-3\n'
    (folder / "config.toml").write_text(config)
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.13.0", "scpl": "0.1.0"},
        "hardware": {"cpu": "Example CPU", "cores": 2, "gpus": []},
        "command": f"scpl train --data fashion-mnist --method {method} --seed {seed}",
    }
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "metrics.csv").write_text(make_metrics(summary, epochs))
    (folder / "steps.jsonl").write_text(make_steps(stages, num_steps))
    if timeline:
        (folder / "timeline.json").write_text(json.dumps(make_timeline(stages)))
    return folder


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


def test_many_methods_and_seeds_stay_apart(tmp_path):
    """Ten methods with three seeds each: every one has a look of its own on every picture."""
    methods = ["scpl", "early-exit", "al", "bp", "bp-wide", "bp-cut", "gpipe", "1f1b", "ddp", "new"]
    runs = [
        RunRecord.read(make_run(tmp_path / f"{m}{seed}", m, seed, stages=2, num_steps=2, epochs=3))
        for m in methods
        for seed in range(3)
    ]
    styles = method_styles(methods, methods)
    assert len({style.colour for style in styles.values()}) == len(methods)
    drawn = {panel.name: panel_svg(panel) for panel in comparison_panels(runs)}
    for name in ("accuracy-seconds", "accuracy-epoch", "throughput", "memory"):
        assert all(style.colour in drawn[name] for style in styles.values()), name


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
    assert "<script" not in comparison_table([make_summary(evil)], markdown=True)


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
    assert "None" not in comparison_table([summary]) + "".join(check_page(page).texts)


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


def test_no_pyplot_and_no_setting_left_behind(tmp_path):
    import matplotlib as mpl

    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=5)
    with mpl.rc_context({"lines.linewidth": 7.0, "svg.hashsalt": "mine"}):
        before = dict(mpl.rcParams)
        write_run_report(folder)
        assert dict(mpl.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_settings_of_the_user_do_not_change_the_pictures(tmp_path):
    import matplotlib as mpl

    panel = run_panels(RunRecord.read(make_run(tmp_path / "run", num_steps=5)))[0]
    plain = panel_svg(panel)
    with mpl.rc_context({"lines.linewidth": 7.0, "axes.facecolor": "red"}):
        assert panel_svg(panel) == plain
    assert plain.startswith('<svg role="img" aria-label="Line chart of training loss')


@pytest.mark.parametrize("method", ["方法", "_hidden", "m" * 200])
def test_odd_names_draw_without_a_warning(tmp_path, method):
    folder = make_run(tmp_path / "run", method, stages=2, timeline=False, num_steps=2, epochs=2)
    for panel in comparison_panels([RunRecord.read(folder)]):
        assert panel_svg(panel).endswith("</svg>")


def test_timelines_at_the_edge(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2, timeline=False)
    event = {"rank": 0, "stage": 0, "step": 0, "activity": "wait", "begin": 1.0, "end": 1.0}
    for events in ([event], [event, {**event, "stage": 1, "activity": "learn", "end": 2.0}]):
        (folder / "timeline.json").write_text(json.dumps(events))
        panels = [p for p in run_panels(RunRecord.read(folder)) if p.name == "timeline"]
        assert [panel_svg(panel).endswith("</svg>") for panel in panels] == [True]


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", stages=2, timeline=False, num_steps=5, epochs=2)
    (folder / "report.html").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("scpl.report.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not list(folder.glob(".*"))


def test_import_is_light():
    code = (
        "import sys, scpl.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# Reading


def test_reading_gives_back_what_was_written(tmp_path):
    run = RunRecord.read(make_run(tmp_path / "run", num_steps=7))
    assert run.finished
    assert run.num_stages == 4
    assert run.command.startswith("scpl train")
    assert run.column("epoch") == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in run.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert run.train_columns() == {"loss": {k: f"train_loss_stage{k}" for k in range(4)}}
    assert sorted(run.readout_columns()) == [1, 2, 3]
    assert {event.activity for event in run.timeline} == {"forward", "learn", "wait", "receive"}


def test_half_written_last_lines_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", epochs=3, num_steps=4)
    for name in ("metrics.csv", "steps.jsonl"):
        path = folder / name
        path.write_text(path.read_text()[:-9])
    run = RunRecord.read(folder)
    assert run.column("epoch") == [1, 2]
    assert [row.step for row in run.steps] == [1, 2, 3]


def test_the_later_of_two_rows_counts(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / "metrics.csv").write_text("epoch,valid_accuracy\n1,0.5\n2,0.6\n2,0.7\n")
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 2, "epoch": 1, "seconds": 0.5, "losses": [{"a": 9}]}\n')
    run = RunRecord.read(folder)
    assert run.column("valid_accuracy") == [0.5, 0.7]
    assert run.steps[1].losses == ({"a": 9.0},)


@pytest.mark.parametrize("where", ["missing", "."])
def test_not_a_run_folder(tmp_path, where):
    with pytest.raises(InputError, match=r"summary\.json or metrics\.csv.*scpl train"):
        write_run_report(tmp_path / where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "valid JSON"),
        ("summary.json", "[]", "a JSON object"),
        ("metrics.csv", "a,b\n1,2\n", "epoch"),
        ("metrics.csv", "epoch,b\n1,2\n3\n4,5\n", "line 3"),
        ("metrics.csv", "epoch,b\n1,x\n2,3\n", "line 2"),
        ("steps.jsonl", 'oops\n{"step": 1, "losses": []}\n', "line 1"),
        ("steps.jsonl", '{"step": 1}\n', "line 1"),
        ("timeline.json", "{}", "list of events"),
        ("timeline.json", '[{"rank": 0}]', "event 0"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        write_run_report(folder)
    assert str(caught.value).startswith(name)


def test_binary_rubbish_is_named(tmp_path):
    folder = make_run(tmp_path / "run", epochs=2, num_steps=2)
    (folder / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config\.toml must hold readable UTF-8"):
        write_run_report(folder)


def test_comparison_of_nothing():
    with pytest.raises(InputError, match="at least one run"):
        Comparison.read([])


# Tables and arithmetic


def test_table_is_aligned_and_pairs_by_seed():
    summaries = [make_summary(m, seed) for m in ("bp", "scpl") for seed in (0, 1, 2)]
    table = comparison_table(summaries)
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "method"
    assert "91.90 ± 0.20 %" in lines[3]
    assert "1.35 (1.34-1.35)" in lines[3]
    assert "1 (reference)" in lines[2]
    assert "812 MiB (1.42 GiB)" in lines[3]
    assert "16 % (31 %)" in lines[3]
    markdown = comparison_table(summaries, markdown=True)
    assert markdown.splitlines()[1] == f"| --- |{' ---: |' * 8}"
    assert "standard deviation over the seeds" in markdown


def test_columns_that_no_run_has_are_left_out():
    bare = make_summary("scpl", wall_seconds=None, bytes_per_step=None, wait_share=None)
    table = ComparisonTable([bare])
    assert table.header == ("method", "runs", "test accuracy", "samples/s", "peak memory")
    assert table.rows == [("scpl", "1", "91.70 %", "5,400", "812 MiB (1.42 GiB)")]
    assert "Sent" not in table.footnote
    both = ComparisonTable([bare, make_summary("gpipe")])
    assert both.header[3:] == ("seconds", "samples/s", "peak memory", "sent per step", "waiting")
    assert both.rows[0][3] == "\N{EN DASH}"


def test_a_table_wider_than_the_terminal_becomes_several():
    summaries = [make_summary(m, seed) for m in ("bp", "scpl") for seed in (0, 1)]
    absent = [Absent("ddp", "It is not possible " * 9, failed=False)]
    table = ComparisonTable(summaries, absent=absent)
    text = table.text(width=70)
    assert max(map(len, text.splitlines())) <= 70
    blocks = [block.splitlines() for block in text.split("\n\n")[:-1]]
    assert len(blocks) > 1
    for block in blocks:
        assert [line.split()[0] for line in block if "--" not in line] == ["method", "bp", "scpl"]
    columns = [name for block in blocks for name in block[0].split("  ")[1:] if name]
    assert [name.strip() for name in columns] == list(table.header[1:])
    assert text.split("\n\n")[-1].startswith("ddp  cannot run here: It is not")


def test_missing_runs_are_in_the_markdown_table_too():
    table = ComparisonTable([make_summary()], absent=[Absent("a|b", "it <broke>", failed=True)])
    assert "| a\\|b | failed: it &lt;broke> |" in table.markdown()


# Time to a target


def with_curve(tmp_path, name, curve, method="scpl"):
    folder = make_run(tmp_path / name, method, epochs=1, num_steps=1, timeline=False)
    rows = "".join(f"{k},{x},{y}\n" for k, (x, y) in enumerate(curve, 1))
    (folder / "metrics.csv").write_text(f"epoch,seconds,valid_accuracy\n{rows}")
    return folder


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(0.4, 10.0), (0.5, 10.0), (0.6, 12.0), (0.7, 14.0), (0.75, 27.5), (0.9, 50.0), (0.91, None)],
)
def test_time_to_a_target_is_interpolated(tmp_path, target, seconds):
    """Before the end of the first epoch nothing is known; what is lost again was still reached."""
    curve = [(10, 0.5), (20, "nan"), (14, 0.7), (20, 0.6), (30, 0.8), (40, 0.8), (50, 0.9)]
    run = RunRecord.read(with_curve(tmp_path, "run", curve))
    found = seconds_to(run, target)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_the_target_is_what_every_run_of_bp_surely_reaches(tmp_path):
    folders = [
        with_curve(tmp_path, f"{method}{end}", [(1, 0.2), (3, end)], method)
        for method, end in (("bp", 0.9), ("bp", 0.8), ("scpl", 0.5), ("scpl", 0.85))
    ]
    comparison = Comparison.read(folders)
    assert comparison.target.accuracy == pytest.approx(0.792)
    assert "99 % of the lowest validation accuracy that a run of bp" in comparison.target.origin
    table = comparison.table()
    column = table.header.index("seconds to 79.2 %")
    assert [row[column] for row in table.rows] == ["2.83 (2.69-2.97)", "2.82, 1 of 2"]
    assert choose_target([RunRecord.read(f) for f in folders[2:]]).accuracy == pytest.approx(0.495)
    asked = Comparison.read(folders, target=0.95)
    assert asked.target == Target(0.95, "as asked for")
    assert [row[column] for row in asked.table().rows] == ["not reached", "not reached"]
    assert asked.results()[0]["seconds_to_target"]["n"] == 0


def test_without_validation_there_is_no_target(tmp_path):
    folder = with_curve(tmp_path, "run", [(1, "")])
    comparison = Comparison.read([folder], target=0.5)
    assert comparison.target is None
    assert not [name for name in comparison.table().header if "to" in name.split()]


# Results as JSON


def test_results_hold_every_measured_key_with_its_spread():
    runs = [make_summary(m, seed, notes=["n"]) for seed in (0, 1, 2) for m in ("bp", "scpl")]
    bp, scpl = comparison_results(runs)
    json.dumps([bp, scpl], allow_nan=False)
    assert (scpl["label"], scpl["method"], scpl["seeds"]) == ("scpl", "scpl", [0, 1, 2])
    assert (scpl["processes"], scpl["notes"]) == (2, ["n"])
    assert scpl["test_accuracy"] == {
        "mean": pytest.approx(0.919), "sd": pytest.approx(0.002), "median": pytest.approx(0.919),
        "min": pytest.approx(0.917), "max": pytest.approx(0.921), "n": 3,
    }  # fmt: skip
    assert [part["n"] for part in scpl["peak_memory_bytes"]] == [3, 3]
    assert scpl["wait_share"][3]["median"] == 0.24
    assert scpl["bytes_per_step"][0]["max"] == 4_194_304
    assert [run["run"] for run in scpl["runs"]] == ["runs/scpl-0", "runs/scpl-1", "runs/scpl-2"]
    pairs = [(5400 + 37 * seed) / (4000 + 37 * seed) for seed in (0, 1, 2)]
    assert scpl["ratio_to"]["bp"]["median"] == pytest.approx(pairs[1])
    assert scpl["ratio_to"]["bp"]["max"] == pytest.approx(pairs[0])
    assert list(bp["ratio_to"]) == ["scpl"]


def test_one_run_has_no_deviation():
    (result,) = comparison_results([make_summary(valid_accuracy=None)])
    assert result["samples_per_second"]["sd"] is None
    assert result["samples_per_second"]["n"] == 1
    assert "valid_accuracy" not in result
    assert result["ratio_to"] == {}


def test_names_cannot_break_the_table():
    table = comparison_table([make_summary("a\nb\x1b[31m|c")])
    assert len(table.splitlines()) == 3
    assert "\x1b" not in table
    assert "a b [31m\\|c" in comparison_table([make_summary("a\nb\x1b[31m|c")], markdown=True)


def test_groups_are_named_by_what_differs():
    runs = [make_summary(stages=2), make_summary(stages=4), make_summary("bp"), make_summary("bp")]
    labels = {group.label: len(group.members) for group in group_runs(runs)}
    assert labels == {"scpl (2 stages)": 1, "scpl (4 stages)": 1, "bp": 2}


def test_repeated_runs_are_paired_in_order():
    rates = [("bp", 100), ("scpl", 150), ("bp", 50), ("scpl", 100), ("scpl", 7)]
    runs = [make_summary(method, samples_per_second=rate) for method, rate in rates]
    groups = group_runs(runs)
    assert paired_ratio(groups[1], baseline(groups)).values == (1.5, 2.0)


def test_other_data_is_not_paired():
    groups = group_runs([make_summary("bp", data="a"), make_summary("scpl", data="b")])
    assert len(paired_ratio(groups[1], baseline(groups))) == 0


def test_sample_of_few_values():
    assert Sample.of([math.nan]).values == ()
    assert math.isnan(Sample.of([]).mean)
    assert math.isnan(Sample.of([1.0]).sd)
    assert Sample.of([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))


def test_labels_are_moved_apart():
    assert spread([5.0, 1.0, 1.0, 1.5], 1.0) == pytest.approx([5.0, 1 / 6, 7 / 6, 13 / 6])
    assert spread([], 1.0) == []


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


def test_condense_keeps_the_mean_and_the_ends():
    xs, ys = condense((list(range(1000)), [float(x) for x in range(1000)]), 100)
    assert len(xs) == 100
    assert xs == ys
    assert sum(ys) / 100 == pytest.approx(499.5)
    assert math.isnan(condense(([1, 2], [math.inf, 1.0]), 1)[1][0])


def test_mean_curve_takes_the_epochs_that_all_have():
    runs = [{1: (1, 10), 2: (2, 20), 3: (3, 30)}, {1: (3, 30), 3: (5, 50), 4: (7, 70)}]
    assert mean_curve(runs) == {1: (2, 20), 3: (4, 40)}


def test_timeline_window_and_shares(tmp_path):
    folder = make_run(tmp_path / "run", stages=3, epochs=1, num_steps=1)
    events = RunRecord.read(folder).timeline
    begin, end = steady_window(events)
    assert begin == pytest.approx(0.18)
    assert end - begin == pytest.approx(0.08)
    shares = activity_shares(events)
    assert list(shares) == ["stage 0, rank 0", "stage 1, rank 0", "stage 2, rank 1"]
    assert shares["stage 0, rank 0"]["wait"] == pytest.approx(0.05)


def test_the_window_avoids_evaluations(tmp_path):
    """A few steps between two evaluations are shown rather than an evaluation."""
    folder = make_run(tmp_path / "run", stages=1, epochs=1, num_steps=1, timeline=False)
    events = make_timeline(1, num_steps=30, period=0.1)
    pause = {"rank": 0, "stage": 0, "step": 0, "activity": "evaluate"}
    events += [{**pause, "begin": t, "end": t + 0.05} for t in (1.21, 1.31, 1.56, 2.51)]
    (folder / "timeline.json").write_text(json.dumps(events))
    recorded = RunRecord.read(folder).timeline
    begin, end = steady_window(recorded)
    assert (begin, end) == (pytest.approx(1.7), pytest.approx(2.1))
    assert steady_window(recorded, length=0.15) == (pytest.approx(1.4), pytest.approx(1.55))


def test_timelines_of_methods_span_the_same_time(tmp_path):
    runs = {}
    for label, period in (("fast", 0.01), ("slow", 0.03)):
        folder = make_run(tmp_path / label, stages=3, num_steps=1, timeline=False)
        (folder / "timeline.json").write_text(json.dumps(make_timeline(3, 40, period)))
        runs[label] = [RunRecord.read(folder)]
    runs["none"] = [RunRecord.read(make_run(tmp_path / "none", num_steps=1, timeline=False))]
    (panel,) = side_by_side_panels(runs)
    assert "5 processes" not in panel.alternative
    assert "4 processes over 120 milliseconds" in panel.alternative
    assert "fast 12; slow 4" in panel.alternative
    assert panel_svg(panel).endswith("</svg>")
    assert not list(side_by_side_panels({"none": runs["none"]}))


def test_bars_show_what_lies_in_the_window(tmp_path):
    from matplotlib.figure import Figure

    folder = make_run(tmp_path / "run", stages=1, num_steps=1, timeline=False)
    spans = [("forward", 0, 1), ("backward", 1, 4), ("odd", 4, 5), ("send", 4, 6), ("wait", 8, 9)]
    event = {"rank": 0, "stage": 0, "step": 7}
    events = [{**event, "activity": a, "begin": b, "end": e} for a, b, e in spans]
    (folder / "timeline.json").write_text(json.dumps(events))
    run = RunRecord.read(folder)
    axes = Figure().add_subplot()
    bars(axes, 0, run.timeline, (0.5, 7.0), origin=5)
    extents = sorted(
        (path.get_extents().x0, path.get_extents().x1)
        for shown in axes.collections
        for path in shown.get_paths()
    )
    assert extents == [(0, 500), (500, 3500), (3500, 4500), (3500, 5500)]
    assert [text.get_text() for text in axes.texts] == ["2"]
    order = ["forward", "backward", "odd", "wait", "send"]
    assert in_order(e.activity for e in run.timeline) == order
    assert activity_shares(run.timeline)["stage 0, rank 0"]["odd"] == pytest.approx(1 / 9)


def test_colours_are_distinct_and_darken():
    colours = stage_colours(12)
    assert len(set(colours)) == 12
    brightness = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in colours]
    assert brightness == sorted(brightness, reverse=True)
    styles = method_styles(["scpl (2)", "scpl (4)", "bp"], ["scpl", "scpl", "bp"])
    assert len(set(styles.values())) == 3


def test_markup_helpers():
    assert (
        tag("p", "<&", tag("b", '"'), class_='"') == '<p class="&quot;">&lt;&amp;<b>&quot;</b></p>'
    )
    assert flatten({"gpus": [{"name": "x"}, {"name": "y"}]}) == {
        "gpus.0.name": "x",
        "gpus.1.name": "y",
    }
    assert flatten({"a": {"b": [1, 2], "c": None}}) == {"a.b": "1, 2", "a.c": "\N{EN DASH}"}
