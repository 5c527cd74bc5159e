"""Every metric, defined once: its name, its unit, what it means and how it is computed.

Names and labels are a promise to people's dashboards. The label values are bounded: never a request, never a client.
docs/metrics.md has the same list, with a sentence more each.
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
    """Since the start of the process; ends in `_total`."""

    name: str
    help: str
    label: str = ""
    """The name of its one label; empty when it has none."""
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Of seconds."""

    name: str
    help: str
    buckets_s: tuple[float, ...]
    """Upper bounds, ascending, without infinity. Values that people promise each other are among them."""
    unit: str = "seconds"


Definition: TypeAlias = Gauge | Counter | Histogram

REJECTION_CODES = tuple(error.code for error in (QueueFull, ClientLimit, Infeasible, Paused, ShuttingDown))
"""Shown from the start, as 0, so that a first refusal is an increase."""
LIMIT_SOURCES = ("operator", "adaptive", "auto")

_WAIT_BUCKETS_S = (0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS_RUNNING = Gauge("chatstream_requests_running", "Slots in use now.")
REQUESTS_WAITING = Gauge("chatstream_requests_waiting", "Requests in line now, the preempted ones too.")
REQUESTS_PREEMPTED = Gauge("chatstream_requests_preempted", "Of those that wait, how many have begun.")
MAX_CONCURRENCY = Gauge("chatstream_max_concurrency", "The most that may run; the number in force.")
MAX_QUEUE_SIZE = Gauge("chatstream_max_queue_size", "The most that may wait beside them; the number in force.")
PAUSED = Gauge("chatstream_paused", "1 while an operator lets nobody new in, else 0.")
DRAINING = Gauge("chatstream_draining", "1 while the server takes nothing new and starts nothing, else 0.")
ENGINE_SLOTS = Gauge("chatstream_engine_slots", "Sequences in the model's memory now.")
PREFIX_CACHE_BYTES = Gauge(
    "chatstream_prefix_cache_bytes",
    "Memory of what is kept of earlier prompts and answers, for those that begin alike.",
)

REQUESTS = Counter("chatstream_requests_total", "Requests that have ended, and those that were refused.", "outcome")
REJECTIONS = Counter("chatstream_rejections_total", "Requests that got no place, by the code they were told.", "code")
PROMPT_TOKENS = Counter("chatstream_prompt_tokens_total", "Prompt tokens that the engine has read.", unit="tokens")
REUSED_PROMPT_TOKENS = Counter(
    "chatstream_reused_prompt_tokens_total", "Of these, how many did not have to be computed.", unit="tokens"
)
GENERATED_TOKENS = Counter("chatstream_generated_tokens_total", "Tokens that were generated.", unit="tokens")
PREEMPTIONS = Counter("chatstream_preemptions_total", "Times that a running request was put back in line.")
REQUEUES = Counter("chatstream_requeues_total", "Times that an engine failed before the first token: tried again.")
LIMIT_CHANGES = Counter("chatstream_limit_changes_total", "Changes of a limit, by who made them.", "source")
SLOTS_RECLAIMED = Counter(
    "chatstream_slots_reclaimed_total", "Slots the watchdog took from an engine that hung: must stay 0."
)

QUEUE_TIME = Histogram(
    "chatstream_queue_time_seconds", "Arrival to first start, of requests that started.", _WAIT_BUCKETS_S
)
TIME_TO_FIRST_TOKEN = Histogram(
    "chatstream_time_to_first_token_seconds", "Arrival to first generated token, waiting included.", _WAIT_BUCKETS_S
)
INTER_TOKEN_LATENCY = Histogram(
    "chatstream_inter_token_latency_seconds",
    "Each gap between two tokens of one request, without the time it was preempted.",
    # Those of OpenTelemetry's gen_ai.server.time_per_output_token, with one more at either end.
    (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
REQUEST_DURATION = Histogram(
    "chatstream_request_duration_seconds",
    "Arrival to end, of every admitted request, however it ended.",
    (*_WAIT_BUCKETS_S, 1200.0),
)
PREEMPTED_TIME = Histogram(
    "chatstream_preempted_time_seconds",
    "Each stay in line of a request that had begun, until it went on.",
    _WAIT_BUCKETS_S,
)
ETA_ERROR = Histogram(
    "chatstream_eta_error_seconds",
    "Expected wait - actual wait since it was first told. Below 0: it took longer.",
    (-120.0, -60.0, -30.0, -20.0, -10.0, -5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
)
