"""How many may run, found from the gaps between tokens. docs/adaptive-concurrency.md derives the rule.

Additive increase, multiplicative decrease on the 90th percentile (p90) of the inter-token gaps, with hysteresis. Knows
gaps, how many run, how many wait; not requests, lengths or engines. No clock: every gap says when it ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from chatstream.checks import check_int, check_seconds
from chatstream.scheduler.limits.step_time import StepTime
from chatstream.scheduler.settings import MAX_COUNT

WINDOW_S = 2.0
"""A window is judged when it is so long and holds `WINDOW_GAPS`, and `WINDOW_STEPS` of each running request."""
WINDOW_GAPS = 200
WINDOW_STEPS = 20
"""One pause of the process gives every running request one long gap: a twentieth of the window, below p90's tenth."""
SILENCE_S = 30.0
"""Nothing came for so long: what was measured before belongs to another time."""

BAD_WINDOWS = 2
"""In a row above the target before the limit is cut: one alone may be a burst of prefills."""
CUT = 0.7
"""A cut leaves at most this share,"""
DEEPEST_CUT = 0.25
"""and at least this one, however bad it looks."""
CUT_AIM = 0.95
"""p90 after a cut should be this share of the target, by what is known of the engine's steps."""
STEP_BACK = 10
"""While most gaps are within the target, a cut is too much: a step back by the limit divided by this, at least 1,"""
BAD_WINDOWS_STEP_BACK = 4
"""after so many windows in a row: a few long gaps more or less are chance."""
COOL_DOWN_WINDOWS = 3
"""No growth for so many windows after a cut."""

GROW_BELOW = 0.9
"""No growth unless p90 is below this share of the target."""
LIMITED_SHARE = 0.5
"""No growth unless for more than this share of the window all slots were taken and somebody waited."""
LEAP = 4
"""Growth is by the limit divided by this, not by 1, where the engine's steps say that there is room."""
MIN_SLOT_GAIN = 0.1
"""A slot that adds less tokens per second than this share of an average slot only slices the same speed."""
TRIAL_WINDOWS = 2
"""Growth is on trial for so many windows, and taken back if it brought nothing or too long gaps,"""
RETRY_WINDOWS = 30
"""and not tried again for so many."""


