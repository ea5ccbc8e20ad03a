"""A page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from blockdex.loadtest.plot import Axis, Series, logarithmic_axis
from blockdex.loadtest.style import STYLE
from blockdex.loadtest.wording import duration

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """An HTML file of these parts, of which empty ones are left out."""
    return _PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, parts)))


def section(title: str, body: str) -> str:
    """A part of it."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Headings and cells, as text."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def latency_axis(lines: Sequence[Series]) -> Axis:
    """An axis that holds all latencies of the lines."""
    values = [value for line in lines for _, value in line.points if value] or [1e-3, 1e-2]
    return logarithmic_axis("", min(values), max(values), duration)
