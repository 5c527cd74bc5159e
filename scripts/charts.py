#!/usr/bin/env python3
"""Draw the charts of the documentation from the tables next to them, so that a chart contains no figures of its own.

    .venv/bin/python scripts/charts.py

Run it after a table has changed. Each chart is an SVG under docs/images/.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parent.parent / "docs"
OURS, OTHER = "#116b5f", "#c9bfa8"
STREAMS = (1, 8, 32)


def main() -> None:
    for name, svg in charts().items():
        (DOCS / "images" / name).write_text(svg, encoding="utf-8")
        print(f"docs/images/{name}")


def charts() -> dict[str, str]:
    """Each chart as SVG, by file name."""
    # Text stays text and the ids stay the same, so that a chart changes only with its table.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chatstream", "font.family": "sans-serif"})
    drawn = {}
    for name, draw in {"eta-error.svg": draw_eta_error, "engines.svg": draw_engines}.items():
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        drawn[name] = svg.getvalue()
    return drawn


def draw_eta_error(axes: Axes) -> None:
    rows = table(DOCS / "eta.md", "| | seeds | mean wait | error |")[::-1]
    ours = [number(row[3]) for row in rows]
    gradio = [number(row[7]) for row in rows]
    axes.barh([n + 0.2 for n in range(len(rows))], ours, 0.4, label="ChatStream", color=OURS)
    axes.barh([n - 0.2 for n in range(len(rows))], gradio, 0.4, label="Gradio's rule", color=OTHER)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_xlabel("median of |expected - actual wait| / actual wait")
    axes.legend(frameon=False)


def draw_engines(axes: Axes) -> None:
    """Tokens per second of the engines that were measured with each of `STREAMS`."""
    rows = table(DOCS / "benchmarks.md", "|  | streams | tokens/s |")
    streams = STREAMS
    speed = {(plain(row[0]), int(row[1])): number(row[2]) for row in rows}
    engines = [name for name in dict.fromkeys(plain(row[0]) for row in rows) if (name, STREAMS[0]) in speed]
    height = 0.8 / len(streams)
    for n, num_streams in enumerate(streams):
        positions = [len(engines) - 1 - k + 0.4 - (n + 0.5) * height for k in range(len(engines))]
        values = [speed[engine, num_streams] for engine in engines]
        shade = mpl.colormaps["viridis"](0.75 - 0.5 * n / max(1, len(streams) - 1))
        axes.barh(positions, values, height, label=f"{num_streams} stream" + "s" * (num_streams > 1), color=shade)
    axes.set_yticks(range(len(engines)), engines[::-1])
    axes.set_xlabel("tokens per second, 0.5 billion parameters, 2 CPU cores")
    axes.legend(frameon=False, loc="upper right")


def table(page: Path, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `head`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(head)) + 2
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def number(cell: str) -> float:
    """The first number of a cell such as `10.7 (10.4 - 11.3)`."""
    found = re.search(r"\d[\d,]*(\.\d+)?", cell)
    assert found is not None, cell
    return float(found[0].replace(",", ""))


def plain(cell: str) -> str:
    """A cell without emphasis and footnote marks."""
    return re.sub(r"[*¹²³⁴⁵]", "", cell).strip()


if __name__ == "__main__":
    main()
