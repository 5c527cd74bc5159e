"""The line at one moment, played through on the slots in `NUM_DRAWS` plausible ways."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from heapq import heapreplace
from math import erf, exp, hypot, inf, log1p, sqrt

from chatstream.scheduler.eta.lengths import NUM_DRAWS, LengthHistory
from chatstream.scheduler.eta.pace import Prefill
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State

MAX_PLAYED = 128
"""Places that are played through; those behind follow by the central limit theorem."""
NEWCOMERS = 16
"""Places behind the last one that are played too: somebody may join before the next refresh."""
Z90 = 1.2815515655446004
"""The 0.9 quantile of the normal distribution."""


class Picture:
    """The line played through: start times by place, and how they go on behind the last one that was played."""

    def __init__(
        self,
        work: WorkDraws,
        running: Sequence[LiveRequest],
        waiting: Sequence[LiveRequest],
        slots: int,
        hazard: float,
    ) -> None:
        """`waiting`: the first `MAX_PLAYED` at most, in the expected order of start."""
        self.taken_s = work.now_s
        self.slots = slots
        self.num_free = slots - len(running)
        self._starts = _starts(work, running, waiting, slots, hazard)
        self._sorted: dict[int, list[float]] = {}
        self._quantiles: dict[int, tuple[float, float]] = {}
        work_s, work_variance = work.typical()
        self._step_s = work_s / slots
        self._step_variance = work_variance / slots**2
        self._error = work.error
        self._hazard = hazard
        last = self._starts[-1]
        self._last_s = sum(last) / NUM_DRAWS
        variance = sum((start - self._last_s) ** 2 for start in last) / NUM_DRAWS
        self._last_variance = max(0.0, variance - (self._last_s * self._error) ** 2)
        """Without the part that comes from the error of the mean length: that part grows with the place."""

    @property
    def num_places(self) -> int:
        """So many were played."""
        return len(self._starts)

    def quantiles(self, place: int) -> tuple[float, float]:
        """Seconds from `taken_s`: the 0.5 and the 0.9 quantile. Neither decreases with the place."""
        known = self._quantiles.get(place)
        if known is not None:
            return known
        if place > len(self._starts):
            last50_s, last90_s = self.quantiles(len(self._starts))
            added_s, deviation_s = self._behind(place)
            return last50_s + added_s, last50_s + added_s + max(Z90 * deviation_s, last90_s - last50_s)
        ways = self._ways(place)
        rank = 0.9 * NUM_DRAWS - 0.5
        low = int(rank)
        known = self._quantiles[place] = (ways[NUM_DRAWS // 2], ways[low] + (rank - low) * (ways[low + 1] - ways[low]))
        return known

    def probability_by(self, place: int, seconds: float) -> float:
        """That it has started so many seconds after `taken_s`."""
        if place <= len(self._starts):
            return bisect_right(self._ways(place), seconds) / NUM_DRAWS
        added_s, deviation_s = self._behind(place)
        late_s = seconds - self.quantiles(len(self._starts))[0] - added_s
        return 0.5 * (1 + erf(late_s / (deviation_s * sqrt(2)))) if deviation_s > 0 else float(late_s >= 0)

    def _ways(self, place: int) -> list[float]:
        ways = self._sorted.get(place)
        if ways is None:
            ways = self._sorted[place] = sorted(self._starts[place - 1])
        return ways

    def _behind(self, place: int) -> tuple[float, float]:
        """Behind the places that were played: seconds after the last of them, and the standard deviation of the start.

        Each place more adds a step; with impatience a step shrinks as exp(-hazard * start), whose sum is this.
        """
        more = place - len(self._starts)
        added_s = more * self._step_s
        if self._hazard > 0:
            added_s = log1p(self._hazard * added_s * exp(-self._hazard * self._last_s)) / self._hazard
        own_s = sqrt(self._last_variance + more * self._step_variance)
        return added_s, hypot(own_s, (self._last_s + added_s) * self._error)


def _starts(
    work: WorkDraws, running: Sequence[LiveRequest], waiting: Sequence[LiveRequest], slots: int, hazard: float
) -> list[tuple[float, ...]]:
    """For each place the `NUM_DRAWS` times at which it starts, in seconds from `work.now_s`."""
    rows = [work.whole(request) for request in waiting]
    rows += [work.unknown(i) for i in range(min(NEWCOMERS, MAX_PLAYED - len(waiting)))]
    patience = [inf if r.expires_s is None else r.expires_s - work.now_s for r in waiting]
    patience += [inf] * (len(rows) - len(waiting))
    ends = [work.rest(request) for request in running]
    frees = [list(ways) for ways in zip(*ends, strict=True)] if ends else [[] for _ in range(NUM_DRAWS)]
    starts = [
        play(free, works, slots, patience if hazard or min(patience) < inf else None, hazard)
        for free, works in zip(frees, zip(*rows, strict=True), strict=True)
    ]
    return [*zip(*starts, strict=True)]


def play(
    free: list[float], works: Sequence[float], slots: int, patience: Sequence[float] | None = None, hazard: float = 0.0
) -> list[float]:
    """When each of `works` (seconds, in order of start) starts, on slots that become free at the times `free`.

    Fewer times than slots: the others are free now. More: that many slots are gone, and whoever ends first takes one
    of them along. `patience`: seconds after which each gives up; it then starts nowhere, but its time is told still.
    Of those who have to wait for t seconds, exp(-hazard * t) are still there; the others take their work along.
    """
    free.sort()
    free = free[len(free) - slots :] if len(free) >= slots else [0.0] * (slots - len(free)) + free
    starts = []
    if patience is None:  # nobody gives up: the same in half of the time
        for work in works:
            start = free[0]
            starts.append(start)
            heapreplace(free, start + work)
        return starts
    for work, until in zip(works, patience, strict=True):
        start = free[0]
        starts.append(start)
        if start < until:
            heapreplace(free, start + work * exp(-hazard * start))
    return starts


class WorkDraws:
    """Plausible seconds of work, `NUM_DRAWS` for each request, from what is known at one moment."""

    def __init__(self, lengths: LengthHistory, pace_s: float, prefill: Prefill, now_s: float) -> None:
        self._lengths = lengths
        self._pace_s = pace_s
        self._prefill = prefill
        self.now_s = now_s
        everybody = lengths.everybody
        self.error = sqrt(everybody.variance() / len(everybody)) / everybody.mean()
        """The standard error of the mean length, as a share of it: the history is a sample too."""
        spread = min(self.error * sqrt(12.0), 1.0)
        # All lengths of one way of playing are a little too long or too short together.
        self._paces_s = [pace_s * (1 + spread * ((k + 0.5) / NUM_DRAWS - 0.5)) for k in permutations()[0]]

    def whole(self, request: LiveRequest) -> list[float]:
        """Of one that waits."""
        if request.generated_tokens:  # it has begun before and keeps what it has
            return self._seconds(request, 0.0)
        return self._seconds(request, self._prefill.seconds(request.arrival.prompt_tokens))

    def rest(self, request: LiveRequest) -> list[float]:
        """Of one that runs."""
        if request.state in (State.ABORTING, State.PREEMPTING):
            return [0.0] * NUM_DRAWS
        if request.generated_tokens:
            passed_s = self.now_s - request.last_progress_s
            return [max(0.0, seconds - passed_s) for seconds in self._seconds(request, 0.0)]
        left_s = self._prefill.seconds(request.arrival.prompt_tokens) - (self.now_s - request.started_s)
        return self._seconds(request, max(0.0, left_s))

    def unknown(self, number: int) -> list[float]:
        """Of one that has not come yet."""
        shuffle = permutations()[-1 - number]
        draws, before_s = self._lengths.everybody.draws(), self._prefill.typical_s()[0]
        return [before_s + (draws[i] - 1) * pace_s for i, pace_s in zip(shuffle, self._paces_s, strict=True)]

    def typical(self) -> tuple[float, float]:
        """Mean and variance of one that has not come yet."""
        everybody = self._lengths.everybody
        before_s, variance = self._prefill.typical_s()
        return before_s + (everybody.mean() - 1) * self._pace_s, variance + everybody.variance() * self._pace_s**2

    def _seconds(self, request: LiveRequest, before_s: float) -> list[float]:
        """From the first token on, or from the last one it has; with `before_s` in front."""
        lengths = self._lengths.of(request.client)
        done, allowed = request.generated_tokens, request.arrival.max_new_tokens
        draws = lengths.draws_beyond(done) if done else lengths.draws()
        if allowed is not None and allowed < draws[-1]:
            draws = [min(draw, allowed) for draw in draws]
        shuffle = permutations()[request.seq % MAX_PLAYED + 1]
        done = done or 1  # the first token ends the prefill
        return [before_s + (draws[i] - done) * pace_s for i, pace_s in zip(shuffle, self._paces_s, strict=True)]


@cache
def permutations() -> list[list[int]]:
    """So many fixed shuffles of the draws that no two requests near each other share one.

    With them the draws of n requests are a Latin hypercube sample (McKay, Beckman and Conover 1979): each request's
    distribution is represented exactly, and none of them is lucky in the same way as another. The same on every
    machine: shuffled by Preempt and Miller's generator (1988).
    """
    state, shuffles = 1, []
    for _ in range(2 * MAX_PLAYED + 1):
        shuffle = list(range(NUM_DRAWS))
        for i in range(NUM_DRAWS - 1, 0, -1):
            state = state * 48271 % 2147483647
            j = state % (i + 1)
            shuffle[i], shuffle[j] = shuffle[j], shuffle[i]
        shuffles.append(shuffle)
    return shuffles
