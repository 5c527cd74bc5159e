"""A concurrency limit that follows the gaps between tokens. docs/adaptive-concurrency.md derives the rule.

Additive increase, multiplicative decrease on the 90th percentile (p90) of the inter-token gaps, with hysteresis. Knows
gaps and the numbers of running and waiting requests; not requests, lengths or engines. No clock: every gap comes with
the time at which it ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from chatstream.checks import check_int, check_seconds
from chatstream.scheduler.limits.step_time import StepTime
from chatstream.scheduler.settings import MAX_COUNT

WINDOW_S = 2.0
"""Minimum duration of a window. It must also contain `WINDOW_GAPS` gaps, and `WINDOW_STEPS` of each running request."""
WINDOW_GAPS = 200
WINDOW_STEPS = 20
"""One pause of the process gives every running request one long gap: 1/20 of the window, below the 1/10 of p90."""
SILENCE_S = 30.0
"""After a pause of this length without gaps, earlier measurements are discarded."""

BAD_WINDOWS = 2
"""Consecutive windows above the target before a cut: a single one may be a burst of prefills."""
CUT = 0.7
"""A cut reduces the limit to at most this share."""
DEEPEST_CUT = 0.25
"""A cut never reduces the limit below this share."""
CUT_AIM = 0.95
"""A cut aims at a p90 of this share of the target, by the fitted step time."""
STEP_BACK = 10
"""While the median gap is within the target, a cut is too much: reduce the limit by limit / `STEP_BACK`, at least 1."""
BAD_WINDOWS_STEP_BACK = 4
"""Consecutive windows above the target before a step back: in fewer windows the number of long gaps is chance."""
COOL_DOWN_WINDOWS = 3
"""Windows without growth after a cut."""

GROW_BELOW = 0.9
"""Growth requires a p90 below this share of the target."""
LIMITED_SHARE = 0.5
"""Growth requires that for more than this share of the gaps all slots were in use and a request waited."""
LEAP = 4
"""Where the fitted step time leaves room, the limit grows by limit / `LEAP` instead of 1."""
MIN_SLOT_GAIN = 0.1
"""A slot that adds less tokens per second than this share of an average slot is not worth having."""
TRIAL_WINDOWS = 2
"""Growth is on trial for this number of windows, and undone if it gained nothing or made gaps too long."""
RETRY_WINDOWS = 30
"""Windows without growth after a trial was undone or a step back was made."""


@dataclass(frozen=True, slots=True)
class Move:
    """A change of the limit."""

    old: int
    new: int
    why: str
    """The reason, for an operator, with the deciding numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveStats:
    """The measurements behind the last decision; None: not measured yet."""

    value: int
    floor: int
    ceiling: int
    target_itl_s: float
    p90_itl_s: float | None
    num_running: float | None
    """Mean number of running requests over the gaps of the window."""
    slot_gain: float | None
    """Gain of one more slot, as a share of an average slot: 1 is perfect scaling, 0 a serial engine."""


