"""Definitions of all metrics: name, unit, meaning and formula.

Dashboards depend on names and labels: do not change them. Label values are bounded and never identify a request or a
client. docs/metrics.md has the same list with more detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from chatstream.errors import ClientLimit, Infeasible, Paused, QueueFull, ShuttingDown


@dataclass(frozen=True, slots=True)
class Gauge:
    name: str
    help: str


@dataclass(frozen=True, slots=True)
class Counter:
    """A count since the start of the process. The name ends in `_total`."""

    name: str
    help: str
    label: str = ""
    """Name of the only label; empty for none."""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A distribution of durations in seconds."""

    name: str
    help: str
    buckets_s: tuple[float, ...]
    """Upper bounds, ascending, without infinity. They include common service objectives, such as 5 s."""
    unit: str = "seconds"


Definition: TypeAlias = Gauge | Counter | Histogram

REJECTION_CODES = tuple(error.code for error in (QueueFull, ClientLimit, Infeasible, Paused, ShuttingDown))
"""Exported as 0 from the start, so that the first rejection is an increase."""
LIMIT_SOURCES = ("operator", "adaptive", "auto")

_WAIT_BUCKETS_S = (0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS_RUNNING = Gauge("chatstream_requests_running", "Slots in use now.")
REQUESTS_WAITING = Gauge("chatstream_requests_waiting", "Requests in the queue now, including preempted ones.")
REQUESTS_PREEMPTED = Gauge("chatstream_requests_preempted", "Waiting requests that have started before (preempted).")
MAX_CONCURRENCY = Gauge("chatstream_max_concurrency", "Limit of running requests now in force.")
MAX_QUEUE_SIZE = Gauge("chatstream_max_queue_size", "Limit of waiting requests now in force.")
PAUSED = Gauge("chatstream_paused", "1 while an operator has paused admission, else 0.")
DRAINING = Gauge("chatstream_draining", "1 while the server drains: it admits and starts no requests, else 0.")
ENGINE_SLOTS = Gauge("chatstream_engine_slots", "Sequences in the engine's memory now.")
PREFIX_CACHE_BYTES = Gauge(
    "chatstream_prefix_cache_bytes",
    "Memory of the prefix cache, in bytes.",
)

REQUESTS = Counter("chatstream_requests_total", "Requests that ended or were rejected, by outcome.", "outcome")
REJECTIONS = Counter("chatstream_rejections_total", "Rejected requests, by error code.", "code")
PROMPT_TOKENS = Counter(
    "chatstream_prompt_tokens_total", "Prompt tokens processed, including those from the prefix cache.", unit="tokens"
)
REUSED_PROMPT_TOKENS = Counter(
    "chatstream_reused_prompt_tokens_total",
    "Prompt tokens taken from the prefix cache.",
    unit="tokens",
)
GENERATED_TOKENS = Counter("chatstream_generated_tokens_total", "Generated tokens.", unit="tokens")
PREEMPTIONS = Counter("chatstream_preemptions_total", "Times that a running request was preempted.")
REQUEUES = Counter(
    "chatstream_requeues_total", "Times that a request was requeued because the engine failed before its first token."
)
LIMIT_CHANGES = Counter("chatstream_limit_changes_total", "Changes of a limit, by source.", "source")
SLOTS_RECLAIMED = Counter(
    "chatstream_slots_reclaimed_total", "Slots that the watchdog reclaimed from a hanging engine: must stay 0."
)

QUEUE_TIME = Histogram("chatstream_queue_time_seconds", "Arrival to first start, of started requests.", _WAIT_BUCKETS_S)
TIME_TO_FIRST_TOKEN = Histogram(
    "chatstream_time_to_first_token_seconds", "Arrival to first generated token, including the wait.", _WAIT_BUCKETS_S
)
INTER_TOKEN_LATENCY = Histogram(
    "chatstream_inter_token_latency_seconds",
    "Time between two tokens of one request, without preempted time.",
    # The buckets of OpenTelemetry's gen_ai.server.time_per_output_token, with one more at either end.
    (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
REQUEST_DURATION = Histogram(
    "chatstream_request_duration_seconds",
    "Arrival to end, of every admitted request with any outcome.",
    (*_WAIT_BUCKETS_S, 1200.0),
)
PREEMPTED_TIME = Histogram(
    "chatstream_preempted_time_seconds",
    "Each preemption: time until the request resumed.",
    _WAIT_BUCKETS_S,
)
ETA_ERROR = Histogram(
    "chatstream_eta_error_seconds",
    "Expected wait (first announced median) - actual wait from then on. Below 0: longer than expected.",
    (-120.0, -60.0, -30.0, -20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
)
