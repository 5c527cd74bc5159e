"""Distributions of lengths and of the gaps between arrivals, drawn from a seeded generator."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import exp, log, sqrt
from random import Random
from typing import Protocol


class Lengths(Protocol):
    """A distribution of token counts, at least 1."""

    @property
    def mean(self) -> float: ...

    def draw(self, rng: Random) -> int: ...


class Gaps(Protocol):
    """A distribution of the times between arrivals."""

    def draw(self, count: int, rate_per_s: float, rng: Random) -> list[float]:
        """Return `count` gaps in seconds with mean 1 / `rate_per_s`."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A quantile table with log-linear interpolation, scaled to `mean`."""

    points: tuple[tuple[float, float], ...]
    """(probability, tokens) in ascending order; the first probability is 0, the last is 1."""
    mean: float

    def draw(self, rng: Random) -> int:
        return max(1, round(self._at(rng.random()) * self.mean / _table_mean(self.points)))

    def _at(self, probability: float) -> float:
        upper = max(1, bisect_left(self.points, (probability,)))
        (p0, low), (p1, high) = self.points[upper - 1 : upper + 1]
        return float(low * (high / low) ** ((probability - p0) / (p1 - p0)))


@cache
def _table_mean(points: tuple[tuple[float, float], ...]) -> float:
    """Mean of the unscaled table: each log-linear piece contributes its logarithmic mean."""
    return sum((p1 - p0) * ((b - a) / log(b / a) if a != b else a) for (p0, a), (p1, b) in pairwise(points))


@dataclass(frozen=True, slots=True)
class LogNormals:
    """A mixture of log-normal distributions, truncated at `at_most`."""

    parts: tuple[tuple[float, float, float], ...]
    """(weight, mu, sigma); the weights add up to 1."""
    at_most: int

    @property
    def mean(self) -> float:
        """Mean before truncation at `at_most`."""
        return sum(weight * exp(mu + sigma * sigma / 2) for weight, mu, sigma in self.parts)

    def draw(self, rng: Random) -> int:
        left = rng.random()
        for weight, mu, sigma in self.parts:  # noqa: B007 - the last part absorbs the rounding error
            left -= weight
            if left < 0:
                break
        return min(self.at_most, max(1, round(rng.lognormvariate(mu, sigma))))


def log_normal(mean: float, cv: float, at_most: int) -> LogNormals:
    """Return one log-normal distribution with this mean and this coefficient of variation."""
    variance = log(1 + cv * cv)
    return LogNormals(((1.0, log(mean) - variance / 2, sqrt(variance)),), at_most)


@dataclass(frozen=True, slots=True)
class Zipf:
    """The probability of n is proportional to n ** -slope, for n from 1 to `at_most`."""

    slope: float
    at_most: int

    @property
    def mean(self) -> float:
        weights = [float(n**-self.slope) for n in range(1, self.at_most + 1)]
        return sum(n * weight for n, weight in enumerate(weights, start=1)) / sum(weights)

    def draw(self, rng: Random) -> int:
        cumulative = _zipf_cumulative(self.slope, self.at_most)
        return 1 + bisect_left(cumulative, rng.random() * cumulative[-1])


@cache
def _zipf_cumulative(slope: float, at_most: int) -> list[float]:
    return list(accumulate(n**-slope for n in range(1, at_most + 1)))


@dataclass(frozen=True, slots=True)
class GammaGaps:
    """Gamma-distributed gaps with coefficient of variation 1 / sqrt(shape); shape 1 is a Poisson process."""

    shape: float

    def draw(self, count: int, rate_per_s: float, rng: Random) -> list[float]:
        return [rng.gammavariate(self.shape, 1 / (self.shape * rate_per_s)) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class SwayingGammaGaps:
    """Gamma-distributed gaps whose rate varies, which adds busy and quiet periods to the short bursts.

    The rate is redrawn after `every` requests on average, from a gamma distribution with coefficient of variation
    `rate_cv`.
    """

    shape: float
    rate_cv: float
    every: int

    def draw(self, count: int, rate_per_s: float, rng: Random) -> list[float]:
        gaps: list[float] = []
        rate_shape = 1 / self.rate_cv**2
        while len(gaps) < count:
            factor = rng.gammavariate(rate_shape, 1 / rate_shape)
            number = min(count - len(gaps), max(1, round(self.every * factor)))
            gaps += GammaGaps(self.shape).draw(number, rate_per_s * factor, rng)
        return gaps


@dataclass(frozen=True, slots=True)
class LogNormalGaps:
    """Log-normal gaps, for arrivals so bursty that no gamma distribution also fits the short gaps."""

    cv: float

    def draw(self, count: int, rate_per_s: float, rng: Random) -> list[float]:
        variance = log(1 + self.cv * self.cv)
        mu = -log(rate_per_s) - variance / 2
        return [rng.lognormvariate(mu, sqrt(variance)) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class RedrawnGammaGaps:
    """Gamma-distributed gaps whose shape is redrawn uniformly every `every_s` seconds."""

    lowest_shape: float
    highest_shape: float
    every_s: float

    def draw(self, count: int, rate_per_s: float, rng: Random) -> list[float]:
        gaps: list[float] = []
        while len(gaps) < count:
            shape, left_s = rng.uniform(self.lowest_shape, self.highest_shape), self.every_s
            while left_s > 0 and len(gaps) < count:
                gaps.append(rng.gammavariate(shape, 1 / (shape * rate_per_s)))
                left_s -= gaps[-1]
        return gaps
