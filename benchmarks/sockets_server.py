"""The server process of `sockets.py`: `python sockets_server.py '{"kind": …}'`.

`chatstream` is the server of `chatstream serve` with the mock engine. `bare` is an asyncio server that answers and then
only counts its connections: the minimum work of a server on this event loop.

The process prints its address, then answers each line on stdin, `report` or `reset`, with the events since the last
`reset` as JSON. Times are those of `time.monotonic`, which is the same clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http import auto

from chatstream import ChatStream, MockEngine, server
from chatstream.runtime import RuntimeSettings
from chatstream.scheduler import events as ev

GREETING = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'27\r\nevent: queued\ndata: {"position":1}   \n\n\r\n'
)


class Log:
    """Events since the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.num_events = 0
        """Scheduler events, without tokens."""
        self.num_withdrawn = 0
        self.first_lost_s: float | None = None
        """Time of the first broken connection."""
        self.last_withdrawn_s: float | None = None
        """Time of the last withdrawal from the queue."""

    def observe(self, event: ev.Event) -> None:
        if isinstance(event, ev.Tokens):
            return
        self.num_events += 1
        if isinstance(event, ev.Cancelled):
            self.count_withdrawal()

    def lose(self) -> None:
        if self.first_lost_s is None:
            self.first_lost_s = time.monotonic()

    def count_withdrawal(self) -> None:
        self.num_withdrawn += 1
        self.last_withdrawn_s = time.monotonic()

    def answer(self) -> None:
        """Answer every line on stdin; end of file ends the process."""
        for line in sys.stdin:
            answer = json.dumps(vars(self))
            if line.strip() == "reset":
                self.reset()
            print_line(answer)
        os.kill(os.getpid(), signal.SIGTERM)


def print_line(line: str) -> None:
    print(line, flush=True)


def serve_chatstream(log: Log, options: dict[str, Any]) -> None:
    chat_stream = ChatStream(
        engine=MockEngine("echo", time_per_token_s=options["time_per_token_s"]),
        max_concurrency=options["max_concurrency"],
        max_queue_size=options["max_queue_size"],
        runtime=RuntimeSettings(**options.get("runtime", {})),
    )
    chat_stream.observe(log.observe)
    watch_connections(auto.AutoHTTPProtocol, log.lose)
    server.serve(chat_stream, port=0, grace_s=0.0, on_ready=print_line)


def watch_connections(protocol: Any, on_lost: Callable[[], None]) -> None:
    """Call `on_lost` when a connection breaks: uvicorn has no hook, and the request notices it one iteration later."""
    connection_lost = protocol.connection_lost

    def lose(self: Any, error: Exception | None) -> None:
        on_lost()
        connection_lost(self, error)

    protocol.connection_lost = lose


class Bare(asyncio.Protocol):
    """Keeps its connections open and counts them."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(GREETING)

    def connection_lost(self, error: Exception | None) -> None:
        self._log.lose()
        self._log.count_withdrawal()


async def serve_bare(log: Log) -> None:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Bare(log), sock=server.listen("127.0.0.1", 0))
    print_line(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()


def main() -> None:
    options = json.loads(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log = Log()
    threading.Thread(target=log.answer, daemon=True).start()
    if options["kind"] == "chatstream":
        serve_chatstream(log, options)
    else:
        # The event loop of uvicorn: uvloop where it is installed.
        with asyncio.Runner(loop_factory=uvicorn.Config(None).get_loop_factory()) as runner:
            runner.run(serve_bare(log))


if __name__ == "__main__":
    main()
