"""The load generator of `sockets.py`: a process that keeps waiting connections open (`python sockets_crowd.py PORT`).

One thread, one selector and plain sockets: 10,000 connections cost less here than in the server. A closed socket
resets its connection, like a killed process. Each line on stdin is a command, answered with a line of JSON:

    join N           open N connections as fast as they are answered; the answer comes when all are admitted
    change PERIOD_S  from now on, close the first connection and open a new one at this interval; 0: stop
    report           observations since the previous report, or since all had joined
"""

from __future__ import annotations

import json
import re
import resource
import selectors
import socket
import struct
import sys
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

REQUEST_BODY = b'{"user_input": "Hello"}'
REQUEST = (
    b"POST /chat_stream HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(REQUEST_BODY), REQUEST_BODY)
)
POSITION = re.compile(rb'event: queued\n(?:[^\n]*\n)*?data: [^\n]*"position":(\d+)')
MAX_JOINING = 200
"""Maximum number of unanswered requests; more would only wait in the server's backlog."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One waiting connection."""

    socket: socket.socket
    position: int = 0
    """0 before the first position."""
    updated_s: float = 0.0
    unread: bytes = b""
    """The start of an incomplete event."""


@dataclass(slots=True)
class Seen:
    """Observations since the last report."""

    since_s: float = field(default_factory=time.monotonic)
    num_positions: int = 0
    num_with_eta: int = 0
    """Positions with an ETA."""
    num_changes: int = 0
    """Number of changes of the queue."""
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    """Times between two positions of one connection."""
    late_s: array[float] = field(default_factory=lambda: array("d"))
    """Duration of each iteration: the maximum delay of this process."""


class Crowd:
    """All waiting connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)
        self._waiters: OrderedDict[int, Waiter] = OrderedDict()
        """By file descriptor, in order of arrival."""
        self._num_to_join = 0
        self._num_joining = 0
        self._is_joining = False
        self._change_period_s = 0.0
        self._next_change_s = 0.0
        self._errors: dict[str, int] = {}
        self._seen = Seen()

    def run(self) -> None:
        """Run until stdin ends."""
        while True:
            ready = self._selector.select(self._timeout_s())
            begin_s = time.monotonic()
            for key, _ in ready:
                if key.data is not None:
                    self._read(key.data)
                elif not self._execute(sys.stdin.readline()):
                    return
            self._join_some()
            self._change(begin_s)
            if ready:
                self._seen.late_s.append(time.monotonic() - begin_s)

    def _timeout_s(self) -> float | None:
        return max(0.0, self._next_change_s - time.monotonic()) if self._change_period_s else None

    def _execute(self, line: str) -> bool:
        match line.split():
            case ["join", number]:
                self._num_to_join, self._is_joining = int(number), True
            case ["change", period_s]:
                self._change_period_s, self._next_change_s = float(period_s), time.monotonic()
                print_line({})
            case ["report"]:
                print_line(self._report())
                self._seen = Seen()
            case _:
                return False
        return True

    # --- opening and closing ----------------------------------------------------------------------------------

    def _join_some(self) -> None:
        while self._num_to_join and self._num_joining < MAX_JOINING:
            self._num_to_join -= 1
            self._join()
        if self._is_joining and not self._num_to_join and not self._num_joining:
            self._is_joining = False
            print_line({"present": len(self._waiters), "errors": self._errors})
            self._seen = Seen()

    def _join(self) -> None:
        try:
            # A local connection is immediate unless the backlog is full.
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=30.0)
        except OSError as error:
            self._fail(f"connect: {type(error).__name__}")
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(REQUEST)
        connection.setblocking(False)
        waiter = self._waiters[connection.fileno()] = Waiter(connection)
        self._selector.register(connection, selectors.EVENT_READ, waiter)
        self._num_joining += 1

    def _remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter.socket.fileno()]
        self._selector.unregister(waiter.socket)
        waiter.socket.close()
        if not waiter.position:
            self._num_joining -= 1

    def _change(self, now_s: float) -> None:
        if self._change_period_s and now_s >= self._next_change_s and self._waiters:
            self._next_change_s = max(self._next_change_s + self._change_period_s, now_s)
            self._remove(next(iter(self._waiters.values())))
            self._num_to_join += 1
            self._seen.num_changes += 1

    # --- reading -------------------------------------------------------------------------------------------

    def _read(self, waiter: Waiter) -> None:
        try:
            data = waiter.socket.recv(65536)
        except OSError as error:
            self._lose(waiter, type(error).__name__)
            return
        events, end, waiter.unread = (waiter.unread + data).rpartition(b"\n\n")
        if not data:
            self._lose(waiter, "connection closed")
        elif b"event: error" in events or (not waiter.position and end and not events.startswith(b"HTTP/1.1 200")):
            self._lose(waiter, events[-200:].decode(errors="replace"))
        else:
            self._take_positions(waiter, events)

    def _take_positions(self, waiter: Waiter, events: bytes) -> None:
        positions = [int(position) for position in POSITION.findall(events)]
        if not positions:
            return
        now_s = time.monotonic()
        if not waiter.position:
            self._num_joining -= 1
        else:
            self._seen.gaps_s.append(now_s - waiter.updated_s)
            if max(positions) > waiter.position:
                self._fail("a position grew")
        self._seen.num_positions += len(positions)
        self._seen.num_with_eta += len(positions) - events.count(b'"eta_seconds":null')
        waiter.position, waiter.updated_s = positions[-1], now_s

    def _lose(self, waiter: Waiter, why: str) -> None:
        self._remove(waiter)
        self._fail(why)

    def _fail(self, why: str) -> None:
        self._errors[why] = self._errors.get(why, 0) + 1

    # --- reporting ----------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, object]:
        now_s, seen = time.monotonic(), self._seen
        # An open gap counts with its length so far.
        open_gaps_s = [now_s - max(w.updated_s, seen.since_s) for w in self._waiters.values() if w.position]
        gaps_s, late_s = sorted([*seen.gaps_s, *open_gaps_s]), sorted(seen.late_s)
        return {
            "present": len(self._waiters),
            "errors": self._errors,
            "seconds": now_s - seen.since_s,
            "num_positions": seen.num_positions,
            "num_with_eta": seen.num_with_eta,
            "num_changes": seen.num_changes,
            "gap_p50_s": gaps_s[len(gaps_s) // 2] if gaps_s else 0.0,
            "gap_max_s": gaps_s[-1] if gaps_s else 0.0,
            "late_p99_s": late_s[len(late_s) * 99 // 100] if late_s else 0.0,
            "late_max_s": late_s[-1] if late_s else 0.0,
        }


def print_line(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Crowd(int(sys.argv[1])).run()


if __name__ == "__main__":
    main()
