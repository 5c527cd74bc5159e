"""The checks before a request may wait, from cheap facts, before any costly work is done.

`Scheduler.submit` makes all checks in one synchronous call, so the limits are exact for any number of requests in one
instant. It sets `retry_after_s` on every rejection. The checks, in their order, by error code:

    shutting_down, paused   no request is admitted
    client_limit            the client has `max_waiting_per_client` requests waiting
    queue_full              the queue is full, by requests or by tokens
    infeasible              the request would probably start too late: rejected now instead of expired later
"""

from __future__ import annotations

from math import ceil, inf, nextafter

from chatstream.errors import ClientLimit, Infeasible, QueueFull
from chatstream.scheduler.eta import EtaEstimator
from chatstream.scheduler.recent_mean import RecentMean
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.settings import Auto, SchedulerSettings, check_queue_size
from chatstream.scheduler.waiting import WaitingRequests

DEFAULT_WAIT_SLO_S = 30.0
"""Longest acceptable wait when neither `ttft_slo_s` nor `max_wait_s` is set."""
MIN_AUTO_QUEUE, MAX_AUTO_QUEUE = 8, 4096
START_AUTO_QUEUE = 32
"""`max_queue_size="auto"` before the first measurement."""
PREFILL_MARGIN = 1.5
"""Factor on the expected prefill time. A request that starts and then misses its objective wastes a generation, which
costs more than the rejection of a request that might just have met it."""
DEFAULT_ANSWER_TOKENS = 256
"""Expected length of an answer before the first complete answer."""


class Admission:
    """Estimates for a new request, and the checks of its demand against the limits."""

    def __init__(self, settings: SchedulerSettings, etas: EtaEstimator) -> None:
        self.bound = QueueBound(settings)
        self._settings = settings
        self._etas = etas
        self._answer_tokens = RecentMean()

    def learn(self, generated_tokens: int) -> None:
        """Record the length of a complete answer."""
        self._answer_tokens.add(generated_tokens)

    def expected_tokens(self, arrival: Arrival) -> int:
        """Estimated tokens of prompt and answer."""
        answer = round(self._answer_tokens.value or DEFAULT_ANSWER_TOKENS)
        if arrival.max_new_tokens is not None:
            answer = min(arrival.max_new_tokens, answer)
        return arrival.prompt_tokens + answer

    def latest_start_s(self, arrival: Arrival, now_s: float) -> float | None:
        """When the request expires; None: never."""
        settings = self._settings
        waits_s = [wait_s for wait_s in (arrival.max_wait_s, settings.max_wait_s) if wait_s is not None]
        if settings.ttft_slo_s is not None:
            waits_s.append(settings.ttft_slo_s - PREFILL_MARGIN * self._etas.prefill_s(arrival.prompt_tokens))
        # Strictly after now, so that even the shortest wait allows a start in a free slot.
        return max(now_s + min(waits_s), nextafter(now_s, inf)) if waits_s else None

    def check_room(
        self, request: LiveRequest, waiting: WaitingRequests, *, num_starting: int, num_free: int, num_slots: int
    ) -> None:
        """Check that the queue has room for a request that cannot start at once. Call before it enters.

        `num_starting` requests in the queue start as soon as the scheduler opens; they do not count as waiting.
        Raises `ClientLimit` or `QueueFull`.
        """
        max_of_client, max_tokens = self._settings.max_waiting_per_client, self._settings.max_waiting_tokens
        starting = [] if max_of_client is max_tokens is None else list(waiting.first_eligible(num_starting))
        if max_of_client is not None:
            of_client = waiting.num_of_client(request.client) - sum(one.client == request.client for one in starting)
            if of_client >= max_of_client:
                share = f"{of_client} of {max_of_client} requests waiting"
                raise ClientLimit(f"this client's share of the queue is full: {share}")
        num_waiting = len(waiting) - num_starting
        if num_waiting >= self.bound.value:
            slots_too = "" if num_starting < num_free else f"{num_slots} of {num_slots} slots in use, "
            raise QueueFull(f"the queue is full: {slots_too}{num_waiting} of {self.bound.value} requests waiting")
        if max_tokens is not None:
            tokens = waiting.tokens - sum(one.waiting_tokens for one in starting)
            if tokens + request.waiting_tokens > max_tokens:
                asked = f"this request has about {request.waiting_tokens} tokens and about {tokens} are waiting"
                raise QueueFull(f"{asked}; the maximum is {max_tokens}")

    def check_feasible(self, request: LiveRequest, position: int, now_s: float) -> None:
        """Check that a request at `position` starts in time with `admit_probability`. The estimates must be fresh.

        Uses the distribution of the expected wait: a rule on the mean rejects too many requests under low load.
        Raises `Infeasible`, but not before the estimates have a basis.
        """
        assert request.expires_s is not None
        within_s = request.expires_s - now_s
        probability = self._etas.probability_by(position, within_s, now_s)
        if probability is not None and probability < self._settings.admit_probability:
            raise Infeasible(
                f"at position {position} this request would start within {within_s:.2g} s with a probability of "
                f"{probability:.2f}; the minimum is {self._settings.admit_probability:g}"
            )


class QueueBound:
    """The value of `max_queue_size` in force; computed when the setting is "auto"."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._wait_slo_s = settings.ttft_slo_s or settings.max_wait_s or DEFAULT_WAIT_SLO_S
        self._is_auto = False
        self.value = START_AUTO_QUEUE
        self.set(settings.max_queue_size)

    def set(self, size: int | Auto) -> None:
        """Raises `ConfigError` when `size` is invalid."""
        check_queue_size(size)
        self._is_auto = size == "auto"
        self.value = min(max(self.value, MIN_AUTO_QUEUE), MAX_AUTO_QUEUE) if size == "auto" else size

    def adapt(self, mean_service_s: float, max_concurrency: int) -> bool:
        """Set an automatic bound by Little's law: objective x slots / service time. True when it has changed.

        In a longer queue the last request would start too late. Changes of less than a quarter are ignored, so that
        the bound does not flicker.
        """
        if not self._is_auto:
            return False
        wanted = ceil(self._wait_slo_s * max_concurrency / max(mean_service_s, 1e-3))
        wanted = min(max(wanted, MIN_AUTO_QUEUE), MAX_AUTO_QUEUE)
        if abs(wanted - self.value) < self.value / 4:
            return False
        self.value = wanted
        return True
