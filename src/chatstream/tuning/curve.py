"""What was measured at each concurrency, and the curve of saturation through it. Values in, values out.

The curve is the universal scalability law (N. J. Gunther, *A Simple Capacity Model of Massively Parallel Transaction
Systems*, CMG 1993; *Guerrilla Capacity Planning*, Springer 2007). With n streams, tokens per second are

    X(n) = n / t(n),    t(n) = t1 (1 + contention (n - 1) + coherency n (n - 1))

where t1 is a step of one stream alone. Why this one: a step of a + b n seconds, what batching does on most machines, is
the law without its last term; the last term lets throughput fall again, as it does where caches or memory run out; and
the steps are linear in its three parameters, so that they are found exactly, without a start value or an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Protocol

import numpy as np

MIN_LEVELS = 4
"""For a fit. The law has three parameters: through three points it goes whatever they are."""
MOST_ERROR_RATIO = 0.1
"""A law that misses a measured step by more is not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What was measured while so many streams ran."""

    num_streams: int
    tokens_per_s: float
    """Of all of them together."""
    itl_p50_s: float
    """Quantiles of the gaps between two tokens of one stream."""
    itl_p90_s: float
    itl_p99_s: float
    ttft_s: float
    """Median of those who joined while all others ran; NaN when nobody did."""
    num_joined: int
    num_gaps: int
    window_s: float

    @property
    def step_s(self) -> float:
        """Mean time in which each stream gets one token."""
        return self.num_streams / self.tokens_per_s


class Curve(Protocol):
    """Time of a step for any number of streams."""

    def step_s(self, num_streams: float) -> float:
        """Mean time in which each of so many streams gets one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalabilityLaw:
    """A `Curve`: the law above, fitted. All parameters are at least 0."""

    alone_s: float
    """A step of one stream alone."""
    contention: float
    """Each further stream makes a step longer by this share of `alone_s`: 0 not at all, 1 one after the other."""
    coherency: float
    """Above 0, throughput falls again beyond `peak`."""
    error_ratio: float
    """The largest miss at a measured level, as a share of its step."""

    def step_s(self, num_streams: float) -> float:
        n = num_streams
        return self.alone_s * (1 + self.contention * (n - 1) + self.coherency * n * (n - 1))

    @property
    def is_good(self) -> bool:
        return self.error_ratio <= MOST_ERROR_RATIO

    @property
    def peak(self) -> float:
        """The number of streams with the most tokens per second; infinity: more is never less."""
        if not self.coherency:
            return inf
        return max(1.0, sqrt(max(0.0, 1 - self.contention) / self.coherency))


@dataclass(frozen=True, slots=True)
class Interpolation:
    """A `Curve`: straight lines from one measured step to the next, and the nearest one outside."""

    levels: Sequence[Level]
    """In ascending order."""

    def step_s(self, num_streams: float) -> float:
        return interpolate(self.levels, [level.step_s for level in self.levels], num_streams)


def interpolate(levels: Sequence[Level], values: Sequence[float], num_streams: float) -> float:
    """On straight lines between the levels, which are in ascending order."""
    return float(np.interp(num_streams, [level.num_streams for level in levels], values))


def fit_law(levels: Sequence[Level]) -> ScalabilityLaw | None:
    """By least squares over the relative errors of the steps: a step of 5 ms counts as much as one of 500.

    None for fewer than `MIN_LEVELS` levels: nothing would be left to test it by.
    """
    if len(levels) < MIN_LEVELS:
        return None
    n = np.array([level.num_streams for level in levels], dtype=np.float64)
    step_s = np.array([level.step_s for level in levels])
    terms = np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1) / step_s[:, None]  # (levels, 3)
    # With three parameters that must not be below 0 every set of those above 0 can be tried: exact, and no solver.
    best: tuple[float, np.ndarray] | None = None
    for others in ((), (1,), (2,), (1, 2)):
        used = [0, *others]
        found = np.linalg.lstsq(terms[:, used], np.ones(len(n)), rcond=None)[0]
        errors = terms[:, used] @ found - 1
        if (found >= 0).all() and (best is None or errors @ errors < best[0]):
            parameters = np.zeros(3)
            parameters[used] = found
            best = float(errors @ errors), parameters
    assert best is not None  # the first set is the mean of positive numbers
    alone, contention, coherency = best[1]
    return ScalabilityLaw(
        alone_s=float(alone),
        contention=float(contention / alone),
        coherency=float(coherency / alone),
        error_ratio=float(np.abs(terms @ best[1] - 1).max()),
    )
