"""Whether what those who wait were told came true, and how much wider the promise must be so that it does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


class Eta(NamedTuple):
    """Seconds from now until the start. Both are finite, and 0 <= p50_s <= p90_s."""

    p50_s: float
    """As likely to be earlier as later."""
    p90_s: float
    """Nine of ten start by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EtaStats:
    """How good the estimates were, over the last 500 that were followed by a wait of at least one second."""

    num_measured: int
    """Since the start."""
    median_abs_error_ratio: float | None
    """Half of the p50 were off by less than this share of the wait."""
    bias_ratio: float | None
    """(sum of p50 - sum of waits) / sum of waits: above 0, people start earlier than they were told."""
    p90_coverage: float | None
    """The share that had started by their p90; 0.9 is the aim."""
    calibration: float
    """The factor on the distance from p50 to p90 now."""
    num_completed: int
    """Generations the length history holds now."""


class Calibration:
    """A factor on the distance from p50 to p90 that makes p90 come true nine times of ten.

    Adaptive conformal inference (Gibbs and Candès 2021): up by 0.045 when somebody started later than its p90, down
    by 0.005 when not, so in the long run nine of ten are in time whatever the load does. On the distance and not on
    p90 itself, because a long line makes the distance a small part of the wait. In a long line everybody has been told
    before the first one is known to be late; smaller steps there keep the factor from swinging.
    """

    STEP = 0.05
    TARGET = 0.9
    DAMPING = 20
    """A step is halved when so many start during the wait."""
    SMALLEST, LARGEST = 0.25, 8.0
    WINDOW = 500
    MIN_WAIT_S = 1.0
    """Shorter waits are not measured: nobody minds them, and relative errors explode there."""

    def __init__(self) -> None:
        self._factor = 1.0
        self._num_measured = 0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=self.WINDOW)  # p50, p90, waited

    @property
    def factor(self) -> float:
        return self._factor

    def add(self, told: Eta, waited_s: float, num_since: float) -> None:
        """`num_since`: about how many others started between the promise and its end."""
        if waited_s < self.MIN_WAIT_S:
            return
        self._num_measured += 1
        self._recent.append((told.p50_s, told.p90_s, waited_s))
        is_late = waited_s > told.p90_s
        step = self.STEP / (1 + num_since / self.DAMPING)
        moved = self._factor + step * (self.TARGET if is_late else self.TARGET - 1)
        self._factor = min(max(moved, self.SMALLEST), self.LARGEST)

    def stats(self, num_completed: int) -> EtaStats:
        recent = self._recent
        errors = sorted(abs(p50 - waited) / waited for p50, _, waited in recent)
        waited_s = sum(waited for _, _, waited in recent)
        return EtaStats(
            num_measured=self._num_measured,
            median_abs_error_ratio=errors[len(errors) // 2] if errors else None,
            bias_ratio=sum(p50 for p50, _, _ in recent) / waited_s - 1 if recent else None,
            p90_coverage=sum(waited <= p90 for _, p90, waited in recent) / len(recent) if recent else None,
            calibration=self.factor,
            num_completed=num_completed,
        )
