"""What the scheduler shows of itself: frozen values, for status pages, metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.scheduler.eta.calibration import Eta, EtaStats
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import Phase
from chatstream.types import WaitsFor


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """The only source for status pages, metrics and logs. Counts are since the scheduler was made."""

    max_concurrency: int
    max_queue_size: int
    """The number in force, also when it is chosen automatically."""
    policy: str
    phase: Phase
    is_paused: bool
    running: int
    """Slots in use."""
    waiting: int
    """In line, the preempted ones too."""
    preempting: int
    """Of those that run, how many must give up their slot."""
    preempted: int
    """Of those that wait, how many have begun."""
    leaving: int
    """Cancelled while preempted, and not released by the engine yet: neither running nor waiting."""
    received: int
    rejected: int
    finished: int
    cancelled: int
    failed: int
    expired: int
    prompt_tokens: int
    """Read by the engine, also for requests that did not finish; what is read again after a failure counts again."""
    generated_tokens: int
    requeued: int
    slots_reclaimed: int
    """The watchdog had to free a slot: must stay 0."""
    stale_reports: int
    """Reports that came after the slot had changed hands, and were ignored."""
    eta: EtaStats
    """How right the expected times were that came true."""

    @property
    def is_open(self) -> bool:
        return self.phase is Phase.OPEN

    @property
    def is_draining(self) -> bool:
        return self.phase is Phase.DRAINING


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One live request, for people who look at the queue. Seconds are ages at the time of the call."""

    request_id: str
    client: str
    priority: int
    position: int | None = None
    """None while it runs."""
    waits_for: WaitsFor | None = None
    """None while it runs."""
    is_preempted: bool = False
    """It has begun, and waits for a slot again."""
    eta: Eta | None = None
    """None while it runs, and until there is a basis."""
    slot: int | None = None
    """None while it waits."""
    waiting_tokens: int
    """Prompt and answer, by estimate: what it counts for in line."""
    generated_tokens: int
    waited_s: float
    """From its arrival to its start, or until now."""
    running_s: float
    """Since its start; 0 while it has not begun."""
    last_progress_s_ago: float


def running_view(request: LiveRequest, now_s: float) -> RequestView:
    """The request must hold a slot."""
    assert request.grant is not None
    return RequestView(
        request_id=request.request_id,
        client=request.client,
        priority=request.priority,
        slot=request.grant.slot,
        waiting_tokens=request.waiting_tokens,
        generated_tokens=request.generated_tokens,
        waited_s=request.started_s - request.admitted_s,
        running_s=now_s - request.started_s,
        last_progress_s_ago=now_s - request.last_progress_s,
    )


def waiting_view(
    request: LiveRequest, position: int, waits_for: WaitsFor, eta: Eta | None, now_s: float
) -> RequestView:
    has_started = request.is_preempted
    return RequestView(
        request_id=request.request_id,
        client=request.client,
        priority=request.priority,
        position=position,
        waits_for=waits_for,
        is_preempted=request.is_preempted,
        eta=eta,
        waiting_tokens=request.waiting_tokens,
        generated_tokens=request.generated_tokens,
        waited_s=(request.started_s if has_started else now_s) - request.admitted_s,
        running_s=now_s - request.started_s if has_started else 0.0,
        last_progress_s_ago=now_s - request.last_progress_s if has_started else 0.0,
    )
