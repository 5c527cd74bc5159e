"""`chatstream serve`: options to settings, then `chatstream.server`."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from chatstream.cli.options import (
    ABOVE_ZERO,
    COUNT_OR_AUTO,
    DEFAULT_SERVED_MODEL,
    WHOLE_NUMBER,
    ServedModelOptions,
)

if TYPE_CHECKING:
    from chatstream.chat_stream import ChatStream


REPEATABLE = Parameter(show_default=False, negative=())
"""Omits the default from the help, and the option `--empty-…` that cyclopts adds."""


@Parameter(name="*", group=Group("Queue", sort_key=2))
@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """Limits and order of the queue."""

    max_concurrency: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = 2
    """Requests that generate at the same time (slots); `chatstream tune` recommends a number. auto: measured at
    startup, then adapted to the gaps between tokens."""
    max_queue_size: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = 5
    """Requests that may wait in the queue; the next one gets status 429 with Retry-After. auto: the number of requests
    that can start in time."""
    max_waiting_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Estimated tokens of the waiting prompts and their answers, at most. [default: no limit]"""
    policy: str = "fcfs"
    """Order of the queue. fcfs: first come, first served; fair: equal tokens for each client; fair-token: the same,
    enforced during generation; priority: highest priority first, with ageing; spf: shortest predicted request first,
    with ageing."""
    ageing: float = 60.0
    """With --policy priority: seconds of waiting that count as one priority level."""
    max_wait: float | None = None
    """Seconds after which a request that has not started ends with queue_timeout. [default: never]"""
    ttft_slo: float | None = None
    """Target time to the first token, in seconds. A request that will probably miss it is rejected at once; a waiting
    request that can no longer meet it ends. [default: none]"""
    max_running_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Running requests per client, at most; further ones wait, and requests of other clients may pass them.
    [default: no limit]"""
    max_waiting_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Waiting requests per client, at most; the next one is rejected. [default: no limit]"""
    slice_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens after which a running request is preempted while others wait; it resumes later. [default: never]"""
    adaptive: Literal["off", "on"] = "off"
    """Adaptive concurrency: the number of slots moves between --min-concurrency and --max-concurrency."""
    itl_target_ms: Annotated[float | None, ABOVE_ZERO] = None
    """Target gap between two tokens, in milliseconds, for 9 of 10 gaps. Adaptive concurrency aims at it, and prompts
    are computed in parts small enough to keep it. [default: 100 for adaptive concurrency; for prompts, parts that keep
    a step within 1.9 times its usual time, or 4 times while more requests wait for their first token than generate]"""
    min_concurrency: Annotated[int, WHOLE_NUMBER] = 1
    """Lowest number of slots under adaptive concurrency."""
    grace: float = 30.0
    """Seconds that running requests may continue after SIGTERM or Ctrl-C."""
    stall_timeout: float = 15.0
    """Seconds after which a client that reads nothing of its answer is disconnected."""


@Parameter(name="*", group=Group("HTTP", sort_key=3))
@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Address, keys and origins."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for all addresses of this machine."""
    port: Annotated[int, WHOLE_NUMBER, Parameter(validator=Number(gte=0, lte=65535))] = 8000
    """TCP port; 0 selects a free one."""
    api_key: Annotated[tuple[str, ...], REPEATABLE] = ()
    """Bearer token that allows requests; repeatable. [default: requests need no key]"""
    admin_key: str | None = None
    """Bearer token that allows reading the queue, changing it (limits, policy, pause, drain) and cancelling any
    request. [default: callers on this machine may read and change the queue]"""
    session_secret: str | None = None
    """Secret that signs session cookies, so that they stay valid after a restart. [default: a new one at each start]"""
    cors_origin: Annotated[tuple[str, ...], REPEATABLE] = ()
    """Origin whose pages may call this server, such as https://example.org; repeatable. [default: none]"""


LOG_GROUP = Group("Log", sort_key=4)
DEFAULT_QUEUE = QueueOptions()
DEFAULT_HTTP = HttpOptions()


