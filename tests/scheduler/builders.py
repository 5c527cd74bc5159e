"""Helpers for tests of the scheduler."""

from __future__ import annotations

from dataclasses import replace

from chatstream.errors import Overloaded
from chatstream.scheduler import Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import History


class Core:
    """A scheduler with its log, which `History` checks after every call. The test sets the time."""

    def __init__(
        self,
        settings: SchedulerSettings | None = None,
        *,
        is_open: bool = True,
        can_preempt: bool = False,
        **changes: object,
    ) -> None:
        self.settings = replace(settings or SchedulerSettings(), **changes)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.settings)
        self.can_preempt = can_preempt
        stats = self.scheduler.stats()
        self.history = History(
            stats.max_concurrency,
            stats.max_queue_size,
            is_fcfs=self.settings.policy == "fcfs",
            max_running_per_client=self.settings.max_running_per_client,
            has_slices=can_preempt,
        )
        self.log: list[ev.Event] = []
        self.grants: dict[str, Grant] = {}
        self.now_s = 0.0
        if is_open:
            self.open()

    def open(self, *, engine_limit: int | None = None) -> None:
        self.scheduler.open(self.now_s, can_preempt=self.can_preempt, engine_limit=engine_limit)
        self._take()

    def submit(self, *request_ids: str, **details: object) -> None:
        """Submit requests. Raises the errors of the scheduler; the log is read in any case."""
        for request_id in request_ids:
            try:
                self.scheduler.submit(Arrival(request_id=request_id, **details), self.now_s)  # type: ignore[arg-type]
            finally:
                self._take()

    def try_submit(self, request_id: str, **details: object) -> str:
        """Submit one request. '' when admitted, else the code of the rejection."""
        try:
            self.submit(request_id, **details)
        except Overloaded as refusal:
            return refusal.code
        return ""

    def tokens(self, request_id: str, count: int = 1) -> None:
        self.scheduler.on_tokens(self.grants[request_id], count, self.now_s)
        self._take()

    def preempt(self, request_id: str) -> None:
        """Report that the engine has preempted the request."""
        self.scheduler.on_preempted(self.grants[request_id], self.now_s)
        self._take()

    def finish(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.end(self.grants[request_id], Outcome.FINISHED, "stop")

    def end(self, grant: Grant, outcome: Outcome, detail: str) -> None:
        self.scheduler.on_ended(grant, outcome, detail, self.now_s)
        self._take()

    def requeue(self, request_id: str) -> bool:
        result = self.scheduler.requeue(self.grants[request_id], self.now_s)
        self._take()
        return result

    def cancel(self, request_id: str, by: str = "client") -> bool:
        result = self.scheduler.cancel(request_id, by, self.now_s)
        self._take()
        return result

    def limits(self, **limits: object) -> None:
        self.scheduler.set_limits(self.now_s, **limits)  # type: ignore[arg-type]
        self._take()

    def set_policy(self, name: str) -> None:
        self.scheduler.set_policy(name, self.now_s, by="admin", why="test")
        self._take()

    def pause(self) -> None:
        self.scheduler.pause(self.now_s, by="admin", why="test")
        self._take()

    def unpause(self) -> None:
        self.scheduler.unpause(self.now_s, by="admin", why="test")
        self._take()

    def position(self, request_id: str) -> int | None:
        return self.scheduler.position(request_id)

    def drain(self) -> None:
        self.scheduler.drain(self.now_s)
        self._take()

    def at(self, now_s: float) -> Core:
        """Advance the time, and call the scheduler at each of its deadlines, as the shell does."""
        while (due_s := self.scheduler.next_deadline_s()) is not None and due_s <= now_s:
            self.now_s = max(self.now_s, due_s)
            self.scheduler.handle_timer(self.now_s)
            self._take()
        self.now_s = now_s
        return self

    @property
    def running(self) -> list[str]:
        return [v.request_id for v in self.scheduler.requests(self.now_s) if v.position is None]

    @property
    def waiting(self) -> list[str]:
        return [v.request_id for v in self.scheduler.requests(self.now_s) if v.position is not None]

    def ends(self, request_id: str) -> list[ev.Event]:
        kinds = (ev.Finished, ev.Cancelled, ev.Failed, ev.Expired)
        return [e for e in self.log if isinstance(e, kinds) and e.request_id == request_id]

    def asked_to_preempt(self) -> list[str]:
        """Requests that the engine was asked to preempt and has not preempted yet."""
        return [request_id for request_id, request in self.history.running.items() if request.is_preempting]

    def _take(self) -> None:
        events = self.scheduler.take_events()
        self.history.feed(events)
        self.log += events
        for event in events:
            if isinstance(event, ev.Started | ev.Resumed):
                self.grants[event.request_id] = event.grant
