"""Converts the scheduler's events to counts and durations."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from chatstream.metrics import definitions as d
from chatstream.scheduler import events as ev


class Distribution:
    """A histogram. Four times as fast per value as that of the Prometheus library."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: inclusive upper bounds of the buckets, ascending."""
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Number of values in each bucket; the last bucket is above all bounds."""
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


@dataclass(slots=True, eq=False)
class _Live:
    """The record of an admitted request, until its end."""

    arrived_s: float
    has_started: bool = False
    last_token_s: float | None = None


class Recorder:
    """An observer of the scheduler. It must receive every event from the first one on.

    Keeps a few numbers for each live request until its end. Does not count what `Scheduler.stats` already counts.
    """

    def __init__(self) -> None:
        self.rejections = dict.fromkeys(d.REJECTION_CODES, 0)
        self.limit_changes = dict.fromkeys(d.LIMIT_SOURCES, 0)
        self.preemptions = 0
        self.queue_time = Distribution(d.QUEUE_TIME.buckets_s)
        self.time_to_first_token = Distribution(d.TIME_TO_FIRST_TOKEN.buckets_s)
        self.inter_token_latency = Distribution(d.INTER_TOKEN_LATENCY.buckets_s)
        self.request_duration = Distribution(d.REQUEST_DURATION.buckets_s)
        self.preempted_time = Distribution(d.PREEMPTED_TIME.buckets_s)
        self.eta_error = Distribution(d.ETA_ERROR.buckets_s)
        self._live: dict[str, _Live] = {}

    @property
    def num_live(self) -> int:
        """Number of requests with a record."""
        return len(self._live)

    def observe(self, event: ev.Event) -> None:
        match event:
            case ev.Tokens():  # the most frequent event first
                self._on_tokens(event)
            case ev.Admitted():
                self._live[event.request_id] = _Live(event.at_s)
            case ev.Rejected():
                self.rejections[event.code] = self.rejections.get(event.code, 0) + 1
            case ev.Started():
                self._on_started(event)
            case ev.Preempted():
                self.preemptions += 1
            case ev.Resumed():
                self._on_resumed(event)
            case ev.LimitsChanged():
                self.limit_changes[event.by if event.by in d.LIMIT_SOURCES else "operator"] += 1
            case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                self.request_duration.add(event.at_s - self._live.pop(event.request_id).arrived_s)

    def _on_tokens(self, event: ev.Tokens) -> None:
        request, num_tokens = self._live[event.request_id], event.num_tokens
        if request.last_token_s is None:
            self.time_to_first_token.add(event.at_s - request.arrived_s)
        else:
            # Several tokens in one event count as equal gaps, one for each token.
            self.inter_token_latency.add((event.at_s - request.last_token_s) / num_tokens, num_tokens)
        request.last_token_s = event.at_s

    def _on_started(self, event: ev.Started) -> None:
        request = self._live[event.request_id]
        if request.has_started:
            return  # a start after a requeue: the engine caused that wait, not the queue
        request.has_started = True
        self.queue_time.add(event.waited_s)
        if event.eta_error_s is not None:
            self.eta_error.add(event.eta_error_s)

    def _on_resumed(self, event: ev.Resumed) -> None:
        self.preempted_time.add(event.preempted_s)
        request = self._live[event.request_id]
        if request.last_token_s is not None:
            # Preempted time does not count towards the open gap. A token in transit at the preemption may have arrived
            # later: then the gap starts now.
            request.last_token_s += min(event.preempted_s, event.at_s - request.last_token_s)
