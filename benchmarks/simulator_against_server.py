"""Compares the simulator with a real server on the same calls, in virtual time and over HTTP.

    python benchmarks/simulator_against_server.py [--seconds 300] [--loads 0.9 1.5] [--seed 1] [--json FILE]

`chatstream serve --engine mock` runs in its own process with 4 slots, a queue of 10, and expiry after the SLO. The mock
echoes the prompt, one word per token, so an answer is as long as its prompt. Everything is twice as fast as in
`service_quality.py`: 10 ms per token, 0.5 s before the first one, an SLO of 15 s. Calls are sent open loop, at fixed
times, over real sockets; the lateness of this program is printed, because a late run is void. The speed of the engine
is measured during the run and passed to the simulation, which models the queue and not engines. The same function
computes both sets of figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from chatstream.scheduler import Scheduler, SchedulerSettings
from chatstream.simulation import WORKLOADS, Call, CallRecord, EngineModel, Figures, Run, Simulation, measure

SLOTS, QUEUE_SIZE, SLO_S = 4, 10, 15.0
PREFILL_S, TOKEN_S = 0.5, 0.010
PROMPT_TOKENS = 100
ENGINE = EngineModel(prefill_tokens_per_s=PROMPT_TOKENS / PREFILL_S, time_per_token_s=TOKEN_S)
SERVER = (
    *("serve", "--port", "0", "--engine", "mock", "--mock-type", "echo"),
    *("--mock-initial-wait", str(PREFILL_S), "--mock-time-per-token", str(TOKEN_S)),
    *("--max-concurrency", str(SLOTS), "--max-queue-size", str(QUEUE_SIZE), "--max-wait", str(SLO_S)),
)
MAX_DIFFERENCE = 0.10
MAX_LATENESS_S = 0.050


def make_calls(load: float, seconds: float, seed: int) -> list[Call]:
    """Return calls with the arrivals and answers of `conv` and equal prompts."""
    answers = WORKLOADS["conv"].calls_at_rate(1.0, seed=seed, duration_s=1000)
    mean = sum(call.output_tokens for call in answers) / len(answers)
    rate_per_s = load / ENGINE.seconds_per_request(SLOTS, PROMPT_TOKENS, mean)
    calls = WORKLOADS["conv"].calls_at_rate(rate_per_s, seed=seed, duration_s=seconds)
    return [call._replace(prompt_tokens=PROMPT_TOKENS) for call in calls]


def simulated(calls: list[Call], engine: EngineModel) -> Figures:
    settings = SchedulerSettings(max_concurrency=SLOTS, max_queue_size=QUEUE_SIZE, max_wait_s=SLO_S)
    simulation = Simulation(scheduler=Scheduler(settings), engine_model=engine, is_exact=True)
    return measure(simulation.run(calls), ttft_slo_s=SLO_S, engine=ENGINE, num_slots=SLOTS)


@contextmanager
def server() -> Iterator[str]:
    """Run the server and yield its address once it is ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CHATSTREAM_")}
    command = [sys.executable, "-m", "chatstream", *SERVER]
    with subprocess.Popen(
        command, env=env | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"chat page\s+(http://\S+?)/?$", line.strip()):
                    yield found[1]
                    return
            raise RuntimeError(f"the server ended with status {process.wait(10)}")
        finally:
            process.terminate()


async def send(client: httpx2.AsyncClient, record: CallRecord, begin_s: float) -> float:
    """Send a call at its time and fill its record; return the lateness in seconds."""
    call = record.call
    await asyncio.sleep(begin_s + call.at_s - time.monotonic())
    late_s = time.monotonic() - begin_s - call.at_s
    record.attempts = 1
    body = {"user_input": " ".join(["w"] * call.output_tokens)}
    async with client.stream("POST", "/chat_stream", json=body, headers={"accept": "text/event-stream"}) as answer:
        if answer.status_code != 200:
            record.end = "queue_timeout" if b"queue_timeout" in await answer.aread() else "queue_full"
        record.admitted_s = call.at_s
        event = ""
        async for line in answer.aiter_lines():
            now_s = time.monotonic() - begin_s
            if line.startswith("event:"):
                event = line.removeprefix("event:").strip()
                if event == "token" and record.first_token_s is None:
                    record.first_token_s = now_s
            elif line.startswith("data:") and event != "token":
                read_event(record, event, json.loads(line.removeprefix("data:")))
    record.ended_s = time.monotonic() - begin_s
    return late_s


