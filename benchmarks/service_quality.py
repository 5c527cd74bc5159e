"""Service quality of the scheduler and of the rules of other projects, in virtual time on the same calls.

    python benchmarks/service_quality.py [--quick] [--only Q5 Q9] [--json FILE]

Each row is the median over the seeds, with a bootstrap 95 % interval and the value of every seed. The baselines
(`baselines.py`) run in the same process with the same calls, engine and clients. Unless a row says otherwise:

    calls    W-conv, TTFT SLO 30 s, over *offered* calls; the first tenth is warm-up
    engine   one processor: 1,000 prompt tokens per second, 20 ms per answer token, one token of each
             generation in rotation, prompts in chunks of 256 between two tokens (the plan of the step loop);
             4 slots. A mean request is 5.4 s of work, so the SLO is 5.6 mean requests
    ours     max_queue_size="auto", ttft_slo_s=30, and the defaults

The goals were fixed before the code was written. A missed goal is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import simulating
from baselines import Fifo, WithOtherEstimates, little
from rich.console import Console
from rich.table import Table

from chatstream.scheduler import Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.scheduler.policies import SpfQueue
from chatstream.simulation import (
    WORKLOADS,
    Call,
    CallRecord,
    ClientBehaviour,
    EngineModel,
    Figures,
    Run,
    Simulation,
    measure,
)
from chatstream.simulation.engine import SimulatedEngine
from chatstream.simulation.measures import attainment, eta_figures, is_good, quantile

ENGINE = EngineModel(slowdown_per_slot=1.0, prefill_chunk_tokens=256)
SLOTS = 4
SLO_S = 30.0
CHAT = WORKLOADS["conv"]
REQUEST_S = 1 / CHAT.capacity_per_s(ENGINE, SLOTS)
"""Seconds of engine work of a mean request."""
SERVICE_S = REQUEST_S * SLOTS
"""Seconds of a mean request in its slot when all slots are in use."""
RESIDUAL_S = SERVICE_S * (1 + 0.7**2) / 2
"""Mean residual service time of a running request; 0.7 is the CV of the work of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Amount of simulation for each question."""

    seeds: tuple[int, ...]
    hours: float
    starts: int
    """Q3"""
    steps: int
    """Q1"""
    updates: int
    """Q15"""


FULL = Size(seeds=(1, 2, 3, 4, 5), hours=6.0, starts=1_000_000, steps=1_400_000, updates=1_000_000)
QUICK = Size(seeds=(1, 2, 3), hours=1.0, starts=10_000, steps=20_000, updates=50_000)


@dataclass(slots=True, kw_only=True)
class Row:
    """One figure with one value per seed. A row without a goal is a baseline or a comparison."""

    name: str
    values: list[float]
    at_least: float | None = None
    at_most: float | None = None
    digits: int = 3

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.median >= self.at_least) and (
            self.at_most is None or self.median <= self.at_most
        )

    @property
    def goal(self) -> str:
        bounds = [f">= {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        return ", ".join(bounds)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the median by the percentile bootstrap (Efron 1979) over the seeds."""
        rng = random.Random(1)
        medians = sorted(statistics.median(rng.choices(self.values, k=len(self.values))) for _ in range(2000))
        return medians[49], medians[1949]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A part of the benchmark."""

    id: str
    title: str
    answer: Callable[[Size], list[Row]]


QUESTIONS: list[Question] = []


def question(id: str, title: str) -> Callable[[Callable[[Size], list[Row]]], Callable[[Size], list[Row]]]:
    def register(answer: Callable[[Size], list[Row]]) -> Callable[[Size], list[Row]]:
        QUESTIONS.append(Question(id=id, title=title, answer=answer))
        return answer

    return register


# --- runs -------------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> SchedulerSettings:
    """Return our settings; a simulated engine neither hangs nor ignores an abort."""
    ours: dict[str, Any] = {
        "max_concurrency": SLOTS,
        "max_queue_size": "auto",
        "ttft_slo_s": SLO_S,
        "stall_timeout_s": None,
        "abort_timeout_s": None,
    }
    return SchedulerSettings(**ours | changes)


class NoisyOracle:
    """Predicts the work of a request with a log-normal error, as a learned predictor would. `sigma` 0: clairvoyant."""

    def __init__(self, calls: Sequence[Call], sigma: float, seed: int) -> None:
        rng = random.Random(f"oracle {seed}")
        per_token = 1 / (ENGINE.prefill_tokens_per_s * ENGINE.time_per_token_s)
        self._work = [
            call.output_tokens * rng.lognormvariate(0.0, sigma) + call.prompt_tokens * per_token for call in calls
        ]

    def predict(self, arrival: Arrival) -> float:
        return self._work[int(arrival.request_id.partition(".")[0])]

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        pass


@cache
def chat_calls(load: float, seed: int, hours: float) -> list[Call]:
    return CHAT.calls_at_load(load, ENGINE, SLOTS, seed=seed, duration_s=hours * 3600)


def scheduler(rule: str, calls: Sequence[Call], seed: int) -> Any:
    """Return the scheduler of a rule by name."""
    if rule == "ours fcfs":
        return Scheduler(settings())
    if rule == "ours fair":
        return Scheduler(settings(policy="fair"))
    if rule == "ours spf, own history":
        return Scheduler(settings(policy="spf"))
    if rule.startswith("ours spf, sigma "):
        own = settings(policy="spf")
        predictor = NoisyOracle(calls, float(rule.rpartition(" ")[2]), seed)
        return Scheduler(own, queue=SpfQueue(own.spf_ageing_s_per_token, predictor))
    return {
        "unbounded FIFO": lambda: Fifo(SLOTS),
        "ChatStream 0.3 (5 wait)": lambda: Fifo(SLOTS, bound=5),
        "bound 512": lambda: Fifo(SLOTS, bound=512),
        "5 wait + expiry": lambda: Fifo(SLOTS, bound=5, expire_s=SLO_S),
        "Little + expiry": lambda: Fifo(SLOTS, bound=little(SLO_S, SLOTS, SERVICE_S), expire_s=SLO_S),
        "mean backlog <= 0.85 SLO": lambda: Fifo(SLOTS, max_backlog_s=0.85 * SLO_S),
    }[rule]()


@cache
def chat_run(rule: str, load: float, seed: int, hours: float) -> Run:
    calls = chat_calls(load, seed, hours)
    is_ours = rule.startswith("ours")
    return Simulation(scheduler=scheduler(rule, calls, seed), engine_model=ENGINE, is_exact=is_ours, seed=seed).run(
        calls
    )


@cache
def chat_figures(rule: str, load: float, seed: int, hours: float) -> Figures:
    return measure(chat_run(rule, load, seed, hours), ttft_slo_s=SLO_S, engine=ENGINE, num_slots=SLOTS)


def over_seeds(
    size: Size, rule: str, load: float, value: Callable[[Figures], float], name: str = "", **goal: float
) -> Row:
    values = [value(chat_figures(rule, load, seed, size.hours)) for seed in size.seeds]
    return Row(name=name or rule, values=values, **goal)  # type: ignore[arg-type]


OTHERS = (
    "unbounded FIFO",
    "ChatStream 0.3 (5 wait)",
    "bound 512",
    "5 wait + expiry",
    "Little + expiry",
    "mean backlog <= 0.85 SLO",
)

# --- Q1 to Q4: invariants ---------------------------------------------------------------------------------------------


@question("Q1", "Interleaving: each running request gets one token per step (real StepEngine, trivial model)")
def interleave(size: Size) -> list[Row]:
    from step_loop_fairness import measure_steps

    steps, tokens, largest, violations = measure_steps(size.steps)
    return [
        Row(name="largest token difference between two running requests", values=[largest], at_most=1, digits=0),
        Row(name="violations", values=[violations], at_most=0, digits=0),
        Row(name="steps", values=[steps], digits=0),
        Row(name="tokens", values=[tokens], digits=0),
    ]


@question("Q2", "Work conservation: decisions that leave a slot free while a request may start")
def work_conservation(size: Size) -> list[Row]:
    rows = []
    for policy in ("fcfs", "fair", "priority", "spf", "fair-token"):
        core = Scheduler(settings(policy=policy))
        counts: Counter[str] = Counter()

        def watch(now_s: float, core: Scheduler = core, counts: Counter[str] = counts) -> None:
            stats = core.stats()
            counts["all"] += 1
            counts["idle"] += stats.running < SLOTS and stats.waiting > 0

        calls = chat_calls(1.2, 1, min(size.hours, 2.0))
        grain = 32 if policy == "fair-token" else 256
        Simulation(scheduler=core, engine_model=ENGINE, grain_tokens=grain, watch=watch).run(calls)
        rows.append(Row(name=f"{policy} (of {counts['all']:,})", values=[counts["idle"]], at_most=0, digits=0))
    return rows


class Backlogged:
    """Clients with permanently waiting requests, and the service difference of every pair of clients.

    A prompt counts when it is computed, or, as in the paper, when its request starts (`counts_prompts_at_start`).
    """

    NUM_CLIENTS = 8

    def __init__(
        self,
        policy: str,
        *,
        seed: int,
        grain_tokens: int,
        prompts: bool,
        counts_prompts_at_start: bool = False,
        **changes: Any,
    ) -> None:
        own = settings(policy=policy, max_queue_size=100_000, ttft_slo_s=None, **changes)
        self.core = Scheduler(own)
        self.engine = SimulatedEngine(ENGINE, grain_tokens=grain_tokens, grain_prompt_tokens=64 if prompts else None)
        self.served = [0.0] * self.NUM_CLIENTS
        self.num_starts = 0
        self.longest_prompt = self.largest_batch = self._batch = 0
        self._prompts = prompts
        self._counts_at_start = counts_prompts_at_start
        self._calls: dict[str, tuple[int, int, int]] = {}
        self._rng = random.Random(f"backlogged {seed}")
        self._pairs = [*combinations(range(self.NUM_CLIENTS), 2)]
        self._lows = [0.0] * len(self._pairs)
        self._highs = [0.0] * len(self._pairs)
        self.core.open(0.0, can_preempt=True)
        for client in range(self.NUM_CLIENTS):
            for _ in range(3):
                self._submit(client, 0.0)
        self._apply_decisions(0.0)

    @property
    def gap(self) -> float:
        """The largest |W_f(t1, t2) - W_g(t1, t2)| over all pairs of clients and all times."""
        return max(high - low for low, high in zip(self._lows, self._highs, strict=True))

    def run(self, num_starts: int) -> None:
        """Run until `num_starts` requests have started, without the initial starts before all clients wait."""
        while self.num_starts < num_starts:
            now_s = self.engine.next_s()
            report = self.engine.take_next()
            self._report_tokens(report.generation.grant, report.num_tokens, report.num_prompt_tokens, now_s)
            for other in self.engine.unreported(now_s):
                self._report_tokens(other.generation.grant, other.num_tokens, other.num_prompt_tokens, now_s)
            if report.generation.is_complete:
                self.core.on_ended(report.generation.grant, Outcome.FINISHED, "stop", now_s)
            self._apply_decisions(now_s)
            self._measure()

    def _submit(self, client: int, now_s: float) -> None:
        request_id = str(len(self._calls) and int(next(reversed(self._calls))) + 1)
        prompt, answer = CHAT.prompt.draw(self._rng) if self._prompts else 0, CHAT.output.draw(self._rng)
        self._calls[request_id] = (client, prompt, answer)
        self.longest_prompt = max(self.longest_prompt, prompt)
        self.core.submit(Arrival(request_id=request_id, client=f"c{client}", prompt_tokens=prompt), now_s)

    def _report_tokens(self, grant: Grant, tokens: int, prompt_tokens: int, now_s: float) -> None:
        self.served[self._calls[grant.request_id][0]] += 2.0 * tokens + (0 if self._counts_at_start else prompt_tokens)
        self.core.on_tokens(grant, tokens, now_s, prompt_tokens=prompt_tokens)

    def _apply_decisions(self, now_s: float) -> None:
        while events := self.core.take_events():
            for event in events:
                if isinstance(event, ev.Started):
                    client, prompt, answer = self._calls[event.request_id]
                    self.num_starts += 1
                    self.served[client] += prompt if self._counts_at_start else 0
                    self._batch += prompt + answer
                    self.largest_batch = max(self.largest_batch, self._batch)
                    self.engine.start(event.grant, prompt, answer, now_s)
                    self._submit(client, now_s)
                elif isinstance(event, ev.Resumed):
                    self.engine.resume(event.grant, now_s)
                elif isinstance(event, ev.PreemptRequested) and event.request_id in self.engine:
                    self.engine.preempt(event.request_id, now_s)
                    self.core.on_preempted(event.grant, now_s)
                elif isinstance(event, ev.Finished):
                    self._batch -= sum(self._calls.pop(event.request_id)[1:])

    def _measure(self) -> None:
        served, lows, highs = self.served, self._lows, self._highs
        for i, (f, g) in enumerate(self._pairs):
            ahead = served[f] - served[g]
            if ahead < lows[i]:
                lows[i] = ahead
            elif ahead > highs[i]:
                highs[i] = ahead


@question("Q3", "VTC: service gap between backlogged clients, against 2 max(w_p L_input, w_q M)")
def vtc_bound(size: Size) -> list[Row]:
    at_start: dict[str, Any] = {"seed": 1, "grain_tokens": 1_000_000, "prompts": True, "counts_prompts_at_start": True}
    fair = Backlogged("fair", **at_start)
    fair.run(size.starts)
    # M: the maximum of prompt and answer tokens of all running requests.
    bound = 2 * max(1.0 * fair.longest_prompt, 2.0 * fair.largest_batch)
    read = Backlogged("fair", **at_start | {"counts_prompts_at_start": False})
    read.run(min(size.starts, 20_000))
    fcfs = Backlogged("fcfs", **at_start)
    fcfs.run(min(size.starts, 20_000))
    return [
        Row(name=f"gap / bound, {fair.num_starts:,} starts", values=[fair.gap / bound], at_most=1.0),
        Row(name="gap, weighted tokens", values=[fair.gap], digits=0),
        Row(name="bound", values=[bound], digits=0),
        Row(
            name=f"gap if a prompt counts when it is computed, {read.num_starts:,} starts", values=[read.gap], digits=0
        ),
        Row(name=f"fcfs, gap after {fcfs.num_starts:,} starts (grows for ever)", values=[fcfs.gap], digits=0),
    ]


@question("Q4", "Token-level fairness: the same gap when counters decide at the end of each time slice")
def token_fairness(size: Size) -> list[Row]:
    # (slots, tokens of a slice, with prompts); the goal is for 64 units of service on all slots together.
    variants = [(1, 32, False), (SLOTS, 32 // SLOTS, False), (SLOTS, 32, False), (SLOTS, 32 // SLOTS, True)]
    rows: list[Row] = []
    for slots, slice_tokens, prompts in variants:
        gaps = {"fair": [0.0], "fair-token": [0.0]}
        for policy in gaps:
            runs = [
                Backlogged(
                    policy,
                    seed=seed,
                    grain_tokens=slice_tokens,
                    prompts=prompts,
                    max_concurrency=slots,
                    slice_tokens=slice_tokens if policy == "fair-token" else None,
                    max_resident=64,
                )
                for seed in size.seeds
            ]
            for run in runs:
                run.run(max(1000, size.starts // 500))
            gaps[policy] = [run.gap for run in runs]
        ratio = [slot / token for slot, token in zip(gaps["fair"], gaps["fair-token"], strict=True)]
        what = f"{slots} slots, slices of {slice_tokens}{', with prompts' if prompts else ''}"
        has_goal = slots * slice_tokens == 32 and not prompts
        rows += [
            Row(name=f"fair-token, {what}", values=gaps["fair-token"], digits=0, at_most=128 if has_goal else None),
            Row(name="  fair (by slots)", values=gaps["fair"], digits=0),
            Row(name="  times tighter", values=ratio, digits=1, at_least=40 if has_goal else None),
        ]
    return rows


# --- Q5 to Q8: overload -----------------------------------------------------------------------------------------------


def good(figures: Figures) -> float:
    return figures.attainment


@question("Q5", "Good service at 2.0x, first come, first served")
def overload_fcfs(size: Size) -> list[Row]:
    rows = [
        over_seeds(size, "ours fcfs", 2.0, good, at_least=0.48),
        over_seeds(size, "ours fcfs", 2.0, lambda f: f.goodput_ratio, "ours fcfs, goodput / capacity", at_least=0.95),
    ]
    for other in OTHERS:
        rows.append(over_seeds(size, other, 2.0, good))
        rows.append(over_seeds(size, other, 2.0, lambda f: f.goodput_ratio, f"{other}, goodput / capacity"))
    return rows


@question("Q6", "Good service at 2.0x, shortest predicted first")
def overload_spf(size: Size) -> list[Row]:
    clairvoyant = over_seeds(size, "ours spf, sigma 0", 2.0, good)
    noisy = over_seeds(size, "ours spf, sigma 0.7", 2.0, good, at_least=0.59)
    ratio = [a / b for a, b in zip(noisy.values, clairvoyant.values, strict=True)]
    return [
        noisy,
        over_seeds(
            size, "ours spf, sigma 0.7", 2.0, lambda f: f.goodput_ratio, "sigma 0.7, goodput / capacity", at_least=1.15
        ),
        Row(name="sigma 0.7 / clairvoyant", values=ratio, at_least=0.90),
        clairvoyant,
        over_seeds(size, "ours spf, own history", 2.0, good),
    ]


@question("Q7", "Good service at 0.8x")
def underload(size: Size) -> list[Row]:
    rows = [
        over_seeds(size, "ours fcfs", 0.8, good, at_least=0.91),
        over_seeds(size, "ours spf, sigma 0.7", 0.8, good, at_least=0.925),
    ]
    return rows + [over_seeds(size, other, 0.8, good) for other in OTHERS]


@question("Q8", "P99 of the time to first token of those admitted, at 2.0x, over the SLO")
def admitted_tail(size: Size) -> list[Row]:
    def tail(figures: Figures) -> float:
        return (figures.ttft_p99_s or 0.0) / SLO_S

    rows = [over_seeds(size, "ours fcfs", 2.0, tail, at_most=1.1)]
    return rows + [over_seeds(size, other, 2.0, tail) for other in OTHERS]


# --- Q9 to Q11: clients -----------------------------------------------------------------------------------------------


@question("Q9", "Light users (47 of 50, without the 3 with the most demand, Zipf 1.2) at 2.0x")
def light_users(size: Size) -> list[Row]:
    def light(figures: Figures) -> float:
        some = [one for one in figures.clients if one.client not in ("client 1", "client 2", "client 3")]
        return sum(one.good for one in some) / sum(one.offered for one in some)

    fair = over_seeds(size, "ours fair", 2.0, light, at_least=0.62)
    fcfs = over_seeds(size, "ours fcfs", 2.0, light)
    ratio = [a / b for a, b in zip(fair.values, fcfs.values, strict=True)]
    return [
        fair,
        Row(name="fair / fcfs", values=ratio, at_least=1.35),
        fcfs,
        over_seeds(size, "ours fair", 2.0, good, "ours fair, all clients"),
        over_seeds(size, "ours fair", 2.0, lambda f: f.worst_share, "ours fair, smallest part of a fair share"),
        over_seeds(size, "ours fcfs", 2.0, lambda f: f.worst_share, "ours fcfs, smallest part of a fair share"),
    ]


@question("Q10", "One client at 10x, fifty equal others at 0.5x in total: the others")
def abuse(size: Size) -> list[Row]:
    workload, hours = WORKLOADS["abuse"], min(size.hours, 2.0)
    caps = {"max_waiting_per_client": 3, "max_running_per_client": 2, "max_queue_size": 50}
    slices = {"slice_tokens": 64, "max_resident": 16}
    variants: dict[str, Callable[[], Any]] = {
        "fair, slices of 64, at most 3 waiting and 2 running per client": lambda: Scheduler(
            settings(policy="fair", **caps, **slices)
        ),
        "the same without slices": lambda: Scheduler(settings(policy="fair", **caps)),
        "fcfs": lambda: Scheduler(settings()),
        "unbounded FIFO": lambda: Fifo(SLOTS),
        "ChatStream 0.3 (5 wait)": lambda: Fifo(SLOTS, bound=5),
    }
    rows = []
    for engine, where in ((ENGINE, ""), (EngineModel(), ", independent slots")):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for seed in size.seeds:
            calls = workload.calls_at_load(0.5, engine, SLOTS, seed=seed, duration_s=hours * 3600)
            alone = [call for call in calls if call.client != "abuser"]
            calm_p99_s = ttft_p99_s(Simulation(scheduler=Scheduler(settings()), engine_model=engine).run(alone).records)
            for name, make in variants.items():
                run = Simulation(scheduler=make(), engine_model=engine, grain_tokens=64, is_exact=True).run(calls)
                records = [record for record in run.records if record.call.client != "abuser"]
                found[name].append((attainment(records, SLO_S), ttft_p99_s(records) / calm_p99_s))
        for number, (name, pairs) in enumerate(found.items()):
            has_goal = number < 2
            good_service, tail = ([pair[kind] for pair in pairs] for kind in (0, 1))
            rows += [
                Row(name=f"{name}{where}: good", values=good_service, at_least=0.99 if has_goal else None),
                Row(name="  P99 TTFT / without abuse", values=tail, at_most=1.5 if has_goal else None, digits=2),
            ]
    return rows


def ttft_p99_s(records: Sequence[CallRecord]) -> float:
    return quantile(sorted(record.ttft_s for record in records if record.ttft_s is not None), 0.99) or 0.0


@question(
    "Q11", "Base load 0.7, 5x for 120 s, clients give up after 30 s and retry: seconds after the spike to 0.9 good"
)
def spike(size: Size) -> list[Row]:
    workload = WORKLOADS["spike"]
    assert workload.spike is not None
    end_s = workload.spike.start_s + workload.spike.duration_s
    patient = ClientBehaviour(max_attempts=4, patience_s=SLO_S)
    fixed = replace(patient, retry_delay_s=1.0)
    variants: dict[str, tuple[Callable[[], Any], ClientBehaviour, bool]] = {
        "ours fcfs": (lambda: Scheduler(settings()), patient, True),
        "ours fcfs, but retries after 1 s": (lambda: Scheduler(settings()), fixed, True),
        "ChatStream 0.3 (5 wait), retries after 1 s": (lambda: Fifo(SLOTS, bound=5), fixed, True),
        "unbounded FIFO": (lambda: Fifo(SLOTS), fixed, True),
        "unbounded FIFO, disconnects not noticed": (lambda: Fifo(SLOTS), fixed, False),
    }
    rows = []
    seeds = range(1, 4 * len(size.seeds) + 1)  # more seeds, because a spike is short
    for name, (make, clients, notices_disconnects) in variants.items():
        recoveries, attempts, parts = [], [], []
        for seed in seeds:
            calls = workload.calls_at_load(0.7, ENGINE, SLOTS, seed=seed, duration_s=5400)
            simulation = Simulation(
                scheduler=make(),
                engine_model=ENGINE,
                clients=clients,
                seed=seed,
                notices_disconnects=notices_disconnects,
                is_exact=name.startswith("ours"),
            )
            records = simulation.run(calls).records
            recoveries.append(recovery_s(records, end_s))
            affected = [record for record in records if workload.spike.start_s <= record.call.at_s < end_s + 300]
            attempts.append(statistics.fmean(record.attempts for record in affected))
            parts.append(attainment(affected, SLO_S))
        is_ours = name == "ours fcfs"
        rows += [
            Row(name=f"{name}: seconds", values=recoveries, digits=0, **({"at_most": 10.0} if is_ours else {})),
            Row(name=f"{name}: attempts per call", values=attempts, digits=2, **({"at_most": 1.7} if is_ours else {})),
            Row(name=f"{name}: good, spike and 5 minutes after", values=parts),
        ]
    return rows


def recovery_s(records: Sequence[CallRecord], end_s: float) -> float:
    """Return the time from the end of the spike to the first good call that starts a run of 20 calls, 9 of 10 good."""
    after = [record for record in records if record.call.at_s >= end_s]
    for i in range(len(after) - 20):
        if is_good(after[i], SLO_S) and attainment(after[i : i + 20], SLO_S) >= 0.9:
            return after[i].call.at_s - end_s
    return after[-1].call.at_s - end_s


# --- Q12 to Q15: estimates and positions ------------------------------------------------------------------------------


@dataclass(slots=True)
class EtaSample:
    """Started calls that had an ETA on arrival and waited at least a second."""

    records: list[CallRecord]
    others: list[dict[str, float]] = field(default_factory=list)


@cache
def eta_sample(kind: str, seed: int, hours: float, engine: EngineModel = ENGINE) -> EtaSample:
    """`stationary`: 0.9x; `overload`: 1.5x, a queue of 40; `drift`: answers 1.8 times as long in the second half."""
    load = 1.5 if kind == "overload" else 0.9
    calls = CHAT.calls_at_load(load, engine, SLOTS, seed=seed, duration_s=hours * 3600)
    if kind == "drift":
        half = len(calls) // 2
        calls = calls[:half] + [call._replace(output_tokens=round(1.8 * call.output_tokens)) for call in calls[half:]]
    queue_size = 100_000 if kind == "stationary" else 40
    core = WithOtherEstimates(
        settings(ttft_slo_s=None, max_queue_size=queue_size),
        qlm_s=CHAT.output.mean * ENGINE.time_per_token_s,
    )
    run = Simulation(scheduler=core, engine_model=engine, records_eta=True, is_exact=True, seed=seed).run(calls)
    found = EtaSample([])
    for number, record in list(enumerate(run.records))[len(run.records) // 10 :]:
        if record.eta is not None and record.waited_s is not None and record.waited_s >= 1.0:
            found.records.append(record)
            found.others.append(core.others[f"{number}.1"])
    return found


def errors(found: EtaSample, other: str) -> tuple[float, float, float]:
    """Return MdAPE, MAE / mean wait and bias / mean wait of another estimator."""
    waits_s = [record.waited_s or 0.0 for record in found.records]
    etas_s = [one[other] for one in found.others]
    mean_s = statistics.fmean(waits_s)
    return (
        statistics.median(abs(a - b) / b for a, b in zip(etas_s, waits_s, strict=True)),
        statistics.fmean(abs(a - b) for a, b in zip(etas_s, waits_s, strict=True)) / mean_s,
        statistics.fmean(a - b for a, b in zip(etas_s, waits_s, strict=True)) / mean_s,
    )


def eta_rows(size: Size, kind: str, *, mdape: float, mae: float | None) -> list[Row]:
    runs = [eta_sample(kind, seed, size.hours) for seed in size.seeds]
    ours = [eta_figures(run.records) for run in runs]
    assert all(ours)
    rows = [
        Row(name="ours: MdAPE", values=[one.median_error_ratio for one in ours if one], at_most=mdape),
        Row(name="ours: MAE / mean wait", values=[one.mean_error_ratio for one in ours if one], at_most=mae),
        Row(
            name="ours: bias / mean wait",
            values=[one.bias_ratio for one in ours if one],
            at_least=-0.03,
            at_most=0.03,
        ),
    ]
    for other in ("gradio", "qlm", "les"):
        values = [errors(run, other) for run in runs]
        for number, what in enumerate(("MdAPE", "MAE / mean wait", "bias / mean wait")):
            rows.append(Row(name=f"{other}: {what}", values=[one[number] for one in values]))
    rows.append(Row(name="estimates measured", values=[len(run.records) for run in runs], digits=0))
    independent = [eta_sample(kind, seed, size.hours / 4, EngineModel()) for seed in size.seeds]
    mdapes = [one.median_error_ratio for one in (eta_figures(run.records) for run in independent) if one]
    rows.append(Row(name="ours, independent slots: MdAPE", values=mdapes))
    rows.append(Row(name="gradio, independent slots: MdAPE", values=[errors(run, "gradio")[0] for run in independent]))
    return rows


@question("Q12", "ETA on arrival at 0.9x")
def eta_stationary(size: Size) -> list[Row]:
    return eta_rows(size, "stationary", mdape=0.17, mae=0.16)


@question("Q13", "ETA on arrival when answers suddenly become 1.8 times as long (0.9x before, queue of 40)")
def eta_drift(size: Size) -> list[Row]:
    return eta_rows(size, "drift", mdape=0.12, mae=None)


@question("Q14", "Share of requests that start within the 90 % ETA")
def eta_coverage(size: Size) -> list[Row]:
    rows = []
    for kind in ("stationary", "overload", "drift"):
        figures = [eta_figures(eta_sample(kind, seed, size.hours).records) for seed in size.seeds]
        values = [one.p90_coverage for one in figures if one]
        rows.append(Row(name=kind, values=values, at_least=0.88, at_most=0.92))
    return rows


@question("Q15", "Growing positions under fcfs, checked after each event")
def positions(size: Size) -> list[Row]:
    core = Scheduler(settings(ttft_slo_s=None, max_queue_size=60, max_wait_s=200.0, admit_probability=0.0))
    last: dict[str, int] = {}
    counts: Counter[str] = Counter()

    def watch(now_s: float) -> None:
        for request_id in list(last):
            position = core.position(request_id)
            if position is None:
                del last[request_id]
                continue
            counts["updates"] += 1
            counts["grown"] += position > last[request_id]
            last[request_id] = position

    def log(event: ev.Event) -> None:
        if isinstance(event, ev.Admitted):
            last[event.request_id] = event.position

    calls = chat_calls(1.5, 1, 6.0)[: size.updates // 100]
    clients = ClientBehaviour(patience_s=250.0, max_attempts=2)
    Simulation(scheduler=core, engine_model=ENGINE, watch=watch, log=log, clients=clients).run(calls)
    return [
        Row(name="grown", values=[counts["grown"]], at_most=0, digits=0),
        Row(name="updates", values=[counts["updates"]], digits=0),
    ]


# --- Q16 to Q18 -------------------------------------------------------------------------------------------------------


@question(
    "Q16", "Priority: one class at 0.3x above one at 3x (60 s of waiting outweigh one level, 10 levels independent)"
)
def priority(size: Size) -> list[Row]:
    variants: dict[str, dict[str, Any]] = {
        "priority": {"policy": "priority"},
        "priority, slices of 32 tokens": {
            "policy": "priority",
            "slice_tokens": 32,
            "max_resident": 32,
        },
        "fcfs": {"policy": "fcfs"},
    }
    rows = []
    for name, changes in variants.items():
        own = settings(max_queue_size=50, ttft_slo_s=None, **changes)
        ratios, violations, low_waits = [], [], []
        for seed in size.seeds:
            calls = two_classes(seed, min(size.hours, 2.0))
            log: list[ev.Event] = []
            run = Simulation(scheduler=Scheduler(own), engine_model=ENGINE, grain_tokens=32, log=log.append).run(calls)
            waits_s = {
                level: sorted(v.waited_s for v in run.records if v.call.priority == level and v.waited_s is not None)
                for level in (5, -5)
            }
            ratios.append((quantile(waits_s[5], 0.99) or 0.0) / RESIDUAL_S)
            low_waits.append(waits_s[-5][-1])
            violations.append(passed_too_late(log, [call.priority for call in calls], own.ageing_s))
        is_ours = name != "fcfs"
        rows += [
            Row(
                name=f"{name}: P99 wait of the high class / mean residual service",
                values=ratios,
                at_most=1.0 if is_ours else None,
            ),
            Row(name="  longest wait of the low class, s", values=low_waits, digits=0),
        ]
        if is_ours:
            passed = "  starts ahead of a request with a smaller key"
            rows.append(Row(name=passed, values=violations, at_most=0, digits=0))
    return rows


def two_classes(seed: int, hours: float) -> list[Call]:
    high = CHAT.calls_at_load(0.3, ENGINE, SLOTS, seed=seed, duration_s=hours * 3600)
    low = CHAT.calls_at_load(3.0, ENGINE, SLOTS, seed=seed + 100, duration_s=hours * 3600)
    calls = [call._replace(priority=5) for call in high] + [call._replace(priority=-5) for call in low]
    return sorted(calls, key=lambda call: call.at_s)


def passed_too_late(log: Sequence[ev.Event], priorities: Sequence[int], ageing_s: float) -> int:
    """Count, from the log alone, the starts ahead of a waiting request with a smaller (older) key."""
    keys: dict[str, float] = {}
    violations = 0
    for event in log:
        if isinstance(event, ev.Admitted):
            number = int(event.request_id.partition(".")[0])
            keys[event.request_id] = event.at_s - ageing_s * priorities[number]
        elif isinstance(event, ev.Started):
            key = keys.pop(event.request_id)
            violations += any(other < key - 1e-9 for other in keys.values())
        elif isinstance(event, ev.Expired | ev.Cancelled):
            keys.pop(event.request_id, None)
    return violations


BATCHED = EngineModel(time_per_token_s=0.025, slowdown_per_slot=0.2)
"""Batched engine: a step takes 20 + 5 b ms for b sequences."""
ITL_SLO_S = 0.070
MAX_GAP_S = ITL_SLO_S * 1.0001
"""Step time of 10 generations, 70 ms, with a tolerance for float errors."""
CHANGE_S = 400.0
"""Time at which the speed of the engine is halved."""


@dataclass(slots=True)
class Pace:
    """Gaps between tokens, limits and token counts, from the event log."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(time, seconds per token)"""
    limits: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)
    _last_s: dict[str, float] = field(default_factory=dict)

    def log(self, event: ev.Event) -> None:
        if isinstance(event, ev.Tokens):
            before_s = self._last_s.get(event.request_id)
            if before_s is not None:
                self.gaps.append((event.at_s, (event.at_s - before_s) / event.num_tokens))
            self._last_s[event.request_id] = event.at_s
            self.tokens.append((event.at_s, event.num_tokens))
        elif isinstance(event, ev.Resumed):
            self._last_s.pop(event.request_id, None)
        elif isinstance(event, ev.LimitsChanged):
            self.limits.append((event.at_s, event.max_concurrency))

    def per_s(self, begin_s: float, end_s: float) -> float:
        return sum(number for at_s, number in self.tokens if begin_s <= at_s < end_s) / (end_s - begin_s)

    def p90_s(self, begin_s: float, end_s: float) -> float:
        return quantile(sorted(gap for at_s, gap in self.gaps if begin_s <= at_s < end_s), 0.9) or 0.0

    def back_in_slo_s(self, change_s: float) -> float:
        """Return the time from the change to the end of the last 2 s window, within 200 s, with a p90 above the SLO."""
        late = [n for n in range(100) if self.p90_s(change_s + 2 * n, change_s + 2 * n + 2) > MAX_GAP_S]
        return 2.0 * (late[-1] + 1) if late else 0.0


