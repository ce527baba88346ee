"""The table and the picture of learn.py, made of whatever results a folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from learn_job import METHODS

from scpl.files import write_whole

PICTURE = "learn.png"
PUBLISHED = """\
Published elsewhere, with another schedule, augmentation and width, so not to be mixed with these:
PredSim's VGG8b, test error on CIFAR-10 5.58 % against 5.99 % for backpropagation, on Fashion-MNIST
4.65 % against 4.53 % (Nokland & Eidnes 2019).\
"""


@dataclass(frozen=True)
class Row:
    """The results of one method on one data set and network.

    Attributes:
        case: Data set, network, method.
        results: Of each seed. Those that were cut short count only where there are no others.
        alone: What was measured with nothing beside it, or None.
    """

    case: tuple[str, str, str]
    results: tuple[dict[str, Any], ...]
    alone: dict[str, Any] | None

    @property
    def method(self) -> str:
        """Its name."""
        return self.case[2]

    @property
    def epochs(self) -> int:
        """The last one that was tested, of all seeds."""
        return min(max(accuracies(each), default=0) for each in self.results)

    def accuracy(self, epoch: int) -> list[float]:
        """Test accuracy of each seed after an epoch, in %, where it was tested."""
        tested = map(accuracies, self.results)
        return [100 * each[epoch] for each in tested if epoch in each]


def accuracies(result: dict[str, Any]) -> dict[int, float]:
    """Test accuracy, 0 .. 1, by epoch."""
    return {row["epoch"]: row["accuracy"] for row in result["curve"] if "accuracy" in row}


def rows_of(out: Path) -> list[Row]:
    """Read all results of a folder, in the order in which methods decide most."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    timed: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        job = result["job"]
        case = (job["dataset"], job["network"], job["method"])
        if path.name.startswith("time-"):
            timed[case] = result
        elif any("accuracy" in row for row in result["curve"]):
            found.setdefault(case, []).append(result)
    order = list(METHODS)
    rows = []
    for case in sorted(found, key=lambda case: (case[:2], order.index(case[2]))):
        finished = [result for result in found[case] if result["finished"]]
        rows.append(Row(case, tuple(finished or found[case]), timed.get(case)))
    return rows


def table(out: Path) -> Iterator[str]:
    """Lines of Markdown: one table for each data set and network."""
    rows = rows_of(out)
    for group in dict.fromkeys(row.case[:2] for row in rows):
        yield from _one_table([row for row in rows if row.case[:2] == group])
    yield PUBLISHED if rows else f"No results in {out}"


def _one_table(rows: Sequence[Row]) -> Iterator[str]:
    dataset, network, _ = rows[0].case
    job = rows[0].results[0]["job"]
    last = max(row.epochs for row in rows)
    between = [
        epoch for epoch in _marks(last, job["every"]) if any(r.accuracy(epoch) for r in rows)
    ]
    about = rows[0].results[0]["environment"]["hardware"]
    yield (
        f"{dataset}, {network}, {job['stages']} stages, {job['image_size']} pixels, batch "
        f"{job['batch_size']}, {job['precision']}, {about.get('accelerator', about['processor'])}: "
        "test accuracy in %, mean over seeds (± standard deviation)"
    )
    yield ""
    yield (
        "| method | seeds | epochs | "
        + "".join(f"after {epoch} | " for epoch in between)
        + "last | error | s per epoch, alone | s per epoch (others beside it) |"
    )
    yield "|---|---:|---:|" + "---:|" * (len(between) + 4)
    for row in rows:
        yield _line(row, between)
    yield ""


def _marks(last: int, every: int) -> list[int]:
    """Up to three epochs on the way that were tested."""
    wanted = (round(share * last / every) * every for share in (1 / 6, 1 / 3, 2 / 3))
    return sorted({epoch for epoch in wanted if 0 < epoch < last})


def _line(row: Row, between: Sequence[int]) -> str:
    planned = row.results[0]["job"]["epochs"]
    ends = row.accuracy(row.epochs)
    rates = [each["seconds_per_epoch"] for each in row.results]
    fields = [
        row.method,
        str(len(row.results)),
        str(planned) if row.epochs == planned else f"{row.epochs} of {planned}",
        *(spread(row.accuracy(epoch)) for epoch in between),
        f"**{spread(ends)}**",
        spread([100 - end for end in ends]),
        f"{row.alone['seconds_per_epoch']:.2f}" if row.alone else "",
        f"{mean(rates):.2f} ({max(each['beside'] for each in row.results)})",
    ]
    return f"| {' | '.join(fields)} |"


def spread(values: Sequence[float]) -> str:
    """Write the mean, and how far values lie apart where there are several."""
    if not values:
        return ""
    apart = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{apart}"


def draw(out: Path) -> Path | None:
    """Draw accuracy against epochs, and against seconds where they were measured alone.

    Returns:
        The picture; None without results or matplotlib.
    """
    from scpl.report.panels import Panel, can_draw, method_styles, panels_png, score_axis
    from scpl.runs.metrics import METRICS

    rows = rows_of(out)
    if not rows or not can_draw():
        return None
    styles = method_styles(list(METHODS), list(METHODS))
    panels: list[Panel] = []
    for dataset, network in dict.fromkeys(row.case[:2] for row in rows):
        group = [row for row in rows if row.case[:2] == (dataset, network)]
        for alone in (False, True):
            lines = [(row, _points(row, alone=alone)) for row in group if row.alone or not alone]
            unit = "seconds, measured alone" if alone else "epochs"

            def plot(axes: Any, lines: Any = lines, unit: str = unit) -> None:
                for row, points in lines:
                    colour, line, mark = styles[row.method]
                    look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": mark}
                    axes.plot(*zip(*points, strict=True), label=row.method, markersize=4, **look)
                axes.set_xlabel(unit)
                score_axis(axes, METRICS["accuracy"])
                axes.legend()

            if lines:
                title = f"{dataset}, {network}"
                wide = not any(row.alone for row in group)
                panels.append(Panel(f"p{len(panels)}", title, "", "", plot, wide=wide, height=4.0))
    path = out / PICTURE
    write_whole(path, panels_png(panels, "Test accuracy, mean over seeds"))
    return path


def _points(row: Row, *, alone: bool) -> list[tuple[float, float]]:
    """Mean accuracy, in %, against epochs or seconds."""
    scale = row.alone["seconds_per_epoch"] if alone and row.alone else 1.0
    epochs = sorted(set.intersection(*(set(accuracies(each)) for each in row.results)))
    return [(scale * epoch, mean(row.accuracy(epoch))) for epoch in epochs]
