"""TCP connections in memory with fragments, delays and losses. Either side may stop reading or vanish.

`connect` connects a real asyncio protocol (for example uvicorn's) to a `Peer`. Fragments stay in order; the seed
determines everything else.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_DELAY_S = 0.02
KEEPALIVE_S = 195.0
"""Time after which the kernel drops a vanished peer: TCP_KEEPIDLE + 9 * TCP_KEEPINTVL, as in `server.listen`."""


class ServerTransport(asyncio.Transport):
    """The server's end of a connection."""

    def __init__(
        self, peer: Peer, rng: random.Random, *, high_water: int, window: int, user_timeout_s: float, name: str
    ) -> None:
        super().__init__({"peername": (name, 1), "sockname": ("server", 80)})
        self._peer = peer
        self._rng = rng
        self._high_water = high_water
        self._window = window
        self._user_timeout_s = user_timeout_s
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BaseProtocol
        self._outgoing = bytearray()
        self._incoming: deque[bytes] = deque()  # b"": end of file
        self._pumps: dict[Callable[[], None], asyncio.TimerHandle] = {}
        self._progress_s = 0.0
        self._is_reading = True
        self._is_closing = False
        self._is_write_paused = False
        self.is_lost = False

    # --- interface of the protocol ----------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True
        self._pump(self._receive)

    def write(self, data: Any) -> None:
        if self.is_lost or self._is_closing:
            return
        if not self._outgoing:
            self._progress_s = self._loop.time()
        self._outgoing += data
        if len(self._outgoing) > self._high_water and not self._is_write_paused:
            self._is_write_paused = True
            self._protocol.pause_writing()
        self._pump(self._send)
        self._pump(self._give_up, self._user_timeout_s)

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            if not self._outgoing:
                self.lose(None)

    def abort(self) -> None:
        self.lose(None)

    def lose(self, error: Exception | None) -> None:
        """End the connection; the protocol gets `connection_lost` in the next iteration of the loop."""
        if self.is_lost:
            return
        self.is_lost = self._is_closing = True
        self._outgoing.clear()
        self._incoming.clear()
        for timer in self._pumps.values():
            timer.cancel()
        self._peer.on_lost(error)
        self._loop.call_soon(self._protocol.connection_lost, error)

    # --- pumps ------------------------------------------------------------------------------------------------

    def incoming(self, data: bytes) -> None:
        if not self.is_lost:
            self._incoming.append(data)
            self._pump(self._receive)

    def pump_out(self) -> None:
        self._pump(self._send)

    def vanish(self) -> None:
        self._pump(lambda: self.lose(TimeoutError("the peer does not answer")), KEEPALIVE_S)

    def _pump(self, pump: Callable[[], None], delay_s: float | None = None) -> None:
        if not self.is_lost and pump not in self._pumps:
            if delay_s is None:
                delay_s = self._rng.random() * MAX_DELAY_S
            self._pumps[pump] = self._loop.call_later(delay_s, self._run, pump)

    def _run(self, pump: Callable[[], None]) -> None:
        del self._pumps[pump]
        if not self.is_lost:
            pump()

    def _receive(self) -> None:
        if not self._is_reading or self._is_closing or not self._incoming:
            return
        data = self._incoming.popleft()
        if data:
            self._protocol.data_received(data)
            self._pump(self._receive)
        elif not self._protocol.eof_received():
            self.close()

    def _send(self) -> None:
        room = self._window - self._peer.num_unread
        if not self._outgoing or room <= 0 or self._peer.has_vanished:
            return
        if self._peer.has_closed:
            self.lose(ConnectionResetError("the peer has closed"))
            return
        size = min(room, 1 + int(self._rng.random() * len(self._outgoing)))
        self._peer.on_data(bytes(self._outgoing[:size]))
        del self._outgoing[:size]
        self._progress_s = self._loop.time()
        if self._is_write_paused and len(self._outgoing) <= self._high_water // 4:
            self._is_write_paused = False
            self._protocol.resume_writing()
        if self._outgoing:
            self._pump(self._send)
        elif self._is_closing:
            self.lose(None)

    def _give_up(self) -> None:
        """TCP_USER_TIMEOUT: sent data was not acknowledged in time."""
        waited_s = self._loop.time() - self._progress_s
        if not self._outgoing:
            return
        if waited_s >= self._user_timeout_s:
            self.lose(TimeoutError("the peer does not read"))
        else:
            self._pump(self._give_up, self._user_timeout_s - waited_s)


class Peer:
    """The client's end of a connection."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._inbox = bytearray()
        self._is_over = False
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self.has_closed = False
        self.has_vanished = False
        self.transport: ServerTransport

    @property
    def num_unread(self) -> int:
        return len(self._inbox)

    def send(self, data: bytes) -> None:
        """Send in up to four fragments."""
        cuts = sorted(int(self._rng.random() * len(data)) for _ in range(self._rng.randrange(4)))
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if begin < end:
                self.transport.incoming(data[begin:end])

    async def receive(self) -> bytes:
        """Return received data, b"" at the end of file. Raises `ConnectionError` if the connection broke."""
        while not self._inbox:
            if self._error is not None:
                raise ConnectionResetError from self._error
            if self._is_over:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        data = bytes(self._inbox)
        self._inbox.clear()
        self.transport.pump_out()
        return data

    def close(self) -> None:
        """Send FIN; data that arrives later is answered with RST."""
        if not self.has_closed:
            self.has_closed = True
            self.transport.incoming(b"")
            self.transport.pump_out()

    def reset(self) -> None:
        """Send RST."""
        self.has_closed = True
        self.transport.lose(ConnectionResetError("reset by peer"))

    def vanish(self) -> None:
        """Cut the connection without notice to either side."""
        self.has_vanished = True
        self.transport.vanish()

    # --- interface of the transport ---------------------------------------------------------------------------

    def on_data(self, data: bytes) -> None:
        self._inbox += data
        self._arrived.set()

    def on_lost(self, error: Exception | None) -> None:
        self._is_over, self._error = True, error
        self._arrived.set()


def connect(
    make_protocol: Callable[[], asyncio.Protocol],
    rng: random.Random,
    *,
    high_water: int = 65536,
    window: int = 65536,
    user_timeout_s: float = 20.0,
    name: str = "client",
) -> Peer:
    """Open a connection.

    `high_water` is the server's write buffer in bytes before it must pause, `window` the client's unread bytes, `name`
    the client's address.
    """
    peer = Peer(rng)
    peer.transport = ServerTransport(
        peer, rng, high_water=high_water, window=window, user_timeout_s=user_timeout_s, name=name
    )
    protocol = make_protocol()
    peer.transport.set_protocol(protocol)
    protocol.connection_made(peer.transport)
    return peer
