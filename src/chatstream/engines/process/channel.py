"""Messages between the parent process and the child process, over one pair of connected sockets.

Both sides run the same code of the same installation, so a message is a pickled value. All messages of one tick of the
event loop cross as one list with its length in front: a step of the model wakes the other side once, whatever the
number of generations in it.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.errors import UnsupportedParameter
from chatstream.types import SamplingParams, TokenDelta

LENGTH_BYTES = 4
MAX_UNREAD = 64
"""Deltas of one generation that may be in transit or unread in the parent. At this number that generation, and no
other, pauses."""


# --- parent to child ----------------------------------------------------------------------------------------------
# `call` is the number that the `Ended` of this call carries.


class Load(NamedTuple):
    """The first message: create the engine and start it. The result is a `Loaded`."""

    call: int
    recipe: bytes
    """A pickled function without arguments that creates the engine."""
    heartbeat_s: float
    log_levels: dict[str, int]
    """Levels of loggers, by name."""


class Prepare(NamedTuple):
    """Call `Engine.prepare`. The result is a `PreparedPrompt`."""

    call: int
    asked: bytes
    """Packed arguments, see `pack`."""


class Open(NamedTuple):
    """Start a generation: one `Delta` a step, then `Ended`."""

    call: int
    request_id: str
    request: bytes
    """A packed `GenerationRequest`."""
    is_preempted: bool
    """Start the generation at `Resume`, not before."""


class Acknowledge(NamedTuple):
    """The reader has taken `num_deltas` more deltas."""

    request_id: str
    num_deltas: int


class Preempt(NamedTuple):
    """Preempt a generation. Ends when nothing more is computed and all earlier deltas have been sent."""

    call: int
    request_id: str


class Resume(NamedTuple):
    """Resume a preempted generation."""

    request_id: str


class Close(NamedTuple):
    """Cancel this call: the parent no longer needs the result. `Ended` still follows, once the call has released its
    resources."""

    call: int


class Stop(NamedTuple):
    """Stop the engine and end the process."""


Command: TypeAlias = Load | Prepare | Open | Acknowledge | Preempt | Resume | Close | Stop

# --- child to parent ----------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """Result of `Load`."""

    capacity: Capacity
    default_sampling: SamplingParams


class Delta(NamedTuple):
    """One delta of the generation that `call` opened."""

    call: int
    delta: TokenDelta


class Ended(NamedTuple):
    """A call has ended."""

    call: int
    result: Any
    """The result, None where the call has none; a `ChatStreamError` if the call failed."""


class Heartbeat(NamedTuple):
    """Sent at a fixed interval, from `Load` on."""

    health: EngineHealth
    stats: EngineStats | None


class Log(NamedTuple):
    """One log record; the text includes its traceback."""

    name: str
    level: int
    text: str


Report: TypeAlias = Delta | Ended | Heartbeat | Log

# --- transport ----------------------------------------------------------------------------------------------------


def pack(value: object, param: str) -> bytes:
    """Pickle a value that may hold objects of the caller's own classes (a token mask, a `str` subclass), to travel as
    plain bytes inside a message.

    Raises `UnsupportedParameter` for `param`, here and in `unpack`, so that only this request fails.
    """
    with _raising_unsupported(param):
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes, param: str) -> Any:
    with _raising_unsupported(param):
        return pickle.loads(packed)


@contextmanager
def _raising_unsupported(param: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"this {param} cannot be sent to the engine process: {error}"
        raise UnsupportedParameter(message, param=param) from error


class Channel(asyncio.Protocol):
    """One end of the connection. Call its methods on its event loop."""

    def __init__(
        self,
        connection: socket.socket,
        receive: Callable[[Any], object],
        on_lost: Callable[[Exception | None], object],
    ) -> None:
        """`receive` gets every message of the other side. `on_lost` is called once, after the last message: with the
        exception if reading a message failed, otherwise with None."""
        self._connection = connection
        self._receive = receive
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._outgoing: list[bytes] = []
        self._incoming = bytearray()
        self.is_congested = False
        """The other side reads slowly; optional messages should be dropped."""

    async def open(self) -> None:
        await self._loop.create_unix_connection(lambda: self, sock=self._connection)

    def send(self, message: Command | Report) -> None:
        """Queue a message; all messages of this tick are written together at its end. Has no effect on a closed
        connection.

        Raises what pickling the message raises; then this message is not sent, the others of the tick are.
        """
        self._outgoing.append(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        if len(self._outgoing) == 1:
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Close after the queued messages have been written."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once and drop unsent messages. Idempotent, and allowed before `open`."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._connection.close()

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if messages and self._transport is not None:
            pickled = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
            self._transport.write(len(pickled).to_bytes(LENGTH_BYTES, "big") + pickled)

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's transport is not a subclass

    def data_received(self, data: bytes) -> None:
        self._incoming += data
        while len(self._incoming) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._incoming[:LENGTH_BYTES], "big")
            if len(self._incoming) < end:
                return
            messages = pickle.loads(self._incoming[LENGTH_BYTES:end])
            del self._incoming[:end]
            for message in messages:
                self._receive(pickle.loads(message))

    def pause_writing(self) -> None:
        self.is_congested = True

    def resume_writing(self) -> None:
        self.is_congested = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(None if isinstance(exc, OSError) else exc)
