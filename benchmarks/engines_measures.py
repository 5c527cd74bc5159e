"""Computes figures from token times, and verdicts on goals from figures. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Times = Sequence[Sequence[float]]
"""Arrival of each token in seconds since the simultaneous requests, by stream."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one peer in one round. The steady interval lasts from the last first token to the first end."""

    decode_tokens_per_s: float | None
    """Total of all streams in the steady interval; None without one."""
    ttft_s: float
    """Median over the streams."""
    itl_p50_s: float | None
    """Gap between two tokens of a stream in the steady interval."""
    itl_p99_s: float | None
    health_p50_s: float | None = None
    health_p99_s: float | None = None


def figures(times: Times, health_s: Sequence[float] = ()) -> Figures:
    from_s = max(stream[0] for stream in times)
    until_s = min(stream[-1] for stream in times)
    num_tokens = sum(from_s < at_s <= until_s for stream in times for at_s in stream)
    gaps_s = [b - a for stream in times for a, b in pairwise(stream) if from_s <= a and b <= until_s]
    return Figures(
        decode_tokens_per_s=num_tokens / (until_s - from_s) if gaps_s else None,
        ttft_s=statistics.median(stream[0] for stream in times),
        itl_p50_s=quantile(gaps_s, 0.5),
        itl_p99_s=quantile(gaps_s, 0.99),
        health_p50_s=quantile(health_s, 0.5),
        health_p99_s=quantile(health_s, 0.99),
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the interpolated quantile, None without values."""
    return float(np.quantile(values, share)) if values else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the known values, None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def median_of(rounds: Sequence[Figures], name: str) -> float | None:
    """Return the median of one figure over the rounds that have it."""
    return median(getattr(one, name) for one in rounds)


def ratio(ours: Sequence[Figures], theirs: Sequence[Figures], name: str = "decode_tokens_per_s") -> float | None:
    """Return the median of ours ÷ theirs within the same round, under the same conditions."""
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=False)]
    return median(a / b for a, b in pairs if a is not None and b is not None)


@dataclass(frozen=True, slots=True)
class Limit:
    """The hardware limit: a step reads all weights and the keys and values of all sequences, and multiplies."""

    weight_bytes: int
    kv_bytes_per_token: int
    num_parameters: int
    read_bytes_per_s: float
    flops_per_s: float

    def tokens_per_s(self, num_streams: int, context_tokens: float) -> float:
        read_bytes = self.weight_bytes + num_streams * context_tokens * self.kv_bytes_per_token
        computing_s = 2 * self.num_parameters * num_streams / self.flops_per_s
        return num_streams / max(read_bytes / self.read_bytes_per_s, computing_s)


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal set before the first measurement, for 2 cores with AMX.

    Goals that name no model are for 0.5 billion parameters in bfloat16.
    """

    what: str
    wanted: float
    is_at_least: bool
    found: float | None
    """None: not measured in this run."""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        is_reached = self.found >= self.wanted if self.is_at_least else self.found <= self.wanted
        return "reached" if is_reached else "missed"

    def row(self) -> list[str]:
        found = "" if self.found is None else f"{self.found:.3g}"
        return [self.what, f"{'≥' if self.is_at_least else '≤'} {self.wanted:g}", found, self.verdict]


def goals(
    rounds: Mapping[tuple[str, int], Sequence[Figures]],
    limits: Mapping[int, float],
    arrival: Mapping[str, Sequence[Mapping[str, float]]],
    turns: Mapping[str, Sequence[Sequence[float]]],
    arrivals_model: str,
) -> list[Goal]:
    """Return all goals.

    `rounds` by peer and number of streams; `limits` in tokens per second by number of streams; `arrival` and `turns`
    by variant, as measured by engines_arrivals.py with `arrivals_model`.
    """

    def speed_ratio(theirs: str, num_streams: int, ours: str = "ours, thread") -> float | None:
        return ratio(rounds.get((ours, num_streams), ()), rounds.get((theirs, num_streams), ()))

    def share(peer: str, num_streams: int) -> float | None:
        found = median_of(rounds.get((peer, num_streams), ()), "decode_tokens_per_s")
        return None if found is None else found / limits[num_streams]

    http = [streams for peer, streams in rounds if peer == "ours, HTTP"]
    health_s = median_of(rounds[("ours, HTTP", http[-1])], "health_p50_s") if http else None
    ours = arrival.get("ours", ())
    cached = turns.get("cached", ())
    long_prompt = f"long prompt, {arrivals_model}"
    return [
        *(
            Goal(f"{n} streams ÷ round-robin", target, True, speed_ratio("round-robin", n))
            for n, target in ((8, 10), (32, 30))
        ),
        *(
            Goal(f"{n} streams ÷ llama.cpp", target, True, speed_ratio("llama.cpp", n))
            for n, target in ((8, 1.7), (32, 3))
        ),
        *(Goal(f"share of the limit, {n} streams", 0.5, True, share("ours, thread", n)) for n in (1, 8)),
        *(Goal(f"OpenVINO engine's share, {n} streams", 0.8, True, share("OpenVINO, engine", n)) for n in (1, 8)),
        Goal("HTTP ÷ bare steps, 16 streams", 0.95, True, speed_ratio("ours, bare steps", 16, "ours, HTTP")),
        Goal("/health under full load, p50 ms", 2, False, None if health_s is None else health_s * 1e3),
        Goal(
            f"{long_prompt}: largest gap ÷ usual", 2, False, median(m["largest_gap_s"] / m["usual_gap_s"] for m in ours)
        ),
        Goal(f"{long_prompt}: TTFT ÷ alone", 2, False, median(m["ttft_s"] / m["ttft_alone_s"] for m in ours)),
        Goal(
            f"chat, {arrivals_model}: TTFT of turn 8 ÷ turn 1",
            1.3,
            False,
            median(ttfts[7] / ttfts[0] for ttfts in cached if len(ttfts) >= 8),
        ),
    ]
