"""One `ChatStream` as a server process: opens the port, loads the model, reports readiness, drains at a signal.

Knows uvicorn, sockets and signals; knows neither options nor terminals. An application with an ASGI server of its own
needs only `ChatStream.router` and `ChatStream.lifespan`.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from chatstream.api.app import create_app
from chatstream.chat_stream import ChatStream
from chatstream.checks import check_seconds
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that the kernel queues until they are accepted; uvicorn's own default. The kernel may cap it."""
CLOSING_TIMEOUT_S = 5
"""Time after the grace time in which the last events can reach their readers. Then connections are closed."""

GARBAGE_INTERVAL_S = 1.0
MAX_GARBAGE = 100_000
"""Objects created since the last collection and still alive, beyond those of live requests; about 10 MB."""
FEW_REQUESTS = 1_000
"""With fewer live requests a collection takes at most 0.1 s; it then runs every minute, for cycles of large objects."""
OBJECTS_PER_REQUEST = 300
"""Allowance for a live request: nearly 200 objects, plus its answer."""


def serve(
    chat_stream: ChatStream,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    cors_origins: Sequence[str] = (),
    grace_s: float = 30.0,
    access_log: bool = False,
    on_listening: Callable[[str], object] = lambda url: None,
    on_ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Must be called in the main thread.

    The port opens at once; requests wait in the queue while the model loads. At a signal the server drains: it admits
    no more requests, ends the waiting ones, and lets the running ones finish for `grace_s` seconds. A second SIGINT
    ends those too. `port` 0 selects a free port; the callbacks receive the actual URL.

    Raises `ConfigError` when a setting is wrong, the address cannot be used or the model does not exist, and
    `EngineUnavailable` when the model could not be loaded for another reason.
    """
    check_seconds("grace_s", grace_s, at_least=0)
    app = create_app(chat_stream, cors_origins=cors_origins)
    listener = listen(host, port, stall_timeout_s=chat_stream.runtime_settings.reader_stall_timeout_s)
    url = _url(listener)
    config = uvicorn.Config(
        app,
        # uvicorn ends the lifespan only after all connections have closed, which is too late to drain. See `_Server`.
        lifespan="off",
        workers=1,
        ws="none",
        log_config=None,
        access_log=access_log,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=math.ceil(grace_s) + CLOSING_TIMEOUT_S,
    )
    server = _Server(config, chat_stream, grace_s, lambda: on_ready(url))
    errors = logging.getLogger("uvicorn.error")
    errors.addFilter(_is_news)
    try:
        with listener:
            on_listening(url)
            server.run(sockets=[listener])
    finally:
        errors.removeFilter(_is_news)
    if isinstance(server.failure, ChatStreamError):
        raise server.failure
    if server.failure is not None:
        what = f"{type(server.failure).__name__}: {server.failure}"
        raise EngineUnavailable(f"{chat_stream.engine.model_name} could not be loaded: {what}") from server.failure


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out uvicorn's error about incomplete responses: `api/streaming.py` breaks connections on purpose."""
    return record.msg != "ASGI callable returned without completing response."


class _Server(uvicorn.Server):
    """uvicorn with the lifecycle of a `ChatStream`: loads once the port is open, drains before the server stops."""

    def __init__(
        self, config: uvicorn.Config, chat_stream: ChatStream, grace_s: float, on_ready: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        """The error with which the engine failed to start."""
        self._chat_stream = chat_stream
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._loading: asyncio.Task[None] | None = None
        self._collecting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load(), name="chatstream-loading")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert self._loading is not None
        # Loading cannot be interrupted; the child process or thread that loads ends with this process.
        is_loaded = self._loading.done() and self.failure is None
        self._loading.cancel()
        if self._collecting is not None:
            self._collecting.cancel()
        # uvicorn waits for connections to close, and they close when their requests end: drain at the same time.
        draining = asyncio.create_task(self._drain(), name="chatstream-draining")
        await super().shutdown(sockets)
        await draining
        if is_loaded:
            await self._chat_stream.stop_queue_worker(0.0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own version raises the signal again at the end, so that it kills the process. Here a requested stop
        # is a success: exit status 0, also for `docker stop` and systemd.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def _load(self) -> None:
        try:
            await self._chat_stream.start_queue_worker()
        except Exception as error:
            logger.debug("the engine did not start", exc_info=error)
            self.failure = error
            self.should_exit = True
        else:
            self._collecting = asyncio.create_task(collect_garbage(self._chat_stream), name="chatstream-garbage")
            self._on_ready()

    async def _drain(self) -> None:
        """Drain for the grace time; a second SIGINT ends the drain at once."""
        stats = self._chat_stream.stats()
        if stats.running or stats.waiting:
            logger.info(
                "stopping: requests waiting: %d, ended now; running: %d, ended after %g s or at the next Ctrl-C",
                stats.waiting,
                stats.running,
                self._grace_s,
            )
        grace = asyncio.create_task(self._chat_stream.drain(self._grace_s))
        while not grace.done() and not self.force_exit:
            await asyncio.wait([grace], timeout=0.1)  # uvicorn's interval for checking for a second signal
        if not grace.done():
            grace.cancel()
            await self._chat_stream.drain(0.0)


async def collect_garbage(chat_stream: ChatStream) -> None:
    """Replace Python's automatic garbage collector until cancelled. Start it after everything has been loaded.

    The automatic collector scans all objects whenever their number has grown by a quarter, and scans all objects of
    newly waiting requests each time. With 10,000 waiting requests every stream stalled for more than a second while
    they arrived, and for 50 ms in every second afterwards. Reference counts free what requests leave behind. Cycles are
    rare; a collection runs when there are more objects than the live requests account for.
    """
    gc.collect()
    gc.freeze()  # loaded objects are permanent
    gc.disable()
    num_received, intervals, num_live_now = 0, 0, 0
    try:
        while True:
            await asyncio.sleep(GARBAGE_INTERVAL_S)
            stats = chat_stream.stats()
            num_live_before, num_live_now = num_live_now, stats.running + stats.waiting
            num_live = max(num_live_before, num_live_now)  # requests that have just ended are still being freed
            intervals += 1
            is_cheap = num_live == 0 or (num_live < FEW_REQUESTS and intervals >= 60)
            if (is_cheap and stats.received > num_received) or (
                gc.get_count()[0] > MAX_GARBAGE + OBJECTS_PER_REQUEST * num_live
            ):
                gc.collect()
                num_received, intervals = stats.received, 0
    finally:
        gc.enable()
        gc.unfreeze()


def listen(host: str, port: int, *, stall_timeout_s: float | None = None) -> socket.socket:
    """Return a listening socket; accepted connections inherit its options. Raises `ConfigError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # "localhost" often has an IPv4 and an IPv6 address. Most clients, and users that type 127.0.0.1, use IPv4.
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        # Sets SO_REUSEADDR: a restarted server can bind while connections of the previous one are in TIME_WAIT.
        listener = socket.create_server(
            address[:2],
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    # Send each token in a packet of its own, without Nagle's delay.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished without closing (a closed laptop) keeps its slot or position until it is detected. While
    # nothing is sent to it, as before an answer that is not streamed, only TCP keep-alive detects it; after 60 s.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    if stall_timeout_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        # A client that reads nothing is disconnected after `stall_timeout_s`, but closing its connection waits until
        # the peer has acknowledged the data in flight. The kernel drops the connection 5 s later in any case.
        timeout_ms = math.ceil((stall_timeout_s + 5.0) * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(timeout_ms, 2**31 - 1))
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} of {host} is in use; choose another with --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"no permission to open port {port}; choose one above 1023 with --port")
    return ConfigError(f"cannot listen on {host}: {error.strerror}")


def _url(listener: socket.socket) -> str:
    """The URL under which a browser on this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
