"""All endpoints, as a router for a host application or as an application of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from chatstream.api.errors import error_response, openai_body
from chatstream.api.native import create_native_router
from chatstream.api.openai import create_openai_router
from chatstream.api.operator import create_operator_router
from chatstream.chat_stream import ChatStream
from chatstream.errors import ChatStreamError, ConfigError, InvalidRequest, NotFound
from chatstream.web import create_web_router

EXPOSED_HEADERS = (
    "X-ChatStream-Request-Id",
    "X-ChatStream-Last-Generated-Message-Id",
    "Retry-After",
    "retry-after-ms",
)
ORIGIN = re.compile(r"\*|null|https?://[^\sA-Z/?#@,*]+|(?!https?:)[a-z][a-z0-9+.-]*://[^\s,]*")
"""The header `Origin` as browsers send it, RFC 6454, section 6.2; apps use other schemes, such as file://."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def create_router(chat_stream: ChatStream) -> APIRouter:
    """Return a router with the native, operator and OpenAI-compatible endpoints, and the chat page at its root."""
    router = APIRouter()
    router.include_router(create_native_router(chat_stream))
    router.include_router(create_operator_router(chat_stream))
    router.include_router(create_openai_router(chat_stream))
    router.include_router(create_web_router())
    return router


def create_app(
    chat_stream: ChatStream,
    *,
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Return an application with the ChatStream endpoints only. By default its lifespan starts and stops the queue.

    `cors_origins`: pages of these origins may call the server, with the session cookie where the browser sends it
    (which it does not across sites). "*" allows every page, without cookies. Raises `ConfigError` for a value that no
    browser sends as an origin.
    """
    for origin in cors_origins:
        if not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"cors_origins must be * or like https://example.org, in lower case, without a path; not {origin!r}",
                param="cors_origins",
            )
    app = FastAPI(title="ChatStream", lifespan=lifespan or chat_stream.lifespan, docs_url=None, redoc_url=None)
    app.include_router(chat_stream.router)
    app.add_exception_handler(HTTPException, _general_error)
    app.add_exception_handler(Exception, _bug)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_credentials="*" not in cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
        )
    return app


async def _general_error(request: Request, error: Exception) -> Response:
    """Give the framework's own errors the shape of all other errors."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound(f"no such path: {request.url.path}"), openai_body)
    headers = {"Allow": ", ".join(_methods_of(request))} if error.status_code == 405 else error.headers
    return JSONResponse(openai_body(InvalidRequest(str(error.detail))), error.status_code, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """The methods of all routes for this path. The framework names only those of the first matching route."""
    routes = request.app.routes
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(ChatStreamError("something went wrong on the server"), openai_body)
