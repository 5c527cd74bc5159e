"""The cost of the queue with 10,000 waiting requests, compared with what it replaces. No model.

    python benchmarks/scheduler.py [--json FILE] [--rounds 5] [--only M1 --only M6 …] [--quick]

M1, M2, M3, M5 and M7 time single operations in one process. Each row is the median over the rounds of a round's median
and 99th percentile. M8 is the cost of position updates (`position_updates.py`), M9 the number of simulated requests per
second of CPU (`simulating.py`). M4 and M6 are measured together over real sockets, with one process for the server and
one for the load generator (`sockets.py`). The goals were set before the code was written; "missed" refers to this run.
The baselines alternate with our rows in the same rounds, on the same machine:

    asyncio.Queue hop    put, wake the getter, get: the minimum cost of a queue between two tasks
    deque.remove         how vLLM's FCFS queue removes an aborted request
    list.remove+heapify  how vLLM's priority queue removes one
    poll every 1 ms      how the dispatchers of Gradio and llm-d detect a free slot
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
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path

import position_updates
import simulating
import sockets
from rich.console import Console
from rich.table import Table
from sockets import MassDisconnect, Waiting

from chatstream.errors import QueueFull
from chatstream.runtime import QueueWorker
from chatstream.scheduler import Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.types import FinishReason, TokenDelta, Usage

NUM_WAITING = 10_000
NUM_CLIENTS = 1_000
NUM_SLOTS = 8

Samples = list[int]
"""Nanoseconds, one entry per operation."""


class Core:
    """A scheduler with all slots in use and 10,000 waiting requests of 1,000 clients."""

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
    """M1: account one token of a running request and take its event."""
    core, samples = Core(), Samples()
    for n in range(20_000):
        grant = core.grants[n % NUM_SLOTS]

        def one(grant: Grant = grant, now_s: float = 1.0 + n * 1e-6) -> None:
            core.scheduler.on_tokens(grant, 1, now_s)
            core.scheduler.take_events()

        timed(samples, one)
    return samples


def submit_admitted() -> Samples:
    """M2: from a request to its admission."""
    core, samples = Core(room=5_000), Samples()
    for _ in range(5_000):
        timed(samples, core.submit)
    return samples


def submit_rejected() -> Samples:
    """M2: from a request to its rejection by a full queue."""
    core, samples = Core(), Samples()

    def reject() -> None:
        try:
            core.scheduler.submit(Arrival(request_id="late"), 1.0)
        except QueueFull:
            return
        raise AssertionError("the request must be rejected")

    for _ in range(5_000):
        timed(samples, reject)
        core.scheduler.take_events()
    return samples


def cancel_waiting() -> Samples:
    """M3: cancel one of 10,000 waiting requests, at a random position."""
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
    waiting = deque(f"r{n}" for n in range(NUM_WAITING))
    for n in range(1_000):
        victim = waiting[rng.randrange(NUM_WAITING)]
        timed(samples, partial(waiting.remove, victim))
        waiting.append(f"s{n}")
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
    """Look up the position of a waiting request."""
    core, samples = Core(), Samples()
    rng = random.Random(1)
    for _ in range(5_000):
        timed(samples, partial(core.scheduler.position, core.waiting[rng.randrange(NUM_SLOTS, NUM_WAITING)]))
    return samples


def lifecycles() -> Samples:
    """M7: arrival, start and end of a request while 10,000 wait; one entry per lifecycle."""
    core, samples = Core(room=1), Samples()
    holders = deque(core.grants)
    for n in range(10_000):

        def lifecycle(now_s: float = 1.0 + n * 1e-6) -> None:
            core.submit()
            core.scheduler.on_ended(holders.popleft(), Outcome.FINISHED, "stop", now_s)
            for event in core.scheduler.take_events():
                if isinstance(event, ev.Started):
                    holders.append(event.grant)

        timed(samples, lifecycle)
    return samples


def release_to_start() -> Samples:
    """M5: from the end of one generation to the first instruction of the next, in the real asyncio runtime."""
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
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def reader() -> None:
            while True:
                sent_ns = await queue.get()
                samples.append(time.perf_counter_ns() - sent_ns)

        task = asyncio.create_task(reader())
        for _ in range(5_000):
            queue.put_nowait(time.perf_counter_ns())
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    return samples


def polling() -> Samples:
    samples, rng, free_ns = Samples(), random.Random(1), [0]

    def engine() -> None:
        """End generations at random times in a thread, like an engine, independently of the timers of the loop."""
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


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal as text, and as limits of the median and the 99th percentile."""

    text: str
    p50_us: float
    p99_us: float = inf