def paced_run(limit: int, seed: int, *, adaptive: bool, can_preempt: bool = True, slows: bool = False) -> Pace:
    calls = CHAT.calls_at_load(1.5, BATCHED, 10, seed=seed, duration_s=800)
    # Answers only: this question is about decoding.
    calls = [call._replace(prompt_tokens=0) for call in calls]
    own = settings(
        max_concurrency=32 if adaptive else limit,
        max_queue_size=1000,
        ttft_slo_s=None,
        adaptive="on" if adaptive else "off",
        itl_target_s=ITL_SLO_S,
    )
    core, pace = Scheduler(own), Pace()
    interventions: list[Any] = [(CHANGE_S, lambda simulation, now_s: simulation.engine.set_speed(0.5, now_s))]
    if adaptive:
        interventions.append((0.0, lambda simulation, now_s: core.set_limits(now_s, max_concurrency=2)))
    Simulation(
        scheduler=core,
        engine_model=BATCHED,
        grain_tokens=1,
        can_preempt=can_preempt,
        interventions=interventions if slows else interventions[1:],
        log=pace.log,
    ).run(calls)
    return pace


@question("Q17", "Adaptive concurrency: steps of 20 + 5 b ms, gaps of at most 70 ms, a never empty queue")
def adaptive(size: Size) -> list[Row]:
    throughput, oscillation, preemptible, waiting, best = [], [], [], [], []
    for seed in size.seeds[:3]:
        fixed = {limit: paced_run(limit, seed, adaptive=False) for limit in (8, 9, 10, 11)}
        within = [pace.per_s(100, 700) for pace in fixed.values() if pace.p90_s(100, 700) <= MAX_GAP_S]
        best.append(max(within))
        moving = paced_run(0, seed, adaptive=True)
        throughput.append(moving.per_s(100, 700) / best[-1])
        late = [limit for at_s, limit in moving.limits if at_s >= 150] or [moving.limits[-1][1]]
        oscillation.append((max(late) - min(late)) / 2)
        preemptible.append(paced_run(0, seed, adaptive=True, slows=True).back_in_slo_s(CHANGE_S))
        waiting.append(paced_run(0, seed, adaptive=True, can_preempt=False, slows=True).back_in_slo_s(CHANGE_S))
    # Mean residual time of a generation at 70 ms per token.
    squares = statistics.fmean(call.output_tokens**2 for call in chat_calls(0.8, 1, 1.0))
    residual_s = squares / (2 * CHAT.output.mean) * ITL_SLO_S * 2
    return [
        Row(name="tokens per second / best fixed limit within the SLO", values=throughput, at_least=0.97),
        Row(name="best fixed limit, tokens per second", values=best, digits=0),
        Row(name="amplitude of the limit after 150 s", values=oscillation, at_most=1, digits=1),
        Row(
            name="half as fast: s until p90 is within the SLO, engine preempts",
            values=preemptible,
            at_most=10,
            digits=0,
        ),
        Row(
            name="the same, engine cannot preempt (goal: mean residual + 10 s)",
            values=waiting,
            at_most=round(residual_s + 10, 1),
            digits=0,
        ),
    ]


