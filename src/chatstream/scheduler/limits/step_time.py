"""How long a step of the engine takes with so many running, and so what one slot more would bring."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple


class StepTime:
    """The mean gap as a straight line in the number running, fitted by least squares to one point a window.

    The line is the universal scalability law without its second term (that is Amdahl's law): throughput n / (a + b n).
    A window forgets a fiftieth of all before it.
    """

    FORGET = 0.02
    LEAST_NOISE = 0.01
    """Points are never trusted to be better than this share of a gap: two of them always lie on a line."""
    MOST_DOUBT = 0.05
    """No line as long as the standard error of a slot's gain is above this."""
    SPEED_CHANGE = 1.25
    """A window so much slower or faster than the one before, with as many running: the engine has changed its speed.
    The line is scaled; to start anew would be to forget how the engine scales."""

    def __init__(self) -> None:
        # Weighted sums of 1, n, t, nn, nt, tt.
        self._sums = [0.0] * 6
        self._last = (0.0, 0.0)
        self._line: StepLine | None = None

    def add(self, running: float, mean_s: float) -> None:
        last_running, last_mean_s = self._last
        if abs(running - last_running) < 0.5:
            self._follow_speed(mean_s / last_mean_s)
        self._last = (running, mean_s)
        keep = 1 - self.FORGET
        point = (1.0, running, mean_s, running * running, running * mean_s, mean_s * mean_s)
        self._sums = [keep * old + new for old, new in zip(self._sums, point, strict=True)]
        self._line = self._fit()

    def line(self) -> StepLine | None:
        """None: what has been seen does not tell."""
        return self._line

    def slot_gain(self, running: int) -> float | None:
        """What one more than `running` would add to the tokens per second, as a share of what one of them gives.

        1 is perfect scaling, 0 a serial engine. The share of all tokens per second would not do: it is at most
        1 / `running`, so that a threshold of 2 % would end growth at 50 on a perfect machine.
        """
        if self._line is None:
            return None
        return self._line.fixed_s / self._line.at(running + 1)

    def _follow_speed(self, slower: float) -> None:
        if not 1 / self.SPEED_CHANGE < slower < self.SPEED_CHANGE:
            weight, n, t, nn, nt, tt = self._sums
            self._sums = [weight, n, t * slower, nn, nt * slower, tt * slower * slower]

    def _fit(self) -> StepLine | None:
        weight, n, t, nn, nt, tt = self._sums
        mean_n, mean_t = n / weight, t / weight
        var_n = nn / weight - mean_n * mean_n
        if var_n < 1e-6:
            return None
        cov = nt / weight - mean_n * mean_t
        noise_s = sqrt(max(0.0, tt / weight - mean_t * mean_t - cov * cov / var_n))
        noise_s = max(noise_s, self.LEAST_NOISE * mean_t)
        error_per_slot_s = noise_s / sqrt(weight * var_n)
        if error_per_slot_s * mean_n > self.MOST_DOUBT * mean_t:
            return None
        # Neither more of them nor none of them takes less than no time.
        per_slot_s = min(max(cov / var_n, 0.0), mean_t / mean_n)
        return StepLine(max(0.0, mean_t - per_slot_s * mean_n), per_slot_s)


class StepLine(NamedTuple):
    """Seconds of a step with n running: fixed_s + n * per_slot_s."""

    fixed_s: float
    per_slot_s: float

    def at(self, running: float) -> float:
        return self.fixed_s + running * self.per_slot_s
