"""Who may join the line. Decided from what is known at the door, before anything costly is done.

The checks, in their order; `Scheduler.submit` makes them all in one synchronous call, so that of N requests in one
instant exactly as many are admitted as there are places. It also says when to come back, whichever check refuses:

    draining, paused   nobody may
    client_limit       this client has enough requests in line
    queue_full         no place left, by number or by tokens
    infeasible         it would probably start too late: refused now rather than expired later
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
"""How long people wait for the first word, where no setting says."""
MIN_AUTO_QUEUE, MAX_AUTO_QUEUE = 8, 4096
START_AUTO_QUEUE = 32
"""Before anything has been measured."""
PREFILL_MARGIN = 1.5
"""A prompt may take so much longer to read than expected. Who starts and then misses its time has cost a whole
generation for nothing, which is dearer than to give up somebody who might just have made it."""
DEFAULT_ANSWER_TOKENS = 256
"""Length of an answer before any has been seen."""


class Admission:
    """What is expected of a newcomer, and the checks of what it asks for against what there is."""

    def __init__(self, settings: SchedulerSettings, etas: EtaEstimator) -> None:
        self.bound = QueueBound(settings)
        self._settings = settings
        self._etas = etas
        self._answer_tokens = RecentMean()

    def learn(self, generated_tokens: int) -> None:
        """An answer has come to its end."""
        self._answer_tokens.add(generated_tokens)

    def expected_tokens(self, arrival: Arrival) -> int:
        """What it counts for in line: prompt and answer."""
        answer = round(self._answer_tokens.value or DEFAULT_ANSWER_TOKENS)
        if arrival.max_new_tokens is not None:
            answer = min(arrival.max_new_tokens, answer)
        return arrival.prompt_tokens + answer

    def latest_start_s(self, arrival: Arrival, now_s: float) -> float | None:
        """When it expires; None: never."""
        settings = self._settings
        waits_s = [wait_s for wait_s in (arrival.max_wait_s, settings.max_wait_s) if wait_s is not None]
        if settings.ttft_slo_s is not None:
            waits_s.append(settings.ttft_slo_s - PREFILL_MARGIN * self._etas.prefill_s(arrival.prompt_tokens))
        # However short the wait, a free slot is taken first: it ends after this instant.
        return max(now_s + min(waits_s), nextafter(now_s, inf)) if waits_s else None

    def check_room(
        self, request: LiveRequest, waiting: WaitingRequests, *, num_starting: int, num_free: int, num_slots: int
    ) -> None:
        """Before it enters; not for a request that has a slot at once. Raises `ClientLimit` or `QueueFull`.

        `num_starting` requests in the queue start as soon as the scheduler opens. They do not count as waiting.
        """
        most_of_client, most_tokens = self._settings.max_waiting_per_client, self._settings.max_waiting_tokens
        starting = [] if most_of_client is most_tokens is None else list(waiting.first_eligible(num_starting))
        if most_of_client is not None:
            of_client = waiting.num_of_client(request.client) - sum(one.client == request.client for one in starting)
            if of_client >= most_of_client:
                share = f"{of_client} of {most_of_client} requests waiting"
                raise ClientLimit(f"this client's share of the queue is full: {share}")
        num_waiting = len(waiting) - num_starting
        if num_waiting >= self.bound.value:
            slots_too = "" if num_starting < num_free else f"{num_slots} of {num_slots} slots in use, "
            raise QueueFull(f"the queue is full: {slots_too}{num_waiting} of {self.bound.value} requests waiting")
        if most_tokens is not None:
            tokens = waiting.tokens - sum(one.waiting_tokens for one in starting)
            if tokens + request.waiting_tokens > most_tokens:
                asked = f"this request has about {request.waiting_tokens} tokens and about {tokens} are waiting"
                raise QueueFull(f"{asked}; the maximum is {most_tokens}")

    def check_feasible(self, request: LiveRequest, position: int, now_s: float) -> None:
        """Once it is known where it would stand; the estimates must be fresh.

        By the distribution of the expected wait: a rule on the mean refuses too many when there is little load.
        Raises `Infeasible`; not before the estimates have a basis.
        """
        assert request.expires_s is not None
        within_s = request.expires_s - now_s
        probability = self._etas.probability_by(position, within_s, now_s)
        if probability is not None and probability < self._settings.admit_probability:
            raise Infeasible(
                f"by now {position - 1} are ahead: it would start within {within_s:.2g} s with a probability of "
                f"{probability:.2f}"
            )


class QueueBound:
    """`max_queue_size` as a number, also when it is "auto"."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self._wait_slo_s = settings.ttft_slo_s or settings.max_wait_s or DEFAULT_WAIT_SLO_S
        self._is_auto = False
        self.value = START_AUTO_QUEUE
        self.set(settings.max_queue_size)

    def set(self, size: int | Auto) -> None:
        """Raises `ConfigError`."""
        check_queue_size(size)
        self._is_auto = size == "auto"
        self.value = min(max(self.value, MIN_AUTO_QUEUE), MAX_AUTO_QUEUE) if size == "auto" else size

    def adapt(self, mean_service_s: float, max_concurrency: int) -> bool:
        """Little's law: of a line longer than SLO x slots / service, the last start too late. True: it has changed.

        A change of less than a quarter is left alone, so that the number does not flicker.
        """
        if not self._is_auto:
            return False
        wanted = ceil(self._wait_slo_s * max_concurrency / max(mean_service_s, 1e-3))
        wanted = min(max(wanted, MIN_AUTO_QUEUE), MAX_AUTO_QUEUE)
        if abs(wanted - self.value) < self.value / 4:
            return False
        self.value = wanted
        return True