@question("Q18", "Bursts: W-code (gaps with a CV of 13) at a mean load of 0.6")
def bursts(size: Size) -> list[Row]:
    values: dict[str, list[float]] = {"ours fcfs": [], "unbounded FIFO": [], "ChatStream 0.3 (5 wait)": []}
    for seed in size.seeds:
        calls = WORKLOADS["code"].calls_at_load(0.6, ENGINE, SLOTS, seed=seed, duration_s=min(size.hours, 3.0) * 3600)
        for rule, found in values.items():
            core = scheduler(rule, calls, seed)
            run = Simulation(scheduler=core, engine_model=ENGINE, is_exact=rule == "ours fcfs").run(calls)
            found.append(measure(run, ttft_slo_s=SLO_S, engine=ENGINE, num_slots=SLOTS).attainment)
    ratio = [a / b for a, b in zip(values["ours fcfs"], values["unbounded FIFO"], strict=True)]
    return [
        Row(name="ours fcfs / unbounded FIFO", values=ratio, at_least=1.5),
        *(Row(name=name, values=found) for name, found in values.items()),
    ]


@question("Q20", "Cost of strict first come, first served (a negative result): spf - fcfs at 2.0x, good service")
def cost_of_fcfs(size: Size) -> list[Row]:
    pairs = [
        [chat_figures(rule, 2.0, seed, size.hours).attainment for rule in ("ours spf, sigma 0.7", "ours fcfs")]
        for seed in size.seeds
    ]
    return [Row(name="the gap", values=[spf - fcfs for spf, fcfs in pairs])]