ROWS: list[tuple[str, str, Callable[[], Samples], Goal | None]] = [
    ("M1", "M1 one token: account + event", token, Goal("5 µs", 5)),
    ("M1", "   baseline: asyncio.Queue hop", queue_hop, None),
    ("M2", "M2 submit -> admitted", submit_admitted, Goal("30 µs, p99 200 µs", 30, 200)),
    ("M2", "M2 submit -> rejected", submit_rejected, Goal("30 µs, p99 200 µs", 30, 200)),
    ("M3", "M3 cancel one of 10,000", cancel_waiting, Goal("5 µs", 5)),
    ("M3", "   baseline: deque.remove", cancel_in_deque, None),
    ("M3", "   baseline: list.remove+heapify", cancel_in_heap, None),
    ("M3", "   position of one of 10,000", position, None),
    ("M5", "M5 slot released -> next start", release_to_start, Goal("50 µs, p99 1 ms", 50, 1_000)),
    ("M5", "   baseline: poll every 1 ms", polling, None),
    ("M7", "M7 lifecycle: arrive, start, end", lifecycles, Goal("30,000 per second", 1e6 / 30_000)),
]
FIGURES = ("M1", "M2", "M3", "M4", "M5", "M6", "M7", "M8", "M9")
UPDATE_GOAL_US = 20.0


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection like `timeit`, so that only the operation is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(rounds: int, only: Collection[str]) -> dict[str, dict[str, float]]:
    rows = [(name, operation) for figure, name, operation, _ in ROWS if figure in only]
    per_round: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in rows}
    for _ in range(rounds):
        for name, operation in rows:
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


def show_operations(console: Console, figures: dict[str, dict[str, float]], machine: str) -> None:
    table = _table(
        f"Scheduler, 10,000 waiting, {NUM_SLOTS} slots, {NUM_CLIENTS:,} clients ({machine})",
        ("p50 µs", "p99 µs", "p50 by round"),
    )
    for _, name, _, goal in ROWS:
        row = figures.get(name.strip())
        if row is not None:
            spread = f"{row['p50_us_lowest']:.1f} - {row['p50_us_highest']:.1f}"
            judged = ""
            if goal is not None:
                judged = verdict(goal.text, row["p50_us"] <= goal.p50_us and row["p99_us"] <= goal.p99_us)
            table.add_row(name, f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}", spread, judged)
    console.print(table)
    lifecycle = figures.get("M7 lifecycle: arrive, start, end")
    if lifecycle is not None:
        console.print(f"M7: {1e6 / lifecycle['p50_us']:,.0f} lifecycles per second (from the median)")


def measure_position_updates(num_waiting: int, seconds: float) -> list[position_updates.UpdateCost]:
    rates = [position_updates.measure(num_waiting, rate, seconds) for rate in position_updates.CHANGES_PER_S]
    return [*rates, position_updates.measure_broadcast(num_waiting)]


