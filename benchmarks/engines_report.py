"""Writes the results as JSON, Markdown and charts. Only this module imports matplotlib."""

from __future__ import annotations

import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines_checkpoints import PROMPT_TOKENS, Checkpoint
from engines_measures import Figures, Goal, Limit, goals, median_of, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGES = ("torch", "transformers", "openvino-genai", "numpy")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442", "#000000", "#7f3c8d")


@dataclass(frozen=True, slots=True)
class PeerRound:
    """Figures of one peer with one number of streams in one round."""

    peer: str
    num_streams: int
    answer_tokens: int
    round: int
    figures: Figures


@dataclass(slots=True)
class ModelResults:
    """Results of all peers with one checkpoint."""

    checkpoint: Checkpoint
    rounds: list[PeerRound] = field(default_factory=list)
    limits: list[dict[str, float]] = field(default_factory=list)
    """The limit of the machine in each round, from engines_limit.py."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason, by peer."""

    def by_peer(self) -> dict[tuple[str, int], list[Figures]]:
        found: dict[tuple[str, int], list[Figures]] = {}
        for one in self.rounds:
            found.setdefault((one.peer, one.num_streams), []).append(one.figures)
        return found

    def limit(self) -> Limit:
        """Return the best limit of all rounds: other work on the machine can only lower it."""
        return Limit(
            weight_bytes=self.checkpoint.weight_bytes,
            kv_bytes_per_token=self.checkpoint.kv_bytes_per_token,
            num_parameters=self.checkpoint.num_parameters,
            read_bytes_per_s=max(one["read_bytes_per_s"] for one in self.limits),
            flops_per_s=max(one["flops_per_s"] for one in self.limits),
        )

    def limits_by_streams(self) -> dict[int, float]:
        limit = self.limit()
        answers = {n: max(one.answer_tokens for one in self.rounds if one.num_streams == n) for n in self.num_streams()}
        # Mean context of a stream during the measurement: the prompt and half of an answer.
        return {n: limit.tokens_per_s(n, PROMPT_TOKENS + tokens / 2) for n, tokens in answers.items()}

    def num_streams(self) -> list[int]:
        return sorted({one.num_streams for one in self.rounds})


@dataclass(slots=True)
class Results:
    """The results of a run so far."""

    command: str
    threads: str
    """Description of the threads of each peer."""
    models: list[ModelResults] = field(default_factory=list)
    arrivals_model: str = ""
    arrival: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Results of engines_arrivals.py by variant."""
    chat: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Skipped variants of the two parts above, with the reason."""
    began_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    """Duration until the last report."""

    def add_model(self, checkpoint: Checkpoint) -> ModelResults:
        self.models.append(ModelResults(checkpoint))
        return self.models[-1]


def write_report(results: Results, directory: Path | None) -> str:
    """Return the Markdown. Also write it, the JSON and (if matplotlib is installed) the charts to `directory`."""
    results.took_s = time.monotonic() - results.began_s
    markdown = "\n\n".join(_markdown(results))
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "engines.md").write_text(markdown + "\n")
        everything = asdict(results) | {"machine": describe_machine()}
        (directory / "engines.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")
        if find_spec("matplotlib") is not None:
            _draw(results, directory)
    return markdown


