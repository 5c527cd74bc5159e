"""The duration of an engine step by number of running requests, and the gain of one more slot."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple


class StepTime:
    """A linear fit of the mean gap to the number of running requests, by weighted least squares, one point per window.

    This is the universal scalability law without its second term (Amdahl's law): throughput n / (a + b n). Each window
    reduces the weight of all earlier windows by 2 %.
    """

    FORGET = 0.02
    MIN_NOISE = 0.01
    """Smallest assumed noise, as a share of the mean gap: two points always fit a line without error."""
    MAX_SLOT_ERROR = 0.05
    """No fit while the standard error of the gain of a slot is above this."""
    SPEED_CHANGE = 1.25
    """A window this much slower or faster than the previous one, with as many requests running, means that the speed
    of the engine has changed. The fit is scaled; a restart would lose how the engine scales."""

    def __init__(self) -> None:
        # Weighted sums of 1, n, t, nn, nt, tt.
        self._sums = [0.0] * 6
        self._last = (0.0, 0.0)
        self._latest_fit: StepFit | None = None

    def add(self, running: float, mean_s: float) -> None:
        """Add a window: mean number of running requests, and mean gap in seconds."""
        last_running, last_mean_s = self._last
        if abs(running - last_running) < 0.5:
            self._follow_speed(mean_s / last_mean_s)
        self._last = (running, mean_s)
        keep = 1 - self.FORGET
        point = (1.0, running, mean_s, running * running, running * mean_s, mean_s * mean_s)
        self._sums = [keep * old + new for old, new in zip(self._sums, point, strict=True)]
        self._latest_fit = self._least_squares()

    def fit(self) -> StepFit | None:
        """The current fit; None while the windows do not determine it."""
        return self._latest_fit

    def slot_gain(self, running: int) -> float | None:
        """Tokens per second gained by one more running request, as a share of those of an average one.

        1 is perfect scaling, 0 a serial engine; None without a fit. The share of the total throughput would not do:
        it is at most 1 / `running`, so a threshold of 2 % would stop growth at 50 on a perfectly scaling engine.
        """
        fit = self._latest_fit
        return None if fit is None else fit.fixed_s / fit.at(running + 1)

    def _follow_speed(self, slower: float) -> None:
        if not 1 / self.SPEED_CHANGE < slower < self.SPEED_CHANGE:
            weight, n, t, nn, nt, tt = self._sums
            self._sums = [weight, n, t * slower, nn, nt * slower, tt * slower * slower]

    def _least_squares(self) -> StepFit | None:
        weight, n, t, nn, nt, tt = self._sums
        mean_n, mean_t = n / weight, t / weight
        var_n = nn / weight - mean_n * mean_n
        if var_n < 1e-6:
            return None
        cov = nt / weight - mean_n * mean_t
        noise_s = sqrt(max(0.0, tt / weight - mean_t * mean_t - cov * cov / var_n))
        noise_s = max(noise_s, self.MIN_NOISE * mean_t)
        error_per_slot_s = noise_s / sqrt(weight * var_n)
        if error_per_slot_s * mean_n > self.MAX_SLOT_ERROR * mean_t:
            return None
        # Neither the slope nor the constant may be negative.
        per_slot_s = min(max(cov / var_n, 0.0), mean_t / mean_n)
        return StepFit(max(0.0, mean_t - per_slot_s * mean_n), per_slot_s)


class StepFit(NamedTuple):
    """Seconds of a step with n running requests: fixed_s + n * per_slot_s."""

    fixed_s: float
    per_slot_s: float

    def at(self, running: float) -> float:
        return self.fixed_s + running * self.per_slot_s