def show_position_updates(console: Console, costs_by_rate: list[position_updates.UpdateCost], num_waiting: int) -> None:
    table = _table(
        f"M8 position updates to {num_waiting:,} requests", ("messages per change", "µs per change", "change alone, µs")
    )
    for one in costs_by_rate:
        is_baseline = one.changes_per_s is None
        name = "   baseline: broadcast" if is_baseline else f"M8 {one.changes_per_s:,} changes per second"
        costs = (one.messages_per_change, one.us_per_change, one.us_of_change)
        judged = "" if is_baseline else verdict(f"{UPDATE_GOAL_US:g} µs", one.us_per_change <= UPDATE_GOAL_US)
        table.add_row(name, *(f"{cost:,.1f}" for cost in costs), judged)
    console.print(table)


def measure_simulating(num_rounds: int, hours: float) -> dict[str, list[float]]:
    """Return simulated requests per second of CPU, one value per round."""
    return {
        name: [simulating.requests_per_s(slo_s, hours) for _ in range(num_rounds)]
        for name, slo_s in simulating.VARIANTS.items()
    }


def show_simulating(console: Console, rounds: dict[str, list[float]], machine: str) -> None:
    table = _table(f"Simulated requests per second of CPU ({machine})", ("median", "of the rounds"))
    for number, (name, per_s) in enumerate(rounds.items()):
        median = statistics.median(per_s)
        goal = simulating.GOAL_PER_S
        judged = "" if number else verdict(f"{goal:,}", median >= goal)
        name = f"   {name}" if number else f"M9 {name}"
        table.add_row(name, f"{median:,.0f}", f"{min(per_s):,.0f} - {max(per_s):,.0f}", judged)
    console.print(table)


def show_sockets(console: Console, rounds: list[tuple[Waiting, MassDisconnect]], machine: str) -> None:
    num_waiting = rounds[0][0].num_waiting
    table = _table(
        f"{num_waiting:,} waiting connections, {len(rounds)} rounds ({machine})", ("median", "of the rounds")
    )
    for name, values, form, at_most in socket_rows(rounds):
        median = statistics.median(values)
        judged = "" if at_most is None else verdict(f"{at_most:g}", median <= at_most)
        table.add_row(name, form.format(median), f"{form.format(min(values))} - {form.format(max(values))}", judged)
    console.print(table)
    errors = sum((Counter(waiting.errors) for waiting, _ in rounds), Counter[str]())
    console.print(f"errors: {dict(errors) or 'none'} ({verdict('none', not errors)})")
    console.print(f"RLIMIT_NOFILE {sockets.max_files():,} per process")


