"""The facade `ChatStream`: connects the rooms and makes no decisions of its own."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Unpack, cast

from chatstream.access import Access, AccessSettings
from chatstream.answering import Answering, ChatRequest, as_conversation
from chatstream.checks import check_int, check_seconds
from chatstream.config import load_settings, make_engine, sampling_defaults, scheduler_settings
from chatstream.engine_fit import check_max_concurrency, check_policy_fits, check_slices
from chatstream.engines.base import Engine, EngineStats, stats_of
from chatstream.engines.choose import EngineIn, EngineName
from chatstream.engines.loading.settings import LoadKeywords, LoadSettings
from chatstream.errors import ChatStreamError
from chatstream.first_limit import FirstLimit
from chatstream.legacy import FINISH_TOKEN, concurrency_limit
from chatstream.metrics.recorder import Recorder
from chatstream.ownership import RequestOwners
from chatstream.runtime import End, QueueWorker, RequestStream, RuntimeSettings
from chatstream.runtime.resumable import ResumableStreams
from chatstream.scheduler import Arrival, RequestView, Scheduler, SchedulerSettings, SchedulerStats
from chatstream.scheduler.events import Event
from chatstream.scheduler.settings import Auto
from chatstream.sessions import Conversations, ConversationStore, MemoryStore, SessionSettings
from chatstream.types import (
    Done,
    Failed,
    Message,
    Queued,
    Started,
    Token,
    TokenMask,
)

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request
    from starlette.responses import Response

    from chatstream.metrics.prometheus import PrometheusMetrics
    from chatstream.runtime.worker import Preemptible

__all__ = ["ChatRequest", "ChatStream"]

logger = logging.getLogger(__name__)


class ChatStream:
    """A queue and an exact limit in front of one engine.

        chat_stream = ChatStream("Qwen/Qwen3-0.6B", max_concurrency=4, max_queue_size=50)
        app = FastAPI(lifespan=chat_stream.lifespan)
        app.include_router(chat_stream.router)

    Without HTTP:

        async with chat_stream:
            async for event in chat_stream.stream("Hello"):
                ...

    At most `max_concurrency` requests run and `max_queue_size` more wait in order; further requests are rejected.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        engine: Engine | EngineName | None = None,
        load: LoadSettings | None = None,
        itl_target_s: float | None = None,
        engine_in: EngineIn = "thread",
        max_concurrency: int | Auto | None = None,
        num_of_concurrent_executions: int | None = None,
        max_queue_size: int | Auto | None = None,
        policy: str | None = None,
        max_wait_s: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        frequency_penalty: float | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        system_prompt: str | None = None,
        use_mock_response: bool = False,
        mock_params: Mapping[str, Any] | None = None,
        sessions: ConversationStore | None = None,
        session_settings: SessionSettings | None = None,
        access: AccessSettings | None = None,
        runtime: RuntimeSettings | None = None,
        scheduler: SchedulerSettings | None = None,
        grace_s: float = 30.0,
        max_body_bytes: int = 1024 * 1024,
        name: str = "node:0",
        **loading: Unpack[LoadKeywords],
    ) -> None:
        """Check the settings and prepare the engine; nothing is loaded yet. Raises `ConfigError`.

        model, tokenizer: a Hugging Face name, a directory, or a loaded model with its tokenizer; None: the demo model.
        engine: an engine of your own, or the name of the engine that runs the model; by default chosen from its files.
        load: how the model is loaded. The keywords in `loading`, such as `device`, override fields of `load`.
        itl_target_s: target time between two tokens. Adaptive concurrency aims at it, and prompts are prefilled in
            parts short enough to keep it.
        engine_in: "process" runs the model, given by its name or directory, in a child process that is restarted when
            it dies.
        max_concurrency, max_queue_size, policy, max_wait_s: override fields of `scheduler`. By default at most 2
            requests run and 5 wait. `num_of_concurrent_executions` is the 0.3 name of `max_concurrency`; pass only one.
        max_new_tokens to seed: sampling defaults for requests that do not set them; None: those of the checkpoint.
        system_prompt: precedes every conversation.
        use_mock_response, mock_params: answer with scripted text instead of a model.
        sessions, session_settings: the store of conversations, and its bounds.
        grace_s: how long running generations may continue at a stop.
        """
        self.name = name
        self._engine = make_engine(
            engine,
            model,
            tokenizer,
            load_settings(load, loading),
            itl_target_s=itl_target_s,
            engine_in=engine_in,
            use_mock_response=use_mock_response,
            mock_params=mock_params,
        )
        settings = scheduler_settings(
            scheduler,
            max_concurrency=concurrency_limit(max_concurrency, num_of_concurrent_executions),
            max_queue_size=max_queue_size,
            policy=policy,
            max_wait_s=max_wait_s,
            itl_target_s=itl_target_s,
        )
        self._runtime_settings = runtime or RuntimeSettings()
        self._settings = settings
        self._worker = QueueWorker(Scheduler(settings), self._runtime_settings)
        self._recorder = Recorder()
        self._worker.observe(self._recorder.observe)
        session_settings = session_settings or SessionSettings()
        store = sessions if sessions is not None else MemoryStore(session_settings)
        self._conversations = Conversations(store, session_settings)
        self._answering = Answering(
            self._engine,
            self._conversations,
            system_prompt=system_prompt,
            sampling_defaults=sampling_defaults(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                frequency_penalty=frequency_penalty,
                presence_penalty=presence_penalty,
                seed=seed,
            ),
        )
        self._access = Access(access)
        check_seconds("grace_s", grace_s, at_least=0)
        self._grace_s = grace_s
        check_int("max_body_bytes", max_body_bytes, at_least=1)
        self.max_body_bytes = max_body_bytes
        self._owners = RequestOwners(_loop_time_s)
        self._callbacks: set[asyncio.Task[None]] = set()
        self._first_limit = FirstLimit(
            is_wanted=settings.max_concurrency == "auto",
            itl_target_s=settings.itl_target_s,
            lowest=settings.min_concurrency,
            highest=settings.highest_concurrency,
        )

    def __repr__(self) -> str:
        return f"<ChatStream {self.name} {self._engine.model_name} {self._worker!r}>"

    # --- lifecycle --------------------------------------------------------------------------------------------

    async def start_queue_worker(self, *, by: str = "", why: str = "") -> None:
        """Load the engine, then start requests, the waiting ones first. Idempotent. Raises `ConfigError`.

        Ends a drain in progress, but not one that starts during the load.
        """
        _warn_about_several_workers()
        num_drains = self._worker.num_drains
        await self._engine.start()
        await self._answering.check_context()
        await self._find_limit()
        if self._worker.num_drains != num_drains:
            return
        capacity = self._engine.capacity
        if not self._settings.is_adaptive:
            check_max_concurrency(capacity, self._worker.stats().max_concurrency)
        check_slices(capacity, self._settings)
        self.check_policy(self._worker.stats().policy)
        # `check_engine` checks that an engine with `can_preempt` has the methods of `Preemptible`.
        preemptible = cast("Preemptible", self._engine) if capacity.can_preempt else None
        self._worker.start(preemptible=preemptible, engine_limit=capacity.max_concurrency, by=by, why=why)

    async def stop_queue_worker(self, grace_s: float | None = None) -> None:
        """Reject new and waiting requests, let running ones finish for `grace_s`, then stop the engine. Idempotent."""
        await self.drain(grace_s)
        await self._engine.stop()
        self._worker.drain()  # a start during the drain is void: the engine has stopped
        if self._callbacks:
            await asyncio.wait(self._callbacks, timeout=5.0)

    async def drain(self, grace_s: float | None = None) -> None:
        """Like `stop_queue_worker`, but keep the engine loaded. `start_queue_worker` ends the drain."""
        await self._worker.stop(self._grace_s if grace_s is None else grace_s)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """For `FastAPI(lifespan=chat_stream.lifespan)`."""
        async with self:
            yield

    async def __aenter__(self) -> ChatStream:
        try:
            await self.start_queue_worker()
        except BaseException:
            await self.stop_queue_worker(0.0)  # `__aexit__` is not called
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop_queue_worker()

    # --- generating -------------------------------------------------------------------------------------------

    async def stream(
        self,
        prompt: str | Sequence[Message | Mapping[str, str]],
        *,
        client: str = "",
        priority: int = 0,
        max_wait_s: float | None = None,
        token_mask: TokenMask | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Queued | Started | Token | Done, None]:
        """Request one answer, as events: `Queued`… `Started`, `Token`…, `Done`.

        `prompt` is a user message or a conversation. `sampling` are fields of `SamplingParams`; `token_mask` restricts
        the tokens, for example by a grammar. Closing the generator early (`aclose`) cancels the request. Raises
        `QueueFull`, `ShuttingDown` or `InvalidRequest` before the first event, and any `ChatStreamError` when the
        request ends without a complete answer.
        """
        request = ChatRequest(
            messages=as_conversation(prompt),
            sampling=sampling,
            token_mask=token_mask,
            client=client,
            priority=priority,
            max_wait_s=max_wait_s,
        )
        stream = await self.submit(request)
        try:
            async for event in stream:
                if isinstance(event, Failed):
                    raise event.error
                yield event
        finally:
            stream.close()

    async def submit(
        self,
        request: ChatRequest,
        *,
        message_id: str = "",
        on_end: Callable[[End], object] | None = None,
    ) -> RequestStream:
        """Admit a request, then check that its prompt can be answered.

        The caller must read the stream to its end or `close()` it. Raises `QueueFull`, `ShuttingDown` or
        `InvalidRequest`; then the request is not live. `on_end` is called (or awaited) exactly once for each admitted
        request.
        """
        arrival = Arrival(
            request_id=secrets.token_hex(16),
            client=request.client,
            conversation=request.conversation,
            priority=request.priority,
            max_wait_s=request.max_wait_s,
            prompt_tokens=request.estimated_prompt_tokens,
            max_new_tokens=request.sampling.get("max_new_tokens"),
        )
        message_id = message_id or uuid.uuid4().hex
        request_id = arrival.request_id
        self._owners.add(request_id, request.owner)
        try:
            stream = self._worker.submit(
                arrival,
                partial(self._answering.generate, request_id, request, message_id),
                message_id=message_id,
                on_end=partial(self._on_end, request_id, on_end),
            )
        except BaseException:
            self._owners.forget(request_id)
            raise
        try:
            waits_for_conversation = self._worker.waits_for(request_id) == "conversation"
            await self._answering.check(request, waits_for_conversation=waits_for_conversation)
        except ChatStreamError as refusal:
            self._worker.refuse(request_id, refusal)
            raise
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, request_id: str, *, owner: str = "", by: str = "client") -> bool:
        """Cancel a request, waiting or running. Idempotent. False when it is unknown or has another owner."""
        if not self._owners.may_cancel(request_id, owner, is_admin=by == "admin"):
            return False
        self._worker.cancel(request_id, by)
        return True

    async def forget(self, conversation: str) -> bool:
        """Delete a conversation kept on the server. False when there was none."""
        return await self._conversations.forget(conversation)

    async def handle_console_input(self, user_input: str) -> AsyncGenerator[tuple[str, str, str], None]:
        """Answer one message of a console conversation, as ChatStream 0.3 did.

        Yields (answer so far + finish token, new text, "begin" | "mid" | "end").
        """
        answer, position = "", "begin"
        stream = await self.submit(
            ChatRequest(messages=(Message("user", user_input),), conversation="console", client="console")
        )
        try:
            async for event in stream:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Token):
                    answer += event.text
                    yield answer + FINISH_TOKEN, event.text, position
                    position = "mid"
        finally:
            stream.close()
        yield answer + FINISH_TOKEN, "", "end"

    # --- HTTP -------------------------------------------------------------------------------------------------

    async def handle_chat_stream_request(
        self,
        request: Request,
        request_body: bytes | str | None = None,
        callback: Callable[[Request, str], object] | None = None,
    ) -> Response:
        """Answer `POST /chat_stream` in an endpoint of the application.

        Pass `request_body` if the endpoint has read the body. `callback(request, message)`, sync or async, is called
        exactly once for each admitted request: `success`, `client_disconnected_while_streaming`,
        `client_disconnected_before_streaming`, `cancelled`, `queue_timeout` or `unknown_error_occurred,…`.
        """
        from chatstream.api.native import chat_stream_response

        return await chat_stream_response(self, request, request_body, callback)

    @cached_property
    def router(self) -> APIRouter:
        """All endpoints and the chat page, for `app.include_router`."""
        from chatstream.api.app import create_router

        return create_router(self)

    # --- inspection -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def access(self) -> Access:
        return self._access

    @property
    def runtime_settings(self) -> RuntimeSettings:
        return self._runtime_settings

    @property
    def resumables(self) -> ResumableStreams:
        """Resumable streams: `keep` one after `submit`, `attach` a reader to it later."""
        return self._worker.resumables

    def resend_position(self, request_id: str) -> None:
        """Send position and ETA anew. Call it before `resumables.attach`, for a client that reconnects."""
        self._worker.resend_position(request_id)

    def observe(self, observer: Callable[[Event], object]) -> None:
        """Call `observer` with every event of `chatstream.scheduler.events`, in order, on the event loop."""
        self._worker.observe(observer)

    def stats(self) -> SchedulerStats:
        """The scheduler's counts and limits, as one frozen value."""
        return self._worker.stats()

    def records(self) -> dict[str, int]:
        """Sizes of internal records, for debuggers and tests: all 0 without live and resumable requests.

        Those of `QueueWorker.records`, and `owners`: live requests; `open_turns`: turns in progress.
        """
        own = {"owners": len(self._owners), "open_turns": self._conversations.num_open_turns}
        return self._worker.records() | own

    def engine_stats(self) -> EngineStats | None:
        """Statistics of the engine: serving mode, memory, prefix cache. None if the engine has none.

        An engine in a child process reports them once a second.
        """
        return stats_of(self._engine)

    @cached_property
    def metrics(self) -> PrometheusMetrics:
        """The metrics of `GET /metrics`, as a collector for an application's own Prometheus registry."""
        from chatstream.metrics.prometheus import PrometheusMetrics

        return PrometheusMetrics(self.stats, self._recorder, self.engine_stats)

    def requests(self, limit: int | None = None) -> list[RequestView]:
        """The running requests and the first `limit` waiting ones (None: all), for display. O(n)."""
        return self._worker.requests(limit)

    def not_ready_because(self) -> str:
        """The reason why requests do not start yet; empty when the server is ready."""
        stats, health = self.stats(), self._engine.health()
        if stats.is_draining:
            return "shutting down"
        if not health.is_ready:
            return health.detail or "the engine is not ready"
        if self._first_limit.is_being_measured:
            return "measuring max_concurrency"
        return "" if stats.is_open else "start_queue_worker was not called"

    # --- control at run time ----------------------------------------------------------------------------------

    def set_limits(
        self,
        *,
        max_concurrency: int | None = None,
        max_queue_size: int | Auto | None = None,
        by: str = "",
        why: str = "",
    ) -> None:
        """Change the limits at once. No request is lost: running ones finish under a lower limit. Raises `ConfigError`.

        `by` and `why`, here and in the following methods, are recorded in the resulting event and log line.
        """
        if max_concurrency is not None:
            check_max_concurrency(self._engine.capacity, max_concurrency)
        self._worker.set_limits(max_concurrency=max_concurrency, max_queue_size=max_queue_size, by=by, why=why)

    def set_policy(self, policy: str, *, by: str = "", why: str = "") -> None:
        """Order the queue by another policy from now on; no request is lost. Raises `ConfigError`."""
        self.check_policy(policy)
        self._worker.set_policy(policy, by=by, why=why)

    def set_paused(self, is_paused: bool, *, by: str = "", why: str = "") -> None:
        """Reject new requests with `paused`, or admit them again; waiting and running ones continue. Idempotent."""
        self._worker.set_paused(is_paused, by=by, why=why)

    def start_drain(self, *, by: str = "", why: str = "") -> None:
        """Reject new requests and those that have not started; started ones finish. `start_queue_worker` ends it."""
        self._worker.drain(by=by, why=why)

    def check_policy(self, policy: str) -> None:
        """Raises `ConfigError` when there is no such policy, or the engine does not support it."""
        check_policy_fits(self._engine.capacity, policy, self._settings)

    async def _find_limit(self) -> None:
        """Measure and set the initial limit, unless an operator sets one during the measurement."""
        before = self.stats().max_concurrency
        found = await self._first_limit.find(self._engine)
        if found is not None and self.stats().max_concurrency == before:
            self._worker.set_limits(max_concurrency=found.max_concurrency, by="auto", why=found.why)

    def _on_end(self, request_id: str, on_end: Callable[[End], object] | None, end: End) -> None:
        self._owners.end(request_id)
        if on_end is None:
            return
        result = on_end(end)
        if asyncio.iscoroutine(result):
            task = asyncio.get_running_loop().create_task(_logged(result))
            self._callbacks.add(task)
            task.add_done_callback(self._callbacks.discard)


def _warn_about_several_workers() -> None:
    num_workers = os.environ.get("WEB_CONCURRENCY", "1")
    if num_workers not in ("", "1") or multiprocessing.parent_process() is not None:
        logger.warning(
            "this looks like one of several worker processes: each worker process has a queue of its own, so limits, "
            "positions and conversations are not shared; run one process"
        )


def _loop_time_s() -> float:
    return asyncio.get_running_loop().time()


async def _logged(awaitable: Any) -> None:
    try:
        await awaitable
    except Exception:
        logger.exception("a callback failed")
