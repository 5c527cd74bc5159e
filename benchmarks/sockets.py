"""M4 and M6: the cost of 10,000 waiting connections over real sockets. Linux; see `scheduler.py --only`.

Three processes on one machine: the server (`sockets_server.py`), the load generator (`sockets_crowd.py`), and this one,
which reads the two running answers and records the arrival of each token.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NUM_STREAMS = 2
TIME_PER_TOKEN_S = 0.02
MAX_TOKENS = 100_000
"""Length of each of the two answers: longer than any measurement."""
CHANGE_PERIOD_S = 0.1
"""Interval at which the first connection disconnects, which changes all positions."""
NUM_FINISHED = 12
"""Number of short answers before the measurements."""
MAX_WARM_UP_S = 2.5
"""Maximum warm-up before each measurement; at most the duration of the measurement."""
TIMEOUT_S = 60.0
"""Time after which a step has failed."""
SPARE_POSITIONS = 100
"""Spare queue size: a connection may join before the server has noticed a disconnect."""
SPARE_FILES = 100
"""File descriptors that a process needs besides its connections."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Gaps between two tokens at their reader, over both answers."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    count: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """One round of M6. CPU in cores."""

    num_waiting: int
    errors: dict[str, int]
    join_s: float
    """Time until all connections are admitted."""
    rss_kib_each: float
    """Increase of the resident memory of the server, per connection."""
    gaps_alone: Gaps
    """With an empty queue."""
    gaps_crowded: Gaps
    refresh_p50_s: float
    refresh_max_s: float
    """The longest time between two positions of one connection."""
    positions_per_s: float
    positions_per_change: float
    """Messages per change of the queue."""
    with_eta: float
    """Share of the messages with an ETA."""
    server_cpu_alone: float
    server_cpu_crowded: float
    server_us_per_position: float
    """CPU time per message, including the kernel."""
    crowd_cpu: float
    crowd_late_p99_ms: float
    """Delay between arrival and processing in the load generator: the error of its times."""
    crowd_late_max_ms: float


@dataclass(frozen=True, slots=True)
class Freed:
    """Seconds until the queue is empty after the load generator was killed."""

    from_first_s: float
    """Since the first broken connection that the server sees."""
    from_kill_s: float
    """Since the kill; most of it is the kernel's work of closing the sockets."""


@dataclass(frozen=True, slots=True)
class MassDisconnect:
    """One round of M4."""

    freed: Freed
    """The server runs while the kernel resets one connection after the other."""
    baseline: Freed
    """The same with a minimal server."""
    freed_at_once: Freed
    """The server is stopped until all connections are reset: only its own work."""
    baseline_at_once: Freed
    max_gap_ms: float
    """The longest gap between tokens during the disconnects, without a stopped server."""


