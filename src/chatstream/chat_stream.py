"""`ChatStream`: the one object that users hold. Wires the rooms together; decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from cachetools import TTLCache

from chatstream.access import Access, AccessSettings
from chatstream.engines.base import Engine
from chatstream.engines.choose import engine_for
from chatstream.engines.mock import MockEngine
from chatstream.errors import ConfigError, InvalidRequest, PromptTooLong
from chatstream.runtime import End, QueueWorker, RequestStream, RuntimeSettings
from chatstream.scheduler import Arrival, RequestView, Scheduler, SchedulerSettings, SchedulerStats
from chatstream.scheduler.events import Event
from chatstream.sessions import Conversations, ConversationStore, MemoryStore, SessionSettings
from chatstream.types import (
    Done,
    Failed,
    GenerationRequest,
    Message,
    PreparedPrompt,
    Queued,
    SamplingParams,
    Started,
    Token,
    TokenDelta,
)

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

FINISH_TOKEN = "<::EOS::>"
"""Ends every piece of text in the wire format of ChatStream 0.3, and of `handle_console_input`."""

_NO_LONGER = {
    "token_sampler": "sampling is set by temperature, top_k, top_p and repetition_penalty",
    "num_gpus": "the device is set by device",
    "chat_prompt_clazz": "prompts are made by the chat template of the tokenizer",
    "request_handler": "use engine=, sessions= or your own endpoint over stream()",
    "repetition_penalty_method": "the penalty is multiplicative, as in Hugging Face",
    "add_special_tokens": "the chat template decides about special tokens",
    "client_roles": "use api_keys and admin_key",
    "logger": "logs go to the logger named chatstream; configure that",
    "locale": "messages are English",
    "probe_mode_enabled": "use the mock engine",
    "too_many_request_as_http_error": "a refusal is always a real 429",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What somebody asks for, checked, before it has a place in line."""

    messages: tuple[Message, ...] = ()
    """The conversation; within a server-side one, only what is said now."""
    conversation: str | None = None
    """Key of a conversation kept on the server: its turns come first, and the answer is kept there."""
    regenerate: bool = False
    """Answer the last message of the conversation again, instead of its last answer."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `SamplingParams` that were given."""
    client: str = ""
    owner: str = ""
    """Which API key may cancel it; empty: whoever knows its id."""
    priority: int = 0
    max_wait_s: float | None = None