@question("M9", "Simulated requests per second of CPU, as in `chatstream simulate`")
def speed(size: Size) -> list[Row]:
    rows = []
    for name, slo_s in simulating.VARIANTS.items():
        per_s = [simulating.requests_per_s(slo_s, size.hours) for _ in size.seeds]
        rows.append(Row(name=name, values=per_s, digits=0, at_least=None if slo_s else simulating.GOAL_PER_S))
    return rows


# --- output -----------------------------------------------------------------------------------------------------------


def show(console: Console, asked: Question, rows: Sequence[Row], seconds: float) -> None:
    table = Table(title=f"{asked.id}  {asked.title}  ({seconds:.0f} s)", title_justify="left")
    for name in ("", "median", "95 %", "goal", ""):
        table.add_column(name, justify="left" if not name else "right")
    table.add_column("by seed", overflow="fold")
    for row in rows:
        low, high = row.interval()
        several = len(row.values) > 1
        table.add_row(
            row.name,
            f"{row.median:,.{row.digits}f}",
            f"{low:,.{row.digits}f} – {high:,.{row.digits}f}" if several else "",
            row.goal,
            {True: "met", False: "MISSED", None: ""}[row.is_met],
            " ".join(f"{value:,.{row.digits}f}" for value in row.values) if several else "",
        )
    console.print(table)


