"""What the scheduler shows of its state: frozen values for status pages, metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.scheduler.eta.calibration import EtaStats
from chatstream.scheduler.request import Eta, LiveRequest
from chatstream.scheduler.states import Phase
from chatstream.types import WaitsFor


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Limits, current numbers and totals since the scheduler was created. Status pages and metrics use only this."""

    max_concurrency: int
    max_queue_size: int
    """The number in force, also when the setting is "auto"."""
    policy: str
    phase: Phase
    is_paused: bool
    running: int
    """Slots in use."""
    waiting: int
    """Requests in the queue, preempted ones included."""
    preempting: int
    """Running requests that the engine was asked to preempt."""
    preempted: int
    """Waiting requests that have started before."""
    leaving: int
    """Requests that were cancelled while preempted and that the engine has not released yet: neither running nor
    waiting."""
    received: int
    rejected: int
    finished: int
    cancelled: int
    failed: int
    expired: int
    prompt_tokens: int
    """Prompt tokens computed by the engine, also for requests that did not finish. A second attempt counts again."""
    generated_tokens: int
    requeued: int
    slots_reclaimed: int
    """Slots that the watchdog freed: must stay 0."""
    stale_reports: int
    """Reports with a stale grant; they were ignored."""
    eta: EtaStats
    """Accuracy of the ETAs."""

    @property
    def is_open(self) -> bool:
        return self.phase is Phase.OPEN

    @property
    def is_draining(self) -> bool:
        return self.phase is Phase.DRAINING


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One live request. Durations are seconds at the time of the call."""

    request_id: str
    client: str
    priority: int
    position: int | None = None
    """None while the request runs."""
    waits_for: WaitsFor | None = None
    """None while the request runs."""
    is_preempted: bool = False
    """True while a request that has started waits to resume."""
    eta: Eta | None = None
    """None while the request runs or is held, and until the estimates have a basis."""
    slot: int | None = None
    """None while the request waits."""
    waiting_tokens: int
    """Estimated tokens of prompt and answer."""
    generated_tokens: int
    waited_s: float
    """From arrival to the start, or until now."""
    running_s: float
    """Since the start, time without a slot included; 0 before the start."""
    last_progress_s_ago: float


def running_view(request: LiveRequest, now_s: float) -> RequestView:
    """The view of a request with a slot."""
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
    """The view of a waiting request."""
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