class ChatStream:
    """A queue and an exact limit in front of one engine.

        chat_stream = ChatStream("Qwen/Qwen3-0.6B", max_concurrency=4, max_queue_size=50)
        app = FastAPI(lifespan=chat_stream.lifespan)
        app.include_router(chat_stream.router)

    Without HTTP:

        async with chat_stream:
            async for event in chat_stream.stream("Hello"):
                ...

    At most `max_concurrency` generations run, `max_queue_size` more wait in order, the next one is refused.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        engine: Engine | None = None,
        device: Any = None,
        dtype: str = "auto",
        context_len: int | None = None,
        max_concurrency: int | None = None,
        num_of_concurrent_executions: int | None = None,
        max_queue_size: int | None = None,
        policy: str | None = None,
        max_wait_s: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
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
        **unknown: Any,
    ) -> None:
        """`model`: a Hugging Face name or directory, or a loaded model with its `tokenizer`; None: the demo model.

        `num_of_concurrent_executions` is the original's word for `max_concurrency`; give one of them. What is not
        given of the line's settings is taken from `scheduler`, by default 2 running and 5 waiting. The sampling
        parameters are the defaults of requests that do not say; where both are silent, the checkpoint's own
        generation settings hold. `grace_s` is how long running generations may go on at a stop.

        Raises `ConfigError` for a wrong or unknown setting; loads nothing yet.
        """
        _refuse_unknown(unknown)
        self.name = name
        self._engine = engine or _make_engine(
            model, tokenizer, device, dtype, context_len, use_mock_response, mock_params
        )
        limits = {
            "max_concurrency": _one_of(max_concurrency, num_of_concurrent_executions),
            "max_queue_size": max_queue_size,
            "policy": policy,
            "max_wait_s": max_wait_s,
        }
        settings = replace(scheduler or SchedulerSettings(), **_only_given(limits))
        self._runtime_settings = runtime or RuntimeSettings()
        self._worker = QueueWorker(Scheduler(settings), self._runtime_settings)
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        try:
            self._sampling_defaults = _checked_sampling(_only_given(given))
        except InvalidRequest as error:
            raise ConfigError(error.message, param=error.param) from error
        self._system = (Message("system", system_prompt),) if system_prompt else ()
        session_settings = session_settings or SessionSettings()
        self._conversations = Conversations(sessions or MemoryStore(session_settings), session_settings)
        self._access = Access(access)
        if not grace_s >= 0:
            raise ConfigError(f"grace_s must be at least 0 seconds, not {grace_s!r}", param="grace_s")
        self._grace_s = grace_s
        if not (isinstance(max_body_bytes, int) and max_body_bytes > 0):
            raise ConfigError(f"max_body_bytes must be above 0, not {max_body_bytes!r}", param="max_body_bytes")
        self.max_body_bytes = max_body_bytes
        self._owners: dict[str, str] = {}
        self._ended_owners: TTLCache[str, str] = TTLCache(maxsize=10_000, ttl=60.0, timer=_loop_time_s)
        self._callbacks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<ChatStream {self.name} {self._engine.model_name} {self._worker!r}>"

    # --- life -------------------------------------------------------------------------------------------------

    async def start_queue_worker(self) -> None:
        """Load the engine, then serve whoever waits, in order. Idempotent. Raises `ConfigError`."""
        _warn_about_several_workers()
        await self._engine.start()
        limit = self._engine.capacity.max_concurrency
        if limit is not None and self._worker.stats().max_concurrency > limit:
            raise ConfigError(f"max_concurrency is more than the {limit} this engine can run", param="max_concurrency")
        self._worker.start()

    async def stop_queue_worker(self, grace_s: float | None = None) -> None:
        """Refuse new and waiting requests, let running ones finish for `grace_s`, then stop the engine. Idempotent."""
        await self.drain(grace_s)
        await self._engine.stop()
        if self._callbacks:
            await asyncio.wait(self._callbacks, timeout=5.0)

    async def drain(self, grace_s: float | None = None) -> None:
        """Like `stop_queue_worker`, but the engine stays loaded; `start_queue_worker` serves again."""
        await self._worker.stop(self._grace_s if grace_s is None else grace_s)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """For `FastAPI(lifespan=chat_stream.lifespan)`."""
        async with self:
            yield

    async def __aenter__(self) -> ChatStream:
        await self.start_queue_worker()
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
        **sampling: Any,
    ) -> AsyncGenerator[Queued | Started | Token | Done, None]:
        """Ask for one answer: `Queued`… `Started`, `Token`…, `Done`.

        `prompt` is what a user says, or a conversation. `sampling` are fields of `SamplingParams`. Leaving the loop
        early (`aclose`) cancels the request. Raises `QueueFull`, `ShuttingDown`, `InvalidRequest` before the first
        event, and any `ChatStreamError` when the request ends without a complete answer.
        """
        request = ChatRequest(
            messages=_as_conversation(prompt),
            sampling=sampling,
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
        """Take a place in line for a request, then check that its prompt can be answered at all.

        The caller must read the stream to its end or `close()` it. Raises `QueueFull`, `ShuttingDown` or
        `InvalidRequest`; then nothing is held. `on_end` is called (or awaited) exactly once for whoever got a place.
        """
        sampling = self._sampling(request.sampling)
        arrival = Arrival(
            request_id=secrets.token_hex(16),
            client=request.client,
            conversation=request.conversation,
            priority=request.priority,
            max_wait_s=_checked_wait(request.max_wait_s),
        )
        message_id = message_id or uuid.uuid4().hex
        stream = self._worker.submit(
            arrival,
            partial(self._generate, arrival.request_id, request, sampling, message_id),
            message_id=message_id,
            on_end=partial(self._on_end, arrival.request_id, on_end),
        )
        self._owners[arrival.request_id] = request.owner
        try:
            await self._check_early(request, sampling, arrival.request_id)
        except BaseException:
            stream.close("refused")
            raise
        return stream

    def cancel(self, request_id: str, *, owner: str = "", by: str = "client") -> bool:
        """End a request, waiting or running. Harmless twice. False when it is unknown or somebody else's."""
        known = self._owners.get(request_id, self._ended_owners.get(request_id))
        if known is None or (known != owner and by != "admin"):
            return False
        self._worker.cancel(request_id, by)
        return True

    async def forget(self, conversation: str) -> bool:
        """Delete a conversation kept on the server. False when there was none."""
        return await self._conversations.forget(conversation)

    async def handle_console_input(self, user_input: str) -> AsyncGenerator[tuple[str, str, str], None]:
        """One turn of the conversation of this process: (answer so far + finish token, new text, begin|mid|end)."""
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
        """Answer `POST /chat_stream` in the user's own endpoint.

        `request_body` is the body when the endpoint has consumed it. `callback(request, message)`, sync or async, is
        called exactly once for every admitted request: `success`, `client_disconnected_while_streaming`,
        `client_disconnected_before_streaming`, `cancelled`, `queue_timeout` or `unknown_error_occurred,…`.
        """
        from chatstream.api.native import chat_stream_response

        return await chat_stream_response(self, request, request_body, callback)

    @cached_property
    def router(self) -> APIRouter:
        """All endpoints and the chat page, for `app.include_router`."""
        from chatstream.api.app import create_router

        return create_router(self)

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def access(self) -> Access:
        return self._access

    @property
    def runtime_settings(self) -> RuntimeSettings:
        return self._runtime_settings

    def observe(self, observer: Callable[[Event], object]) -> None:
        """Show it every decision of the scheduler (`chatstream.scheduler.events`), on the event loop, in order."""
        self._worker.observe(observer)

    def stats(self) -> SchedulerStats:
        """Counts and limits, as one frozen value."""
        return self._worker.stats()

    def requests(self) -> list[RequestView]:
        """Every running and waiting request. O(n), for people."""
        return self._worker.requests()

    def not_ready_because(self) -> str:
        """Empty when a request that came now would run or wait for others only."""
        stats, health = self.stats(), self._engine.health()
        if stats.is_draining:
            return "shutting down"
        if not health.is_ready:
            return health.detail or "the engine is not ready"
        return "" if stats.is_open else "start_queue_worker was not called"

    def set_limits(
        self, *, max_concurrency: int | None = None, max_queue_size: int | None = None, by: str = ""
    ) -> None:
        """Effective at once, losing nobody; lowering lets the running ones finish. Raises `ConfigError`."""
        limit = self._engine.capacity.max_concurrency
        if max_concurrency is not None and limit is not None and max_concurrency > limit:
            raise ConfigError(f"max_concurrency is more than the {limit} this engine can run", param="max_concurrency")
        self._worker.set_limits(max_concurrency=max_concurrency, max_queue_size=max_queue_size, by=by)

    # --- one request, inside ----------------------------------------------------------------------------------

    def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        return replace(self._engine.default_sampling, **{**self._sampling_defaults, **_checked_sampling(given)})

    async def _check_early(self, request: ChatRequest, sampling: SamplingParams, request_id: str) -> None:
        """Refuse what can never be answered while a status line can still say so. Not before the engine is ready."""
        if request.regenerate:
            # An earlier request of the same conversation may still bring the answer that is to be made anew.
            if request.conversation is not None and not self._worker.is_held(request_id):
                await self._conversations.check_regenerable(request.conversation)
        elif self._engine.health().is_ready:
            await self._prepare(request, request.messages, sampling)

    async def _generate(
        self, request_id: str, request: ChatRequest, sampling: SamplingParams, message_id: str
    ) -> AsyncGenerator[TokenDelta, None]:
        """Runs when the request has its slot: only now is a conversation complete."""
        if request.conversation is None:
            async with aclosing(self._answer(request_id, request, request.messages, sampling)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        said = None if request.regenerate else request.messages[-1].content
        async with (
            self._conversations.open_turn(request.conversation, said, message_id) as turn,
            aclosing(self._answer(request_id, request, turn.messages, sampling)) as deltas,
        ):
            async for delta in deltas:
                turn.answer += delta.text
                yield delta

    async def _answer(
        self, request_id: str, request: ChatRequest, messages: tuple[Message, ...], sampling: SamplingParams
    ) -> AsyncGenerator[TokenDelta, None]:
        prompt = await self._prepare(request, messages, sampling)
        async with aclosing(self._engine.stream(GenerationRequest(request_id, prompt, sampling))) as deltas:
            async for delta in deltas:
                yield delta

    async def _prepare(
        self, request: ChatRequest, messages: tuple[Message, ...], sampling: SamplingParams
    ) -> PreparedPrompt:
        """A conversation kept here loses its oldest turns when it outgrows the context; one that was sent does not."""
        prepare = partial(
            self._engine.prepare, (*self._system, *messages), may_drop_history=request.conversation is not None
        )
        try:
            return await prepare(sampling)
        except PromptTooLong:
            if "max_new_tokens" in request.sampling:
                raise
        # Only the default length does not fit: the answer gets the room that is left.
        return await prepare(replace(sampling, max_new_tokens=None))

    def _on_end(self, request_id: str, on_end: Callable[[End], object] | None, end: End) -> None:
        owner = self._owners.pop(request_id, None)
        if owner is not None:
            self._ended_owners[request_id] = owner
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
            "places and conversations are not shared; run one process"
        )


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        instead = _NO_LONGER.get(name)
        raise ConfigError(
            f"{name} is not a setting any more: {instead}" if instead else f"unknown setting {name}", param=name
        )


