"""Carries out the scheduler's decisions and reports facts to it.

    submit ──▶ scheduler ──▶ events ──▶ start a task per running request, send positions, end streams
                  ▲                          │
                  └── on_tokens, on_ended ◀──┘

Each started request has one task; a request that has not started has none. One timer serves all deadlines. A task
releases its slot in `_on_task_done` and nowhere else: whatever ends the request (last token, error, disconnect, cancel,
timeout, shutdown) ends its task. At the end of a time slice a request gives up its slot before that, in `_preempt`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from chatstream.errors import (
    Cancelled,
    ChatStreamError,
    EngineError,
    EngineUnavailable,
    QueueTimeout,
    ShuttingDown,
)
from chatstream.runtime.positions import PositionUpdates
from chatstream.runtime.resumable import ResumableStreams
from chatstream.runtime.settings import RuntimeSettings
from chatstream.runtime.stream import EventLog, ReaderStalled, RequestStream
from chatstream.scheduler import Arrival, Grant, Outcome, RequestView, Scheduler, SchedulerStats
from chatstream.scheduler import events as ev
from chatstream.scheduler.settings import Auto
from chatstream.types import Done, Failed, FinishReason, Started, Token, TokenDelta, Usage, WaitsFor

logger = logging.getLogger(__name__)

Generate: TypeAlias = Callable[[], AsyncGenerator[TokenDelta, None]]
"""Called when the request has its slot, and again if the engine failed before the first token."""


class Preemptible(Protocol):
    """An engine that can pause a generation and keep its state: `chatstream.engines.base.Preemptible`."""

    def preempt(self, request_id: str) -> Awaitable[None]: ...
    def resume(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class End:
    """How one admitted request ended; the argument of `on_end`."""

    event: Done | Failed
    by: str
    """Source of a cancellation: client_disconnected, client, admin, slow_reader, shutdown; else empty."""
    has_started: bool


@dataclass(slots=True, eq=False)
class _Job:
    """The worker's record of one live request."""

    stream: EventLog
    generate: Generate
    message_id: str
    on_end: Callable[[End], object] | None
    task: asyncio.Task[None] | None = None
    grant: Grant | None = None
    must_preempt: bool = False
    """The scheduler asked for the slot; the request's task preempts the generation at the next delta."""
    last_delta: TokenDelta | None = None
    error: ChatStreamError | None = None
    refusal: ChatStreamError | None = None
    """Why the request was refused after its admission."""


