"""When those who wait will start.

Simulation instead of a formula: each running generation is continued in 47 plausible ways given how far it is, each
waiting one is given 47 plausible lengths, and the line is played through on the slots for each of the 47. The times
at which somebody starts, over the 47, are the answer. docs/eta.md has the method, its sources and what it promises.

    lengths.py      how long answers are
    pace.py         how fast the engine is
    calibration.py  what was told, what came true, and the factor that follows from it
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from heapq import heapreplace
from itertools import islice
from math import erf, exp, floor, hypot, inf, log1p, log10, sqrt

from chatstream.scheduler.calibration import Calibration, Eta, EtaStats
from chatstream.scheduler.lengths import NUM_DRAWS, LengthHistory, Lengths
from chatstream.scheduler.pace import Prefill, TokenPace
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State

MIN_COMPLETED = 10
"""No estimate before so many generations have ended."""
MAX_PLAYED = 128
"""Places that are played through; those behind follow by the central limit theorem."""
NEWCOMERS = 16
"""Places behind the last one that are played too: somebody may join before the next refresh."""
REFRESH_S = 0.5
SOONEST_S = 0.1
"""What somebody is told at least while no slot is free."""
Z90 = 1.2815515655446004
"""The 0.9 quantile of the normal distribution."""


class EtaEstimator:
    """Facts in as they happen, a picture of the line at most twice a second, estimates out at any time.

    The caller asks `is_stale` now and then and calls `refresh` when it is. Estimates age: what was 5 s a second ago
    is 4 s now, and who starts moves everybody up by one.
    """

    def __init__(self) -> None:
        self._lengths = LengthHistory()
        self._pace = TokenPace()
        self._prefill = Prefill()
        self._patience = _Patience()
        self._calibration = Calibration()
        self._num_running = 0
        # Not yet told to the pace: this is all that is done for a token.
        self._tokens = 0
        self._seconds = 0.0
        self._picture: _Picture | None = None
        self._started_since = 0
        self._changes_since = 0
        self._last_start_s: float | None = None
        self._start_gap_s = 0.0  # mean of late between two starts

    # --- facts in ---------------------------------------------------------------------------------------------

    def on_started(self, request: LiveRequest, now_s: float) -> None:
        """It has left the line for a slot, for the first time or again."""
        self._learn_pace()
        self._num_running += 1
        self._started_since += 1
        self._changes_since += 1
        if self._last_start_s is not None:
            self._start_gap_s += 0.05 * (now_s - self._last_start_s - self._start_gap_s)
        self._last_start_s = now_s
        if request.generated_tokens == 0:
            self._patience.add(now_s - request.admitted_s, has_left=False)

    def on_tokens(self, request: LiveRequest, count: int, now_s: float) -> None:
        """Call before `generated_tokens` and `last_progress_s` of the request change."""
        if request.generated_tokens:
            self._tokens += count
            self._seconds += now_s - request.last_progress_s
        elif count:
            self._prefill.add(request.arrival.prompt_tokens, now_s - request.started_s)

    def on_ended(self, request: LiveRequest, is_complete: bool, now_s: float) -> None:
        """It has given its slot back. `is_complete`: the answer ended by itself or by its allowance."""
        self._learn_pace()
        self._num_running = max(0, self._num_running - 1)
        self._changes_since += 1
        tokens, allowed = request.generated_tokens, request.arrival.max_new_tokens
        # Who left during the prefill, or was failed by a broken engine there, says nothing about lengths.
        if is_complete or tokens:
            self._lengths.add(request.client, max(tokens, 1), is_cut=allowed is not None and tokens >= allowed)

    def on_abandoned(self, request: LiveRequest, now_s: float) -> None:
        """It has left the line without starting."""
        self._changes_since += 1
        # Who had to go at a known time is played through as such; what is learned is who goes without a word.
        has_expired = request.expires_s is not None and now_s >= request.expires_s
        self._patience.add(now_s - request.admitted_s, has_left=not has_expired)

    def came_true(self, told: Eta, waited_s: float) -> None:
        """Somebody who was told `told` has started after so long."""
        num_since = waited_s / self._start_gap_s if self._start_gap_s > 0 else 0.0
        self._calibration.add(told, waited_s, num_since)

    def is_stale(self, now_s: float) -> bool:
        """A refresh would pay: the picture is half a second old, or much has happened since."""
        picture = self._picture
        if picture is None:
            return self._changes_since > 0
        age_s = now_s - picture.taken_s
        return age_s >= REFRESH_S or (age_s >= REFRESH_S / 5 and self._changes_since > picture.slots)

    def refresh(self, running: Sequence[LiveRequest], waiting: Iterable[LiveRequest], slots: int, now_s: float) -> None:
        """Play the line through. `waiting` in the expected order of start; only the first 128 are looked at."""
        self._learn_pace()
        self._num_running = len(running)
        self._started_since = self._changes_since = 0
        if len(self._lengths.everybody) < MIN_COMPLETED:
            self._picture = None
            return
        self._lengths.forget_before_a_change()
        slots = min(slots, len(running) + MAX_PLAYED)  # more would stay free whatever happens
        guess = _Guess(self._lengths, self._pace.seconds_per_token(slots), self._prefill, now_s)
        first = list(islice(waiting, MAX_PLAYED))
        rows = [guess.whole(request) for request in first]
        rows += [guess.unknown(i) for i in range(min(NEWCOMERS, MAX_PLAYED - len(first)))]
        patience = [inf if r.expires_s is None else r.expires_s - now_s for r in first]
        patience += [inf] * (len(rows) - len(first))
        hazard = self._patience.hazard()
        ends = [guess.rest(request) for request in running]
        frees = [list(ways) for ways in zip(*ends, strict=True)] if ends else [[] for _ in range(NUM_DRAWS)]
        starts = [
            play(free, works, slots, patience if hazard or min(patience) < inf else None, hazard)
            for free, works in zip(frees, zip(*rows, strict=True), strict=True)
        ]
        self._picture = _Picture(now_s, slots, slots - len(running), [*zip(*starts, strict=True)], guess, hazard)

    # --- estimates out ----------------------------------------------------------------------------------------

    def at(self, position: int, now_s: float) -> Eta | None:
        """For whoever is at that place in line now, 1 for the next, also for places nobody has taken yet.

        None before there is a basis: 10 ended generations and a refresh.
        """
        picture = self._picture
        if picture is None:
            return None
        place = position + self._started_since
        p50_s, p90_s = picture.quantiles(place)
        passed_s = now_s - picture.taken_s
        least_s = 0.0 if place <= picture.num_free else SOONEST_S
        p50_s, p90_s = max(least_s, p50_s - passed_s), max(least_s, p90_s - passed_s)
        return Eta(p50_s, p50_s + self._calibration.factor * (p90_s - p50_s))

    def probability_by(self, position: int, within_s: float, now_s: float) -> float | None:
        """That whoever is at that place has started within so many seconds; None before there is a basis."""
        picture = self._picture
        if picture is None:
            return None
        return picture.probability_by(position + self._started_since, within_s + now_s - picture.taken_s)

    def prefill_s(self, prompt_tokens: int) -> float:
        """The expected seconds from the start to the first token; 0 while nothing is known."""
        return self._prefill.seconds(prompt_tokens)

    def stats(self) -> EtaStats:
        return self._calibration.stats(len(self._lengths.everybody))

    def _learn_pace(self) -> None:
        if self._tokens:
            self._pace.add(self._tokens, self._seconds, self._num_running)
            self._tokens, self._seconds = 0, 0.0


def smoothed(previous: Eta, previous_at_s: float, fresh: Eta, now_s: float, *, has_grown: bool = False) -> Eta:
    """What to tell somebody who was told `previous` at `previous_at_s`, now that `fresh` is the best estimate.

    Down at once, up by at most 20 % a second (from at least 1 s), so that the answer does not jump; unless
    `has_grown`: somebody came in front, slots were taken away, and the jump is news.
    """
    if has_grown:
        return fresh
    growth = 1.2 ** min(1.0, max(0.0, now_s - previous_at_s))
    p50_s = min(fresh.p50_s, max(1.0, previous.p50_s) * growth)
    return fresh._replace(p50_s=p50_s, p90_s=max(p50_s, min(fresh.p90_s, max(1.0, previous.p90_s) * growth)))


def rounded(seconds: float) -> float:
    """To two significant digits, one below 10 s, and tenths below 1 s: nobody knows it better."""
    if seconds < 1:
        return round(seconds, 1)
    digits = 1 if seconds < 10 else 2
    return round(seconds, digits - 1 - floor(log10(seconds)))


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
    if patience is None:
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


@cache
def permutations() -> list[list[int]]:
    """So many fixed shuffles of the draws that no two requests near each other share one.

    With them the draws of n requests are a Latin hypercube sample (McKay, Beckman and Conover 1979): each request's
    distribution is represented exactly, and none of them is lucky in the same way as another. The same on every
    machine: shuffled by Park and Miller's generator (1988).
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


