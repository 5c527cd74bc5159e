"""`chatstream simulate`: converts options to calls and settings, runs `chatstream.simulation`, prints a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token

from chatstream.checks import check_choice, check_int, check_number, check_seconds
from chatstream.cli.options import COUNT_OR_AUTO, WHOLE_NUMBER
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from chatstream.scheduler import SchedulerSettings
    from chatstream.simulation import Call, ClientBehaviour, EngineModel, Figures, Run

REPEATABLE = Parameter(show_default=False, negative=())
GOOD_TTFT_S = 30.0
"""Time to the first token that counts as good service if no option sets one."""
WORKLOAD = "conv"
DURATION_S = 3600.0


def _whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    for token in tokens:
        if not token.value.removeprefix("-").isdecimal():
            raise ValueError(f"{token.value!r} is not a whole number")
    return tuple(int(token.value) for token in tokens)


@Parameter(name="*", group=Group("Demand", sort_key=1))
@dataclass(frozen=True, slots=True, kw_only=True)
class DemandOptions:
    """The simulated calls: their arrival times, clients and lengths."""

    workload: str | None = None
    """Synthetic calls with the statistics of real traffic: conv, code, multi, reason, small, burst, sharegpt, abuse or
    spike. [default: conv]"""
    trace: Path | None = None
    """CSV file of calls, instead of --workload: columns arrival_s, prompt_tokens, output_tokens and, optionally,
    client, priority and max_wait_s."""
    load: float | None = None
    """Offered load, as a multiple of the server's capacity. [default: 0.8; abuse 0.5; spike 0.7; a trace's own]"""
    rate: float | None = None
    """Calls per second, instead of --load."""
    users: Annotated[int | None, WHOLE_NUMBER] = None
    """Number of clients; a few of them send most of the calls. [default: the workload's, mostly 50]"""
    calls_per_user: float | None = None
    """Calls per user and hour, instead of --load."""
    duration: float | None = None
    """Seconds during which calls arrive. [default: 3600]"""
    requests: Annotated[int | None, WHOLE_NUMBER] = None
    """Number of calls, instead of --duration."""
    seed: Annotated[tuple[int, ...], Parameter(converter=_whole_numbers), REPEATABLE] = ()
    """Random seed of the calls; repeatable: the table then shows medians. [default: 1]"""
    attempts: Annotated[int, WHOLE_NUMBER] = 1
    """Attempts per call, at most: a client whose request was rejected retries after Retry-After."""
    patience: float | None = None
    """Seconds after which a client without a first token gives up, retries included. [default: never]"""


@Parameter(name="*", group=Group("Server", sort_key=2))
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The options of the same names of `chatstream serve`."""

    max_concurrency: Annotated[int, WHOLE_NUMBER] = 2
    """Requests that generate at the same time (slots); a number, not auto."""
    max_queue_size: Annotated[int | str, COUNT_OR_AUTO] = 5
    """Requests that may wait in the queue; auto: the number of requests that can start in time."""
    policy: str = "fcfs"
    """Order of the queue: fcfs, fair, priority, spf or fair-token."""
    max_wait: float | None = None
    """Seconds after which a request that has not started ends with queue_timeout. [default: never]"""
    ttft_slo: float | None = None
    """Target time to the first token, in seconds; a request that cannot meet it is rejected, or ends
    while it waits. [default: none]"""
    max_running_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Running requests per client, at most; requests of other clients pass the further ones. [default: no limit]"""
    max_waiting_per_client: Annotated[int | None, WHOLE_NUMBER] = None
    """Waiting requests per client, at most; the next one is rejected. [default: no limit]"""
    slice_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Tokens after which a running request is preempted while others wait. [default: never]"""


@Parameter(name="*", group=Group("Engine", sort_key=3))
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The simulated engine's speed. `chatstream tune` measures a real engine."""

    prefill_tokens_per_s: float = 1000.0
    """Prompt tokens computed per second."""
    time_per_token: float = 0.02
    """Seconds per token of an answer."""
    slowdown_per_slot: float = 0.0
    """Relative slowdown of all requests per further running request: 0 is none, 1 is one shared processor."""
    prefill_chunk_tokens: Annotated[int | None, WHOLE_NUMBER] = None
    """Prompt tokens computed between two tokens of the running answers, one prompt after the other. [default: each
    slot computes its own prompt at once]"""


@Parameter(name="*", group=Group("Output", sort_key=4))
@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Comparison, figures and files."""

    more_slots: Annotated[int | None, WHOLE_NUMBER] = None
    """Also simulate a second server that has this many more slots, with the same calls. [default: no second server]"""
    good_ttft: float | None = None
    """Seconds to the first token that count as good service, at most. [default: --ttft-slo, else 30]"""
    eta: Annotated[bool, Parameter(negative=())] = False
    """Also estimate when waiting requests start, and measure the error; slower."""
    report: Path | None = None
    """Write charts to FILE.svg, a page to FILE.html, or everything to a folder."""
    json: Annotated[bool, Parameter(negative=())] = False
    """Print the figures as JSON instead of a table."""


DEFAULT_DEMAND = DemandOptions()
DEFAULT_SERVER = ServerOptions()
DEFAULT_ENGINE = EngineOptions()
DEFAULT_OUTPUT = OutputOptions()


def simulate(
    *,
    demand: DemandOptions = DEFAULT_DEMAND,
    server: ServerOptions = DEFAULT_SERVER,
    engine: EngineOptions = DEFAULT_ENGINE,
    output: OutputOptions = DEFAULT_OUTPUT,
) -> None:
    """Simulate the scheduler in virtual time: which service do these clients get from these slots?

    For example:

    ```
    chatstream simulate --max-concurrency 4 --load 1.2
    chatstream simulate --max-concurrency 4 --users 200 --calls-per-user 20 --more-slots 2 --report report.html
    chatstream simulate --trace calls.csv --max-concurrency 8 --ttft-slo 10 --seed 1 --seed 2
    ```
    """
    study = _Study(demand, server, engine, output)
    if output.report is not None:
        from chatstream.simulation import report

        report.check_can_write(output.report)
    results = [study.variant(server.max_concurrency)]
    if output.more_slots is not None:
        check_int("more_slots", output.more_slots, at_least=1)
        results.append(study.variant(server.max_concurrency + output.more_slots))
    if output.report is not None:
        _write_report(study, results, output.report)
    if output.json:
        print(json.dumps(_as_json(study, results), indent=2))
    else:
        _print_table(study, results)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One number of slots, simulated once for each seed."""

    num_slots: int
    figures: list[Figures]
    first_run: Run

    @property
    def label(self) -> str:
        return f"{self.num_slots} slots"


class _Study:
    """Builds the simulation's calls and settings from the options. Raises `ConfigError`."""

    def __init__(
        self, demand: DemandOptions, server: ServerOptions, engine: EngineOptions, output: OutputOptions
    ) -> None:
        from chatstream.simulation import ClientBehaviour, EngineModel

        self.engine: EngineModel = EngineModel(
            prefill_tokens_per_s=engine.prefill_tokens_per_s,
            time_per_token_s=engine.time_per_token,
            slowdown_per_slot=engine.slowdown_per_slot,
            prefill_chunk_tokens=engine.prefill_chunk_tokens,
        )
        self.clients: ClientBehaviour = ClientBehaviour(max_attempts=demand.attempts, patience_s=demand.patience)
        self.seeds = demand.seed or (1,)
        self.good_ttft_s = output.good_ttft if output.good_ttft is not None else server.ttft_slo or GOOD_TTFT_S
        check_seconds("good_ttft", self.good_ttft_s)
        _check_demand(demand)
        if demand.trace is None:
            workload = WORKLOAD if demand.workload is None else demand.workload
            demand = replace(demand, workload=workload, duration=demand.duration or DURATION_S)
        self.records_eta = output.eta
        self._demand, self._server = demand, server
        self.settings: SchedulerSettings = self._settings(server.max_concurrency)
        self.calls: list[list[Call]] = [self._calls(seed) for seed in self.seeds]
        self._check_span()

    def variant(self, num_slots: int) -> _Variant:
        from chatstream.scheduler import Scheduler
        from chatstream.simulation import Simulation, measure
        from chatstream.simulation.run import GRAIN_TOKENS

        runs = [
            Simulation(
                scheduler=Scheduler(self._settings(num_slots)),
                engine_model=self.engine,
                clients=self.clients,
                seed=seed,
                grain_tokens=min(GRAIN_TOKENS, self._server.slice_tokens or GRAIN_TOKENS),
                grain_prompt_tokens=256 if self._server.policy == "fair-token" else None,
                records_eta=self.records_eta,
                is_exact=self.records_eta or self._server.ttft_slo is not None,
                sample_every_s=(calls[-1].at_s or 1.0) / 300 if seed == self.seeds[0] else None,
            ).run(calls)
            for seed, calls in zip(self.seeds, self.calls, strict=True)
        ]
        figures = [measure(run, ttft_slo_s=self.good_ttft_s, engine=self.engine, num_slots=num_slots) for run in runs]
        return _Variant(num_slots=num_slots, figures=figures, first_run=runs[0])

    def describe(self) -> str:
        """One line that names the calls and the criterion of good service."""
        demand, count = self._demand, len(self.calls[0])
        what = demand.workload if demand.trace is None else demand.trace.name
        seeds = f", medians of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        return (
            f"{what}, {count:,} calls in {self.calls[0][-1].at_s:,.0f} s{seeds}; "
            f"good is a first token within {self.good_ttft_s:g} s"
        )

    def options(self) -> dict[str, Any]:
        given = asdict(self._demand) | asdict(self._server) | asdict(self.engine)
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}

    def _settings(self, num_slots: int) -> SchedulerSettings:
        from chatstream.scheduler import SchedulerSettings

        server = self._server
        return SchedulerSettings(
            max_concurrency=num_slots,
            max_queue_size=server.max_queue_size,  # type: ignore[arg-type]  # checked by the settings
            policy=server.policy,
            max_wait_s=server.max_wait,
            ttft_slo_s=server.ttft_slo,
            max_running_per_client=server.max_running_per_client,
            max_waiting_per_client=server.max_waiting_per_client,
            slice_tokens=server.slice_tokens,
            # A simulated engine never hangs and releases a slot at once.
            stall_timeout_s=None,
            abort_timeout_s=None,
        )

    def _calls(self, seed: int) -> list[Call]:
        from chatstream.simulation import WORKLOADS, read_trace

        demand, num_slots = self._demand, self._server.max_concurrency
        if demand.trace is not None:
            return self._paced(read_trace(demand.trace))
        assert demand.workload is not None
        assert demand.duration is not None
        name = demand.workload.lower().removeprefix("w-")
        check_choice("workload", name, WORKLOADS)
        workload = WORKLOADS[name]
        if demand.users is not None:
            workload = replace(workload, num_clients=demand.users)
        rate_per_s = demand.rate
        if demand.calls_per_user is not None:
            rate_per_s = demand.calls_per_user * workload.num_clients / 3600
        if rate_per_s is not None:
            duration_s = demand.requests / rate_per_s if demand.requests else demand.duration
            return workload.calls_at_rate(rate_per_s, seed=seed, duration_s=duration_s)
        load = demand.load if demand.load is not None else workload.load
        duration_s = demand.duration
        if demand.requests:
            duration_s = demand.requests / (load * workload.capacity_per_s(self.engine, num_slots))
        return workload.calls_at_load(load, self.engine, num_slots, seed=seed, duration_s=duration_s)

    def _paced(self, calls: list[Call]) -> list[Call]:
        """The first `requests` calls of a trace, with arrival times scaled to `load` or `rate`."""
        demand = self._demand
        calls = calls[: demand.requests]
        rate_per_s, span_s = demand.rate, calls[-1].at_s
        if demand.load is not None:
            prompt = statistics.fmean(call.prompt_tokens for call in calls)
            answer = statistics.fmean(call.output_tokens for call in calls)
            per_request_s = self.engine.seconds_per_request(self._server.max_concurrency, prompt, answer)
            rate_per_s = demand.load / per_request_s
        if rate_per_s is None:
            return calls
        if not span_s:
            name = "load" if demand.load is not None else "rate"
            raise ConfigError(
                f"{name}: the calls of {demand.trace} all arrive at one moment; their times cannot be scaled",
                param=name,
            )
        stretch = len(calls) / rate_per_s / span_s
        return [call._replace(at_s=call.at_s * stretch) for call in calls]

    def _check_span(self) -> None:
        from chatstream.simulation.traces import MAX_SPAN_S

        span_s = max(calls[-1].at_s for calls in self.calls)
        if not span_s <= MAX_SPAN_S:
            raise ConfigError(
                f"the calls would arrive over {span_s:,.0f} s; at most a year, {MAX_SPAN_S:,.0f} s, is possible: "
                "choose a higher load or fewer calls"
            )


