"""Queueing rules of other projects, re-implemented from their descriptions for the simulation.

These are not runs of the other programs: only their rules of admission, order and estimation are reproduced.

    Fifo()                                  unbounded, first come, first served
    Fifo(bound=5)                           ChatStream 0.3: at most five wait, the next gets 429 without `Retry-After`
    Fifo(bound=512)                         Ollama's default
    Fifo(bound=little(...), expire_s=30)    a bound by Little's law, and expiry
    Fifo(max_backlog_s=...)                reject a request with too much mean work ahead of it
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf

from chatstream.errors import QueueFull
from chatstream.scheduler import Arrival, Eta, Grant, Outcome, Scheduler
from chatstream.scheduler import events as ev


class Fifo:
    """A FIFO queue and a number of slots, independent of our scheduler."""

    def __init__(
        self,
        slots: int,
        *,
        bound: float = inf,
        expire_s: float | None = None,
        max_backlog_s: float = inf,
        retry_after_s: float | None = 1.0,
    ) -> None:
        self._slots = slots
        self._bound = bound
        self._expire_s = expire_s
        self._max_backlog_s = max_backlog_s
        self._retry_after_s = retry_after_s
        self._waiting: deque[tuple[float, str]] = deque()
        self._withdrawn: set[str] = set()
        self._running: dict[str, tuple[Grant, float]] = {}
        self._events: list[ev.Event] = []
        self._count = 0
        self._ended = 0
        self._in_slots_s = 0.0

    def open(self, now_s: float, *, can_preempt: bool = False) -> None:
        pass

    def submit(self, arrival: Arrival, now_s: float) -> None:
        num_waiting = len(self._waiting) - len(self._withdrawn)
        if len(self._running) >= self._slots:
            mean_s = self._in_slots_s / self._ended if self._ended else 0.0
            backlog_s = (num_waiting + 1) * mean_s / self._slots
            if num_waiting >= self._bound or backlog_s > self._max_backlog_s:
                raise QueueFull("full", retry_after_s=self._retry_after_s)
        self._waiting.append((now_s, arrival.request_id))
        self._fill(now_s)

    def on_tokens(self, grant: Grant, count: int, now_s: float, *, prompt_tokens: int = 0) -> None:
        pass

    def on_preempted(self, grant: Grant, now_s: float) -> None:
        raise AssertionError("it never preempts")

    def on_ended(self, grant: Grant, outcome: Outcome, detail: str, now_s: float) -> None:
        _, started_s = self._running.pop(grant.request_id)
        self._ended += 1
        self._in_slots_s += now_s - started_s
        kind = ev.Finished if outcome is Outcome.FINISHED else ev.Cancelled
        self._events.append(kind(0, now_s, grant.request_id, detail, 0))
        self._fill(now_s)

    def cancel(self, request_id: str, by: str, now_s: float) -> bool:
        if request_id in self._running:
            self._events.append(ev.AbortRequested(0, now_s, request_id, self._running[request_id][0], by))
        else:
            self._withdrawn.add(request_id)
            self._events.append(ev.Cancelled(0, now_s, request_id, by, 0))
        return True

    def handle_timer(self, now_s: float) -> None:
        while self._waiting and (deadline_s := self.next_deadline_s()) is not None and deadline_s <= now_s:
            self._expire(*self._waiting.popleft())
        self._fill(now_s)

    def next_deadline_s(self) -> float | None:
        return self._waiting[0][0] + self._expire_s if self._expire_s is not None and self._waiting else None

    def take_events(self) -> list[ev.Event]:
        taken, self._events = self._events, []
        return taken

    def eta(self, request_id: str, now_s: float) -> Eta | None:
        return None

    def _expire(self, since_s: float, request_id: str) -> None:
        if request_id in self._withdrawn:
            self._withdrawn.remove(request_id)
        else:
            assert self._expire_s is not None
            self._events.append(ev.Expired(0, since_s + self._expire_s, request_id, self._expire_s))

    def _fill(self, now_s: float) -> None:
        while self._waiting and len(self._running) < self._slots:
            since_s, request_id = self._waiting.popleft()
            if request_id in self._withdrawn:
                self._withdrawn.remove(request_id)
                continue
            self._count += 1
            grant = Grant(self._count, request_id, 1, 1)
            self._running[request_id] = (grant, now_s)
            self._events.append(ev.Started(0, now_s, request_id, grant, now_s - since_s, None))


def little(wait_s: float, slots: int, mean_service_s: float) -> int:
    """L = lambda W (Little's law): the last request of a longer queue would start too late."""
    return ceil(wait_s * slots / mean_service_s)


class WithOtherEstimates(Scheduler):
    """Our scheduler, which also records the estimates of other rules at the same moments.

    gradio  position * mean duration / slots
    qlm     position * mean tokens / tokens per second, both constants measured in advance
    les     the wait of the request that started last (last to enter service)
    """

    def __init__(self, *arguments: object, qlm_s: float, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.others: dict[str, dict[str, float]] = {}
        self._qlm_s = qlm_s
        self._last_wait_s = 0.0
        self._began_s: dict[str, float] = {}
        self._durations_s: deque[float] = deque(maxlen=200)

    def take_events(self) -> list[ev.Event]:
        events = super().take_events()
        for event in events:
            if isinstance(event, ev.Started):
                self._last_wait_s = event.waited_s
                self._began_s[event.request_id] = event.at_s
            elif isinstance(event, ev.Finished):
                self._durations_s.append(event.at_s - self._began_s.pop(event.request_id))
        return events

    def eta(self, request_id: str, now_s: float) -> Eta | None:
        position = self.position(request_id)
        if position is not None and self._durations_s:
            mean_s = sum(self._durations_s) / len(self._durations_s)
            self.others[request_id] = {
                "gradio": position * mean_s / self.stats().max_concurrency,
                "qlm": position * self._qlm_s,
                "les": self._last_wait_s,
            }
        return super().eta(request_id, now_s)