def answers(size: Size, only: Sequence[str]) -> Iterator[tuple[Question, list[Row], float]]:
    for asked in QUESTIONS:
        if not only or asked.id in only:
            begin_s = time.process_time()
            rows = asked.answer(size)
            yield asked, rows, time.process_time() - begin_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one hour and three seeds instead of six hours and five seeds"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="Q", help="these questions only, for example Q5")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    unknown = set(options.only) - {asked.id for asked in QUESTIONS}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(q.id for q in QUESTIONS)}")
    size = QUICK if options.quick else FULL
    console = Console(width=160)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    console.print(f"seeds {', '.join(map(str, size.seeds))}; {size.hours:g} h of virtual time per run; {machine}")
    written: dict[str, Any] = {"machine": machine, "size": asdict(size), "questions": []}
    missed = []
    for asked, rows, seconds in answers(size, options.only):
        show(console, asked, rows, seconds)
        missed += [f"{asked.id} {row.name}: {row.median:.3f}, goal {row.goal}" for row in rows if row.is_met is False]
        figures = [
            asdict(row) | {"median": row.median, "interval": row.interval(), "is_met": row.is_met} for row in rows
        ]
        written["questions"].append({"id": asked.id, "title": asked.title, "cpu_s": seconds, "rows": figures})
    console.print("Missed:" if missed else "No goal was missed.", *missed, sep="\n  ")
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