class _Guess:
    """Plausible seconds of work, `NUM_DRAWS` for each request, from what is known at one moment."""

    def __init__(self, lengths: LengthHistory, pace_s: float, prefill: Prefill, now_s: float) -> None:
        self._lengths = lengths
        self._pace_s = pace_s
        self._prefill = prefill
        self._now_s = now_s
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
            passed_s = self._now_s - request.last_progress_s
            return [max(0.0, seconds - passed_s) for seconds in self._seconds(request, 0.0)]
        left_s = self._prefill.seconds(request.arrival.prompt_tokens) - (self._now_s - request.started_s)
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
        lengths: Lengths = self._lengths.of(request.client)
        done, allowed = request.generated_tokens, request.arrival.max_new_tokens
        draws = lengths.draws_beyond(done) if done else lengths.draws()
        if allowed is not None and allowed < draws[-1]:
            draws = [min(draw, allowed) for draw in draws]
        shuffle = permutations()[request.seq % MAX_PLAYED + 1]
        done = done or 1  # the first token ends the prefill
        return [before_s + (draws[i] - done) * pace_s for i, pace_s in zip(shuffle, self._paces_s, strict=True)]


class _Patience:
    """How soon those who wait go away by themselves, as a rate per second of waiting."""

    MEMORY = 200
    """Forgets half of what it has seen whenever it has seen so many."""

    def __init__(self) -> None:
        self._seen = 0.0
        self._left = 0.0
        self._waited_s = 0.0

    def add(self, waited_s: float, *, has_left: bool) -> None:
        if self._seen >= self.MEMORY:
            self._seen, self._left, self._waited_s = self._seen / 2, self._left / 2, self._waited_s / 2
        self._seen += 1
        self._left += has_left
        self._waited_s += waited_s

    def hazard(self) -> float:
        return self._left / self._waited_s if self._waited_s > 0 else 0.0


