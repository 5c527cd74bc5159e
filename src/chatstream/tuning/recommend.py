"""From what was measured to one number, and the sentences that explain it. Values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from chatstream.scheduler.limits.adaptive import MIN_SLOT_GAIN
from chatstream.tuning.curve import Curve, Interpolation, Level, ScalabilityLaw, fit_law, interpolate

Tail: TypeAlias = Literal["p90", "p99"]
"""Which of the gaps must keep the target: 9 of 10, or 99 of 100."""

_WORDS: dict[Tail, tuple[str, str]] = {"p90": ("9 of 10", "1 of 10"), "p99": ("99 of 100", "1 of 100")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """How many should run at once."""

    max_concurrency: int
    why: tuple[str, ...]
    """Sentences for an operator."""
    keeps_target: bool
    """False: even one stream alone does not."""
    is_measured: bool
    """False: what is said of it lies on the lines between the measured ones."""
    law: ScalabilityLaw | None
    """Through what was measured, good or not; None: too few levels."""


def recommend(
    levels: Sequence[Level], *, itl_target_s: float, tail: Tail = "p99", why_no_more: str = "nobody tried"
) -> Recommendation:
    """The largest concurrency that keeps the target and whose last stream is still worth its slot.

    `levels`: at least one, in ascending order. A further stream is worth it as long as some larger number that was
    tried brings `MIN_SLOT_GAIN` of an average stream's tokens per second for each stream more: what adaptive
    concurrency asks for too, so that the one does not undo the other. `why_no_more`: why the last level was the last.
    """
    law = fit_law(levels)
    picture = _Picture(levels, law if law is not None and law.is_good else Interpolation(levels), tail)
    keeping = [n for n in range(1, picture.knee + 1) if picture.gap_s(n) <= itl_target_s]
    chosen = max(keeping, default=1)
    return Recommendation(
        max_concurrency=chosen,
        why=(
            picture.what_it_gives(chosen, itl_target_s),
            picture.why_no_more(chosen, itl_target_s, why_no_more),
            _about(law, levels),
        ),
        keeps_target=bool(keeping),
        is_measured=picture.is_measured(chosen),
        law=law,
    )


class _Picture:
    """What is known of every concurrency up to the highest one measured."""

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
        """In tokens per second, as a share in whole per cents, by the curve: it is what the choice was made by."""
        return round(more / chosen * self._curve.step_s(chosen) / self._curve.step_s(more) - 1, 2)

    def _find_knee(self) -> int:
        """The smallest number beyond which no number that was tried is worth its slots."""
        n = np.arange(1, self.highest + 1)
        rate = n / np.array([self._curve.step_s(int(one)) for one in n])
        for i in range(len(n) - 1):
            gain_per_slot = (rate[i + 1 :] - rate[i]) / (n[i + 1 :] - n[i])
            if gain_per_slot.max() < MIN_SLOT_GAIN * rate[i] / n[i]:
                return int(n[i])
        return self.highest

    def what_it_gives(self, chosen: int, target_s: float) -> str:
        rate = self.tokens_per_s(chosen)
        between = "" if self.is_measured(chosen) else " (not measured itself: on the lines between those that were)"
        if self.gap_s(chosen) > target_s:
            return (
                f"Even one stream alone misses the target: {self._rest} gaps between tokens is {_ms(self.gap_s(1))} or "
                f"more, and {_ms(target_s)} are wanted. A smaller or quantised model would help, or a longer target."
            )
        each = "" if chosen == 1 else f", {_number(rate / chosen)} for each stream"
        return (
            f"{chosen}: {self._most} gaps between tokens within {_ms(self.gap_s(chosen))}, where {_ms(target_s)} are "
            f"allowed; {_number(rate)} tokens/s{each}{between}."
        )

    def why_no_more(self, chosen: int, target_s: float, ended: str) -> str:
        more = next((level.num_streams for level in self._levels if level.num_streams > chosen), None)
        if more is None:
            return f"More than {chosen} were not tried: {ended}."
        gain = self._gain(chosen, more)
        brings = "no more tokens/s" if not gain else f"{abs(gain):.0%} {'more' if gain > 0 else 'fewer'} tokens/s"
        if not isinstance(self._curve, Interpolation):
            brings += " by the curve"  # which need not be what was measured
        if chosen >= self.knee:
            return (
                f"{more} would bring {brings}: beyond {self.knee} a further stream adds less than {MIN_SLOT_GAIN:.0%} "
                "of what an average one gets, and makes all of them slower."
            )
        but = "but" if gain > 0 else "and"
        return f"{more} would bring {brings}, {but} {self._rest} gaps would be {_ms(self.gap_s(more))} or more."


def _about(law: ScalabilityLaw | None, levels: Sequence[Level]) -> str:
    """The curve, and how good it is."""
    if law is None:
        return f"No curve: {len(levels)} measured points are too few to test one; between them are straight lines."
    miss = f"{law.error_ratio:.0%}"
    if not law.is_good:
        return (
            f"No curve: the universal scalability law misses a measured step by {miss}, so straight lines from point "
            "to point are used; did something else compute meanwhile?"
        )
    peak = f", the most tokens/s with {law.peak:.0f}" if law.peak < levels[-1].num_streams else ""
    return (
        f"Universal scalability law: {_ms(law.alone_s)} a step for one stream, contention {law.contention:.2g}, "
        f"coherency {law.coherency:.2g}{peak}; within {miss} of every measured step."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    return f"{_number(1000 * seconds)} ms"
