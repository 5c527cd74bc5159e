"""Facts in as they happen, estimates out at any time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from math import floor, log10

from chatstream.scheduler.eta.calibration import Calibration, Eta, EtaStats
from chatstream.scheduler.eta.lengths import LengthHistory
from chatstream.scheduler.eta.pace import Prefill, TokenPace
from chatstream.scheduler.eta.patience import Patience
from chatstream.scheduler.eta.picture import MAX_PLAYED, Picture, WorkDraws
from chatstream.scheduler.request import LiveRequest

MIN_COMPLETED = 10
"""No estimate before so many generations have ended."""
REFRESH_S = 0.5
"""A picture serves so long, or a fifth of it when much happens."""
SOONEST_S = 0.1
"""What somebody is told at least while no slot is free."""


class EtaEstimator:
    """Facts in as they happen, a picture of the line at most twice a second, estimates out at any time.

    The caller asks `is_stale` now and then and calls `refresh` when it is. Estimates age: what was 5 s a second ago
    is 4 s now, and who starts moves everybody up by one.
    """

    def __init__(self) -> None:
        self._lengths = LengthHistory()
        self._pace = TokenPace()
        self._prefill = Prefill()
        self._patience = Patience()
        self._calibration = Calibration()
        self._num_running = 0
        # Not yet told to the pace: this is all that is done for a token.
        self._tokens = 0
        self._seconds = 0.0
        self._picture: Picture | None = None
        self.era = 0
        """Of what was told in an earlier one, nothing need hold."""
        self._started_since = 0  # since it was taken
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

    def start_over(self) -> None:
        """The slots or the order have changed: the next picture has little to do with this one."""
        self._picture = None
        self._changes_since += 1
        self.era += 1

    def is_stale(self, now_s: float) -> bool:
        """A refresh would pay: the picture is half a second old, or much has happened since."""
        picture = self._picture
        if picture is None:
            return self._changes_since > 0
        age_s = now_s - picture.taken_s
        is_much = self._changes_since > max(picture.slots, picture.num_places // 8)
        return age_s >= REFRESH_S or (is_much and age_s >= REFRESH_S / 5)

    def refresh(self, running: Sequence[LiveRequest], waiting: Iterable[LiveRequest], slots: int, now_s: float) -> None:
        """Play the line through. `waiting` in the expected order of start; of them the first `MAX_PLAYED` count."""
        self._learn_pace()
        self._num_running = len(running)
        self._started_since = self._changes_since = 0
        if len(self._lengths.everybody) < MIN_COMPLETED:
            self._picture = None
            return
        self._lengths.forget_before_a_change()
        slots = min(slots, len(running) + MAX_PLAYED)  # more would stay free whatever happens
        work = WorkDraws(self._lengths, self._pace.seconds_per_token(slots), self._prefill, now_s)
        first = list(islice(waiting, MAX_PLAYED))
        self._picture = Picture(work, running, first, slots, self._patience.hazard())

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


def smoothed(previous: Eta, previous_at_s: float, fresh: Eta, now_s: float, *, is_news: bool = False) -> Eta:
    """What to tell somebody who was told `previous` at `previous_at_s`, now that `fresh` is the best estimate.

    Down at once, up by at most 20 % for each second since (from at least 1 s), so that the answer does not jump;
    unless `is_news`: somebody came in front, slots were taken away, and the jump has a reason.
    """
    if is_news:
        return fresh
    growth = 1.2 ** min(max(0.0, now_s - previous_at_s), 60.0)  # by then it may be 50,000 times as much
    p50_s = min(fresh.p50_s, max(1.0, previous.p50_s) * growth)
    return fresh._replace(p50_s=p50_s, p90_s=max(p50_s, min(fresh.p90_s, max(1.0, previous.p90_s) * growth)))


def rounded(seconds: float) -> float:
    """To two significant digits, one below 10 s, and tenths below 1 s: nobody knows it better."""
    if seconds < 1:
        return round(seconds, 1)
    digits = 1 if seconds < 10 else 2
    return round(seconds, digits - 1 - floor(log10(seconds)))