def _check_demand(demand: DemandOptions) -> None:
    for name in ("load", "rate", "calls_per_user"):
        check_number(name, getattr(demand, name), above=0, or_none=True)
    for name in ("requests", "users"):
        check_int(name, getattr(demand, name), at_least=1, or_none=True)
    check_seconds("duration", demand.duration, or_none=True)
    given = [name for name in ("load", "rate", "calls_per_user") if getattr(demand, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{given[0]} and --{given[1].replace('_', '-')} both set the number of calls: leave out one", param=given[0]
        )
    if demand.trace is not None:
        for name in ("workload", "users", "calls_per_user", "duration"):
            if getattr(demand, name) is not None:
                raise ConfigError(f"{name} has no effect with --trace, which defines all calls", param=name)


# --- the table --------------------------------------------------------------------------------------------------------


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _time(value: float) -> str:
    return f"{value:,.1f} s"


ROWS: tuple[tuple[str, Callable[[Figures], float | None], Callable[[float], str]], ...] = (
    ("calls that count", lambda f: f.offered, _whole),
    ("load", lambda f: f.load, _ratio),
    ("good service, of all calls", lambda f: f.attainment, _per_cent),
    ("good service / capacity", lambda f: f.goodput_ratio, _ratio),
    ("refused", lambda f: f.refused / f.offered, _per_cent),
    ("waited too long", lambda f: f.expired / f.offered, _per_cent),
    ("left", lambda f: f.abandoned / f.offered, _per_cent),
    ("sent, per call", lambda f: f.attempts_per_request, _ratio),
    ("first token, median", lambda f: f.ttft_p50_s, _time),
    ("first token, 9 of 10 within", lambda f: f.ttft_p90_s, _time),
    ("first token, 99 of 100 within", lambda f: f.ttft_p99_s, _time),
    ("wait, mean", lambda f: f.wait_mean_s, _time),
    ("slots busy", lambda f: f.utilisation, _per_cent),
    ("fairness between clients (Jain)", lambda f: f.jain, _ratio),
    ("worst client's part of a fair share", lambda f: f.worst_share, _ratio),
)
ETA_ROWS: tuple[tuple[str, Callable[[Figures], float | None], Callable[[float], str]], ...] = (
    ("estimates: median error", lambda f: f.eta.median_error_ratio if f.eta else None, _per_cent),
    ("estimates: bias", lambda f: f.eta.bias_ratio if f.eta else None, _per_cent),
    ("estimates: started by the 90 % time", lambda f: f.eta.p90_coverage if f.eta else None, _per_cent),
)


def _table(study: _Study, variants: list[_Variant]) -> list[list[str]]:
    """The table's rows, the header first."""
    rows = [["", *(variant.label for variant in variants)]]
    for name, value_of, show in ROWS + (ETA_ROWS if study.records_eta else ()):
        rows.append([name, *(_cell([value_of(figures) for figures in variant.figures], show) for variant in variants)])
    if len(study.seeds) > 1:
        good = [[figures.attainment for figures in variant.figures] for variant in variants]
        rows.insert(4, ["  over the seeds", *(f"{_per_cent(min(some))} – {_per_cent(max(some))}" for some in good)])
    return rows


def _cell(values: list[float | None], show: Callable[[float], str]) -> str:
    """The median over the seeds; a dash if no seed has a value."""
    known = [value for value in values if value is not None]
    return show(statistics.median(known)) if known else "–"


def _print_table(study: _Study, variants: list[_Variant]) -> None:
    from rich.console import Console
    from rich.table import Table

    head, *rows = _table(study, variants)
    table = Table()
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(study.describe(), markup=False, soft_wrap=True)
    console.print(table)


def _as_json(study: _Study, variants: list[_Variant]) -> dict[str, Any]:
    return {
        "options": study.options(),
        "good_ttft_s": study.good_ttft_s,
        "variants": [
            {
                "max_concurrency": variant.num_slots,
                "runs": [
                    {"seed": seed, **figures.as_dict()}
                    for seed, figures in zip(study.seeds, variant.figures, strict=True)
                ],
            }
            for variant in variants
        ],
    }


def _write_report(study: _Study, variants: list[_Variant], path: Path) -> None:
    from chatstream.simulation import report

    results = [
        report.Result(label=variant.label, run=variant.first_run, figures=variant.figures[0]) for variant in variants
    ]
    written = report.Report(
        title=study.describe(),
        rows=_table(study, variants),
        results=results,
        ttft_slo_s=study.good_ttft_s,
        figures=_as_json(study, variants),
    )
    try:
        report.write(written, path)
    except OSError as error:
        raise ConfigError(f"report cannot be written to {path}: {error.strerror or error}", param="report") from error