def socket_rows(rounds: list[tuple[Waiting, MassDisconnect]]) -> Iterator[tuple[str, list[float], str, float | None]]:
    """Yield label, one value per round, format, and the upper limit of the goal."""
    waiting, disconnects = [one for one, _ in rounds], [one for _, one in rounds]
    yield "M6 server memory, KiB per connection", [w.rss_kib_each for w in waiting], "{:.1f}", 64
    yield "   longest time between two positions, s", [w.refresh_max_s for w in waiting], "{:.2f}", 2
    yield "   median time between two positions, s", [w.refresh_p50_s for w in waiting], "{:.2f}", None
    yield "   positions sent per second", [w.positions_per_s for w in waiting], "{:,.0f}", None
    yield "   of these with an ETA, %", [100 * w.with_eta for w in waiting], "{:.0f}", None
    yield "   gap between tokens p99, empty queue, ms", [w.gaps_alone.p99_ms for w in waiting], "{:.2f}", None
    yield "   gap between tokens p99, ms", [w.gaps_crowded.p99_ms for w in waiting], "{:.2f}", None
    slower = [100 * (w.gaps_crowded.p99_ms / w.gaps_alone.p99_ms - 1) for w in waiting]
    yield "   increase of p99, %", slower, "{:.1f}", 10
    yield "   gap between tokens p50, ms", [w.gaps_crowded.p50_ms for w in waiting], "{:.2f}", None
    yield "   gap between tokens, longest, ms", [w.gaps_crowded.max_ms for w in waiting], "{:.1f}", None
    yield "   server CPU, empty queue, % of a core", [100 * w.server_cpu_alone for w in waiting], "{:.0f}", None
    yield "   server CPU, % of a core", [100 * w.server_cpu_crowded for w in waiting], "{:.0f}", None
    yield "   server CPU per position sent, µs", [w.server_us_per_position for w in waiting], "{:.0f}", None
    yield "   load generator CPU, % of a core", [100 * w.crowd_cpu for w in waiting], "{:.0f}", None
    yield "   load generator lateness, p99, ms", [w.crowd_late_p99_ms for w in waiting], "{:.2f}", None
    yield "   load generator lateness, maximum, ms", [w.crowd_late_max_ms for w in waiting], "{:.1f}", None
    yield "   time until all are admitted, s", [w.join_s for w in waiting], "{:.1f}", None
    yield "M4 all disconnect: queue empty after, ms", [1e3 * g.freed.from_first_s for g in disconnects], "{:.0f}", 150
    yield "   baseline: bare asyncio server", [1e3 * g.baseline.from_first_s for g in disconnects], "{:.0f}", None
    yield "   since the kill", [1e3 * g.freed.from_kill_s for g in disconnects], "{:.0f}", None
    yield "   baseline: bare asyncio server", [1e3 * g.baseline.from_kill_s for g in disconnects], "{:.0f}", None
    yield "   work of the server only", [1e3 * g.freed_at_once.from_first_s for g in disconnects], "{:.0f}", None
    yield (
        "   baseline: bare asyncio server",
        [1e3 * g.baseline_at_once.from_first_s for g in disconnects],
        "{:.0f}",
        None,
    )
    yield "   longest gap between tokens during M4, ms", [g.max_gap_ms for g in disconnects], "{:.0f}", None


def verdict(goal: str, is_met: bool) -> str:
    return f"goal {goal}" if is_met else f"goal {goal}, missed"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, help="default 5; 3 for M4 and M6; M8 has one")
    parser.add_argument("--only", choices=FIGURES, action="append", help="repeatable; M4 and M6 run together")
    parser.add_argument("--quick", action="store_true", help="one round, 1,000 connections, 5 s, 30 virtual minutes")
    parser.add_argument("--waiting", type=int, help="waiting requests of M4, M6 and M8; default 10,000")
    parser.add_argument("--seconds", type=float, help="duration of each of the two measurements of M6; default 20")
    options = parser.parse_args()
    only = options.only or FIGURES
    num_waiting = options.waiting or (1_000 if options.quick else NUM_WAITING)
    seconds = options.seconds or (5.0 if options.quick else 20.0)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    report: dict[str, object] = {"machine": machine, "waiting": num_waiting}
    console = Console(width=110)
    if {"M1", "M2", "M3", "M5", "M7"} & set(only):
        figures = measure(options.rounds or (1 if options.quick else 5), only)
        show_operations(console, figures, machine)
        report["figures"] = figures
    if "M8" in only:
        costs_by_rate = measure_position_updates(num_waiting, seconds / 5)
        show_position_updates(console, costs_by_rate, num_waiting)
        report["position_updates"] = [asdict(one) for one in costs_by_rate]
    if "M9" in only:
        simulated = measure_simulating(options.rounds or (1 if options.quick else 5), 0.5 if options.quick else 2.0)
        show_simulating(console, simulated, machine)
        report["simulated_requests_per_s"] = simulated
    if {"M4", "M6"} & set(only):
        if sys.platform != "linux":
            console.print("M4 and M6 read /proc: they need Linux")
        else:
            num_rounds = options.rounds or (1 if options.quick else 3)
            rounds = sockets.measure_rounds(num_rounds, num_waiting, seconds)
            show_sockets(console, rounds, machine)
            report["sockets"] = [
                {"waiting": asdict(waiting), "disconnects": asdict(disconnects)} for waiting, disconnects in rounds
            ]
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
