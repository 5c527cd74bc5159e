"""The program of `scripts/nightly`: the reliability tests with many more seeds and requests, and a table of the runs.

    worlds      the whole server in memory (world.py), each seed twice, in two processes with different hashes
    core        the scheduler alone under random calls, 10,000 requests a run, each with another policy and limits
    shell       the asyncio runtime with a fake engine in virtual time, likewise
    sockets     a server over real sockets, 2,000 requests a run, in this process

Each part has its own process. A leak or a broken promise ends the part and reports the seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from chatstream import ChatStream, RuntimeSettings, SchedulerSettings
from chatstream.scheduler import SchedulerStats
from chatstream.testing import FakeEngine
from tests.e2e.server import serve
from tests.reliability.faults import FAULT_POINTS
from tests.reliability.shrinking import check_seed
from tests.scenarios.chaos import (
    CoreChaos,
    SocketChaos,
    num_open_files,
    random_script,
    random_settings,
    run_shell_chaos,
)

SIMULATED_RUN = 10_000
SOCKET_RUN = 2_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/nightly", description="Run the reliability tests with many seeds.")
    parser.add_argument("--seeds", type=int, default=1_000, help="worlds; each runs twice")
    parser.add_argument("--core", type=int, default=1_000_000, help="requests for the scheduler alone")
    parser.add_argument("--shell", type=int, default=100_000, help="requests in virtual time")
    parser.add_argument("--sockets", type=int, default=10_000, help="requests over real sockets")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="repeat one world only")
    parser.add_argument("--requests", type=int, help="with --seed: number of requests; default 10")
    parser.add_argument("--faults", help="with --seed: comma-separated names; default: the faults of the seed")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is None and not (options.requests is options.faults is None):
        parser.error("--requests and --faults apply to one world: they need --seed")
    if options.seed is not None:
        num_requests = 10 if options.requests is None else options.requests
        if num_requests < 1:
            parser.error(f"--requests must be at least 1, not {num_requests}")
        faults = None if options.faults is None else [name.strip() for name in options.faults.split(",") if name]
        # An unknown fault would never occur, and the run would prove nothing.
        unknown = [name for name in faults or () if name not in FAULT_POINTS]
        if unknown:
            parser.error(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULT_POINTS)}")
        world = check_seed(options.seed, num_requests=num_requests, faults=faults)
        print(f"nothing went wrong; {world.digest()}")
        return 0
    if options.part is not None:
        for result in PARTS[options.part[0]](options.first_seed, int(options.part[1])):
            print(json.dumps(result), flush=True)
        return 0
    counts = {"worlds": options.seeds, "core": options.core, "shell": options.shell, "sockets": options.sockets}
    return run_all(counts, options.first_seed)


def run_all(counts: dict[str, int], first_seed: int) -> int:
    """Print the table. Return 0 if all parts passed, else 1."""
    rows, faults, is_fine = [], Counter[str](), True
    for name, count in counts.items():
        if not count:
            continue
        began_s = time.monotonic()
        runs = [_start(name, count, first_seed, hash_seed) for hash_seed in ("0", "1")[: 2 if name == "worlds" else 1]]
        results = [_results(run) for run in runs]
        if any(run.wait() for run in runs):
            is_fine = False
        for number, digests in enumerate(
            zip(*[[result.get("digest") for result in one] for one in results], strict=False)
        ):
            if len(set(digests)) > 1:
                print(f"{name}: seed {first_seed + number} gave different runs")
                is_fine = False
        total = Counter[str]()
        for result in (result for of_one in results for result in of_one):
            faults.update(result["faults"])
            total.update({key: value for key, value in result.items() if isinstance(value, int)})
            total["num_faults"] += sum(result["faults"].values())
        rows.append((name, total, time.monotonic() - began_s))
    print(f"{'':10} {'runs':>7} {'requests':>9} {'faults':>8} {'leaked: slots':>14} {'tasks':>6} {'files':>6} {'s':>7}")
    for name, total, seconds in rows:
        leaks = f"{total['leaked_slots']:14} {total['leaked_tasks']:6} {total['leaked_files']:6}"
        print(f"{name:10} {total['runs']:7} {total['requests']:9} {total['num_faults']:8} {leaks} {seconds:7.0f}")
    print(f"{len(faults)} kinds of faults: " + ", ".join(f"{kind} {num}" for kind, num in faults.most_common()))
    print("nothing went wrong" if is_fine else "SOMETHING WENT WRONG: see above")
    return 0 if is_fine else 1


def _start(name: str, count: int, first_seed: int, hash_seed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.reliability.nightly", "--first-seed", str(first_seed)]
    return subprocess.Popen(
        [*command, "--part", name, str(count)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
    )


def _results(run: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert run.stdout is not None
    with run.stdout:
        return [json.loads(line) for line in run.stdout]


def worlds(first_seed: int, count: int) -> Iterator[dict[str, Any]]:
    for seed in range(first_seed, first_seed + count):
        world = check_seed(seed)
        yield {
            "runs": 1,
            "requests": world.chat_stream.stats().received,
            "faults": world.faults.hits,
            "digest": world.digest(),
            **leaks(world.chat_stream.stats(), num_tasks=0, num_files=0),
        }


def _shares(first_seed: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """Return pairs of a seed and its number of requests, at most `most`; the numbers add up to `count`."""
    return ((first_seed + n, min(most, count - begun)) for n, begun in enumerate(range(0, count, most)))


def core(first_seed: int, count: int) -> Iterator[dict[str, Any]]:
    files = num_open_files()
    for seed, num_requests in _shares(first_seed, count, SIMULATED_RUN):
        run = CoreChaos(seed, num_requests, **random_settings(random.Random(seed)))
        run.run()
        yield {
            "runs": 1,
            "requests": num_requests,
            "faults": run.faults,
            **leaks(run.scheduler.stats(), num_tasks=0, num_files=num_open_files() - files),
        }


def shell(first_seed: int, count: int) -> Iterator[dict[str, Any]]:
    files = num_open_files()
    for seed, num_requests in _shares(first_seed, count, SIMULATED_RUN):
        run = run_shell_chaos(seed, num_requests, **random_settings(random.Random(seed)))
        yield {
            "runs": 1,
            "requests": num_requests,
            "faults": run.faults,
            # The run itself asserts that no task is left.
            **leaks(run.house.worker.stats(), num_tasks=0, num_files=num_open_files() - files),
        }


def sockets(first_seed: int, count: int) -> Iterator[dict[str, Any]]:
    asyncio.run(_over_sockets(first_seed, 20))  # opens the files that a process opens only once
    files = num_open_files()
    for seed, num_requests in _shares(first_seed, count, SOCKET_RUN):
        stats, faults, num_tasks = asyncio.run(_over_sockets(seed, num_requests))
        yield {
            "runs": 1,
            "requests": num_requests,
            "faults": faults,
            **leaks(stats, num_tasks=num_tasks, num_files=num_open_files() - files),
        }


async def _over_sockets(seed: int, num_requests: int) -> tuple[SchedulerStats, Counter[str], int]:
    """Run requests over sockets. Return statistics, faults and the number of remaining tasks."""
    rng, faults = random.Random(seed), Counter[str]()
    scripts: dict[str, Any] = {}
    engine = FakeEngine(
        lambda request: scripts.setdefault(request.request_id, random_script(rng, 0.05, faults)), step_s=0.001
    )
    settings = SchedulerSettings(
        max_concurrency=4,
        max_queue_size=40,
        max_wait_s=5.0,
        stall_timeout_s=0.3,
        abort_timeout_s=5.0,
        **random_settings(rng),
    )
    chat_stream = ChatStream(engine=engine, scheduler=settings, runtime=RuntimeSettings(resume_grace_s=1.0))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads = threading.active_count()
    with serve(chat_stream) as server:
        server.history.is_fcfs = settings.policy == "fcfs"
        server.history.has_slices = True
        server.history.max_running_per_client = settings.max_running_per_client
        run = SocketChaos(server, engine, seed)
        await run.run(num_requests, at_once=min(60, soft // 4))
        await server.until(lambda: not chat_stream.resumables.num_kept, timeout_s=60.0)
        await server.until_idle()
        assert server.loop is not None
        num_tasks = sum(task.get_name().startswith("chatstream") for task in asyncio.all_tasks(server.loop))
    assert threading.active_count() == threads
    return chat_stream.stats(), faults + run.faults, num_tasks


def leaks(stats: SchedulerStats, *, num_tasks: int, num_files: int) -> dict[str, int]:
    """Return the numbers of leaks, which are 0. Raises `AssertionError` for a leak."""
    slots = stats.running + stats.preempted + stats.leaving + stats.waiting
    found = {"leaked_slots": slots, "leaked_tasks": num_tasks, "leaked_files": num_files}
    assert not any(found.values()), f"left behind: {found}"
    return found


PARTS = {"worlds": worlds, "core": core, "shell": shell, "sockets": sockets}


if __name__ == "__main__":
    sys.exit(main())
