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
"""Without a default in its help, and without the `--empty-…` that cyclopts adds."""


@Parameter(name="*", group=Group("Line", sort_key=2))
@dataclass(frozen=True, slots=True, kw_only=True)
class LineOptions:
    """Who runs, who waits, who is refused."""

    max_concurrency: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = 2
    """Generations at the same time; `chatstream tune` recommends a number. auto: measured at the start, then found from
    the gaps between tokens."""
    max_queue_size: Annotated[int | Literal["auto"], COUNT_OR_AUTO] = 5
    """Requests that may wait beside them; one more is refused with 429 and told when to come back. auto: as many as
    can start in time."""
    max_waiting_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens of prompts and answers that may wait, by estimate. [default: no bound of its own]"""
    policy: str = "fcfs"
    """Order of the line. fcfs: first come, first served; fair: clients share by tokens; fair-token: at every moment;
    priority: the urgent first, with ageing; spf: the shortest predicted first, with ageing."""
    ageing: float = 60.0
    """With --policy priority: seconds of waiting that outweigh one class."""
    max_wait: float | None = None
    """Give up a request that has waited for so many seconds. [default: never]"""
    ttft_slo: float | None = None
    """Seconds to the first token that are still good service: who will probably not reach it is refused at once, and
    who cannot any more is given up. [default: none]"""
    max_running_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Slots that one client may hold; its other requests wait and let others pass. [default: all]"""
    max_waiting_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Requests of one client that may wait; the next one is refused. [default: all places]"""
    slice_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """After so many tokens a long answer makes room for somebody who waits, and goes on later. [default: never]"""
    adaptive: Literal["off", "on"] = "off"
    """on: the limit moves between --min-concurrency and --max-concurrency."""
    itl_target_ms: Annotated[float | None, ABOVE_ZERO] = None
    """Milliseconds between two tokens that 9 of 10 gaps should not exceed: adaptive concurrency aims at it, and while
    others generate, prompts are read in parts that keep it. [default: 100 for adaptive concurrency; parts of prompts
    that keep a step within 1.9 times its usual time, up to 4 while more wait than generate]"""
    min_concurrency: Annotated[int, WHOLE_NUMBER] = 1
    """With adaptive concurrency: never below."""
    grace: float = 30.0
    """At SIGTERM or Ctrl-C, running generations may go on for so many seconds."""
    stall_timeout: float = 15.0
    """Cut a client that takes nothing of its answer for so many seconds."""


@Parameter(name="*", group=Group("HTTP", sort_key=3))
@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """Where it listens, and to whom."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: for all of this machine's."""
    port: Annotated[int, WHOLE_NUMBER, Parameter(validator=Number(gte=0, lte=65535))] = 8000
    """TCP port; 0 takes a free one."""
    api_key: Annotated[tuple[str, ...], REPEATABLE] = ()
    """Bearer token that may generate; repeatable. [default: everybody may]"""
    admin_key: str | None = None
    """Bearer token that may look at the queue, change it (limits, policy, pause, drain) and cancel anything.
    [default: callers from this machine may look at it and change it]"""
    session_secret: str | None = None
    """Signs the cookies of browser sessions, so that they outlive a restart. [default: a new one at each start]"""
    cors_origin: Annotated[tuple[str, ...], REPEATABLE] = ()
    """Origin whose pages may call this server, such as https://example.org; repeatable. [default: none]"""


LOG_GROUP = Group("Log", sort_key=4)
DEFAULT_LINE = LineOptions()
DEFAULT_HTTP = HttpOptions()


