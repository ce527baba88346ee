"""What was measured on emulated machines, as tables and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from writing import shown

__all__ = ["check_table", "draw", "plan_table", "tables"]


def check_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| what | asked for | got | off | |"
    yield "|---|---:|---:|---:|---|"
    for row in rows:
        verdict = "good" if row["good"] else f"more than {100 * row['tolerance']:.0f} %"
        yield (
            f"| {row['what']} | {row['wanted']:.4g} {row['unit']} | {row['got']:.4g} "
            f"| {100 * row['off']:+.1f} % | {verdict} |"
        )


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    yield from check_table(found["check"])
    if found["results"]:
        yield ""
        yield from _result_table(found["results"])
    if found["comparisons"]:
        yield ""
        yield "| `scpl` against | machines | link | at its best | median (min .. max) |"
        yield "|---|---:|---|---|---:|"
    for row in found["comparisons"]:
        cells = [row["against"], str(row["machines"]), row["link"], row["which"], shown(row, 2)]
        yield f"| {' | '.join(cells)} |"
    for name, reason in found["failures"].items():
        yield f"{name} cannot run: {reason}"


def _result_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| machines | link | method | samples/s: median (min .. max) | to `bp` on one, paired "
        "| of the limit, paired | MB per step | ranks wait | other load, cores |"
    )
    yield "|---:|---|---|---:|---:|---:|---:|---:|---:|"
    for row in results:
        traffic = row["bytes_per_step"]
        cells = [
            str(row["machines"]),
            row["link"] or "-",
            title_of(row),
            shown(row["samples_per_second"], 2),
            shown(row["to_one"], 2),
            shown(row["of_limit"], 3),
            "" if traffic is None else f"{traffic['median'] / 1e6:.2f}",
            ", ".join(f"{100 * share:.0f} %" for share in row["wait"]),
            shown(row["others"], 2),
        ]
        yield f"| {' | '.join(cells)} |"


def title_of(row: Mapping[str, Any]) -> str:
    return f"{row['label']}/{row['variant']}" if row["variant"] else row["label"]


def best_rows(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each method on each number of machines over each link the best variant."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in sorted(results, key=lambda row: -row["samples_per_second"]["median"]):
        best.setdefault((row["label"], row["machines"], row["link"]), row)
    return sorted(best.values(), key=lambda row: row["machines"])


def plan_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: what was simulated of each method beside what was measured."""
    rows = [row for row in results if row["to_one"] and row.get("simulated")]
    if not rows:
        return
    yield "| machines | link | method | measured, to `bp` on one | simulated | off |"
    yield "|---:|---|---|---:|---:|---:|"
    for row in sorted(rows, key=lambda row: (row["machines"], row["link"])):
        off = row["simulated"]["median"] / row["to_one"]["median"] - 1
        cells = [str(row["machines"]), row["link"] or "-", title_of(row)]
        cells += [shown(row["to_one"], 2), shown(row["simulated"], 2), f"{100 * off:+.0f} %"]
        yield f"| {' | '.join(cells)} |"


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw speed-up against the number of machines: measured points, simulated lines."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses windows

    rows = [row for row in best_rows(results) if row["label"] != "bp" and row["to_one"]]
    wanted = list(dict.fromkeys(row["link"] for row in results if row["link"]))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    looks = {label: (f"C{i % 10}", "osD^vP*X<>"[i % 10]) for i, label in enumerate(labels)}
    most = max((row["machines"] for row in rows), default=1)
    figure = Figure(figsize=(4.2 * max(len(wanted), 1), 4.2))
    axes = figure.subplots(1, max(len(wanted), 1), sharey=True, squeeze=False)[0]
    for link, axis in zip(wanted, axes, strict=True):
        axis.plot([1, most], [1, most], color="0.7", linestyle=":", label="machines")
        for label in labels:
            own = [r for r in rows if r["label"] == label and r["link"] in (link, "")]
            if not own:
                continue
            (color, mark), middle = looks[label], [row["to_one"]["median"] for row in own]
            spread = [
                [m - row["to_one"]["min"] for m, row in zip(middle, own, strict=True)],
                [row["to_one"]["max"] - m for m, row in zip(middle, own, strict=True)],
            ]
            axis.errorbar(
                [row["machines"] for row in own], middle, yerr=spread,
                color=color, marker=mark, linestyle="none", capsize=2, label=label,
            )  # fmt: skip
            line = [row for row in own if row.get("simulated")]
            if line:
                speed_ups = [row["simulated"]["median"] for row in line]
                axis.plot([r["machines"] for r in line], speed_ups, color=color, linewidth=1.2)
        axis.set_title(link)
        axis.set_xlabel("emulated machines")
        axis.set_xticks(sorted({1, *(row["machines"] for row in rows)}))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up over one machine with bp")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
