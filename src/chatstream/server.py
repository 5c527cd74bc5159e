"""One `ChatStream` as a server process: opens the port, loads, says when it is ready, drains at a signal.

Knows uvicorn, sockets and signals; nothing of options or of what a terminal looks like. Who has an ASGI server of
their own needs only `ChatStream.router` and `ChatStream.lifespan`.
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
"""Connections that the kernel holds until they are accepted; uvicorn's own default. The kernel may cap it."""
FAREWELL_S = 5
"""After the grace time, for the last events to reach their readers; then connections are cut."""

GARBAGE_INTERVAL_S = 1.0
MAX_GARBAGE = 100_000
"""Objects that may have been made since the last collection and still be there, about 10 MB."""
FEW_REQUESTS = 1_000
"""With so few a collection takes a tenth of a second: once a minute it is made anyway, for cycles that hold much."""
OBJECTS_PER_REQUEST = 300
"""That a live one may have: nearly 200, and room for its answer."""


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
    """Serve until SIGTERM or SIGINT. Call it in the main thread.

    The port is open at once and requests wait in line while the model loads. At a signal nobody new is admitted, the
    waiting are refused, the running may finish for `grace_s`; a second SIGINT cuts that short. `port` 0 takes a free
    one; the callbacks are given the real address.

    Raises `ConfigError` when a setting is wrong, the address cannot be used or there is no such model, and
    `EngineUnavailable` when the model could not be loaded for another reason.
    """
    check_seconds("grace_s", grace_s, at_least=0)
    app = create_app(chat_stream, cors_origins=cors_origins)
    listener = listen(host, port, stall_timeout_s=chat_stream.runtime_settings.reader_stall_timeout_s)
    url = _url(listener)
    config = uvicorn.Config(
        app,
        # uvicorn would end the lifespan only when all connections have closed: too late to drain. See `_Server`.
        lifespan="off",
        workers=1,
        ws="none",
        log_config=None,
        access_log=access_log,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=math.ceil(grace_s) + FAREWELL_S,
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
    """An answer that ends without its end is broken off on purpose: see `api/streaming.py`."""
    return record.msg != "ASGI callable returned without completing response."


class _Server(uvicorn.Server):
    """uvicorn, with the life of a `ChatStream` tied to it: loads once the port is open, drains before it closes."""

    def __init__(
        self, config: uvicorn.Config, chat_stream: ChatStream, grace_s: float, on_ready: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        """What kept the engine from starting."""
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
        # A model that is still being read cannot be stopped; its process, or its thread, ends with this one.
        is_loaded = self._loading.done() and self.failure is None
        self._loading.cancel()
        if self._collecting is not None:
            self._collecting.cancel()
        # uvicorn waits for connections to close, and they close when their requests have ended: so drain meanwhile.
        draining = asyncio.create_task(self._drain(), name="chatstream-draining")
        await super().shutdown(sockets)
        await draining
        if is_loaded:
            await self._chat_stream.stop_queue_worker(0.0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own version raises the signal again at the end, so that the process dies of it. Here a stop that
        # was asked for is a success: exit status 0, also for `docker stop` and systemd.
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
        """The running get their grace, unless there is a second SIGINT."""
        stats = self._chat_stream.stats()
        if stats.running or stats.waiting:
            logger.info(
                "stopping: %d waiting are refused, %d running may finish for %g s (Ctrl-C again ends them now)",
                stats.waiting,
                stats.running,
                self._grace_s,
            )
        grace = asyncio.create_task(self._chat_stream.drain(self._grace_s))
        while not grace.done() and not self.force_exit:
            await asyncio.wait([grace], timeout=0.1)  # uvicorn looks for a second signal as often
        if not grace.done():
            grace.cancel()
            await self._chat_stream.drain(0.0)


async def collect_garbage(chat_stream: ChatStream) -> None:
    """Instead of Python's automatic collector, until cancelled. Start it when everything is loaded.

    That one looks at every object there is whenever their number has grown by a quarter, and at all that was made for
    those who wait since it looked last: with 10,000 waiting all answers stood still for more than a second while they
    came, and for 50 ms every second afterwards. What requests leave behind is freed by its reference count; cycles are
    rare, and are looked for when there are more objects than the live requests account for.
    """
    gc.collect()
    gc.freeze()  # what has been loaded stays
    gc.disable()
    num_received, intervals, num_live_now = 0, 0, 0
    try:
        while True:
            await asyncio.sleep(GARBAGE_INTERVAL_S)
            stats = chat_stream.stats()
            num_live_before, num_live_now = num_live_now, stats.running + stats.waiting
            num_live = max(num_live_before, num_live_now)  # those who have just left are still being cleared away
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
    """A listening socket whose options every accepted connection inherits. Raises `ConfigError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # "localhost" has two addresses on many machines. Most clients, and people who type 127.0.0.1, mean the old one.
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        # Sets SO_REUSEADDR: a restart need not wait for the connections of the server before it to be forgotten.
        listener = socket.create_server(
            address[:2],
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    # A token is a packet of its own: do not hold it back to fill a larger one.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished without a word (a closed laptop) holds its place until somebody notices. Where nothing is
    # being sent to it, as in a long answer that is not streamed, only the kernel can: it asks after a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    if stall_timeout_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        # A reader that takes nothing is cut after `stall_timeout_s`, but closing its connection would wait for it to
        # take what was already sent. A little later the kernel drops the connection, sent or not.
        timeout_ms = math.ceil((stall_timeout_s + 5.0) * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(timeout_ms, 2**31 - 1))
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} of {host} is in use; choose another with --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} needs more rights; choose one above 1023 with --port")
    return ConfigError(f"cannot listen on {host}: {error.strerror}")


def _url(listener: socket.socket) -> str:
    """An address that a browser on this machine can open."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
