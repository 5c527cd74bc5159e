"""Exports the metrics to Prometheus. The only module that imports its library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from chatstream.engines.base import EngineStats
from chatstream.metrics import definitions as d
from chatstream.metrics.recorder import Distribution, Recorder
from chatstream.scheduler import SchedulerStats


class PrometheusMetrics(Collector):
    """A Prometheus collector for one ChatStream. Values are read at the time of the scrape.

    It is in no registry by default, so it does not collide with other instances or the application's metrics. An
    application can add it to its own registry by `registry.register`.
    """

    def __init__(
        self,
        stats: Callable[[], SchedulerStats],
        recorder: Recorder,
        engine_stats: Callable[[], EngineStats | None],
    ) -> None:
        self._stats = stats
        self._recorder = recorder
        self._engine_stats = engine_stats

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics if the `accept` header names it, else text."""
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. Must be called on the thread of the event loop."""
        stats, recorder = self._stats(), self._recorder
        yield _gauge(d.REQUESTS_RUNNING, stats.running)
        yield _gauge(d.REQUESTS_WAITING, stats.waiting)
        yield _gauge(d.REQUESTS_PREEMPTED, stats.preempted)
        yield _gauge(d.MAX_CONCURRENCY, stats.max_concurrency)
        yield _gauge(d.MAX_QUEUE_SIZE, stats.max_queue_size)
        yield _gauge(d.PAUSED, stats.is_paused)
        yield _gauge(d.DRAINING, stats.is_draining)
        yield _counter(d.REQUESTS, _outcomes(stats))
        yield _counter(d.REJECTIONS, recorder.rejections)
        yield _counter(d.PROMPT_TOKENS, stats.prompt_tokens)
        yield _counter(d.GENERATED_TOKENS, stats.generated_tokens)
        yield _counter(d.PREEMPTIONS, recorder.preemptions)
        yield _counter(d.REQUEUES, stats.requeued)
        yield _counter(d.LIMIT_CHANGES, recorder.limit_changes)
        yield _counter(d.SLOTS_RECLAIMED, stats.slots_reclaimed)
        yield _histogram(d.QUEUE_TIME, recorder.queue_time)
        yield _histogram(d.TIME_TO_FIRST_TOKEN, recorder.time_to_first_token)
        yield _histogram(d.INTER_TOKEN_LATENCY, recorder.inter_token_latency)
        yield _histogram(d.REQUEST_DURATION, recorder.request_duration)
        yield _histogram(d.PREEMPTED_TIME, recorder.preempted_time)
        yield _histogram(d.ETA_ERROR, recorder.eta_error)
        engine = self._engine_stats()
        if engine is not None:
            yield _gauge(d.ENGINE_SLOTS, engine.num_slots)
            if engine.prefix_cache_bytes is not None:
                yield _gauge(d.PREFIX_CACHE_BYTES, engine.prefix_cache_bytes)
            if engine.reused_prompt_tokens is not None:
                yield _counter(d.REUSED_PROMPT_TOKENS, engine.reused_prompt_tokens)


def _outcomes(stats: SchedulerStats) -> dict[str, int]:
    names = ("finished", "cancelled", "failed", "expired", "rejected")
    return {name: getattr(stats, name) for name in names}


def _gauge(definition: d.Gauge, value: float) -> Metric:
    return GaugeMetricFamily(definition.name, definition.help, value=value)


def _counter(definition: d.Counter, counted: float | Mapping[str, float]) -> Metric:
    """`counted`: one number, or one for each label value."""
    labels = [definition.label] if definition.label else []
    family = CounterMetricFamily(definition.name, definition.help, labels=labels, unit=definition.unit)
    for value, count in counted.items() if isinstance(counted, Mapping) else [("", counted)]:
        family.add_metric([value] if labels else [], count)
    return family


def _histogram(definition: d.Histogram, distribution: Distribution) -> Metric:
    bounds = [*map(str, definition.buckets_s), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True))
    family = HistogramMetricFamily(definition.name, definition.help, unit=definition.unit)
    family.add_metric([], buckets, distribution.sum)
    return family
