"""The estimator: facts in as they happen, estimates out at any time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from math import floor, log10

from chatstream.scheduler.eta.calibration import Calibration, EtaStats
from chatstream.scheduler.eta.lengths import LengthHistory
from chatstream.scheduler.eta.pace import Prefill, TokenPace
from chatstream.scheduler.eta.patience import Patience
from chatstream.scheduler.eta.picture import MAX_SIMULATED, Picture, WorkDraws
from chatstream.scheduler.request import Eta, LiveRequest

MIN_COMPLETED = 10
"""No estimates before this number of generations have ended."""
REFRESH_S = 0.5
"""Maximum age of a picture; a fifth of it after many changes."""
SOONEST_S = 0.1
"""Smallest estimate while no slot is free."""


class EtaEstimator:
    """Estimates from a simulation of the queue (`Picture`), which the caller refreshes at most twice a second.

    The caller checks `is_stale` before it reads estimates, and calls `refresh` if it is true. Between refreshes the
    elapsed time is subtracted from an estimate, and each start moves the positions by one.
    """

    def __init__(self) -> None:
        self._lengths = LengthHistory()
        self._pace = TokenPace()
        self._prefill = Prefill()
        self._patience = Patience()
        self._calibration = Calibration()
        self._num_running = 0
        # Not added to `_pace` yet, so that a token costs two additions.
        self._tokens = 0
        self._seconds = 0.0
        self._picture: Picture | None = None
        self.epoch = 0
        """Incremented when limits or policy change; earlier ETAs may then be revised upwards at once."""
        self._started_since = 0  # since the picture was taken
        self._changes_since = 0
        self._last_start_s: float | None = None
        self._start_gap_s = 0.0  # recent mean time between two starts

    # --- facts in ---------------------------------------------------------------------------------------------

    def on_started(self, request: LiveRequest, now_s: float) -> None:
        """A request has left the queue for a slot: start or resumption."""
        self._learn_pace()
        self._num_running += 1
        self._started_since += 1
        self._changes_since += 1
        if self._last_start_s is not None:
            self._start_gap_s += 0.05 * (now_s - self._last_start_s - self._start_gap_s)
        self._last_start_s = now_s
        if request.generated_tokens == 0:
            self._patience.add(now_s - request.admitted_s, is_cancelled=False)

    def on_tokens(self, request: LiveRequest, count: int, now_s: float) -> None:
        """The engine generated `count` tokens. Call before `generated_tokens` and `last_progress_s` change."""
        if request.generated_tokens:
            self._tokens += count
            self._seconds += now_s - request.last_progress_s
        elif count:
            self._prefill.add(request.arrival.prompt_tokens, now_s - request.started_s)

    def on_ended(self, request: LiveRequest, is_complete: bool, now_s: float) -> None:
        """A started request has ended. `is_complete`: by itself or by `max_new_tokens`."""
        self._learn_pace()
        self._num_running = max(0, self._num_running - 1)
        self._changes_since += 1
        tokens, allowed = request.generated_tokens, request.arrival.max_new_tokens
        # A request that was cancelled or failed during its prefill carries no information about lengths.
        if is_complete or tokens:
            self._lengths.add(request.client, max(tokens, 1), is_cut=allowed is not None and tokens >= allowed)

    def on_abandoned(self, request: LiveRequest, now_s: float) -> None:
        """A request has left the queue without a start: cancelled or expired."""
        self._changes_since += 1
        # Expiry at a known time is simulated as such, so only cancellations count as impatience.
        has_expired = request.expires_s is not None and now_s >= request.expires_s
        self._patience.add(now_s - request.admitted_s, is_cancelled=not has_expired)

    def measure(self, sent: Eta, waited_s: float) -> None:
        """A request has started `waited_s` after `sent` was sent to its client: calibrate with the error."""
        num_since = waited_s / self._start_gap_s if self._start_gap_s > 0 else 0.0
        self._calibration.add(sent, waited_s, num_since)

    def invalidate(self) -> None:
        """Discard the picture, because the number of slots or the order of the queue has changed."""
        self._picture = None
        self._changes_since += 1
        self.epoch += 1

    def is_stale(self, now_s: float) -> bool:
        """True when a refresh is worth its cost: the picture is half a second old, or many changes followed it."""
        picture = self._picture
        if picture is None:
            return self._changes_since > 0
        age_s = now_s - picture.taken_s
        has_many_changes = self._changes_since > max(picture.slots, picture.num_positions // 8)
        return age_s >= REFRESH_S or (has_many_changes and age_s >= REFRESH_S / 5)

    def refresh(self, running: Sequence[LiveRequest], waiting: Iterable[LiveRequest], slots: int, now_s: float) -> None:
        """Simulate the queue. `waiting`: in the expected order of start; the first `MAX_SIMULATED` are used."""
        self._learn_pace()
        self._num_running = len(running)
        self._started_since = self._changes_since = 0
        if len(self._lengths.overall) < MIN_COMPLETED:
            self._picture = None
            return
        self._lengths.drop_before_change()
        slots = min(slots, len(running) + MAX_SIMULATED)  # more would stay free
        work = WorkDraws(self._lengths, self._pace.seconds_per_token(slots), self._prefill, now_s)
        first = list(islice(waiting, MAX_SIMULATED))
        self._picture = Picture(work, running, first, slots, self._patience.hazard())

    # --- estimates out ----------------------------------------------------------------------------------------

    def at(self, position: int, now_s: float) -> Eta | None:
        """The ETA of a position in the queue, from 1. The position may be behind the last waiting request.

        None before the estimates have a basis: 10 ended generations and a refresh.
        """
        picture = self._picture
        if picture is None:
            return None
        position_then = position + self._started_since
        p50_s, p90_s = picture.quantiles(position_then)
        passed_s = now_s - picture.taken_s
        least_s = 0.0 if position_then <= picture.num_free else SOONEST_S
        p50_s, p90_s = max(least_s, p50_s - passed_s), max(least_s, p90_s - passed_s)
        return Eta(p50_s, p50_s + self._calibration.factor * (p90_s - p50_s))

    def probability_by(self, position: int, within_s: float, now_s: float) -> float | None:
        """The probability that the request at `position` starts within `within_s`; None before there is a basis."""
        picture = self._picture
        if picture is None:
            return None
        return picture.probability_by(position + self._started_since, within_s + now_s - picture.taken_s)

    def prefill_s(self, prompt_tokens: int) -> float:
        """The expected seconds from the start to the first token; 0 before the first measurement."""
        return self._prefill.seconds(prompt_tokens)

    def stats(self) -> EtaStats:
        return self._calibration.stats(len(self._lengths.overall))

    def _learn_pace(self) -> None:
        if self._tokens:
            self._pace.add(self._tokens, self._seconds, self._num_running)
            self._tokens, self._seconds = 0, 0.0


def smoothed(previous: Eta, previous_at_s: float, fresh: Eta, now_s: float, *, may_jump: bool = False) -> Eta:
    """The ETA to send when `previous` was sent at `previous_at_s` and `fresh` is the current estimate.

    A decrease is sent at once. An increase is limited to 20 % for each second since (from at least 1 s), so that the
    displayed time does not jump; unless `may_jump`: the increase has a reason, such as a worse position or fewer slots.
    """
    if may_jump:
        return fresh
    growth = 1.2 ** min(max(0.0, now_s - previous_at_s), 60.0)  # 1.2 ** 60 = 56,000: no limit in practice
    p50_s = min(fresh.p50_s, max(1.0, previous.p50_s) * growth)
    return fresh._replace(p50_s=p50_s, p90_s=max(p50_s, min(fresh.p90_s, max(1.0, previous.p90_s) * growth)))


def rounded(seconds: float) -> float:
    """Round to the accuracy of the estimates: two significant digits, one below 10 s, tenths below 1 s."""
    if seconds < 1:
        return round(seconds, 1)
    digits = 1 if seconds < 10 else 2
    return round(seconds, digits - 1 - floor(log10(seconds)))
