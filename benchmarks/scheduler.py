"""What the queue itself costs, with 10,000 requests waiting, beside what it replaces. No model, one process.

    python benchmarks/scheduler.py [--json FILE] [--rounds 5]

Each row is the median over the rounds of a round's median and 99th percentile. The baselines are measured in the
same rounds, alternating with ours, on the same machine:

    asyncio.Queue hop    put, wake the getter, get: the least a queue between two tasks can cost
    deque.remove         how vLLM's FCFS queue forgets an aborted request
    list.remove+heapify  how vLLM's priority queue does
    poll every 1 ms      how Gradio's and llm-d's dispatchers find out that a place is free
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import os
import platform
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chatstream.errors import QueueFull
from chatstream.runtime import QueueWorker
from chatstream.scheduler import Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.types import FinishReason, TokenDelta, Usage

NUM_WAITING = 10_000
NUM_CLIENTS = 1_000
NUM_SLOTS = 8

Samples = list[int]
"""Nanoseconds, one entry an operation."""


class Core:
    """A scheduler with all slots taken and 10,000 requests of 1,000 clients waiting."""

    def __init__(self, *, room: int = 0) -> None:
        settings = SchedulerSettings(
            max_concurrency=NUM_SLOTS, max_queue_size=NUM_WAITING + room, max_wait_s=3600.0, stall_timeout_s=300.0
        )
        self.scheduler = Scheduler(settings)
        self.scheduler.open(0.0)
        self.count = 0
        self.waiting: list[str] = []
        for _ in range(NUM_SLOTS + NUM_WAITING):
            self.submit()
        self.grants: list[Grant] = [e.grant for e in self.scheduler.take_events() if isinstance(e, ev.Started)]

    def submit(self) -> None:
        self.count += 1
        request_id = f"r{self.count}"
        self.scheduler.submit(Arrival(request_id=request_id, client=f"c{self.count % NUM_CLIENTS}"), self.count * 1e-6)
        self.waiting.append(request_id)


def timed(samples: Samples, operation: Callable[[], object]) -> None:
    begin = time.perf_counter_ns()
    operation()
    samples.append(time.perf_counter_ns() - begin)


def token() -> Samples:
    """M1: account one token of a running request and take the event that says so."""
    core, samples = Core(), Samples()
    for n in range(20_000):
        grant = core.grants[n % NUM_SLOTS]

        def one(grant: Grant = grant, now_s: float = 1.0 + n * 1e-6) -> None:
            core.scheduler.on_tokens(grant, 1, now_s)
            core.scheduler.take_events()

        timed(samples, one)
    return samples


def submit_admitted() -> Samples:
    """M2: from a request at the door to its place in line."""
    core, samples = Core(room=5_000), Samples()
    for _ in range(5_000):
        timed(samples, core.submit)
    return samples


def submit_refused() -> Samples:
    """M2: from a request at the door to its refusal."""
    core, samples = Core(), Samples()

    def refused() -> None:
        try:
            core.scheduler.submit(Arrival(request_id="late"), 1.0)
        except QueueFull:
            return
        raise AssertionError("it had to be refused")

    for _ in range(5_000):
        timed(samples, refused)
        core.scheduler.take_events()
    return samples


def cancel_waiting() -> Samples:
    """M3: one of 10,000 leaves the line, anywhere in it."""
    core, samples = Core(), Samples()
    rng = random.Random(1)
    for _ in range(3_000):
        victim = core.waiting.pop(rng.randrange(NUM_SLOTS, len(core.waiting)))
        timed(samples, partial(core.scheduler.cancel, victim, "client", 1.0))
        core.submit()
        core.scheduler.take_events()
    return samples


def cancel_in_deque() -> Samples:
    rng, samples = random.Random(1), Samples()
    line = deque(f"r{n}" for n in range(NUM_WAITING))
    for n in range(1_000):
        victim = line[rng.randrange(NUM_WAITING)]
        timed(samples, partial(line.remove, victim))
        line.append(f"s{n}")
    return samples


def cancel_in_heap() -> Samples:
    rng, samples = random.Random(1), Samples()
    heap = [(0, n, f"r{n}") for n in range(NUM_WAITING)]

    def cancel(victim: tuple[int, int, str]) -> None:
        heap.remove(victim)
        heapq.heapify(heap)

    for n in range(300):
        timed(samples, partial(cancel, heap[rng.randrange(NUM_WAITING)]))
        heapq.heappush(heap, (0, NUM_WAITING + n, f"s{n}"))
    return samples


def position() -> Samples:
    """Where does this one stand?"""
    core, samples = Core(), Samples()
    rng = random.Random(1)
    for _ in range(5_000):
        timed(samples, partial(core.scheduler.position, core.waiting[rng.randrange(NUM_SLOTS, NUM_WAITING)]))
    return samples


def lifecycles() -> Samples:
    """M7: arrive, start, end, with 10,000 in line all the while; one entry a whole life."""
    core, samples = Core(room=1), Samples()
    holders = deque(core.grants)
    for n in range(10_000):

        def life(now_s: float = 1.0 + n * 1e-6) -> None:
            core.submit()
            core.scheduler.on_ended(holders.popleft(), Outcome.FINISHED, "stop", now_s)
            for event in core.scheduler.take_events():
                if isinstance(event, ev.Started):
                    holders.append(event.grant)

        timed(samples, life)
    return samples


def release_to_start() -> Samples:
    """M5: from the end of one generation to the first instruction of the next, in the real asyncio shell."""
    samples, ended_ns = Samples(), [0]

    async def generate() -> AsyncGenerator[TokenDelta, None]:
        if ended_ns[0]:
            samples.append(time.perf_counter_ns() - ended_ns[0])
        await asyncio.sleep(0)
        yield TokenDelta("x", finish_reason=FinishReason.STOP, usage=Usage(1, 1))
        ended_ns[0] = time.perf_counter_ns()

    async def run() -> None:
        settings = SchedulerSettings(max_concurrency=1, max_queue_size=NUM_WAITING + 1_000)
        worker = QueueWorker(Scheduler(settings))
        for n in range(NUM_WAITING + 1_000):
            worker.submit(Arrival(request_id=f"r{n}"), generate)
        worker.start()
        while len(samples) < 1_000:  # noqa: ASYNC110 - an event would be set in the code that is measured
            await asyncio.sleep(0.001)
        await worker.stop()

    asyncio.run(run())
    return samples[:1_000]


def queue_hop() -> Samples:
    samples = Samples()

    async def run() -> None:
        line: asyncio.Queue[int] = asyncio.Queue()

        async def reader() -> None:
            while True:
                sent_ns = await line.get()
                samples.append(time.perf_counter_ns() - sent_ns)

        task = asyncio.create_task(reader())
        for _ in range(5_000):
            line.put_nowait(time.perf_counter_ns())
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    return samples


def polling() -> Samples:
    samples, rng, free_ns = Samples(), random.Random(1), [0]

    def engine() -> None:
        """Ends a generation now and then, in its own thread, as engines do: not when a timer of the loop fires."""
        for _ in range(200):
            time.sleep(rng.uniform(0.002, 0.004))
            free_ns[0] = time.perf_counter_ns()

    async def dispatcher() -> None:
        ending = asyncio.create_task(asyncio.to_thread(engine))
        while not ending.done():
            await asyncio.sleep(0.001)
            if free_ns[0]:
                samples.append(time.perf_counter_ns() - free_ns[0])
                free_ns[0] = 0

    asyncio.run(dispatcher())
    return samples


ROWS: list[tuple[str, Callable[[], Samples], str]] = [
    ("M1 one token: account + event", token, "goal 5 µs"),
    ("   baseline: asyncio.Queue hop", queue_hop, ""),
    ("M2 submit -> a place", submit_admitted, "goal 30 µs, p99 200 µs"),
    ("M2 submit -> refused", submit_refused, "goal 30 µs, p99 200 µs"),
    ("M3 cancel one of 10,000", cancel_waiting, "goal 5 µs"),
    ("   baseline: deque.remove", cancel_in_deque, ""),
    ("   baseline: list.remove+heapify", cancel_in_heap, ""),
    ("   position of one of 10,000", position, ""),
    ("M5 slot released -> next start", release_to_start, "goal 50 µs, p99 1 ms"),
    ("   baseline: poll every 1 ms", polling, ""),
    ("M7 one life: arrive, start, end", lifecycles, "goal 30,000 a second"),
]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: what is measured is the operation, not whose turn it was to collect."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(rounds: int) -> dict[str, dict[str, float]]:
    per_round: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in ROWS}
    for _ in range(rounds):
        for name, operation, _ in ROWS:
            with no_garbage_collection():
                samples = sorted(operation())
            p50, p99 = samples[len(samples) // 2], samples[len(samples) * 99 // 100]
            per_round[name].append((p50 / 1000, p99 / 1000))
    return {
        name.strip(): {
            "p50_us": statistics.median(p50 for p50, _ in results),
            "p99_us": statistics.median(p99 for _, p99 in results),
            "p50_us_lowest": min(p50 for p50, _ in results),
            "p50_us_highest": max(p50 for p50, _ in results),
        }
        for name, results in per_round.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures = measure(options.rounds)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    table = Table(title=f"Scheduler, 10,000 waiting, {NUM_SLOTS} slots, {NUM_CLIENTS:,} clients ({machine})")
    for column, justify in (
        ("", "left"),
        ("p50 µs", "right"),
        ("p99 µs", "right"),
        ("p50 of the rounds", "right"),
        ("", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, _, goal in ROWS:
        row = figures[name.strip()]
        spread = f"{row['p50_us_lowest']:.1f} - {row['p50_us_highest']:.1f}"
        table.add_row(name, f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}", spread, goal)
    console = Console(width=110)
    console.print(table)
    lives = figures["M7 one life: arrive, start, end"]["p50_us"]
    console.print(f"M7: {1e6 / lives:,.0f} lives a second (from the median)")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "rounds": options.rounds, "figures": figures}, indent=2)
        )


if __name__ == "__main__":
    main()
