"""Measured levels of concurrency, and the saturation curve fitted to them. Pure functions.

The curve is the universal scalability law (N. J. Gunther, *A Simple Capacity Model of Massively Parallel Transaction
Systems*, CMG 1993; *Guerrilla Capacity Planning*, Springer 2007). With n streams, tokens per second are

    X(n) = n / t(n),    t(n) = t1 (1 + contention (n - 1) + coherency n (n - 1))

where t1 is the step time of one stream alone. Reasons for this law: a step of a + b n seconds, typical of batching, is
the law without its last term; the last term models falling throughput where caches or memory run out; and the step
time is linear in the three parameters, so the fit is exact, without a start value or an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Protocol

import numpy as np

MIN_LEVELS = 4
"""Minimum number of levels for a fit. The law has three parameters and passes through any three points."""
MAX_ERROR_RATIO = 0.1
"""A law with a larger error at a measured step is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Measurements with `num_streams` concurrent streams."""

    num_streams: int
    tokens_per_s: float
    """Total of all streams."""
    itl_p50_s: float
    """Quantiles of the gaps between two tokens of one stream."""
    itl_p90_s: float
    itl_p99_s: float
    ttft_s: float
    """Median over the requests that joined while all other streams ran; NaN without any."""
    num_joined: int
    num_gaps: int
    window_s: float

    @property
    def step_s(self) -> float:
        """Mean time in which every stream gets one token."""
        return self.num_streams / self.tokens_per_s


class Curve(Protocol):
    """Step time as a function of the number of streams."""

    def step_s(self, num_streams: float) -> float:
        """Mean time in which each of `num_streams` streams gets one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalabilityLaw:
    """A `Curve`: the fitted law of the module docstring. All parameters are at least 0."""

    alone_s: float
    """Step time of one stream alone."""
    contention: float
    """Each further stream adds this share of `alone_s` to a step: 0 is a free stream, 1 is serial execution."""
    coherency: float
    """Above 0, throughput falls again beyond `peak`."""
    error_ratio: float
    """The largest error at a measured level, as a share of its step."""

    def step_s(self, num_streams: float) -> float:
        n = num_streams
        return self.alone_s * (1 + self.contention * (n - 1) + self.coherency * n * (n - 1))

    @property
    def is_good(self) -> bool:
        return self.error_ratio <= MAX_ERROR_RATIO

    @property
    def peak(self) -> float:
        """Number of streams with the highest throughput; infinity if throughput never falls."""
        if not self.coherency:
            return inf
        return max(1.0, sqrt(max(0.0, 1 - self.contention) / self.coherency))


@dataclass(frozen=True, slots=True)
class Interpolation:
    """A `Curve`: linear interpolation between measured steps, constant outside them."""

    levels: Sequence[Level]
    """In ascending order."""

    def step_s(self, num_streams: float) -> float:
        return interpolate(self.levels, [level.step_s for level in self.levels], num_streams)


def interpolate(levels: Sequence[Level], values: Sequence[float], num_streams: float) -> float:
    """Interpolate linearly between the levels, which must be in ascending order."""
    return float(np.interp(num_streams, [level.num_streams for level in levels], values))


def fit_law(levels: Sequence[Level]) -> ScalabilityLaw | None:
    """Fit the law by least squares of the relative errors, so that short and long steps have equal weight.

    Return None for fewer than `MIN_LEVELS` levels, which cannot test the fit.
    """
    if len(levels) < MIN_LEVELS:
        return None
    n = np.array([level.num_streams for level in levels], dtype=np.float64)
    step_s = np.array([level.step_s for level in levels])
    terms = np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1) / step_s[:, None]  # (levels, 3)
    # Non-negative least squares with three parameters: try every set of positive ones, which is exact without a solver.
    best: tuple[float, np.ndarray] | None = None
    for others in ((), (1,), (2,), (1, 2)):
        used = [0, *others]
        found = np.linalg.lstsq(terms[:, used], np.ones(len(n)), rcond=None)[0]
        errors = terms[:, used] @ found - 1
        if (found >= 0).all() and (best is None or errors @ errors < best[0]):
            parameters = np.zeros(3)
            parameters[used] = found
            best = float(errors @ errors), parameters
    assert best is not None  # the first set fits a mean of positive numbers
    alone, contention, coherency = best[1]
    return ScalabilityLaw(
        alone_s=float(alone),
        contention=float(contention / alone),
        coherency=float(coherency / alone),
        error_ratio=float(np.abs(terms @ best[1] - 1).max()),
    )