def serve(
    model: str | None = None,
    /,
    *,
    model_options: ServedModelOptions = DEFAULT_SERVED_MODEL,
    line: LineOptions = DEFAULT_LINE,
    http: HttpOptions = DEFAULT_HTTP,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(group=LOG_GROUP)] = "info",
) -> None:
    """Start the server: chat page, native API and OpenAI-compatible API.

    For example, with the bundled demo model, with one of your own, and with scripted text:

    ```
    chatstream serve
    chatstream serve Qwen/Qwen3-0.6B --max-concurrency 4 --max-queue-size 50
    chatstream serve --engine mock --mock-type long --max-concurrency 1
    ```

    Parameters
    ----------
    model:
        A Hugging Face name, a checkpoint directory, or one exported for OpenVINO. [default: the bundled demo model]
    log_level:
        What is told on stderr; debug adds every HTTP request.
    """
    chat_stream = _chat_stream(model, model_options, line, http)
    _set_up_logging(log_level)
    _warn_of_workers()
    _warn_of_unused(line)
    from chatstream import server

    started_s = time.monotonic()
    name = chat_stream.engine.model_name
    log = logging.getLogger("chatstream")
    server.serve(
        chat_stream,
        host=http.host,
        port=http.port,
        cors_origins=http.cors_origin,
        grace_s=line.grace,
        access_log=log_level == "debug",
        on_listening=lambda url: log.info("%s is open; loading %s, requests wait in line meanwhile", url, name),
        on_ready=lambda url: _show_ready(url, chat_stream, time.monotonic() - started_s),
    )


def _chat_stream(
    model: str | None, model_options: ServedModelOptions, line: LineOptions, http: HttpOptions
) -> ChatStream:
    settings = model_options.settings(model)
    from chatstream.access import AccessSettings
    from chatstream.chat_stream import ChatStream
    from chatstream.runtime import RuntimeSettings
    from chatstream.scheduler import SchedulerSettings

    return ChatStream(
        **settings,
        itl_target_s=None if line.itl_target_ms is None else line.itl_target_ms / 1000,
        scheduler=SchedulerSettings(
            max_concurrency=line.max_concurrency,
            max_queue_size=line.max_queue_size,
            max_waiting_tokens=line.max_waiting_tokens,
            policy=line.policy,
            ageing_s=line.ageing,
            max_wait_s=line.max_wait,
            ttft_slo_s=line.ttft_slo,
            max_running_per_client=line.max_running_per_client,
            max_waiting_per_client=line.max_waiting_per_client,
            slice_tokens=line.slice_tokens,
            adaptive=line.adaptive,
            min_concurrency=line.min_concurrency,
        ),
        grace_s=line.grace,
        runtime=RuntimeSettings(reader_stall_timeout_s=line.stall_timeout),
        access=AccessSettings(api_keys=http.api_key, admin_key=http.admin_key, session_secret=http.session_secret),
    )


def _set_up_logging(level: str) -> None:
    """What this house says from `level` up; others' words only from WARNING up, except when somebody debugs."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("chatstream").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(level.upper() if level in ("debug", "error") else "WARNING")


def _warn_of_workers() -> None:
    for name in ("WEB_CONCURRENCY", "UVICORN_WORKERS"):
        if os.environ.get(name, "1") != "1":
            logging.getLogger("chatstream").warning(
                "%s=%s is ignored: one process keeps the line, so that its limit is exact; see --max-concurrency",
                name,
                os.environ[name],
            )


def _warn_of_unused(line: LineOptions) -> None:
    """Not refused: an operator may change the policy while it runs, and what was said for another one then counts."""
    if line.ageing != DEFAULT_LINE.ageing and line.policy != "priority":
        logging.getLogger("chatstream").warning(
            "--ageing changes nothing under the policy %s, only under priority", line.policy
        )


def _show_ready(url: str, chat_stream: ChatStream, loading_s: float) -> None:
    stats = chat_stream.stats()
    print(f"{chat_stream.engine.model_name} is ready after {loading_s:.1f} s", end="; ")
    print(f"{stats.max_concurrency} at the same time, {stats.max_queue_size} more may wait")
    print(f"  chat page   {url}/")
    print(f"  API         {url}/v1   (OpenAI-compatible)", flush=True)