class _Picture:
    """The start times that were played, by place, and how they go on behind the last one."""

    def __init__(
        self,
        taken_s: float,
        slots: int,
        num_free: int,
        starts: list[tuple[float, ...]],
        guess: _Guess,
        hazard: float,
    ) -> None:
        self.taken_s = taken_s
        self.slots = slots
        self.num_free = num_free
        self._starts = starts
        self._sorted: dict[int, list[float]] = {}
        self._quantiles: dict[int, tuple[float, float]] = {}
        work_s, work_variance = guess.typical()
        self._step_s = work_s / slots
        self._step_variance = work_variance / slots**2
        self._error = guess.error
        self._hazard = hazard
        last = starts[-1]
        self._last_s = sum(last) / NUM_DRAWS
        variance = sum((start - self._last_s) ** 2 for start in last) / NUM_DRAWS
        self._last_variance = max(0.0, variance - (self._last_s * self._error) ** 2)
        """Without the part that comes from the error of the mean length: that part grows with the place."""

    def quantiles(self, place: int) -> tuple[float, float]:
        """Seconds from `taken_s`: the 0.5 and the 0.9 quantile. Neither decreases with the place."""
        known = self._quantiles.get(place)
        if known is None and place <= len(self._starts):
            ways = self._ways(place)
            rank = 0.9 * NUM_DRAWS - 0.5
            low = int(rank)
            known = ways[NUM_DRAWS // 2], ways[low] + (rank - low) * (ways[low + 1] - ways[low])
            self._quantiles[place] = known
        elif known is None:
            last50_s, last90_s = self.quantiles(len(self._starts))
            added_s, deviation_s = self._behind(place)
            known = last50_s + added_s, last50_s + added_s + max(Z90 * deviation_s, last90_s - last50_s)
        return known

    def probability_by(self, place: int, seconds: float) -> float:
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