def serve(
    model: str | None = None,
    /,
    *,
    model_options: ServedModelOptions = DEFAULT_SERVED_MODEL,
    queue: QueueOptions = DEFAULT_QUEUE,
    http: HttpOptions = DEFAULT_HTTP,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(group=LOG_GROUP)] = "info",
) -> None:
    """Start the server: chat page, native API and OpenAI-compatible API.

    For example, with the bundled demo model, with your own model, and with scripted text:

    ```
    chatstream serve
    chatstream serve Qwen/Qwen3-0.6B --max-concurrency 4 --max-queue-size 50
    chatstream serve --engine mock --mock-type long --max-concurrency 1
    ```

    Parameters
    ----------
    model:
        Hugging Face name, or directory of a checkpoint or of an OpenVINO export. [default: the bundled demo model]
    log_level:
        Lowest level of the log on stderr; debug includes every HTTP request.
    """
    chat_stream = _chat_stream(model, model_options, queue, http)
    _set_up_logging(log_level)
    _warn_of_workers()
    _warn_of_unused(queue)
    from chatstream import server

    started_s = time.monotonic()
    name = chat_stream.engine.model_name
    log = logging.getLogger("chatstream")
    server.serve(
        chat_stream,
        host=http.host,
        port=http.port,
        cors_origins=http.cors_origin,
        grace_s=queue.grace,
        access_log=log_level == "debug",
        on_listening=lambda url: log.info("listening on %s; requests wait in the queue while %s loads", url, name),
        on_ready=lambda url: _show_ready(url, chat_stream, time.monotonic() - started_s),
    )


def _chat_stream(
    model: str | None, model_options: ServedModelOptions, queue: QueueOptions, http: HttpOptions
) -> ChatStream:
    settings = model_options.settings(model)
    from chatstream.access import AccessSettings
    from chatstream.chat_stream import ChatStream
    from chatstream.runtime import RuntimeSettings
    from chatstream.scheduler import SchedulerSettings

    return ChatStream(
        **settings,
        itl_target_s=None if queue.itl_target_ms is None else queue.itl_target_ms / 1000,
        scheduler=SchedulerSettings(
            max_concurrency=queue.max_concurrency,
            max_queue_size=queue.max_queue_size,
            max_waiting_tokens=queue.max_waiting_tokens,
            policy=queue.policy,
            ageing_s=queue.ageing,
            max_wait_s=queue.max_wait,
            ttft_slo_s=queue.ttft_slo,
            max_running_per_client=queue.max_running_per_client,
            max_waiting_per_client=queue.max_waiting_per_client,
            slice_tokens=queue.slice_tokens,
            adaptive=queue.adaptive,
            min_concurrency=queue.min_concurrency,
        ),
        grace_s=queue.grace,
        runtime=RuntimeSettings(reader_stall_timeout_s=queue.stall_timeout),
        access=AccessSettings(api_keys=http.api_key, admin_key=http.admin_key, session_secret=http.session_secret),
    )


def _set_up_logging(level: str) -> None:
    """Log ChatStream from `level` up and other libraries from WARNING up; uvicorn in full at `debug`."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("chatstream").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(level.upper() if level in ("debug", "error") else "WARNING")


def _warn_of_workers() -> None:
    for name in ("WEB_CONCURRENCY", "UVICORN_WORKERS"):
        if os.environ.get(name, "1") != "1":
            logging.getLogger("chatstream").warning(
                "%s=%s is ignored: ChatStream runs in one process, so that its limit is exact; see --max-concurrency",
                name,
                os.environ[name],
            )


def _warn_of_unused(queue: QueueOptions) -> None:
    """Warn of options without effect. They are not refused, because an operator may change the policy at run time."""
    if queue.ageing != DEFAULT_QUEUE.ageing and queue.policy != "priority":
        logging.getLogger("chatstream").warning(
            "--ageing has no effect with the policy %s, only with priority", queue.policy
        )


def _show_ready(url: str, chat_stream: ChatStream, loading_s: float) -> None:
    stats = chat_stream.stats()
    print(f"{chat_stream.engine.model_name} is ready after {loading_s:.1f} s", end="; ")
    print(f"at most {stats.max_concurrency} running and {stats.max_queue_size} waiting requests")
    print(f"  chat page   {url}/")
    print(f"  API         {url}/v1   (OpenAI-compatible)", flush=True)
