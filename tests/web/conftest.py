"""A real server in a thread and a real browser.

A console message, a script error or a violation of the Content-Security-Policy fails the test of its page. (A browser
also reports each failed request on the console; a test that provokes one sets `expects_failed_requests`.)
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from starlette.types import ASGIApp

from chatstream.access import AccessSettings
from chatstream.api.app import create_app
from chatstream.chat_stream import ChatStream
from chatstream.engines.mock import MockEngine

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Long enough for a busy machine; only a failing test waits for it.
expect.set_options(timeout=15_000)

ENDLESS = "word " * 5000
"""Echoed with SLOW_S per word, this message occupies a slot until the request is cancelled."""
SLOW_S = 0.02


class Serve(Protocol):
    def __call__(self, **options: Any) -> str: ...


class OpenPage(Protocol):
    def __call__(self, url: str, *, expects_failed_requests: bool = False, **context_options: Any) -> Page: ...


@pytest.fixture(scope="package")
def url() -> Iterator[str]:
    """The URL of a server that echoes without delay. Tests share it: browser contexts do not affect each other."""
    address, stop = run_in_thread(build_app())
    yield address
    stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server for one test and returns its URL, without a trailing slash."""
    stops: list[Callable[[], None]] = []

    def start(**options: Any) -> str:
        address, stop = run_in_thread(build_app(**options))
        stops.append(stop)
        return address

    yield start
    for stop in stops:
        stop()


def build_app(
    *,
    time_per_token_s: float = 0.0,
    max_concurrency: int = 2,
    max_queue_size: int = 5,
    api_key: str | None = None,
    prefix: str = "",
) -> ASGIApp:
    """The real server over the mock engine, which echoes each question word by word."""
    chat_stream = ChatStream(
        engine=MockEngine("echo", time_per_token_s=time_per_token_s),
        max_concurrency=max_concurrency,
        max_queue_size=max_queue_size,
        access=AccessSettings(api_keys=(api_key,) if api_key else ()),
        grace_s=0,
    )
    if not prefix:
        return create_app(chat_stream)
    app = FastAPI(lifespan=chat_stream.lifespan)
    app.include_router(chat_stream.router, prefix=prefix)
    return app


def run_in_thread(app: ASGIApp) -> tuple[str, Callable[[], None]]:
    """Runs `app` on a free port until the returned function is called."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}", stop


# Playwright's event loop occupies this thread, in which anyio's tests run their own: closed after this package.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Prefer the system's browser to Playwright's own; the headless shell takes half the time.
        names = ("chromium-headless-shell", "chromium", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, serve: Serve) -> Iterator[OpenPage]:
    """Opens a URL in a new context with its own cookies and storage. Depends on `serve` so that pages close first.

    Motion is off unless a test enables it: painting it takes most of the time of a test.
    """
    problems: list[str] = []
    contexts = []

    def open_(url: str, *, expects_failed_requests: bool = False, **context_options: Any) -> Page:
        context = browser.new_context(**({"locale": "en-US", "reduced_motion": "reduce"} | context_options))
        contexts.append(context)

        def on_console(message: ConsoleMessage) -> None:
            is_refusal = message.text.startswith("Failed to load resource")
            if not (is_refusal and expects_failed_requests):
                problems.append(f"{message.type}: {message.text}")

        context.on("console", on_console)
        context.on("weberror", lambda error: problems.append(str(error.error)))
        page = context.new_page()
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Page, text: str) -> None:
    """Type a message and press Enter."""
    page.get_by_role("textbox", name="Your message").fill(text)
    page.keyboard.press("Enter")


def occupy_slot(page: Page) -> None:
    """Request an endless answer and return once it has started."""
    ask(page, ENDLESS)
    expect(page.get_by_role("article").last).to_contain_text("word word")


def expect_load(page: Page, *, processing: int, waiting: int) -> None:
    """Wait until the server reports these numbers; those on the page may be some seconds old."""
    deadline_s = time.monotonic() + 15
    while True:
        (worker,) = page.request.get(f"{page.url}get_load").json()["chatstream_workers"]
        if (worker["processing"], worker["waiting"]) == (processing, waiting):
            return
        assert time.monotonic() < deadline_s, worker
