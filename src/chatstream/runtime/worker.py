"""Acts on the scheduler's decisions and tells it what happened.

    submit ──▶ scheduler ──▶ events ──▶ start a task per running request, show places, end streams
                  ▲                          │
                  └── on_tokens, on_ended ◀──┘

One task per request that has begun, none for the others; one timer for everything. A request ends in `_on_task_done`,
and nowhere else: the task ends when the stream has ended — last token, error, disconnect, cancel, timeout, shutdown —
and a task always ends. Before that it lends its slot out in `_preempt`, when its time slice is used up.
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
"""Called when the request has its slot; a second time if the engine failed before the first token."""


class Preemptible(Protocol):
    """An engine that can hold on to a generation without going on with it: `chatstream.engines.base.Preemptible`."""

    def preempt(self, request_id: str) -> Awaitable[None]: ...
    def resume(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class End:
    """How one admitted request ended, for whoever asked to be sent."""

    event: Done | Failed
    by: str
    """Who cancelled it: client_disconnected, client, admin, slow_reader, shutdown; else empty."""
    has_started: bool


@dataclass(slots=True, eq=False)
class _Job:
    """One live request on this side of the scheduler."""

    stream: EventLog
    generate: Generate
    message_id: str
    on_end: Callable[[End], object] | None
    task: asyncio.Task[None] | None = None
    grant: Grant | None = None
    must_preempt: bool = False
    """Its engine is to hold it; its own task does that when it has delivered what it has."""
    last_delta: TokenDelta | None = None
    error: ChatStreamError | None = None
    refusal: ChatStreamError | None = None
    """Why it was turned away after it had got its place."""


class QueueWorker:
    """Runs at most N generations at once; the others wait in line.

    All calls come from one event loop; from another one only after `stop`.
    """

    DRAIN_SLICE = 32
    """Sent away before the event loop gets its turn again: a line of 10,000 is gone within seconds."""
    DRAIN_PAUSE_S = 0.002

    def __init__(self, scheduler: Scheduler, settings: RuntimeSettings | None = None) -> None:
        self._scheduler = scheduler
        self._settings = settings or RuntimeSettings()
        self._preemptible: Preemptible | None = None
        self.num_drains = 0
        """Begun so far."""
        self._observers: list[Callable[[ev.Event], object]] = []
        self._jobs: dict[str, _Job] = {}
        self._positions = PositionUpdates(scheduler, self._settings, on_changed=self._arm)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._idle: asyncio.Event | None = None
        self._is_acting = False
        self._has_served = False
        self._is_sending_away = False
        self._next_drain_slice: asyncio.TimerHandle | None = None
        self.resumables = ResumableStreams(
            grace_s=self._settings.resume_grace_s,
            max_bytes_per_request=self._settings.max_resume_bytes_per_request,
            max_bytes=self._settings.max_resume_bytes,
            on_abandoned=lambda request_id: self._cancel(request_id, "client_disconnected"),
        )
        """Requests that outlive their connection; none unless somebody says so after `submit`."""

    def __repr__(self) -> str:
        return f"<QueueWorker {self._scheduler!r}>"

    # --- what callers do --------------------------------------------------------------------------------------

    def submit(
        self,
        arrival: Arrival,
        generate: Generate,
        *,
        message_id: str = "",
        on_end: Callable[[End], object] | None = None,
    ) -> RequestStream:
        """Ask for a generation. When this returns, a place or a slot is held until the stream ends or is closed.

        Raises an `Overloaded` (its class says why); then nothing is held. `on_end` is called exactly once for every
        request that was admitted; what it raises is logged and changes nothing.
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
            self._act()
        if not self._positions.send(request_id) and self._is_acting:
            self._positions.positions_changed()  # it is sent in the next round
        return stream

    def cancel(self, request_id: str, by: str = "client") -> bool:
        """End a request, waiting or running. Idempotent; False when no such request is live."""
        return self._cancel(request_id, by)

    def resend_position(self, request_id: str) -> None:
        """To a reader who is about to come back: what was sent the one before it may have aged. Harmless otherwise."""
        self._positions.resend(request_id)

    def refuse(self, request_id: str, refusal: ChatStreamError) -> None:
        """Turn a request away after all: it could never be answered. Its place or slot is given back."""
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
        """Change the limits at once, losing nobody. Raises `ConfigError`."""
        self._loop = asyncio.get_running_loop()
        self._scheduler.set_limits(
            self._now_s(), max_concurrency=max_concurrency, max_queue_size=max_queue_size, by=by, why=why
        )
        self._act()

    def set_policy(self, name: str, *, by: str = "", why: str = "") -> None:
        """Order the line in another way from now on. Raises `ConfigError`."""
        self._loop = asyncio.get_running_loop()
        self._scheduler.set_policy(name, self._now_s(), by=by, why=why)
        self._act()

    def set_paused(self, is_paused: bool, *, by: str = "", why: str = "") -> None:
        """Refuse new requests, or take them again; those who wait and run go on. Idempotent."""
        self._loop = asyncio.get_running_loop()
        change = self._scheduler.pause if is_paused else self._scheduler.unpause
        change(self._now_s(), by=by, why=why)
        self._act()

    def start(
        self, *, preemptible: Preemptible | None = None, engine_limit: int | None = None, by: str = "", why: str = ""
    ) -> None:
        """Requests start from now on, those that wait already too. Idempotent.

        `preemptible`: the engine, if it can preempt. `engine_limit`: it runs so many, whatever the limit says.
        """
        self._loop = asyncio.get_running_loop()
        if not self._scheduler.stats().is_open:
            self._has_served = True
            self._end_drain()  # those who were not sent away yet stay
            self._preemptible = preemptible
            can_preempt = preemptible is not None
            self._scheduler.open(self._now_s(), can_preempt=can_preempt, engine_limit=engine_limit, by=by, why=why)
            self._act()

    def drain(self, *, by: str = "", why: str = "") -> None:
        """Refuse new requests and those who have not begun; the others go on. Idempotent; `start` ends it."""
        self._loop = asyncio.get_running_loop()
        if not self._scheduler.stats().is_draining:
            self.num_drains += 1
            self._is_sending_away = True
            self._send_away(by, why)

    def _send_away(self, by: str = "", why: str = "") -> None:
        """Those who have not begun; a long line in slices, so that the streams of the running ones hardly notice."""
        self._next_drain_slice = None
        has_more = self._scheduler.drain(self._now_s(), at_most=self.DRAIN_SLICE, by=by, why=why)
        self._act()
        # A callback may have called `start`, and even `drain` again.
        if has_more and self._is_sending_away and self._next_drain_slice is None:
            assert self._loop is not None
            self._next_drain_slice = self._loop.call_later(self.DRAIN_PAUSE_S, self._send_away)

    def _end_drain(self) -> None:
        self._is_sending_away = False
        if self._next_drain_slice is not None:
            self._next_drain_slice.cancel()
            self._next_drain_slice = None

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new and waiting requests; let running ones finish for `grace_s`, then abort them.

        Returns when nothing runs any more. Idempotent.
        """
        self.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._wait_idle()
        except TimeoutError:
            for request_id in list(self._jobs):
                self._cancel(request_id, "shutdown")
            await self._wait_idle()
        self.resumables.forget_ended()
        # No timer would come in the loop of a later start.
        self._disarm()
        self._positions.close()
        self._end_drain()

    def observe(self, observer: Callable[[ev.Event], object]) -> None:
        """Show it every event of the scheduler, for logs and metrics. What it raises is logged and changes nothing."""
        self._observers.append(observer)

    def waits_for(self, request_id: str) -> WaitsFor | None:
        """Why the request does not run; None when it does not wait."""
        return self._scheduler.waits_for(request_id)

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def records(self) -> dict[str, int]:
        """How much is kept of live and resumable requests, for debuggers and tests: all 0 when there are none.

        Those of the scheduler, and `jobs`: live requests; `places`: those whose place is told; `resumable`: streams
        whose readers may come back, ended ones too.
        """
        own = {"jobs": len(self._jobs), "places": len(self._positions), "resumable": self.resumables.num_kept}
        return self._scheduler.records() | own

    def requests(self, limit: int | None = None) -> list[RequestView]:
        """The running requests and the first `limit` of those who wait (None: all), for people. O(n)."""
        return self._scheduler.requests(self._now_s(), limit) if self._jobs else []

    # --- acting on decisions ----------------------------------------------------------------------------------

    def _now_s(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _act(self) -> None:
        """After every call into the scheduler: do what it decided, and set the timer for what it will decide.

        An observer or a callback may call back: what that decides is acted on after what was decided before, so that
        everybody sees the events in their order, and nobody is cancelled before its start was acted on.
        """
        if self._is_acting:
            return
        self._is_acting = True
        try:
            while events := self._scheduler.take_events():
                for event in events:
                    # Every event is acted on, whatever became of the one before it: a lost one would be a lost slot.
                    _guarded(self._react, event)
                    for observe in self._observers:
                        _guarded(observe, event)
        finally:
            self._is_acting = False
            self._arm()

    def _react(self, event: ev.Event) -> None:
        match event:
            case ev.Tokens():
                pass  # the frequent one first
            case ev.Started():
                self._start(event)
            case ev.Admitted():
                self._positions.add(self._jobs[event.request_id].stream)
                if not self._scheduler.is_exact:  # it may be in front of others
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
                # The client is sent at once; its slot is free when the engine has let go.
                job.stream.finish(Failed(event.request_id, job.refusal or self._cancelled(event.by)))
                if job.task is not None:
                    job.task.cancel()
            case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                self._end(event)
            case ev.SlotReclaimed():
                logger.error("the engine %s: its slot was taken from request %s", event.why, event.request_id)
            case ev.DrainStarted() if not (self._has_served or event.by):
                pass  # there was nothing to drain; who could not begin says why
            case _ if isinstance(event, _ToLog):
                self._positions.etas_changed()
                logger.info("%s", _in_words(event))

    def _start(self, event: ev.Started) -> None:
        self._positions.remove(event.request_id)
        job = self._jobs[event.request_id]
        job.stream.show_start(Started(event.request_id, event.waited_s))
        job.grant = event.grant
        assert self._loop is not None
        job.task = self._loop.create_task(self._generate(job), name=f"chatstream-{event.request_id}")
        job.task.add_done_callback(lambda task: self._on_task_done(task, job))

    async def _generate(self, job: _Job) -> None:
        """Pump one generation into its stream. Whatever ends it, ends up in `_on_task_done`."""
        job.last_delta = None
        async with aclosing(job.generate()) as deltas:
            async for delta in deltas:
                if job.last_delta is not None and job.last_delta.finish_reason is not None:
                    raise EngineError("the engine went on after its last delta")
                job.last_delta = delta
                if delta.num_tokens or delta.num_prompt_tokens:
                    self._report(job, delta)
                if job.must_preempt and delta.finish_reason is None:
                    await self._preempt(job)  # first: the next one must not wait for this one's reader
                if delta.text or delta.logprobs:
                    token = Token(delta.text, delta.logprobs)
                    await job.stream.put(token, stall_timeout_s=self._settings.reader_stall_timeout_s)

    def _report(self, job: _Job, delta: TokenDelta) -> None:
        assert job.grant is not None
        self._scheduler.on_tokens(job.grant, delta.num_tokens, self._now_s(), prompt_tokens=delta.num_prompt_tokens)
        self._act()

    async def _preempt(self, job: _Job) -> None:
        """Give the slot to somebody else. What the engine had generated before is still read, and waits for no slot."""
        job.must_preempt = False
        assert self._preemptible is not None
        await self._preemptible.preempt(job.stream.request_id)
        assert job.grant is not None
        self._scheduler.on_preempted(job.grant, self._now_s())
        self._act()

    def _resume(self, event: ev.Resumed) -> None:
        assert self._preemptible is not None
        self._jobs[event.request_id].grant = event.grant
        self._preemptible.resume(event.request_id)

    def _on_task_done(self, task: asyncio.Task[None], job: _Job) -> None:
        """The generation has let go of the engine: give its slot back. The only place that does."""
        grant = job.grant
        assert grant is not None
        outcome, detail = self._outcome(task, job)
        if detail == EngineUnavailable.code and self._scheduler.requeue(grant, self._now_s()):
            self._act()
            return
        self._scheduler.on_ended(grant, outcome, detail, self._now_s())
        self._act()

    def _outcome(self, task: asyncio.Task[None], job: _Job) -> tuple[Outcome, str]:
        # Cancelled without our asking is the engine's failure; when we asked, the scheduler knows and overrules.
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
            job.task.cancel()  # the watchdog took its slot: whatever it still does concerns nobody
        by = event.by if isinstance(event, ev.Cancelled) else ""
        job.stream.finish(self._last_event(event, job))
        assert job.stream.end is not None
        if job.on_end is not None:
            _guarded(job.on_end, End(job.stream.end, by, job.stream.has_started))
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
                message = f"waited {event.waited_s:.1f} s, as long as it was allowed to"
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
        self._act()
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
            # Kept beside the handle: uvloop's has no `when` for a time that is now.
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
        self._act()


_WHY_CANCELLED = {
    "slow_reader": "the client stopped reading",
    "admin": "an operator cancelled the request",
}


_ToLog: TypeAlias = ev.LimitsChanged | ev.PolicyChanged | ev.Paused | ev.Unpaused | ev.DrainStarted | ev.Opened


def _in_words(event: _ToLog) -> str:
    match event:
        case ev.LimitsChanged():
            change = f"{event.max_concurrency} may run and {event.max_queue_size} wait"
        case ev.PolicyChanged():
            change = f"the policy is {event.policy}"
        case ev.Paused():
            change = "new requests are refused"
        case ev.Unpaused():
            change = "new requests are taken again"
        case ev.DrainStarted():
            change = "draining: new requests are refused, those who have begun finish"
        case ev.Opened():
            change = "requests are served"
    reasons = ": ".join(filter(None, (event.by, event.why)))
    return f"{change} ({reasons})" if reasons else change


def _guarded(function: Callable[..., object], argument: object) -> None:
    """Foreign code may fail; the queue goes on."""
    try:
        function(argument)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a CancelledError too: nobody awaits here, so it is only somebody's stray result()
        logger.exception("%r failed", function)
