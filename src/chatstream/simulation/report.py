"""Charts of a run as an SVG, an HTML page, or a folder of both. Only this module of the package imports matplotlib."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatstream.errors import ConfigError
from chatstream.simulation.measures import Figures, attainment
from chatstream.simulation.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Palette of Okabe and Ito, distinguishable with any colour vision."""
NUM_POINTS = 400
"""Maximum number of points of a curve."""
NUM_CLIENTS = 20
"""Maximum number of clients in a chart, by descending demand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One simulated variant, with the run that is drawn."""

    label: str
    run: Run
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The contents of a report. `rows` is the printed table; its first row has the column names."""

    title: str
    rows: Sequence[Sequence[str]]
    results: Sequence[Result]
    ttft_slo_s: float
    figures: dict[str, Any]
    """Contents of `figures.json` in a folder."""


def check_can_write(path: Path) -> None:
    """Raise `ConfigError` if no report can be written to `path`. Call it before the run."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "report needs matplotlib: pip install 'openchatstream[report]', in a clone pip install -e '.[report]'; "
            "or use --json",
            param="report",
        )
    if path.suffix in (".html", ".svg"):
        if not path.parent.is_dir():
            raise ConfigError(f"report: there is no folder {path.parent}", param="report")
    elif path.exists() and not path.is_dir():
        raise ConfigError(f"report must be a folder or end in .html or .svg, not {str(path)!r}", param="report")


def write(report: Report, path: Path) -> None:
    """Write an `.svg` with all charts, an `.html` page with charts and table, or a folder with page, charts and JSON.

    The suffix of `path` decides. The same run gives the same bytes. Raises `OSError`.
    """
    charts = [chart for chart in CHARTS if chart is not _estimates or any(r.figures.eta for r in report.results)]
    if path.suffix == ".svg":
        path.write_text(_svg(report, charts), encoding="utf-8")
        return
    drawn = {chart.__name__.strip("_"): _svg(report, [chart]) for chart in charts}
    page = _page(report, drawn.values())
    if path.suffix == ".html":
        path.write_text(page, encoding="utf-8")
        return
    path.mkdir(parents=True, exist_ok=True)
    (path / "index.html").write_text(page, encoding="utf-8")
    (path / "figures.json").write_text(json.dumps(report.figures, indent=2) + "\n", encoding="utf-8")
    for name, svg in drawn.items():
        (path / f"{name}.svg").write_text(svg, encoding="utf-8")


# --- the charts -------------------------------------------------------------------------------------------------------


def _time_to_first_token(axes: Axes, report: Report) -> None:
    for result, colour in _coloured(report):
        ttfts_s = sorted(record.ttft_s for record in result.run.records if record.ttft_s is not None)
        offered = len(result.run.records)
        points = [(ttfts_s[i], (i + 1) / offered) for i in _indices(len(ttfts_s))]
        axes.step([x for x, _ in points], [y for _, y in points], where="post", color=colour, label=result.label)
    axes.axvline(report.ttft_slo_s, color="black", linestyle=":", label="SLO")
    axes.set(title="Time to first token", xlabel="seconds", ylabel="share of all calls", ylim=(0, 1), xlim=(0, None))
    axes.legend()


def _good_over_time(axes: Axes, report: Report) -> None:
    for result, colour in _coloured(report):
        records = result.run.records
        size = max(1, len(records) // 60)
        parts = [records[i : i + size] for i in range(0, len(records), size)]
        at_min = [part[0].call.at_s / 60 for part in parts]
        axes.plot(at_min, [attainment(p, report.ttft_slo_s) for p in parts], color=colour, label=result.label)
    axes.set(title="Good service by arrival time", xlabel="minutes", ylabel="share of all calls", ylim=(0, 1.02))
    axes.legend()


def _queue_over_time(axes: Axes, report: Report) -> None:
    for result, colour in _coloured(report):
        samples = result.run.samples
        at_min = [sample.at_s / 60 for sample in samples]
        axes.plot(at_min, [sample.waiting for sample in samples], color=colour, label=f"{result.label}: waiting")
        axes.plot(at_min, [s.running for s in samples], color=colour, linestyle=":", label=f"{result.label}: running")
    axes.set(title="Queue", xlabel="minutes", ylabel="requests", ylim=(0, None))
    axes.legend()


def _clients(axes: Axes, report: Report) -> None:
    for result, colour in _coloured(report):
        clients = result.figures.clients[:NUM_CLIENTS]
        ranks = range(1, len(clients) + 1)
        axes.plot(ranks, [c.service for c in clients], "o", color=colour, label=f"{result.label}: service")
        axes.plot(
            ranks,
            [c.fair_share for c in clients],
            "_",
            color=colour,
            markersize=14,
            label=f"{result.label}: fair share",
        )
    axes.set(title="Clients by descending demand", xlabel="rank", ylabel="weighted tokens", ylim=(0, None))
    axes.legend()


def _estimates(axes: Axes, report: Report) -> None:
    highest_s = 1.0
    for result, colour in _coloured(report):
        pairs = [
            (record.eta.p50_s, record.waited_s)
            for record in result.run.records
            if record.eta is not None and record.waited_s is not None
        ]
        pairs = [pairs[i] for i in _indices(len(pairs))]
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], ".", color=colour, markersize=3, label=result.label)
        highest_s = max([highest_s, *(max(pair) for pair in pairs)])
    axes.plot((0, highest_s), (0, highest_s), color="black", linestyle=":", label="exact")
    axes.set(title="Estimates on arrival", xlabel="expected wait in seconds (median)", ylabel="wait in seconds")
    axes.legend()


CHARTS: tuple[Callable[[Axes, Report], None], ...] = (
    _time_to_first_token,
    _good_over_time,
    _queue_over_time,
    _clients,
    _estimates,
)


def _coloured(report: Report) -> Iterator[tuple[Result, str]]:
    return zip(report.results, cycle(COLOURS), strict=False)


def _indices(count: int) -> Sequence[int]:
    """Return at most `NUM_POINTS` evenly spaced indices, including the first and the last."""
    if count <= NUM_POINTS:
        return range(count)
    return [round(i * (count - 1) / (NUM_POINTS - 1)) for i in range(NUM_POINTS)]


# --- the files --------------------------------------------------------------------------------------------------------


def _svg(report: Report, charts: Sequence[Callable[[Axes, Report], None]]) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    num_columns = min(2, len(charts))
    num_rows = -(-len(charts) // num_columns)
    # Keep text as text, and make ids deterministic.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chatstream", "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4 * num_columns, 4.0 * num_rows), layout="constrained")
        FigureCanvasSVG(figure)
        for number, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(num_rows, num_columns, number)
            axes.grid(visible=True, alpha=0.3)
            chart(axes, report)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": report.title})
    return file.getvalue()


def _page(report: Report, charts: Iterable[str]) -> str:
    head, *rows = report.rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    # Drop the XML declaration before <svg>: it is valid only in a file of its own.
    drawings = "\n".join(f"<figure>{svg[svg.index('<svg') :]}</figure>" for svg in charts)
    return _PAGE.format(title=html.escape(report.title), head=cells, rows=lines, charts=drawings)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ display: inline-block; margin: 1rem 0; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table>
{charts}
</html>
"""
