"""Pictures: what they show, and that they depend on nothing but the runs."""

import io
import json
import math
import sys

import pytest
from PIL import Image

from run_folders import make_run, make_timeline
from scpl.report import exits_picture, write_run_report
from scpl.report.comparison_plots import comparison_panels, mean_curve
from scpl.report.panels import method_styles, moved_apart, panel_svg, short_label, stage_colours
from scpl.report.run_plots import condense, run_panels
from scpl.report.timelines import (
    activity_shares,
    bars,
    comparison_timelines,
    in_order,
    steady_window,
)
from scpl.runs import RunRecord

pytestmark = pytest.mark.pictures


def test_names_that_differ_at_their_ends_stay_apart():
    """Class folders often share how they begin; all were cut to the same label."""
    assert short_label("a class with a long name 003", 14) == "a class…me 003"
    assert short_label("short", 14) == "short"


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


def test_labels_are_moved_apart():
    assert moved_apart([5.0, 1.0, 1.0, 1.5], 1.0) == pytest.approx([5.0, 1 / 6, 7 / 6, 13 / 6])
    assert moved_apart([], 1.0) == []


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
    (panel,) = comparison_timelines(runs)
    assert "5 processes" not in panel.alternative
    assert "4 processes over 120 milliseconds" in panel.alternative
    assert "fast 12; slow 4" in panel.alternative
    assert panel_svg(panel).endswith("</svg>")
    assert not list(comparison_timelines({"none": runs["none"]}))


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


def test_the_baseline_looks_the_same_whatever_it_is_compared_with():
    names = ["bp", "bp-wide", "bp-cut", "bp (2 epochs)"]
    alone = method_styles(names, names)
    assert len(set(alone.values())) == 4
    for others in (["new"], ["scpl", "newer"]):
        styles = method_styles([*others, "bp"], [*others, "bp"])
        assert styles["bp"] == alone["bp"]
        assert alone["bp"] not in [styles[name] for name in others]


def test_early_exits_are_drawn():
    rows = [
        {"threshold": 0.2, "accuracy": 0.5, "stages_per_sample": 1.0},
        {"threshold": 0.9, "accuracy": 0.75, "stages_per_sample": 2.5},
    ]
    image = exits_picture({"exits": rows, "exit_accuracy": [0.5, 0.6, 0.8]}, "scpl on digits")
    with Image.open(io.BytesIO(image)) as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5
