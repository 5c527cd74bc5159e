"""All endpoints, as a router for somebody's application or as an application of its own."""

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
"""As browsers write it in the header `Origin`, RFC 6454, section 6.2. Apps have schemes of their own: file://"""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def create_router(chat_stream: ChatStream) -> APIRouter:
    """The native, the operator's and the OpenAI-compatible endpoints, and the chat page at the router's root."""
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
    """An application that is nothing but ChatStream. By default the queue runs as long as the application does.

    `cors_origins`: pages from these origins may call it, with the session cookie where the browser sends it (it does
    not to another site). With "*" every page may, never with cookies. Raises `ConfigError` for what no browser calls
    an origin.
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
    """What the framework itself refuses, in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound(f"no such path: {request.url.path}"), openai_body)
    headers = {"Allow": ", ".join(_methods_of(request))} if error.status_code == 405 else error.headers
    return JSONResponse(openai_body(InvalidRequest(str(error.detail))), error.status_code, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Those that this path knows; the framework names only those of the first route that it finds for it."""
    routes = request.app.routes
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(ChatStreamError("something went wrong on the server"), openai_body)
