"""Derives a recommended concurrency and its explanation from measured levels. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from chatstream.scheduler.limits.adaptive import MIN_SLOT_GAIN
from chatstream.tuning.curve import Curve, Interpolation, Level, ScalabilityLaw, fit_law, interpolate

Tail: TypeAlias = Literal["p90", "p99"]
"""The quantile of the gaps that must stay within the target."""

_WORDS: dict[Tail, tuple[str, str]] = {"p90": ("9 of 10", "1 of 10"), "p99": ("99 of 100", "1 of 100")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The recommended concurrency and its explanation."""

    max_concurrency: int
    why: tuple[str, ...]
    """Sentences for an operator."""
    keeps_target: bool
    """False if even one stream alone misses the target."""
    is_measured: bool
    """False if the figures in `why` are interpolated between measured levels."""
    law: ScalabilityLaw | None
    """The fitted law, usable or not; None with too few levels."""


def recommend(
    levels: Sequence[Level], *, itl_target_s: float, tail: Tail = "p99", why_no_more: str = "not tried"
) -> Recommendation:
    """Return the largest concurrency that keeps the target without exceeding the knee of the throughput.

    `levels` needs at least one level, in ascending order. Below the knee, some larger number of streams adds at
    least `MIN_SLOT_GAIN` of the average stream's tokens per second for each further stream; adaptive concurrency
    applies the same rule, so the two agree. `why_no_more` is the reason why no higher level was measured.
    """
    law = fit_law(levels)
    analysis = _Analysis(levels, law if law is not None and law.is_good else Interpolation(levels), tail)
    keeping = [n for n in range(1, analysis.knee + 1) if analysis.gap_s(n) <= itl_target_s]
    chosen = max(keeping, default=1)
    return Recommendation(
        max_concurrency=chosen,
        why=(
            analysis.what_it_gives(chosen, itl_target_s),
            analysis.why_no_more(chosen, itl_target_s, why_no_more),
            _describe_law(law, levels),
        ),
        keeps_target=bool(keeping),
        is_measured=analysis.is_measured(chosen),
        law=law,
    )


class _Analysis:
    """Gaps, throughput and knee for every concurrency up to the highest measured one."""

    def __init__(self, levels: Sequence[Level], curve: Curve, tail: Tail) -> None:
        self._levels = levels
        self._curve = curve
        self._gaps_s = [level.itl_p90_s if tail == "p90" else level.itl_p99_s for level in levels]
        self._most, self._rest = _WORDS[tail]
        self.highest = levels[-1].num_streams
        self.knee = self._find_knee()

    def gap_s(self, num_streams: int) -> float:
        return interpolate(self._levels, self._gaps_s, num_streams)

    def is_measured(self, num_streams: int) -> bool:
        return any(level.num_streams == num_streams for level in self._levels)

    def tokens_per_s(self, num_streams: int) -> float:
        for level in self._levels:
            if level.num_streams == num_streams:
                return level.tokens_per_s
        return num_streams / self._curve.step_s(num_streams)

    def _gain(self, chosen: int, more: int) -> float:
        """Relative gain in tokens per second, rounded to whole per cents, by the curve that the choice uses."""
        return round(more / chosen * self._curve.step_s(chosen) / self._curve.step_s(more) - 1, 2)

    def _find_knee(self) -> int:
        """Return the smallest number of streams beyond which no larger one adds enough throughput."""
        n = np.arange(1, self.highest + 1)
        rate = n / np.array([self._curve.step_s(int(one)) for one in n])
        for i in range(len(n) - 1):
            gain_per_slot = (rate[i + 1 :] - rate[i]) / (n[i + 1 :] - n[i])
            if gain_per_slot.max() < MIN_SLOT_GAIN * rate[i] / n[i]:
                return int(n[i])
        return self.highest

    def what_it_gives(self, chosen: int, target_s: float) -> str:
        rate = self.tokens_per_s(chosen)
        between = "" if self.is_measured(chosen) else " (interpolated between measured levels)"
        if self.gap_s(chosen) > target_s:
            return (
                f"Even one stream alone misses the target: {self._rest} gaps between tokens is {_ms(self.gap_s(1))} or "
                f"more, the target is {_ms(target_s)}. Use a smaller or quantised model, or a longer target."
            )
        each = "" if chosen == 1 else f", {_number(rate / chosen)} per stream"
        return (
            f"{chosen}: {self._most} gaps between tokens within {_ms(self.gap_s(chosen))}, where {_ms(target_s)} are "
            f"allowed; {_number(rate)} tokens/s{each}{between}."
        )

    def why_no_more(self, chosen: int, target_s: float, ended: str) -> str:
        more = next((level.num_streams for level in self._levels if level.num_streams > chosen), None)
        if more is None:
            return f"More than {chosen} {'stream was' if chosen == 1 else 'streams were'} not tried: {ended}."
        gain = self._gain(chosen, more)
        gain_text = "no more tokens/s" if not gain else f"{abs(gain):.0%} {'more' if gain > 0 else 'fewer'} tokens/s"
        if not isinstance(self._curve, Interpolation):
            gain_text += " by the curve"  # the measured gain may differ
        if chosen >= self.knee:
            return (
                f"{more} streams would give {gain_text}: beyond {self.knee}, each further stream adds less than "
                f"{MIN_SLOT_GAIN:.0%} of the average stream's tokens/s and slows every stream."
            )
        but = "but" if gain > 0 else "and"
        return (
            f"{more} streams would give {gain_text}, {but} {self._rest} gaps would be {_ms(self.gap_s(more))} or more."
        )


def _describe_law(law: ScalabilityLaw | None, levels: Sequence[Level]) -> str:
    """Describe the fitted law and its error."""
    if law is None:
        return f"No curve: {len(levels)} measured levels are too few to test one; linear interpolation is used."
    miss = f"{law.error_ratio:.0%}"
    if not law.is_good:
        return (
            f"No curve: the universal scalability law misses a measured step by {miss}; linear interpolation is used. "
            "Was the machine busy with other work?"
        )
    peak = f", maximum tokens/s with {law.peak:.0f} streams" if law.peak < levels[-1].num_streams else ""
    return (
        f"Universal scalability law: {_ms(law.alone_s)} a step for one stream, contention {law.contention:.2g}, "
        f"coherency {law.coherency:.2g}{peak}; within {miss} of every measured step."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{_number(1000 * seconds)} ms"
