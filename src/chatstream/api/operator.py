"""The operator's endpoints: the queue and its control, health, and metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chatstream.api.bodies import Body, Query, parse_body, parse_query, read_body
from chatstream.api.errors import answering_errors, native_body
from chatstream.api.legacy import load_body
from chatstream.api.openapi import add_endpoint
from chatstream.chat_stream import ChatStream
from chatstream.engines.base import EngineStats
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.scheduler import RequestView, rounded


class QueueQuery(Query):
    """Query parameters of `GET` and `PATCH /queue`."""

    # Enough for any display, and only a few milliseconds of the event loop that all streams share.
    limit: int = Field(1000, ge=0, le=1_000_000, description="Waiting requests to list, at most.")


def _queue_size(value: object, check: ValidatorFunctionWrapHandler) -> object:
    try:
        return check(value)
    except ValidationError:
        # pydantic's message names only one of the two types.
        raise PydanticCustomError("queue_size", 'must be a whole number of at least 0, or "auto"') from None


def _one_line(text: str) -> str:
    """The text is logged: it must not forge or colour log lines."""
    # Allow the ideographic space of Japanese text.
    if not text.replace("\u3000", " ").isprintable():
        raise PydanticCustomError("not_printable", "must be printable characters on one line")
    return text


class QueueBody(Body):
    """Body of `PATCH /queue`."""

    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    max_queue_size: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"] | None, WrapValidator(_queue_size)] = None
    policy: str | None = None
    paused: bool | None = None
    draining: bool | None = None
    reason: Annotated[str, Field(max_length=200), AfterValidator(_one_line)] | None = None

    async def apply(self, chat_stream: ChatStream, by: str) -> None:
        """Apply all changes or none. Raises `InvalidRequest` with the wrong field's name, or when no field is given."""
        changes = [name for name in type(self).model_fields if name != "reason"]
        if all(getattr(self, name) is None for name in changes):
            raise InvalidRequest(f"there is nothing to change: give at least one of {', '.join(changes)}")
        why = self.reason or ""
        try:
            if self.policy is not None:
                chat_stream.check_policy(self.policy)
            if self.max_concurrency is not None or self.max_queue_size is not None:
                chat_stream.set_limits(
                    max_concurrency=self.max_concurrency, max_queue_size=self.max_queue_size, by=by, why=why
                )
        except ConfigError as error:
            raise InvalidRequest(error.message, param=error.param) from error
        if self.policy is not None:
            chat_stream.set_policy(self.policy, by=by, why=why)
        if self.paused is not None:
            chat_stream.set_paused(self.paused, by=by, why=why)
        if self.draining:
            chat_stream.start_drain(by=by, why=why)
        elif self.draining is False and chat_stream.stats().is_draining:
            await chat_stream.start_queue_worker(by=by, why=why)


def create_operator_router(chat_stream: ChatStream) -> APIRouter:
    router = APIRouter()
    access = chat_stream.access
    collected = chat_stream.metrics  # imports its library now, not while requests stream

    @answering_errors(native_body)
    async def get_load(request: Request) -> Response:
        """Return the numbers of running and waiting requests, and their limits."""
        return JSONResponse(load_body(chat_stream.name, chat_stream.stats()))

    @answering_errors(native_body)
    async def get_queue(request: Request) -> Response:
        """List all running requests and the first `limit` waiting ones. For administrators."""
        access.require_admin(request)
        return JSONResponse(_queue(chat_stream, parse_query(QueueQuery, request).limit))

    @answering_errors(native_body)
    async def patch_queue(request: Request) -> Response:
        """Change limits or policy, pause or drain. Takes effect at once; no request is lost. For administrators."""
        by = access.require_admin(request)
        limit = parse_query(QueueQuery, request).limit  # before the changes: an invalid limit changes nothing
        change = parse_body(QueueBody, await read_body(request, chat_stream.max_body_bytes))
        await change.apply(chat_stream, by)
        return JSONResponse(_queue(chat_stream, limit))

    async def live(request: Request) -> Response:
        """Return 200 while the process runs."""
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        """Return 200 if the model is loaded and nothing drains, else 503. A full or paused server is still ready."""
        why_not = chat_stream.not_ready_because()
        return JSONResponse({"status": why_not or "ready"}, 503 if why_not else 200)

    async def metrics(request: Request) -> Response:
        """Return metrics for Prometheus. Needs no key, like `/get_load`."""
        page, content_type = collected.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": content_type})

    add_endpoint(router, "GET", "/get_load", get_load)
    add_endpoint(router, "GET", "/queue", get_queue, query=QueueQuery)
    add_endpoint(router, "PATCH", "/queue", patch_queue, QueueBody, QueueQuery)
    add_endpoint(router, "GET", "/health/live", live)
    add_endpoint(router, "GET", "/health/ready", ready)
    add_endpoint(router, "GET", "/metrics", metrics)
    return router


def _queue(chat_stream: ChatStream, limit: int) -> dict[str, Any]:
    stats, requests = chat_stream.stats(), chat_stream.requests(limit)
    return {
        "max_concurrency": stats.max_concurrency,
        "max_queue_size": stats.max_queue_size,
        "policy": stats.policy,
        "paused": stats.is_paused,
        "draining": stats.is_draining,
        "num_waiting": stats.waiting,
        "engine": _engine(chat_stream.engine_stats()),
        "running": [_running_row(view) for view in requests if view.position is None],
        "waiting": [_waiting_row(view) for view in requests if view.position is not None],
    }


def _engine(stats: EngineStats | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {
        "batched": stats.is_batched,
        "slow_because": stats.slow_because,
        "slots": stats.num_slots,
        "prefix_cache_sequences": stats.num_cached_sequences,
        "prefix_cache_bytes": stats.prefix_cache_bytes,
        "prompt_tokens": stats.prompt_tokens,
        "reused_prompt_tokens": stats.reused_prompt_tokens,
    }


def _running_row(view: RequestView) -> dict[str, Any]:
    return {
        "request_id": view.request_id,
        "client": view.client,
        "slot": view.slot,
        "generated_tokens": view.generated_tokens,
        "running_seconds": round(view.running_s, 3),
        "waited_seconds": round(view.waited_s, 3),
        "last_token_seconds_ago": round(view.last_progress_s_ago, 3),
    }


def _waiting_row(view: RequestView) -> dict[str, Any]:
    return {
        "request_id": view.request_id,
        "client": view.client,
        "position": view.position,
        "waited_seconds": round(view.waited_s, 3),
        "eta_seconds": None if view.eta is None else rounded(view.eta.p50_s),
        "priority": view.priority,
        "preempted": view.is_preempted,
        "generated_tokens": view.generated_tokens,
        "waits_for": view.waits_for,
        "why": _WHY_WAITING.get(view.waits_for or "", ""),
    }


_WHY_WAITING: dict[str, str] = {
    "slot": "all slots are in use",
    "conversation": "an earlier request of the same conversation has not ended",
    "client_limit": "this client runs its maximum number of requests",
    "opening": "the server has not started to serve",
}
