"""Errors to responses: the OpenAI shape for `/v1/...` and general errors, the native shape for native endpoints."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from chatstream.errors import ChatStreamError, Overloaded, Unauthorized
from chatstream.runtime import RequestStream
from chatstream.types import Failed

logger = logging.getLogger(__name__)

UNKNOWN_RETRY_AFTER_S = 5.0
"""`Retry-After` without an estimate, as while the engine is unavailable."""
MAX_RETRY_AFTER_S = 120.0
MAX_JITTER = 0.1
"""Share by which a hint is randomly extended, so that clients refused together do not all retry together."""

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
ErrorBody: TypeAlias = Callable[[ChatStreamError], dict[str, Any]]


def openai_body(error: ChatStreamError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def native_body(error: ChatStreamError) -> dict[str, Any]:
    """The `error` field of ChatStream 0.3, with `code`, `message` and `param` added."""
    return {
        "error": "too_many_requests" if error.http_status == 429 else error.code,
        "code": error.code,
        "message": error.message,
        "param": error.param,
    }


def error_response(error: ChatStreamError, body: ErrorBody) -> JSONResponse:
    return JSONResponse(body(error), error.http_status, headers=error_headers(error))


def error_headers(error: ChatStreamError) -> dict[str, str]:
    """`Retry-After` in whole seconds, rounded up; the exact value in `retry-after-ms`; `WWW-Authenticate` for 401."""
    headers = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, Overloaded):
        retry_after_s = UNKNOWN_RETRY_AFTER_S
    if retry_after_s is not None:
        # Clamp before the jitter, so that hints at the maximum differ too.
        retry_after_s = min(max(retry_after_s, 1.0), MAX_RETRY_AFTER_S / (1.0 + MAX_JITTER))
        retry_after_s *= random.uniform(1.0, 1.0 + MAX_JITTER)
        retry_after_ms = math.ceil(retry_after_s * 1000)
        headers["Retry-After"] = str(math.ceil(retry_after_ms / 1000))
        headers["retry-after-ms"] = str(retry_after_ms)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def raise_early_end(stream: RequestStream) -> None:
    """Raise the error of a request that failed before its headers were sent, so that it gets a real status."""
    if isinstance(stream.end, Failed):
        raise stream.end.error


def answering_errors(body: ErrorBody) -> Callable[[Endpoint], Endpoint]:
    """Decorate an endpoint: its errors become responses, independent of the host application's handlers."""

    def decorate(endpoint: Endpoint) -> Endpoint:
        @wraps(endpoint)
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ChatStreamError as error:
                return error_response(error, body)
            except ClientDisconnect:
                return Response(status_code=499)  # never sent
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return error_response(ChatStreamError("something went wrong on the server"), body)

        return answer

    return decorate
