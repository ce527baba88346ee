"""Blocks of a page that needs nothing but itself: no script, no font, no picture from elsewhere.

Text is escaped unless it is :class:`Html`; only the functions here make ``Html``, so a name that a
user chose can not become markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from scpl.report.formats import DASH

__all__ = [
    "Html",
    "definitions",
    "flatten",
    "fold",
    "join",
    "page",
    "picture",
    "section",
    "table",
    "tag",
]

_VOID = frozenset({"meta", "br", "hr"})

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4;
  --page: #f6f8fa; --card: #ffffff; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d;
  --page: #0d1117; --card: #161b22; --accent: #58a6dc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 0 0 10px; max-width: 80ch; }
.lead, .note, figcaption span { color: var(--soft); }
.note { font-size: 13.5px; max-width: 105ch; margin: 10px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tile dt { color: var(--soft); font-size: 13px; }
.tile dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile dd + dd { font-size: 13px; font-weight: 400; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
@media (max-width: 820px) { .figures { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; background: #ffffff; color: #1b1f24; border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px 12px; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; }
figure.wide svg { min-width: 640px; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: 8px; font-size: 13px; line-height: 1.4; }
figcaption b { display: block; font-size: 15px; }
figcaption span { color: #57606a; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 13px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px;
  border-bottom: 1px solid var(--line); }
th:first-child, .words td, .words th { text-align: left; }
tbody th { font-weight: 600; }
.results th, .results td { white-space: normal; padding: 7px 9px; vertical-align: top; }
.results tbody th, .results span { white-space: nowrap; }
td.remark { text-align: left; white-space: normal; color: var(--soft); max-width: 60ch; }
.words td { white-space: normal; overflow-wrap: anywhere; }
.words th { font-weight: 400; color: var(--soft); width: 30%; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 0 0 6px; } details pre { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } }
"""


class Html(str):
    """Markup that is safe to put on a page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """Make an element; children and values that are not :class:`Html` are escaped.

    Example:
        >>> tag("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{listed}>")
    return Html(f"<{name}{listed}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Join parts, escaping those that are plain text."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(title: str, *blocks: str) -> str:
    """Make the whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_CSS)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', *blocks)), lang='en')}\n"


def section(title: str, *blocks: str) -> Html:
    """Make a section with a heading; nothing if it has no content."""
    return tag("section", tag("h2", title), *blocks) if any(blocks) else Html("")


def fold(title: str, *blocks: str) -> Html:
    """Make a block that opens on a click."""
    return tag("details", tag("summary", title), *blocks)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    remarks: Iterable[tuple[str, str]] = (),
    **attributes: str,
) -> Html:
    """Make a table whose first column names the rows.

    Args:
        header: Names of the columns.
        rows: Cells.
        remarks: Rows that have one long text in place of cells.
        attributes: Of the table.
    """
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    span = {"colspan": str(max(1, len(header) - 1)), "class_": "remark"}
    body += [
        tag("tr", tag("th", name, scope="row"), tag("td", text, **span)) for name, text in remarks
    ]
    return tag("div", tag("table", head, tag("tbody", *body), **attributes), class_="scroll")


def definitions(pairs: Mapping[str, str]) -> Html:
    """Make a two-column table of names and values; nothing if it is empty."""
    rows = [tag("tr", tag("th", k, scope="row"), tag("td", v)) for k, v in pairs.items()]
    if not rows:
        return Html("")
    return tag("div", tag("table", tag("tbody", *rows), class_="words"), class_="scroll")


def picture(svg: str, title: str, caption: str, wide: bool) -> Html:
    """Make a figure of an ``<svg>`` element that matplotlib wrote."""
    words = tag("figcaption", tag("b", title), tag("span", caption))
    return tag("figure", words, Html(svg), **({"class_": "wide"} if wide else {}))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested mappings into one, with dotted names.

    Example:
        >>> flatten({"versions": {"torch": "2.6"}, "cpus": [0, 1]})
        {'versions.torch': '2.6', 'cpus': '0, 1'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            flat.update(flatten(dict(enumerate(value)), f"{prefix}{key}."))
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) or DASH
        else:
            flat[f"{prefix}{key}"] = DASH if value is None else str(value)
    return flat