class QueueWorker:
    """Runs at most `max_concurrency` generations at once; other requests wait in the queue.

    All calls must come from one event loop; another loop may be used after `stop`.
    """

    DRAIN_BATCH_SIZE = 32
    """Requests rejected in one tick of the event loop; a queue of 10,000 is empty within seconds."""
    DRAIN_PAUSE_S = 0.002
    """Pause between two batches."""

    def __init__(self, scheduler: Scheduler, settings: RuntimeSettings | None = None) -> None:
        self._scheduler = scheduler
        self._settings = settings or RuntimeSettings()
        self._preemptible: Preemptible | None = None
        self.num_drains = 0
        """Drains started so far."""
        self._observers: list[Callable[[ev.Event], object]] = []
        self._jobs: dict[str, _Job] = {}
        self._positions = PositionUpdates(scheduler, self._settings, on_changed=self._arm)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._idle: asyncio.Event | None = None
        self._is_applying = False
        self._has_served = False
        self._is_rejecting_waiting = False
        self._next_drain_batch: asyncio.TimerHandle | None = None
        self.resumables = ResumableStreams(
            grace_s=self._settings.resume_grace_s,
            max_bytes_per_request=self._settings.max_resume_bytes_per_request,
            max_bytes=self._settings.max_resume_bytes,
            on_abandoned=lambda request_id: self._cancel(request_id, "client_disconnected"),
        )
        """Requests that outlive their connection; a request is added by `keep`, after `submit`."""

    def __repr__(self) -> str:
        return f"<QueueWorker {self._scheduler!r}>"

    # --- calls ------------------------------------------------------------------------------------------------

    def submit(
        self,
        arrival: Arrival,
        generate: Generate,
        *,
        message_id: str = "",
        on_end: Callable[[End], object] | None = None,
    ) -> RequestStream:
        """Admit a request. When this returns, it waits or runs until its stream ends or is closed.

        Raises a subclass of `Overloaded` when the request is rejected. `on_end` is called exactly once for each
        admitted request; an exception that it raises is logged and has no other effect.
        """
        self._loop = asyncio.get_running_loop()
        request_id = arrival.request_id
        log = EventLog(
            request_id,
            max_buffered=self._settings.max_buffered_tokens,
            on_closed=lambda by: self._cancel(request_id, by),
        )
        stream = log.attach()
        job = _Job(log, generate, message_id, on_end)
        self._jobs[request_id] = job
        try:
            self._scheduler.submit(arrival, self._now_s())
        except BaseException:
            del self._jobs[request_id]
            raise
        finally:
            self._apply_events()
        if not self._positions.send(request_id) and self._is_applying:
            self._positions.positions_changed()  # the next round sends it
        return stream

    def cancel(self, request_id: str, by: str = "client") -> bool:
        """Cancel a request, waiting or running. Idempotent; False when no such request is live."""
        return self._cancel(request_id, by)

    def resend_position(self, request_id: str) -> None:
        """Send position and ETA anew, for a client that reconnects. Does nothing when the request does not wait."""
        self._positions.resend(request_id)

    def refuse(self, request_id: str, refusal: ChatStreamError) -> None:
        """End an admitted request with an error: it can never be answered. Frees its position or slot."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.refusal = refusal
            self._cancel(request_id, "refused")

    def set_limits(
        self,
        *,
        max_concurrency: int | None = None,
        max_queue_size: int | Auto | None = None,
        by: str = "",
        why: str = "",
    ) -> None:
        """Change the limits at once; no request is lost. Raises `ConfigError`."""
        self._loop = asyncio.get_running_loop()
        self._scheduler.set_limits(
            self._now_s(), max_concurrency=max_concurrency, max_queue_size=max_queue_size, by=by, why=why
        )
        self._apply_events()

    def set_policy(self, name: str, *, by: str = "", why: str = "") -> None:
        """Order the queue by another policy from now on. Raises `ConfigError`."""
        self._loop = asyncio.get_running_loop()
        self._scheduler.set_policy(name, self._now_s(), by=by, why=why)
        self._apply_events()

    def set_paused(self, is_paused: bool, *, by: str = "", why: str = "") -> None:
        """Reject new requests, or admit them again; waiting and running requests continue. Idempotent."""
        self._loop = asyncio.get_running_loop()
        change = self._scheduler.pause if is_paused else self._scheduler.unpause
        change(self._now_s(), by=by, why=why)
        self._apply_events()

    def start(
        self, *, preemptible: Preemptible | None = None, engine_limit: int | None = None, by: str = "", why: str = ""
    ) -> None:
        """Start requests from now on, the waiting ones first. Idempotent; ends a drain.

        `preemptible`: the engine, if it can preempt. `engine_limit`: the most requests that the engine can run.
        """
        self._loop = asyncio.get_running_loop()
        if not self._scheduler.stats().is_open:
            self._has_served = True
            self._end_drain()  # requests that were not rejected yet stay in the queue
            self._preemptible = preemptible
            can_preempt = preemptible is not None
            self._scheduler.open(self._now_s(), can_preempt=can_preempt, engine_limit=engine_limit, by=by, why=why)
            self._apply_events()

    def drain(self, *, by: str = "", why: str = "") -> None:
        """Reject new requests and those that have not started; started ones continue. Idempotent; `start` ends it."""
        self._loop = asyncio.get_running_loop()
        if not self._scheduler.stats().is_draining:
            self.num_drains += 1
            self._is_rejecting_waiting = True
            self._reject_waiting(by, why)

    def _reject_waiting(self, by: str = "", why: str = "") -> None:
        """Reject a batch of requests that have not started. Batches keep the streams of running requests going."""
        self._next_drain_batch = None
        has_more = self._scheduler.drain(self._now_s(), at_most=self.DRAIN_BATCH_SIZE, by=by, why=why)
        self._apply_events()
        # A callback may have called `start`, and even `drain` again.
        if has_more and self._is_rejecting_waiting and self._next_drain_batch is None:
            assert self._loop is not None
            self._next_drain_batch = self._loop.call_later(self.DRAIN_PAUSE_S, self._reject_waiting)

    def _end_drain(self) -> None:
        self._is_rejecting_waiting = False
        if self._next_drain_batch is not None:
            self._next_drain_batch.cancel()
            self._next_drain_batch = None

    async def stop(self, grace_s: float = 0.0) -> None:
        """Reject new and waiting requests; let running ones finish for `grace_s`, then abort them.

        Returns once no request runs. Idempotent.
        """
        self.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._wait_idle()
        except TimeoutError:
            for request_id in list(self._jobs):
                self._cancel(request_id, "shutdown")
            await self._wait_idle()
        self.resumables.remove_ended()
        # Timers belong to this event loop; a later start may have another.
        self._disarm()
        self._positions.close()
        self._end_drain()

    def observe(self, observer: Callable[[ev.Event], object]) -> None:
        """Call `observer` with every event of the scheduler. An exception is logged and has no other effect."""
        self._observers.append(observer)

    def waits_for(self, request_id: str) -> WaitsFor | None:
        """What a waiting request waits for; None when it does not wait."""
        return self._scheduler.waits_for(request_id)

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def records(self) -> dict[str, int]:
        """Sizes of internal records, for debuggers and tests: all 0 without live and resumable requests.

        The scheduler's records, and `jobs`: live requests; `positions`: waiting requests; `resumable`: resumable
        requests, ended ones included.
        """
        own = {"jobs": len(self._jobs), "positions": len(self._positions), "resumable": self.resumables.num_kept}
        return self._scheduler.records() | own

    def requests(self, limit: int | None = None) -> list[RequestView]:
        """The running requests and the first `limit` waiting ones (None: all), for display. O(n)."""
        return self._scheduler.requests(self._now_s(), limit) if self._jobs else []

    # --- decisions --------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _apply_events(self) -> None:
        """Apply all pending events and set the timer. Must follow every call into the scheduler.

        Observers and callbacks may call the worker. Their events are applied after the pending ones, so every observer
        sees the events in order, and a start is applied before the cancellation of the same request.
        """
        if self._is_applying:
            return
        self._is_applying = True
        try:
            while events := self._scheduler.take_events():
                for event in events:
                    # An exception must not skip the events after it: a skipped event could leak a slot.
                    _call_logged(self._apply, event)
                    for observe in self._observers:
                        _call_logged(observe, event)
        finally:
            self._is_applying = False
            self._arm()

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.Tokens():
                pass  # the most frequent event first
            case ev.Started():
                self._start(event)
            case ev.Admitted():
                self._positions.add(self._jobs[event.request_id].stream)
                if not self._scheduler.is_exact:  # the new request may be ahead of others
                    self._positions.positions_changed()
            case ev.Requeued():
                self._positions.add(self._jobs[event.request_id].stream)
                self._positions.positions_changed()
            case ev.PreemptRequested():
                self._jobs[event.request_id].must_preempt = True
            case ev.Preempted():
                self._positions.positions_changed()
            case ev.Resumed():
                self._resume(event)
            case ev.AbortRequested():
                job = self._jobs[event.request_id]
                # The client gets its last event now; the slot is free when the engine has stopped the generation.
                job.stream.finish(Failed(event.request_id, job.refusal or self._cancelled(event.by)))
                if job.task is not None:
                    job.task.cancel()
            case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                self._end(event)
            case ev.SlotReclaimed():
                logger.error("slot of request %s reclaimed: the engine %s", event.request_id, event.why)
            case ev.DrainStarted() if not (self._has_served or event.by):
                pass  # a failed startup logs its own reason
            case _ if isinstance(event, _Logged):
                self._positions.etas_changed()
                logger.info("%s", _describe(event))

    def _start(self, event: ev.Started) -> None:
        self._positions.remove(event.request_id)
        job = self._jobs[event.request_id]
        job.stream.show_start(Started(event.request_id, event.waited_s))
        job.grant = event.grant
        assert self._loop is not None
        job.task = self._loop.create_task(self._generate(job), name=f"chatstream-{event.request_id}")
        job.task.add_done_callback(lambda task: self._on_task_done(task, job))

    async def _generate(self, job: _Job) -> None:
        """Copy one generation into its stream. Every end of this task leads to `_on_task_done`."""
        job.last_delta = None
        async with aclosing(job.generate()) as deltas:
            async for delta in deltas:
                if job.last_delta is not None and job.last_delta.finish_reason is not None:
                    raise EngineError("the engine sent a delta after its last one")
                job.last_delta = delta
                if delta.num_tokens or delta.num_prompt_tokens:
                    self._report(job, delta)
                if job.must_preempt and delta.finish_reason is None:
                    await self._preempt(job)  # before `put`: the slot must not wait for this request's reader
                if delta.text or delta.logprobs:
                    token = Token(delta.text, delta.logprobs)
                    await job.stream.put(token, stall_timeout_s=self._settings.reader_stall_timeout_s)

    def _report(self, job: _Job, delta: TokenDelta) -> None:
        assert job.grant is not None
        self._scheduler.on_tokens(job.grant, delta.num_tokens, self._now_s(), prompt_tokens=delta.num_prompt_tokens)
        self._apply_events()

    async def _preempt(self, job: _Job) -> None:
        """Pause the generation in the engine and release its slot. Tokens generated before are still delivered."""
        job.must_preempt = False
        assert self._preemptible is not None
        await self._preemptible.preempt(job.stream.request_id)
        assert job.grant is not None
        self._scheduler.on_preempted(job.grant, self._now_s())
        self._apply_events()

    def _resume(self, event: ev.Resumed) -> None:
        assert self._preemptible is not None
        self._jobs[event.request_id].grant = event.grant
        self._preemptible.resume(event.request_id)

    def _on_task_done(self, task: asyncio.Task[None], job: _Job) -> None:
        """The generation has ended in the engine: release its slot."""
        grant = job.grant
        assert grant is not None
        outcome, detail = self._outcome(task, job)
        if detail == EngineUnavailable.code and self._scheduler.requeue(grant, self._now_s()):
            self._apply_events()
            return
        self._scheduler.on_ended(grant, outcome, detail, self._now_s())
        self._apply_events()

    def _outcome(self, task: asyncio.Task[None], job: _Job) -> tuple[Outcome, str]:
        # A cancellation that the scheduler did not request is the engine's failure. For one that it did request, the
        # scheduler overrules this outcome.
        error = EngineError("the engine cancelled itself") if task.cancelled() else task.exception()
        if error is None:
            reason = job.last_delta.finish_reason if job.last_delta is not None else None
            if reason in list(FinishReason):
                return Outcome.FINISHED, FinishReason(reason)
            error = EngineError(f"the engine ended with the finish reason {reason!r}")
        if isinstance(error, ReaderStalled):
            return Outcome.CANCELLED, "slow_reader"
        if not isinstance(error, ChatStreamError):
            logger.error("request %s failed", job.stream.request_id, exc_info=error)
            error = EngineError(f"the engine failed: {type(error).__name__}")
        job.error = error
        return Outcome.FAILED, error.code

    def _end(self, event: ev.End) -> None:
        self._positions.remove(event.request_id)
        job = self._jobs.pop(event.request_id)
        if job.task is not None and not job.task.done():
            job.task.cancel()  # the watchdog reclaimed its slot: the generation no longer matters
        by = event.by if isinstance(event, ev.Cancelled) else ""
        job.stream.finish(self._last_event(event, job))
        assert job.stream.end is not None
        if job.on_end is not None:
            _call_logged(job.on_end, End(job.stream.end, by, job.stream.has_started))
        if not self._jobs and self._idle is not None:
            self._idle.set()

    def _last_event(self, event: ev.End, job: _Job) -> Done | Failed:
        match event:
            case ev.Finished():
                usage = (job.last_delta.usage if job.last_delta else None) or Usage(0, event.total)
                return Done(event.request_id, job.message_id, FinishReason(event.reason), usage)
            case ev.Cancelled():
                return Failed(event.request_id, job.refusal or self._cancelled(event.by))
            case ev.Failed():
                return Failed(event.request_id, job.error or EngineError("the engine made no progress"))
            case ev.Expired():
                message = f"not started within {event.waited_s:.1f} s"
                return Failed(event.request_id, QueueTimeout(message, retry_after_s=self._retry_after_s()))

    def _cancelled(self, by: str) -> ChatStreamError:
        if by == "shutdown":
            return ShuttingDown("the server is shutting down", retry_after_s=self._retry_after_s())
        return Cancelled(_WHY_CANCELLED.get(by, "the request was cancelled"))

    def _retry_after_s(self) -> float:
        return self._scheduler.retry_after_s(self._now_s())

    async def _wait_idle(self) -> None:
        if not self._jobs:
            return
        if self._idle is None or self._idle.is_set():
            self._idle = asyncio.Event()
        await self._idle.wait()

    def _cancel(self, request_id: str, by: str) -> bool:
        if request_id not in self._jobs:
            return False
        is_live = self._scheduler.cancel(request_id, by, self._now_s())
        self._apply_events()
        return is_live

    # --- the one timer ----------------------------------------------------------------------------------------

    def _arm(self) -> None:
        due_s = self._scheduler.next_deadline_s()
        round_s = self._positions.next_round_s()
        if round_s is not None:
            due_s = round_s if due_s is None else min(due_s, round_s)
        if due_s is None:
            self._disarm()
        elif self._timer is None or self._timer_due_s != due_s:
            self._disarm()
            assert self._loop is not None
            # The due time is stored separately: uvloop's handle has no `when` for a timer that is due now.
            self._timer, self._timer_due_s = self._loop.call_at(due_s, self._on_timer), due_s

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self._now_s()
        self._positions.on_timer(now_s)
        self._scheduler.handle_timer(now_s)
        self._apply_events()


_WHY_CANCELLED = {
    "slow_reader": "the client stopped reading",
    "admin": "an operator cancelled the request",
}


_Logged: TypeAlias = ev.LimitsChanged | ev.PolicyChanged | ev.Paused | ev.Unpaused | ev.DrainStarted | ev.Opened


def _describe(event: _Logged) -> str:
    match event:
        case ev.LimitsChanged():
            change = f"max_concurrency is {event.max_concurrency}, max_queue_size {event.max_queue_size}"
        case ev.PolicyChanged():
            change = f"the policy is {event.policy}"
        case ev.Paused():
            change = "paused: new requests are rejected"
        case ev.Unpaused():
            change = "no longer paused: new requests are admitted"
        case ev.DrainStarted():
            change = "draining: new and waiting requests are rejected, started ones finish"
        case ev.Opened():
            change = "open: waiting requests start"
    reasons = ": ".join(filter(None, (event.by, event.why)))
    return f"{change} ({reasons})" if reasons else change


def _call_logged(function: Callable[..., object], argument: object) -> None:
    """Call foreign code; an exception is logged and must not stop the queue."""
    try:
        function(argument)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a CancelledError too: nothing is awaited here, so it is a stray `result()` of that code
        logger.exception("%r failed", function)