@dataclass(frozen=True, slots=True)
class Move:
    """The limit has changed."""

    old: int
    new: int
    why: str
    """A sentence for an operator, with the numbers that decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveStats:
    """What the limit was last judged by; None: nothing is known yet."""

    value: int
    floor: int
    ceiling: int
    target_itl_s: float
    p90_itl_s: float | None
    num_running: float | None
    """Mean over the gaps of the window."""
    slot_gain: float | None
    """What one slot more would add, as a share of an average slot: 1 is perfect scaling, 0 a serial engine."""


class AdaptiveLimit:
    """A concurrency limit that keeps the p90 of the inter-token gaps within `target_itl_s`. 1 <= floor <= ceiling.

    Grows only while requests wait for a slot. Raises `ConfigError` for impossible values.
    """

    def __init__(self, *, initial: int, floor: int, ceiling: int, target_itl_s: float) -> None:
        check_int("min_concurrency", floor, at_least=1, at_most=ceiling)
        check_seconds("itl_target_s", target_itl_s)
        check_int("max_concurrency", initial, at_least=floor, at_most=ceiling)
        self._floor, self._ceiling = floor, ceiling
        self._target_s = target_itl_s
        self._steps = StepTime()
        self._judged: _EndedWindow | None = None
        # Windows to go until growth is allowed. Only a move sets it: set by every bad window, as a pilot did, it does
        # not run out while they are bad, and the limit is frozen.
        self._cool_down = 0
        self._last_s = -inf
        self.set(initial)

    def __repr__(self) -> str:
        return f"AdaptiveLimit({self._value} of {self._floor}..{self._ceiling}, target {_ms(self._target_s)})"

    @property
    def value(self) -> int:
        """At most this many may run."""
        return self._value

    def set(self, value: int) -> None:
        """An operator's wish; the controller goes on from there. A number above the ceiling becomes the ceiling.

        Raises `ConfigError` below the floor.
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
        """A running request's token came `gap_s` after the one before, at `now_s`; so many hold a slot, so many wait.

        Call it for every gap, except one across which the request was preempted. Answers with the change of `value`
        that this gap was the last straw for. O(1), but for the last gap of a window.
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

    # --- the rule: once a window ----------------------------------------------------------------------------------

    def _judge(self, window: _EndedWindow) -> Move | None:
        self._judged = window
        self._steps.add(window.num_running, window.mean_s)
        self._cool_down = max(0, self._cool_down - 1)
        if window.p90_s > self._target_s:
            # While more run than may, what was done before has not arrived yet.
            self._num_bad = self._num_bad + 1 if window.num_running < self._value + 0.5 else 0
            return self._shrink(window) if self._num_bad >= BAD_WINDOWS and self._value > self._floor else None
        self._num_bad = 0
        return self._end_trial() or self._grow(window)

    def _shrink(self, window: _EndedWindow) -> Move | None:
        """p90 is above the target, and not for the first time."""
        before = f"p90 of the gaps between tokens was {window}, above {_ms(self._target_s)}, in {self._num_bad} windows"
        if window.p50_s > self._target_s:
            return self._cut(window, before)
        return self._step_back(window, before) if self._num_bad >= BAD_WINDOWS_STEP_BACK else None

    def _cut(self, window: _EndedWindow, before: str) -> Move:
        """To where the gaps should fit, if the engine's steps are known."""
        running = min(self._value, max(1, round(window.num_running)))
        aim_s = CUT_AIM * self._target_s
        enough = next((k for k in range(running - 1, 0, -1) if self._p90_with(k, window) <= aim_s), running)
        new = max(self._floor, int(DEEPEST_CUT * running), min(int(CUT * running), enough))
        at_best = "" if self._steps.line() else "at best "
        why = f"{before}; with {new} running it should be {at_best}{_ms(self._p90_with(new, window))}"
        return self._move(new, COOL_DOWN_WINDOWS, why)

    def _step_back(self, window: _EndedWindow, before: str) -> Move:
        """By as much as the last growth, if that is still on trial."""
        less = self._trial.came_from if self._trial is not None else self._value - max(1, self._value // STEP_BACK)
        why = f"{before}, but half of them were within {_ms(window.p50_s)}: a step back is enough"
        return self._move(max(self._floor, less), RETRY_WINDOWS, why)

    def _end_trial(self) -> Move | None:
        """The last growth has kept the target; was it worth it? As long as nobody can tell, it stays on trial."""
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
        why = f"{why}, less than {MIN_SLOT_GAIN:.0%}: more slots only slice the same speed"
        return self._move(trial.came_from, RETRY_WINDOWS, why)

    def _grow(self, window: _EndedWindow) -> Move | None:
        """p90 is within the target."""
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
        why += "nobody knows yet: a trial" if gain is None else f"it should be {_ms(expected_s)}"
        move = self._move(new, 0, why)
        self._trial = _Trial(came_from, TRIAL_WINDOWS)
        return move

    def _move(self, new: int, cool_down: int, why: str) -> Move:
        move = Move(self._value, new, why)
        self.set(new)
        self._cool_down = cool_down
        return move

    def _p90_with(self, running: float, window: _EndedWindow) -> float:
        """p90 if so many ran. While the engine's steps are not known: the least that it can be."""
        line = self._steps.line()
        if line is None:
            return window.p90_s * min(1.0, running / window.num_running)
        return window.p90_s * line.at(running) / line.at(window.num_running)


@dataclass(slots=True)
class _Trial:
    """Growth that has to prove itself."""

    came_from: int
    windows: int
    """To go until it is judged."""


# --- what is measured -------------------------------------------------------------------------------------------------


class _EndedWindow(NamedTuple):
    """A window that has ended."""

    p50_s: float
    p90_s: float
    mean_s: float
    num_running: float
    """Mean over the gaps."""
    limited_share: float
    """Of the gaps in which all slots were taken and somebody waited."""
    num_waiting: int
    """At its end."""

    def __str__(self) -> str:
        return f"{_ms(self.p90_s)} with {self.num_running:.3g} running"


class _Window:
    """Gaps as a histogram in hundredths of the target up to four targets: bounded, and p90 needs no sorting.

    A longer gap counts as four targets, so that one pause of the machine does not become the mean of the window.
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
        """The middle of the lowest bucket that has at most 1 - `share` of the gaps above it."""
        most_above = (1 - share) * self.num
        num_above, bucket = 0, len(self._counts) - 1
        while num_above + self._counts[bucket] <= most_above:
            num_above += self._counts[bucket]
            bucket -= 1
        return (bucket + 0.5) / self._buckets_per_s


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
