"""A simulation of the queue on the slots, from a snapshot, for `NUM_DRAWS` draws of the answer lengths."""

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

MAX_SIMULATED = 128
"""Maximum number of simulated positions; those behind are extrapolated by the central limit theorem."""
NUM_FUTURE = 16
"""Simulated positions behind the last request, for requests that arrive before the next refresh."""
Z90 = 1.2815515655446004
"""The 0.9 quantile of the normal distribution."""


class Picture:
    """Simulated start times by position, and their extrapolation behind the last simulated position."""

    def __init__(
        self,
        work: WorkDraws,
        running: Sequence[LiveRequest],
        waiting: Sequence[LiveRequest],
        slots: int,
        hazard: float,
    ) -> None:
        """`waiting`: at most `MAX_SIMULATED` requests, in the expected order of start. `hazard`: see `simulate`."""
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
        """Without the error of the mean length, which grows with the position and is added for each position."""

    @property
    def num_positions(self) -> int:
        """Number of simulated positions."""
        return len(self._starts)

    def quantiles(self, position: int) -> tuple[float, float]:
        """The 0.5 and 0.9 quantiles of the start, in seconds from `taken_s`. Neither decreases with the position."""
        cached = self._quantiles.get(position)
        if cached is not None:
            return cached
        if position > len(self._starts):
            last50_s, last90_s = self.quantiles(len(self._starts))
            added_s, deviation_s = self._extrapolated(position)
            return last50_s + added_s, last50_s + added_s + max(Z90 * deviation_s, last90_s - last50_s)
        starts = self._sorted_starts(position)
        rank = 0.9 * NUM_DRAWS - 0.5
        low = int(rank)
        p90_s = starts[low] + (rank - low) * (starts[low + 1] - starts[low])
        quantiles = self._quantiles[position] = (starts[NUM_DRAWS // 2], p90_s)
        return quantiles

    def probability_by(self, position: int, seconds: float) -> float:
        """The probability of a start within `seconds` from `taken_s`."""
        if position <= len(self._starts):
            return bisect_right(self._sorted_starts(position), seconds) / NUM_DRAWS
        added_s, deviation_s = self._extrapolated(position)
        late_s = seconds - self.quantiles(len(self._starts))[0] - added_s
        return 0.5 * (1 + erf(late_s / (deviation_s * sqrt(2)))) if deviation_s > 0 else float(late_s >= 0)

    def _sorted_starts(self, position: int) -> list[float]:
        starts = self._sorted.get(position)
        if starts is None:
            starts = self._sorted[position] = sorted(self._starts[position - 1])
        return starts

    def _extrapolated(self, position: int) -> tuple[float, float]:
        """For a position behind the simulated ones: seconds after the last one, and standard deviation of the start.

        Each further position adds one step. With impatience a step shrinks by exp(-hazard * start); `log1p` is the sum.
        """
        more = position - len(self._starts)
        added_s = more * self._step_s
        if self._hazard > 0:
            added_s = log1p(self._hazard * added_s * exp(-self._hazard * self._last_s)) / self._hazard
        own_s = sqrt(self._last_variance + more * self._step_variance)
        return added_s, hypot(own_s, (self._last_s + added_s) * self._error)


def _starts(
    work: WorkDraws, running: Sequence[LiveRequest], waiting: Sequence[LiveRequest], slots: int, hazard: float
) -> list[tuple[float, ...]]:
    """For each position its `NUM_DRAWS` start times, in seconds from `work.now_s`."""
    rows = [work.of_waiting(request) for request in waiting]
    rows += [work.of_future(i) for i in range(min(NUM_FUTURE, MAX_SIMULATED - len(waiting)))]
    patience = [inf if r.expires_s is None else r.expires_s - work.now_s for r in waiting]
    patience += [inf] * (len(rows) - len(waiting))
    ends = [work.of_running(request) for request in running]
    frees = [list(draw) for draw in zip(*ends, strict=True)] if ends else [[] for _ in range(NUM_DRAWS)]
    starts = [
        simulate(free, works, slots, patience if hazard or min(patience) < inf else None, hazard)
        for free, works in zip(frees, zip(*rows, strict=True), strict=True)
    ]
    return [*zip(*starts, strict=True)]


def simulate(
    free: list[float], works: Sequence[float], slots: int, patience: Sequence[float] | None = None, hazard: float = 0.0
) -> list[float]:
    """The start times of `works` (seconds, in order of start) on slots that become free at the times `free`.

    With fewer times than slots, the other slots are free now; with more, the surplus slots disappear as the earliest
    generations end. `patience`: seconds after which each request expires; an expired request has a start time but takes
    no slot. `hazard`: of a request that starts after t seconds, a share exp(-hazard * t) of the work remains, because
    the other clients have disconnected.
    """
    free.sort()
    free = free[len(free) - slots :] if len(free) >= slots else [0.0] * (slots - len(free)) + free
    starts = []
    if patience is None:  # the same result in half of the time
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
    """`NUM_DRAWS` plausible seconds of work for each request, from the facts at one moment."""

    def __init__(self, lengths: LengthHistory, pace_s: float, prefill: Prefill, now_s: float) -> None:
        self._lengths = lengths
        self._pace_s = pace_s
        self._prefill = prefill
        self.now_s = now_s
        overall = lengths.overall
        self.error = sqrt(overall.variance() / len(overall)) / overall.mean()
        """Standard error of the mean length, as a share of it: the history is a sample."""
        spread = min(self.error * sqrt(12.0), 1.0)
        # The lengths of one draw are too long or too short by the same factor.
        self._paces_s = [pace_s * (1 + spread * ((k + 0.5) / NUM_DRAWS - 0.5)) for k in permutations()[0]]

    def of_waiting(self, request: LiveRequest) -> list[float]:
        """Work of a waiting request."""
        if request.generated_tokens:  # preempted: it continues where it stopped
            return self._seconds(request, 0.0)
        return self._seconds(request, self._prefill.seconds(request.arrival.prompt_tokens))

    def of_running(self, request: LiveRequest) -> list[float]:
        """Remaining work of a running request."""
        if request.state in (State.ABORTING, State.PREEMPTING):
            return [0.0] * NUM_DRAWS
        if request.generated_tokens:
            passed_s = self.now_s - request.last_progress_s
            return [max(0.0, seconds - passed_s) for seconds in self._seconds(request, 0.0)]
        left_s = self._prefill.seconds(request.arrival.prompt_tokens) - (self.now_s - request.started_s)
        return self._seconds(request, max(0.0, left_s))

    def of_future(self, number: int) -> list[float]:
        """Work of a request that has not arrived yet."""
        shuffle = permutations()[-1 - number]
        draws, before_s = self._lengths.overall.draws(), self._prefill.typical_s()[0]
        return [before_s + (draws[i] - 1) * pace_s for i, pace_s in zip(shuffle, self._paces_s, strict=True)]

    def typical(self) -> tuple[float, float]:
        """Mean and variance of the work of a request that has not arrived yet."""
        overall = self._lengths.overall
        before_s, variance = self._prefill.typical_s()
        return before_s + (overall.mean() - 1) * self._pace_s, variance + overall.variance() * self._pace_s**2

    def _seconds(self, request: LiveRequest, before_s: float) -> list[float]:
        """`before_s` plus the seconds after the first token, or after the last token that the request has."""
        lengths = self._lengths.of(request.client)
        done, allowed = request.generated_tokens, request.arrival.max_new_tokens
        draws = lengths.draws_beyond(done) if done else lengths.draws()
        if allowed is not None and allowed < draws[-1]:
            draws = [min(draw, allowed) for draw in draws]
        shuffle = permutations()[request.seq % MAX_SIMULATED + 1]
        done = done or 1  # the first token ends the prefill
        return [before_s + (draws[i] - done) * pace_s for i, pace_s in zip(shuffle, self._paces_s, strict=True)]


@cache
def permutations() -> list[list[int]]:
    """Fixed shuffles of the draws, enough that no two simulated requests share one.

    With them the draws of n requests are a Latin hypercube sample (McKay, Beckman and Conover 1979): the distribution
    of each request is represented exactly, and the draws of two requests are not correlated. Park and Miller's
    generator (1988) makes them equal on every machine.
    """
    state, shuffles = 1, []
    for _ in range(2 * MAX_SIMULATED + 1):
        shuffle = list(range(NUM_DRAWS))
        for i in range(NUM_DRAWS - 1, 0, -1):
            state = state * 48271 % 2147483647
            j = state % (i + 1)
            shuffle[i], shuffle[j] = shuffle[j], shuffle[i]
        shuffles.append(shuffle)
    return shuffles
