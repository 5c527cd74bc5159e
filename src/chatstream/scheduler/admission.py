"""Who may join the line. Decided from what is known at the door, before anything costly is done.

The checks, in their order; `Scheduler.submit` makes them all in one synchronous call, so that of N requests in one
instant exactly as many are admitted as there are places:

    draining, paused   nobody may
    client_limit       this client has enough requests in line
    queue_full         no place left, by number or by tokens; sooner for those whose priority is below 0
    infeasible         it would probably start too late: refused now rather than expired later
"""

from __future__ import annotations

from math import ceil, floor

from chatstream.scheduler.settings import Auto, SchedulerSettings, check_queue_size

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

        A change of less than a tenth is left alone, so that the number does not flicker.
        """
        if not self._is_auto:
            return False
        wanted = ceil(self._wait_slo_s * max_concurrency / max(mean_service_s, 1e-3))
        wanted = min(max(wanted, MIN_AUTO_QUEUE), MAX_AUTO_QUEUE)
        if abs(wanted - self.value) <= self.value / 10:
            return False
        self.value = wanted
        return True


def places_for(priority: int, places: int, holdback: float) -> int:
    """How full the line may be for a request of this priority: below 0, each class leaves more room to the others."""
    return places if priority >= 0 else floor(places * max(0.0, 1.0 + priority * holdback))