class AdaptiveLimit:
    """A concurrency limit that keeps the p90 of the inter-token gaps within `target_itl_s`. 1 <= floor <= ceiling.

    Grows only while requests wait for a slot. Raises `ConfigError` for invalid values.
    """

    def __init__(self, *, initial: int, floor: int, ceiling: int, target_itl_s: float) -> None:
        check_int("min_concurrency", floor, at_least=1, at_most=ceiling)
        check_seconds("itl_target_s", target_itl_s)
        check_int("max_concurrency", initial, at_least=floor, at_most=ceiling)
        self._floor, self._ceiling = floor, ceiling
        self._target_s = target_itl_s
        self._steps = StepTime()
        self._judged: _EndedWindow | None = None
        # Windows left until growth is allowed. Only a move sets it. If every bad window set it, it would never run out
        # while windows are bad, and the limit would freeze.
        self._cool_down = 0
        self._last_s = -inf
        self.set(initial)

    def __repr__(self) -> str:
        return f"AdaptiveLimit({self._value} of {self._floor}..{self._ceiling}, target {_ms(self._target_s)})"

    @property
    def value(self) -> int:
        """The limit in force."""
        return self._value

    def set(self, value: int) -> None:
        """Set the limit on behalf of an operator; the controller continues from there.

        A value above the ceiling becomes the ceiling. Raises `ConfigError` for a value below the floor.
        """
        check_int("max_concurrency", value, at_least=self._floor, at_most=MAX_COUNT)
        self._ceiling = max(self._ceiling, value)
        self._value = value
        self._num_bad = 0
        self._trial: _Trial | None = None
        self._window = _Window(self._target_s, self._last_s)

    def stats(self) -> AdaptiveStats:
        return AdaptiveStats(
            value=self._value,
            floor=self._floor,
            ceiling=self._ceiling,
            target_itl_s=self._target_s,
            p90_itl_s=self._judged.p90_s if self._judged else None,
            num_running=self._judged.num_running if self._judged else None,
            slot_gain=self._steps.slot_gain(self._value),
        )

    def observe(self, gap_s: float, running: int, waiting: int, now_s: float) -> Move | None:
        """Add the gap `gap_s` between two tokens of a running request, the second of which came at `now_s`.

        `running`, `waiting`: number of requests in slots, in the queue. Call for every gap, except one that contains a
        preemption. Returns the change of `value`, if this gap ended a window and caused one. O(1), except for the last
        gap of a window.
        """
        if now_s - self._last_s > SILENCE_S:
            self._window = _Window(self._target_s, now_s)
            self._num_bad = 0
        self._last_s = now_s
        window = self._window
        window.add(gap_s, running, waiting > 0 and running >= self._value)
        if window.num < WINDOW_GAPS or now_s - window.started_s < WINDOW_S or window.num < WINDOW_STEPS * running:
            return None
        self._window = _Window(self._target_s, now_s)
        return self._judge(window.end(waiting))

    # --- the rule, once per window --------------------------------------------------------------------------------

    def _judge(self, window: _EndedWindow) -> Move | None:
        self._judged = window
        self._steps.add(window.num_running, window.mean_s)
        self._cool_down = max(0, self._cool_down - 1)
        if window.p90_s > self._target_s:
            # While more requests run than the limit allows, the previous cut has not taken effect yet.
            self._num_bad = self._num_bad + 1 if window.num_running < self._value + 0.5 else 0
            return self._shrink(window) if self._num_bad >= BAD_WINDOWS and self._value > self._floor else None
        self._num_bad = 0
        return self._end_trial() or self._grow(window)

    def _shrink(self, window: _EndedWindow) -> Move | None:
        """Cut or step back, after `BAD_WINDOWS` windows with p90 above the target."""
        before = f"p90 of the gaps between tokens was {window}, above {_ms(self._target_s)}, in {self._num_bad} windows"
        if window.p50_s > self._target_s:
            return self._cut(window, before)
        return self._step_back(window, before) if self._num_bad >= BAD_WINDOWS_STEP_BACK else None

    def _cut(self, window: _EndedWindow, before: str) -> Move:
        """Cut to the highest limit that should meet the target, by the fitted step time."""
        running = min(self._value, max(1, round(window.num_running)))
        aim_s = CUT_AIM * self._target_s
        enough = next((k for k in range(running - 1, 0, -1) if self._p90_with(k, window) <= aim_s), running)
        new = max(self._floor, int(DEEPEST_CUT * running), min(int(CUT * running), enough))
        at_best = "" if self._steps.fit() else "at best "
        why = f"{before}; with {new} running it should be {at_best}{_ms(self._p90_with(new, window))}"
        return self._move(new, COOL_DOWN_WINDOWS, why)

    def _step_back(self, window: _EndedWindow, before: str) -> Move:
        """Reduce the limit slightly; to the value before the last growth if that is still on trial."""
        less = self._trial.came_from if self._trial is not None else self._value - max(1, self._value // STEP_BACK)
        why = f"{before}, but half of them were within {_ms(window.p50_s)}: a step back is enough"
        return self._move(max(self._floor, less), RETRY_WINDOWS, why)

    def _end_trial(self) -> Move | None:
        """Undo the last growth, which kept the target, if it gained too little.

        The trial continues while the gain is unknown.
        """
        trial = self._trial
        if trial is None:
            return None
        trial.windows -= 1
        gain = self._steps.slot_gain(trial.came_from)
        if trial.windows > 0 or gain is None:
            return None
        self._trial = None
        if gain >= MIN_SLOT_GAIN:
            return None
        why = f"beyond {trial.came_from} a slot adds {gain:.0%} of the tokens a second that an average one gives"
        why = f"{why}, less than {MIN_SLOT_GAIN:.0%}: more slots only share the same speed"
        return self._move(trial.came_from, RETRY_WINDOWS, why)

    def _grow(self, window: _EndedWindow) -> Move | None:
        """Raise the limit, if nothing forbids it. Call when p90 is within the target."""
        if self._value == self._ceiling or self._cool_down or (self._trial is not None and self._trial.windows > 0):
            return None
        room_s = GROW_BELOW * self._target_s
        if window.p90_s >= room_s or not window.num_waiting or window.limited_share <= LIMITED_SHARE:
            return None
        gain = self._steps.slot_gain(self._value)
        if gain is not None and gain < MIN_SLOT_GAIN:
            return None
        leap = min(self._ceiling, self._value + self._value // LEAP)
        is_sure = gain is not None and leap > self._value and self._p90_with(leap, window) < room_s
        new = leap if is_sure else self._value + 1
        expected_s = self._p90_with(new, window)
        if expected_s > self._target_s:
            return None
        came_from = self._trial.came_from if self._trial is not None else self._value
        why = f"p90 of the gaps between tokens was {window}, below {_ms(room_s)} ({GROW_BELOW:g} of the target)"
        why = f"{why}, and {window.num_waiting} waited; with {new} running "
        why += "it is not known yet: a trial" if gain is None else f"it should be {_ms(expected_s)}"
        move = self._move(new, 0, why)
        self._trial = _Trial(came_from, TRIAL_WINDOWS)
        return move

    def _move(self, new: int, cool_down: int, why: str) -> Move:
        move = Move(self._value, new, why)
        self.set(new)
        self._cool_down = cool_down
        return move

    def _p90_with(self, running: float, window: _EndedWindow) -> float:
        """The expected p90 with `running` requests; a lower bound while the step time is not known."""
        fit = self._steps.fit()
        if fit is None:
            return window.p90_s * min(1.0, running / window.num_running)
        return window.p90_s * fit.at(running) / fit.at(window.num_running)


@dataclass(slots=True)
class _Trial:
    """A growth that is undone if its gain is too small."""

    came_from: int
    windows: int
    """Windows left until it is judged."""


# --- measurement ------------------------------------------------------------------------------------------------------


class _EndedWindow(NamedTuple):
    """The figures of a complete window."""

    p50_s: float
    p90_s: float
    mean_s: float
    num_running: float
    """Mean number of running requests over the gaps."""
    limited_share: float
    """Share of the gaps during which all slots were in use and a request waited."""
    num_waiting: int
    """Waiting requests at the end of the window."""

    def __str__(self) -> str:
        return f"{_ms(self.p90_s)} with {self.num_running:.3g} running"


class _Window:
    """A histogram of gaps in hundredths of the target, up to four targets: bounded, and p90 needs no sorting.

    A longer gap counts as four targets, so that one pause of the machine does not dominate the mean.
    """

    __slots__ = (
        "_buckets_per_s",
        "_counts",
        "_longest_s",
        "_num_limited",
        "_sum_running",
        "_sum_s",
        "num",
        "started_s",
    )

    def __init__(self, target_s: float, started_s: float) -> None:
        self.started_s = started_s
        self.num = 0
        self._num_limited = 0
        self._sum_s = 0.0
        self._sum_running = 0
        self._longest_s = 4 * target_s
        self._buckets_per_s = 100 / target_s
        self._counts = [0] * 402

    def add(self, gap_s: float, running: int, is_limited: bool) -> None:
        if gap_s > self._longest_s:
            gap_s = self._longest_s
        self._counts[int(gap_s * self._buckets_per_s)] += 1
        self._sum_s += gap_s
        self._sum_running += running
        self.num += 1
        self._num_limited += is_limited

    def end(self, num_waiting: int) -> _EndedWindow:
        return _EndedWindow(
            p50_s=self._quantile_s(0.5),
            p90_s=self._quantile_s(0.9),
            mean_s=self._sum_s / self.num,
            num_running=self._sum_running / self.num,
            limited_share=self._num_limited / self.num,
            num_waiting=num_waiting,
        )

    def _quantile_s(self, share: float) -> float:
        """The middle of the lowest bucket with at most 1 - `share` of the gaps above it."""
        max_above = (1 - share) * self.num
        num_above, bucket = 0, len(self._counts) - 1
        while num_above + self._counts[bucket] <= max_above:
            num_above += self._counts[bucket]
            bucket -= 1
        return (bucket + 0.5) / self._buckets_per_s


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