def _make_engine(
    model: Any,
    tokenizer: Any,
    device: Any,
    dtype: str,
    context_len: int | None,
    use_mock_response: bool,
    mock_params: Mapping[str, Any] | None,
) -> Engine:
    if not use_mock_response:
        return engine_for(model, tokenizer, device=device, dtype=dtype, context_len=context_len)
    names = {"type": "type", "initial_wait_sec": "initial_wait_s", "time_per_token_sec": "time_per_token_s"}
    params = mock_params or {}
    wrong = [str(name) for name in params if name not in names]
    if wrong:
        raise ConfigError(f"unknown mock_params: {', '.join(wrong)}; known: {', '.join(names)}", param="mock_params")
    return MockEngine(**{names[name]: value for name, value in params.items()})


def _only_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _one_of(max_concurrency: int | None, num_of_concurrent_executions: int | None) -> int | None:
    if max_concurrency is not None and num_of_concurrent_executions is not None:
        raise ConfigError(
            "max_concurrency and num_of_concurrent_executions mean the same: give one", param="max_concurrency"
        )
    return num_of_concurrent_executions if max_concurrency is None else max_concurrency


def _checked_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams`, where `stop` may also be one string or a list. Raises `InvalidRequest` naming one."""
    known = SamplingParams.__dataclass_fields__
    for name in given:
        if name not in known:
            raise InvalidRequest(f"unknown sampling parameter {name}", param=name)
    checked = dict(given)
    match checked.get("stop"):
        case str(stop):
            checked["stop"] = (stop,)
        case list(stops):
            checked["stop"] = tuple(stops)
    SamplingParams(**checked)
    return checked


def _checked_wait(max_wait_s: float | None) -> float | None:
    if max_wait_s is not None and not max_wait_s > 0:
        raise InvalidRequest("max_wait_seconds must be above 0", param="max_wait_seconds")
    return max_wait_s


def _as_conversation(prompt: str | Sequence[Message | Mapping[str, str]]) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    messages = tuple(m if isinstance(m, Message) else _as_message(m) for m in prompt)
    if not messages:
        raise InvalidRequest("the conversation is empty", param="messages")
    return messages


def _as_message(given: Mapping[str, str]) -> Message:
    match given:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if len(given) == 2:
            return Message(role, content)
    raise InvalidRequest("a message has a role (system, user or assistant) and a content, a string", param="messages")


def _loop_time_s() -> float:
    return asyncio.get_running_loop().time()


async def _logged(awaitable: Any) -> None:
    try:
        await awaitable
    except Exception:
        logger.exception("a callback failed")