class Child:
    """A process that answers each input line with a line of JSON. Exiting the block kills it."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.read())
        return answer

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} has ended")
        return line.strip()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()

    @property
    def rss_kib(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))

    @property
    def cpu_s(self) -> float:
        """User and system time so far, in steps of 0.01 s."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Answers:
    """Reads the running answers in a thread and records the arrival of their tokens."""

    def __init__(self, port: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._last_s: dict[socket.socket, float] = {}
        self._gaps_s: list[float] = []
        self._failure: Exception | None = None
        for _ in range(NUM_STREAMS):
            self._selector.register(ask(port, MAX_TOKENS), selectors.EVENT_READ)
        threading.Thread(target=self._read_all, daemon=True).start()

    def during(self, seconds: float) -> Gaps:
        """Return the gaps of the next `seconds`, extended until there is a token."""
        begin = self.count()
        time.sleep(seconds)
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.count() == begin and time.monotonic() < deadline_s:
            time.sleep(TIME_PER_TOKEN_S)
        return self.since(begin)

    def count(self) -> int:
        return len(self._gaps_s)

    def since(self, begin: int) -> Gaps:
        if self._failure is not None:
            raise self._failure
        ms = sorted(1000 * gap_s for gap_s in self._gaps_s[begin:])
        if not ms:
            raise RuntimeError("the answers have stopped")
        return Gaps(statistics.median(ms), ms[len(ms) * 99 // 100], ms[-1], len(ms))

    def _read_all(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)
        except Exception as error:  # raised by the next call of `since`
            self._failure = error

    def _read(self, connection: socket.socket) -> None:
        data = connection.recv(65536)
        now_s = time.monotonic()
        if not data or b"event: error" in data or b"event: done" in data:
            raise RuntimeError(f"an answer ended: {data[-200:]!r}")
        for _ in range(data.count(b"event: token")):
            if connection in self._last_s:
                self._gaps_s.append(now_s - self._last_s[connection])
            self._last_s[connection] = now_s


def measure_rounds(num_rounds: int, num_waiting: int, seconds: float) -> list[tuple[Waiting, MassDisconnect]]:
    """Measure with `num_waiting` connections, or with as many as the file limit of a process allows."""
    num_waiting = min(num_waiting, max_files() - SPARE_FILES)
    return [measure(num_waiting, seconds) for _ in range(num_rounds)]


def measure(num_waiting: int, seconds: float) -> tuple[Waiting, MassDisconnect]:
    """Run one round of M6 and M4: answers with an empty queue, answers with a full queue, and two mass disconnects."""
    baseline, baseline_at_once = (measure_baseline(num_waiting, at_once=at_once) for at_once in (False, True))
    options = {
        "kind": "chatstream",
        "time_per_token_s": TIME_PER_TOKEN_S,
        "max_concurrency": NUM_STREAMS,
        "max_queue_size": num_waiting + SPARE_POSITIONS,
    }
    with server_of(options) as (server, port):
        complete_some_answers(port)
        answers = Answers(port)
        with crowd_of(port) as crowd:
            waiting = measure_waiting(server, crowd, answers, num_waiting, seconds)
            begin = answers.count()
            freed = disconnect_all(server, crowd, num_waiting)
            answers.during(0.0)  # includes the gap that is open now
            max_gap_ms = answers.since(begin).max_ms
        with crowd_of(port) as crowd:
            join(crowd, num_waiting)
            freed_at_once = disconnect_all(server, crowd, num_waiting, at_once=True)
    return waiting, MassDisconnect(freed, baseline, freed_at_once, baseline_at_once, max_gap_ms)


def measure_waiting(server: Child, crowd: Child, answers: Answers, num_waiting: int, seconds: float) -> Waiting:
    warm_up_s = min(MAX_WARM_UP_S, seconds)
    time.sleep(warm_up_s)
    alone = measure_interval(server, crowd, answers, seconds)
    rss_kib = server.rss_kib
    join_s = join(crowd, num_waiting)
    crowd.ask(f"change {CHANGE_PERIOD_S}")
    time.sleep(warm_up_s)
    crowded = measure_interval(server, crowd, answers, seconds)
    rss_kib_each = (server.rss_kib - rss_kib) / num_waiting
    crowd.ask("change 0")
    time.sleep(warm_up_s)
    last = crowd.ask("report")  # the latest connections are admitted by now
    seen, num_positions = crowded.report, max(crowded.report["num_positions"], 1)
    return Waiting(
        num_waiting=last["present"],
        errors=last["errors"],
        join_s=join_s,
        rss_kib_each=rss_kib_each,
        gaps_alone=alone.gaps,
        gaps_crowded=crowded.gaps,
        refresh_p50_s=seen["gap_p50_s"],
        refresh_max_s=seen["gap_max_s"],
        positions_per_s=num_positions / seen["seconds"],
        positions_per_change=num_positions / max(seen["num_changes"], 1),
        with_eta=seen["num_with_eta"] / num_positions,
        server_cpu_alone=alone.server_cpu,
        server_cpu_crowded=crowded.server_cpu,
        server_us_per_position=1e6 * (crowded.server_cpu - alone.server_cpu) * seen["seconds"] / num_positions,
        crowd_cpu=crowded.crowd_cpu,
        crowd_late_p99_ms=1000 * seen["late_p99_s"],
        crowd_late_max_ms=1000 * seen["late_max_s"],
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """The results of one measurement interval. CPU in cores."""

    gaps: Gaps
    report: dict[str, Any]
    server_cpu: float
    crowd_cpu: float


def measure_interval(server: Child, crowd: Child, answers: Answers, seconds: float) -> Interval:
    crowd.ask("report")
    begin_s, server_cpu_s, crowd_cpu_s = time.monotonic(), server.cpu_s, crowd.cpu_s
    gaps = answers.during(seconds)
    passed_s = time.monotonic() - begin_s
    server_cpu, crowd_cpu = (server.cpu_s - server_cpu_s) / passed_s, (crowd.cpu_s - crowd_cpu_s) / passed_s
    return Interval(gaps, crowd.ask("report"), server_cpu, crowd_cpu)


def ask(port: str, num_tokens: int) -> socket.socket:
    """Request an answer of `num_tokens` tokens."""
    body = json.dumps({"user_input": "x " * (num_tokens - 1) + "x"}).encode()
    head = (
        "POST /chat_stream HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", int(port)))
    connection.sendall(head.encode() + body)
    return connection


def complete_some_answers(port: str) -> None:
    """Complete some short answers: the server sends no ETA before it has seen a few."""
    for n in range(NUM_FINISHED):
        with ask(port, 3 + n % 5) as connection:
            answer = b""
            while b"event: done" not in answer:
                data = connection.recv(65536)
                if not data:
                    raise RuntimeError(f"an answer ended: {answer[-200:]!r}")
                answer += data


def join(crowd: Child, num_waiting: int) -> float:
    """Open the connections; return the seconds until all are admitted."""
    begin_s = time.monotonic()
    answer = crowd.ask(f"join {num_waiting}")
    if answer["present"] != num_waiting:
        raise RuntimeError(f"not every connection was admitted: {answer}")
    return time.monotonic() - begin_s


def measure_baseline(num_waiting: int, *, at_once: bool) -> Freed:
    with server_of({"kind": "bare"}) as (server, port), crowd_of(port) as crowd:
        join(crowd, num_waiting)
        return disconnect_all(server, crowd, num_waiting, at_once=at_once)


def disconnect_all(server: Child, crowd: Child, num_waiting: int, *, at_once: bool = False) -> Freed:
    """Kill the load generator, which resets every connection; with `at_once` the server is stopped meanwhile."""
    server.ask("reset")
    if at_once:
        server.send_signal(signal.SIGSTOP)
    killed_s = time.monotonic()
    crowd.kill()
    if at_once:
        server.send_signal(signal.SIGCONT)
    while (report := server.ask("report"))["num_withdrawn"] < num_waiting:
        if time.monotonic() > killed_s + TIMEOUT_S:
            raise RuntimeError(f"requests remain in the queue: {report}")
        time.sleep(0.05)
    return Freed(report["last_withdrawn_s"] - report["first_lost_s"], report["last_withdrawn_s"] - killed_s)


@contextmanager
def server_of(options: dict[str, Any]) -> Iterator[tuple[Child, str]]:
    with Child(str(HERE / "sockets_server.py"), json.dumps(options)) as server:
        yield server, server.read().rpartition(":")[2]


def crowd_of(port: str) -> Child:
    return Child(str(HERE / "sockets_crowd.py"), port)


def max_files() -> int:
    """Return the hard limit, which the server and the load generator apply."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
