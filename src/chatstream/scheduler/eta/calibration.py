"""The errors of sent ETAs, and a factor that keeps the coverage of the p90 at 0.9."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from chatstream.scheduler.request import Eta


@dataclass(frozen=True, slots=True, kw_only=True)
class EtaStats:
    """Accuracy of the last 500 sent ETAs that were followed by a wait of at least one second."""

    num_measured: int
    """Number of measured ETAs since the scheduler was created."""
    median_abs_error_ratio: float | None
    """Median of |p50 - wait| / wait."""
    bias_ratio: float | None
    """(sum of p50 - sum of waits) / sum of waits; above 0, requests start earlier than estimated."""
    p90_coverage: float | None
    """Share of the requests that started by their p90; the target is 0.9."""
    calibration: float
    """Current factor on the distance from p50 to p90."""
    num_completed: int
    """Number of generations in the length history."""


class Calibration:
    """A factor on the distance from p50 to p90 that keeps the coverage of p90 at 0.9.

    Adaptive conformal inference (Gibbs and Candès 2021): the factor rises by 0.045 when a request starts later than its
    p90 and falls by 0.005 when not, so in the long run nine of ten requests start in time under any load. It applies
    to the distance, not to p90 itself, because in a long queue the distance is a small part of the wait. In a long
    queue all ETAs are sent before the first late start is known; smaller steps there keep the factor from swinging.
    """

    STEP = 0.05
    TARGET = 0.9
    DAMPING = 20
    """A step is halved when this number of requests start during the wait."""
    SMALLEST, LARGEST = 0.25, 8.0
    WINDOW = 500
    MIN_WAIT_S = 1.0
    """Shorter waits are not measured: they do not matter to users, and relative errors explode."""

    def __init__(self) -> None:
        self._factor = 1.0
        self._num_measured = 0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=self.WINDOW)  # p50, p90, waited

    @property
    def factor(self) -> float:
        return self._factor

    def add(self, sent: Eta, waited_s: float, num_since: float) -> None:
        """Compare a sent ETA with the wait. `num_since`: estimated number of requests that started during the wait."""
        if waited_s < self.MIN_WAIT_S:
            return
        self._num_measured += 1
        self._recent.append((sent.p50_s, sent.p90_s, waited_s))
        is_late = waited_s > sent.p90_s
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
