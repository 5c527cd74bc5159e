"""Charts of a sweep over the number of streams. Only this module of the package imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from chatstream.errors import ConfigError
from chatstream.tuning.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
"""Palette of Okabe and Ito, distinguishable with any colour vision."""


def check_can_write(path: Path) -> None:
    """Raise `ConfigError` if no charts can be written to `path`. Call it before the sweep."""
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"plot must end in .png or .svg, not {str(path)!r}", param="plot")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: there is no folder {path.parent}", param="plot")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "plot needs matplotlib: pip install 'openchatstream[report]', in a clone pip install -e '.[report]'; "
            "or use --json",
            param="plot",
        )


def write(found: Sweep, path: Path, *, title: str, itl_target_s: float) -> None:
    """Write charts of throughput, gaps and times to first token. Raises `OSError`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Keep text as text in an SVG, and make ids deterministic.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chatstream", "font.family": "sans-serif"}):
        figure = Figure(figsize=(15.0, 4.2), layout="constrained")
        figure.suptitle(title)
        throughput, gaps, first_token = (figure.add_subplot(1, 3, number) for number in (1, 2, 3))
        _throughput(throughput, found)
        _gaps(gaps, found, itl_target_s)
        _first_token(first_token, found)
        for axes in (throughput, gaps, first_token):
            _over_streams(axes, found)
        figure.savefig(path, format=path.suffix[1:], metadata={"Title": title} | _undated(path))


def _throughput(axes: Axes, found: Sweep) -> None:
    axes.plot(_streams(found), [level.tokens_per_s for level in found.levels], "o", color=BLUE, label="measured")
    law = found.recommendation.law
    if law is not None and law.is_good:
        n = range(1, found.levels[-1].num_streams + 1)
        axes.plot(n, [one / law.step_s(one) for one in n], color=BLUE, label="scalability law")
    axes.set(title="Throughput", ylabel="tokens per second, all streams")


def _gaps(axes: Axes, found: Sweep, target_s: float) -> None:
    for share, colour, name in (("p50", GREEN, "half"), ("p90", BLUE, "9 of 10"), ("p99", ORANGE, "99 of 100")):
        gaps_ms = [1000 * getattr(level, f"itl_{share}_s") for level in found.levels]
        axes.plot(_streams(found), gaps_ms, "o-", color=colour, label=f"{name} within")
    axes.axhline(1000 * target_s, color="black", linestyle=":", label="target")
    axes.set(title="Gap between two tokens", ylabel="milliseconds")


def _first_token(axes: Axes, found: Sweep) -> None:
    known = [level for level in found.levels if isfinite(level.ttft_s)]
    streams, ttfts_ms = [level.num_streams for level in known], [1000 * level.ttft_s for level in known]
    axes.plot(streams, ttfts_ms, "o-", color=BLUE, label="median")
    axes.set(title="First token of a request that joins", ylabel="milliseconds")


def _over_streams(axes: Axes, found: Sweep) -> None:
    axes.axvline(found.recommendation.max_concurrency, color="grey", linestyle="--", label="recommended")
    axes.set_xscale("log", base=2)
    axes.set_xticks(_streams(found), labels=[str(number) for number in _streams(found)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="concurrent streams", ylim=(0, None))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _streams(found: Sweep) -> Sequence[int]:
    return [level.num_streams for level in found.levels]


def _undated(path: Path) -> dict[str, None]:
    return {"Date": None} if path.suffix == ".svg" else {}