def read_event(record: CallRecord, event: str, data: dict[str, Any]) -> None:
    if event == "started":
        record.started_s = record.call.at_s + data["waited_seconds"]
    elif event == "done":
        record.end = "finished"
        record.generated_tokens = data["usage"]["completion_tokens"]
    elif event == "error":
        record.end = "expired" if data["code"] == "queue_timeout" else data["code"]


def measured_engine(records: list[CallRecord]) -> EngineModel:
    """Return the measured speed of the engine, by medians over the answers."""
    served = [record for record in records if record.end == "finished" and record.generated_tokens > 20]
    token_s = statistics.median(
        ((r.ended_s or 0.0) - (r.first_token_s or 0.0)) / (r.generated_tokens - 1) for r in served
    )
    prefill_s = statistics.median((r.first_token_s or 0.0) - (r.started_s or 0.0) for r in served) - token_s
    return EngineModel(prefill_tokens_per_s=PROMPT_TOKENS / prefill_s, time_per_token_s=token_s)


async def replay(url: str, calls: list[Call]) -> tuple[Figures, EngineModel, float]:
    """Return the figures of the real server, the speed of its engine and the p99 of our lateness."""
    records = [CallRecord(call) for call in calls]
    limits = httpx2.Limits(max_connections=None)
    # No cookies: requests of one browser session run one after the other.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    async with httpx2.AsyncClient(
        base_url=url, timeout=120.0, limits=limits, cookies=no_cookies, trust_env=False
    ) as client:
        begin_s = time.monotonic() + 1.0
        lateness_s = sorted(await asyncio.gather(*(send(client, record, begin_s) for record in records)))
    run = Run(records, [], end_s=time.monotonic() - begin_s, busy_slot_s=0.0, num_events=0)
    figures = measure(run, ttft_slo_s=SLO_S, engine=ENGINE, num_slots=SLOTS)
    return figures, measured_engine(records), lateness_s[int(0.99 * len(lateness_s))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="duration of the arrivals for each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.9, 1.5], help="multiples of the capacity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    console = Console(width=120)
    written = []
    for load in options.loads:
        calls = make_calls(load, options.seconds, options.seed)
        with server() as url:
            real, engine, late_s = asyncio.run(replay(url, calls))
        ours = simulated(calls, engine)
        console.print(compare(load, ours, real, late_s))
        prefill_s = PROMPT_TOKENS / engine.prefill_tokens_per_s
        console.print(
            f"measured engine: {prefill_s:.3f} s before the first token, then {engine.time_per_token_s:.4f} s per token"
        )
        written.append({"load": load, "late_p99_s": late_s, "simulated": ours.as_dict(), "real": real.as_dict()})
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def compare(load: float, ours: Figures, real: Figures, late_s: float) -> Table:
    void = "" if late_s <= MAX_LATENESS_S else ": VOID, the machine was too busy"
    title = f"load {load:g}, {ours.offered} calls; calls were sent late by {1000 * late_s:.1f} ms (p99){void}"
    table = Table(title=title, title_justify="left")
    for name in ("", "simulated", "real", "difference", f"goal {MAX_DIFFERENCE:.0%}"):
        table.add_column(name, justify="right" if name else "left")
    rows = (
        ("good service", ours.attainment, real.attainment, True),
        ("wait, median s", ours.wait_p50_s, real.wait_p50_s, True),
        ("wait, mean s", ours.wait_mean_s, real.wait_mean_s, False),
        ("first token, p90 s", ours.ttft_p90_s, real.ttft_p90_s, False),
        ("rejected", ours.refused / ours.offered, real.refused / real.offered, False),
    )
    for name, a, b, has_goal in rows:
        a, b = a or 0.0, b or 0.0
        difference = abs(a - b) / b if b else 0.0
        verdict = ("met" if difference <= MAX_DIFFERENCE else "MISSED") if has_goal else ""
        table.add_row(name, f"{a:.3f}", f"{b:.3f}", f"{difference:.1%}", verdict)
    return table


if __name__ == "__main__":
    main()
