"""What the parent and the child say to each other, over one pair of connected sockets.

Both are the same code of the same installation, so a message is a pickled value. All that is said within one turn of
the event loop crosses as one list, with its length in front: a step of the model wakes the other side once, whatever
the number of generations in it.
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
"""Deltas of one generation that may be on their way or unread in the parent. Then it pauses, and nobody else does."""


# --- the parent says ----------------------------------------------------------------------------------------------
# `call` is a number that `Ended` comes back with.


class Load(NamedTuple):
    """The first message: make the engine and start it. Its result is a `Loaded`."""

    call: int
    recipe: bytes
    """A pickled function without arguments that makes the engine."""
    heartbeat_s: float
    log_levels: dict[str, int]
    """Of loggers, by name."""


class Prepare(NamedTuple):
    """Its result is a `PreparedPrompt`."""

    call: int
    asked: bytes
    """The arguments, packed."""


class Open(NamedTuple):
    """Generate: a `Delta` each step, until it ends."""

    call: int
    request_id: str
    request: bytes
    """Packed."""
    is_preempted: bool
    """Do not begin before `Resume`."""


class Taken(NamedTuple):
    """So many deltas more have been read."""

    request_id: str
    num_deltas: int


class Preempt(NamedTuple):
    """It has ended when nothing more is computed, and all that was is on its way."""

    call: int
    request_id: str


class Resume(NamedTuple):
    request_id: str


class Close(NamedTuple):
    """Nobody waits for the result of this call. It still ends, when it has given back what it held."""

    call: int


class Stop(NamedTuple):
    """Stop the engine and end."""


Order: TypeAlias = Load | Prepare | Open | Taken | Preempt | Resume | Close | Stop

# --- the child says -----------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    capacity: Capacity
    default_sampling: SamplingParams


class Delta(NamedTuple):
    call: int
    delta: TokenDelta


class Ended(NamedTuple):
    call: int
    result: Any
    """None where there is nothing to say; a `ChatStreamError` where it failed."""


class Heartbeat(NamedTuple):
    """Said regularly, from `Load` on."""

    health: EngineHealth
    stats: EngineStats | None


class Log(NamedTuple):
    """One record, with its traceback in the text."""

    name: str
    level: int
    text: str


Report: TypeAlias = Delta | Ended | Heartbeat | Log

# --- how it gets across -------------------------------------------------------------------------------------------


def pack(value: object, param: str) -> bytes:
    """What our caller has written (a token mask, a text of a class of theirs) crosses as plain bytes of a message.

    Raises `UnsupportedParameter` for `param`, here and in `unpack`: that request fails, and no other.
    """
    with _refused(param):
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes, param: str) -> Any:
    with _refused(param):
        return pickle.loads(packed)


@contextmanager
def _refused(param: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = f"this {param} cannot be sent to the engine's process: {error}"
        raise UnsupportedParameter(message, param=param) from error


class Channel(asyncio.Protocol):
    """One end of the connection. Use it on its event loop."""

    def __init__(
        self,
        connection: socket.socket,
        receive: Callable[[Any], object],
        on_lost: Callable[[Exception | None], object],
    ) -> None:
        """`receive` gets every message of the other side. `on_lost` is called once, after the last one, with what it
        raised: then it is we who hear no more."""
        self._connection = connection
        self._receive = receive
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._outgoing: list[bytes] = []
        self._incoming = bytearray()
        self.is_congested = False
        """The other side reads slowly: what is not needed should not be said now."""

    async def open(self) -> None:
        await self._loop.create_unix_connection(lambda: self, sock=self._connection)

    def send(self, message: Order | Report) -> None:
        """Say it at the end of this turn of the event loop. Harmless when nobody listens any more.

        Raises what pickling it raises; then it was not said, and what else is said in this turn is.
        """
        self._outgoing.append(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        if len(self._outgoing) == 1:
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """What was said before still gets across, if the other side reads it."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Nothing more gets across. Harmless twice, and before `open`."""
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
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

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