def describe_machine() -> dict[str, str]:
    found = {"cpus": str(os.cpu_count()), "python": platform.python_version(), "cpu": platform.processor()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            found["cpu"] = value.strip()
        if name.strip() == "flags":
            flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in value.split()]
            found["flags"] = " ".join(flags)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def _markdown(results: Results) -> list[str]:
    """Return the paragraphs and tables of the report."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    found = [f"```sh\n{results.command}\n```"]
    found.append(_paragraph(f"{results.took_s / 60:.0f} minutes; {machine}; {results.threads}."))
    for model in results.models:
        found += [*(_peers(model) if model.rounds else []), *_left_out(model.left_out)]
    found += _arrival(results) if results.arrival else []
    found += _chat(results) if results.chat else []
    found += _left_out(results.left_out)
    measured = [goal.row() for goal in _goals(results) if goal.found is not None]
    return [*found, *([_table(["goal", "target", "measured", ""], measured)] if measured else [])]


def _peers(model: ModelResults) -> list[str]:
    limit, limits = model.limit(), model.limits_by_streams()
    rounds = model.by_peer()
    order = list(dict.fromkeys(peer for peer, _ in rounds))
    num_rounds = len(model.limits)
    rows, notes = [], []
    if any(len(found) < num_rounds for found in rounds.values()):
        notes.append(f"¹ Not in each of the {num_rounds} rounds.")
    for (peer, num_streams), found in sorted(rounds.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        steady = median_of(found, "decode_tokens_per_s")
        is_quantised = peer.endswith(("int8", "int4"))  # quantised weights have another limit
        rows.append(
            [
                peer + " ¹" * (len(found) < num_rounds),
                str(num_streams),
                _span([one.decode_tokens_per_s for one in found]),
                "" if steady is None or is_quantised else f"{steady / limits[num_streams]:.0%}",
                _number(ratio(rounds.get(("ours, thread", num_streams), ()), found), 1, 2),
                _number(median_of(found, "itl_p50_s"), 1000, 0),
                _number(median_of(found, "itl_p99_s"), 1000, 0),
                _number(median_of(found, "ttft_s"), 1000, 0),
            ]
        )
        if (p50_s := median_of(found, "health_p50_s")) is not None:
            p99 = _number(median_of(found, "health_p99_s"), 1000)
            clients = f"{num_streams} SSE clients, {peer}"
            notes.append(f"`/health/live` with {clients}: p50 {_number(p50_s, 1000)} ms, p99 {p99} ms.")
    header = ["", "streams", "tokens/s", "of the limit", "ours ÷ this", "gap p50, ms", "p99", "TTFT, ms"]
    speeds = ", ".join(f"{value:,.0f} tokens/s at {n}" for n, value in limits.items())
    limit_text = (
        f"{model.checkpoint.name}: {model.checkpoint.weight_bytes / 1e6:,.0f} MB of weights. Memory was read at "
        f"{limit.read_bytes_per_s / 1e9:.1f} GB/s and products computed at {limit.flops_per_s / 1e9:,.0f} GFLOP/s, so "
        f"the limit is {speeds}."
    )
    return [_paragraph(limit_text), _table(header, rows), *([_paragraph(" ".join(notes))] if notes else [])]


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    return [_paragraph(f"Left out: {peer} ({why}).") for peer, why in reasons.items()]


def _arrival(results: Results) -> list[str]:
    rows = [
        [
            variant,
            _span([one["usual_gap_s"] * 1000 for one in rounds]),
            _span([one["largest_gap_s"] * 1000 for one in rounds]),
            _span([one["largest_gap_s"] / one["usual_gap_s"] for one in rounds]),
            _span([one["ttft_alone_s"] for one in rounds]),
            _span([one["ttft_s"] for one in rounds]),
            _span([one["ttft_s"] / one["ttft_alone_s"] for one in rounds]),
        ]
        for variant, rounds in results.arrival.items()
    ]
    header = ["", "usual gap, ms", "largest, ms", "ratio", "TTFT alone, s", "TTFT, s", "ratio"]
    return [
        f"A prompt of 1,024 tokens arrives while 8 streams generate, {results.arrivals_model}:",
        _table(header, rows),
    ]


def _chat(results: Results) -> list[str]:
    num_turns = len(next(iter(results.chat.values()))[0]["turn_ttft_s"])
    rows = []
    for variant, rounds in results.chat.items():
        turns = [statistics.median(one["turn_ttft_s"][n] for one in rounds) * 1000 for n in range(num_turns)]
        arrivals = statistics.median(statistics.median(one["arrival_ttft_s"]) for one in rounds)
        computed = statistics.median(one["computed_tokens"] for one in rounds)
        last = _span([one["turn_ttft_s"][-1] / one["turn_ttft_s"][0] for one in rounds])
        rows.append([variant, *(f"{ms:,.0f}" for ms in turns), last, f"{computed:,.0f}", f"{arrivals:.2f}"])
    turns = [str(n + 1) for n in range(num_turns)]
    header = ["prefix is", *turns, "last ÷ first", "prompt tokens computed", "TTFT, s"]
    title = (
        f"A chat with 64 new and 128 answer tokens per turn, {results.arrivals_model}, TTFT in ms by turn; and 8 "
        "simultaneous requests with a shared system prompt of 500 tokens and 64 tokens of their own:"
    )
    return [_paragraph(title), _table(header, rows)]


def _goals(results: Results) -> list[Goal]:
    model = next((one for one in results.models if one.checkpoint.name == "0.5b-bfloat16"), None)
    turns = {variant: [one["turn_ttft_s"] for one in rounds] for variant, rounds in results.chat.items()}
    rounds, limits = (model.by_peer(), model.limits_by_streams()) if model and model.rounds else ({}, {})
    return goals(rounds, limits, results.arrival, turns, results.arrivals_model)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table; all columns except the first are right-aligned."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---", *["--:"] * (len(header) - 1)], *rows))


def _span(values: Sequence[float | None]) -> str:
    """Format the median, with the range if there are several values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, least, most = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.{1 if value >= 10 else 2}f}"
        for value in (statistics.median(known), min(known), max(known))
    )
    return f"{middle} ({least} – {most})" if len(known) > 1 else middle


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _draw(results: Results, directory: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chatstream"}):
        for model in results.models:
            if not model.rounds:
                continue
            figure = Figure(figsize=(13.0, 4.6), layout="constrained")
            figure.suptitle(model.checkpoint.name)
            speed, gaps = (figure.add_subplot(1, 2, number) for number in (1, 2))
            _draw_peers(speed, model, "decode_tokens_per_s", "tokens per second, all streams")
            limits = model.limits_by_streams()
            speed.plot(list(limits), list(limits.values()), color="grey", linestyle=":", label="limit")
            _draw_peers(gaps, model, "itl_p99_s", "gap between tokens, p99, s")
            gaps.legend(loc="upper left", fontsize=7)
            figure.savefig(directory / f"{model.checkpoint.name}.svg", metadata={"Date": None})
        if results.chat:
            figure = Figure(figsize=(6.5, 4.6), layout="constrained")
            axes = figure.add_subplot()
            for (variant, rounds), colour in zip(results.chat.items(), COLOURS, strict=False):
                turns = [
                    statistics.median(ttfts) * 1000 for ttfts in zip(*(r["turn_ttft_s"] for r in rounds), strict=True)
                ]
                axes.plot(range(1, len(turns) + 1), turns, "o-", color=colour, label=variant)
            axes.set(title=f"A chat, {results.arrivals_model}", xlabel="turn", ylabel="time to first token, ms")
            axes.set_ylim(bottom=0)
            axes.legend()
            figure.savefig(directory / "chat.svg", metadata={"Date": None})


def _draw_peers(axes: Axes, model: ModelResults, name: str, label: str) -> None:
    rounds = model.by_peer()
    for peer, colour in zip(dict.fromkeys(peer for peer, _ in rounds), COLOURS, strict=False):
        points = [(n, median_of(found, name)) for (other, n), found in rounds.items() if other == peer]
        known = sorted((n, value) for n, value in points if value is not None)
        axes.plot([n for n, _ in known], [value for _, value in known], "o-", color=colour, label=peer)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(model.num_streams(), labels=[str(n) for n in model.num_streams()])
    axes.set(xlabel="streams", ylabel=label)
