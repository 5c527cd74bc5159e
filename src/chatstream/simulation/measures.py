"""Service quality of a run. Every figure covers all *offered* calls; a rejected call counts as failed.

Definitions:

    good          finished, and the first token came within the SLO, counted from the intended time of the first attempt
    attainment    good / offered
    goodput       good calls per second; `goodput_ratio` divides it by the capacity of the engine for these lengths, and
                  may exceed 1 when short requests are preferred
    service       weighted tokens: 1 per prompt token, 2 per answer token
    fair share    max-min fair division of the total service: no client gets more than its demand, and none could get
                  more without a cut for a client with less
    Jain          index of service / fair share over the clients: 1 is perfectly fair, 1/n means that one client has
                  everything. It hides one starved client among a thousand; `worst_share` shows it
    ETA error     over the started calls that waited at least 1 s: the median of |wait - p50| / wait, the mean of
                  p50 - wait over the mean wait, and the share of waits within p90

The first tenth of the calls is excluded as warm-up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatstream.simulation.engine import EngineModel
from chatstream.simulation.run import CallRecord, Run

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
WARM_UP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFigures:
    """Figures of one client."""

    client: str
    offered: int
    good: int
    service: float
    fair_share: float
    ttft_p50_s: float | None

    @property
    def attainment(self) -> float:
        return self.good / self.offered


@dataclass(frozen=True, slots=True, kw_only=True)
class EtaFigures:
    """Errors of the ETAs that were given on arrival."""

    measured: int
    median_error_ratio: float
    """Median absolute percentage error (MdAPE), as a ratio."""
    mean_error_ratio: float
    """Mean absolute error over the mean wait."""
    bias_ratio: float
    """Above 0: the estimates are too long."""
    p90_coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures of one run. A time is None when no call has one."""

    offered: int
    good: int
    finished: int
    refused: int
    expired: int
    abandoned: int
    attempts: int
    duration_s: float
    """From the first counted arrival to the last one."""
    load: float | None
    """Offered work over the capacity of the engine. Load and goodput are None when all calls arrive at one moment."""
    utilisation: float
    goodput_per_s: float | None
    goodput_ratio: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    wait_mean_s: float | None
    wait_p50_s: float | None
    wait_p99_s: float | None
    jain: float
    worst_share: float
    """The smallest service / fair share of a client."""
    eta: EtaFigures | None
    clients: tuple[ClientFigures, ...]
    """In descending order of demand."""

    @property
    def attainment(self) -> float:
        return self.good / self.offered

    @property
    def attempts_per_request(self) -> float:
        return self.attempts / self.offered

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as values for JSON."""
        figures = asdict(self)
        figures["clients"] = [asdict(client) | {"attainment": client.attainment} for client in self.clients]
        return {"attainment": self.attainment, "attempts_per_request": self.attempts_per_request, **figures}


def measure(run: Run, *, ttft_slo_s: float, engine: EngineModel, num_slots: int, warm_up: float = WARM_UP) -> Figures:
    """Return the figures of a run with at least one call, without the first share `warm_up` of its calls."""
    records = run.records[int(len(run.records) * warm_up) :]
    good = [record for record in records if is_good(record, ttft_slo_s)]
    mean_prompt = statistics.fmean(record.call.prompt_tokens for record in records)
    mean_output = statistics.fmean(record.call.output_tokens for record in records)
    duration_s = records[-1].call.at_s - records[0].call.at_s
    request_s = engine.seconds_per_request(num_slots, mean_prompt, mean_output)
    offered_per_s = len(records) / duration_s if duration_s else None
    goodput_per_s = len(good) / duration_s if duration_s else None
    ttfts_s = sorted(record.ttft_s for record in records if record.ttft_s is not None)
    waits_s = sorted(record.waited_s for record in records if record.waited_s is not None)
    clients = client_figures(records, ttft_slo_s)
    shares = [one.service / one.fair_share for one in clients if one.fair_share > 0]
    return Figures(
        offered=len(records),
        good=len(good),
        finished=sum(record.end == "finished" for record in records),
        refused=sum(
            record.end not in ("finished", "expired", "abandoned", "cancelled", "failed") for record in records
        ),
        expired=sum(record.end == "expired" for record in records),
        abandoned=sum(record.end == "abandoned" for record in records),
        attempts=sum(record.attempts for record in records),
        duration_s=duration_s,
        load=offered_per_s * request_s if offered_per_s is not None else None,
        utilisation=run.busy_slot_s / (num_slots * run.end_s) if run.end_s else 0.0,
        goodput_per_s=goodput_per_s,
        goodput_ratio=goodput_per_s * request_s if goodput_per_s is not None else None,
        ttft_p50_s=quantile(ttfts_s, 0.5),
        ttft_p90_s=quantile(ttfts_s, 0.9),
        ttft_p99_s=quantile(ttfts_s, 0.99),
        wait_mean_s=statistics.fmean(waits_s) if waits_s else None,
        wait_p50_s=quantile(waits_s, 0.5),
        wait_p99_s=quantile(waits_s, 0.99),
        jain=jain_index(shares),
        worst_share=min(shares, default=1.0),
        eta=eta_figures(records),
        clients=clients,
    )


def is_good(record: CallRecord, ttft_slo_s: float) -> bool:
    return record.end == "finished" and record.ttft_s is not None and record.ttft_s <= ttft_slo_s


def attainment(records: Sequence[CallRecord], ttft_slo_s: float) -> float:
    return sum(is_good(record, ttft_slo_s) for record in records) / len(records)


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """Return the empirical quantile: an element of `ordered`, or None if it is empty."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def client_figures(records: Iterable[CallRecord], ttft_slo_s: float) -> tuple[ClientFigures, ...]:
    by_client: dict[str, list[CallRecord]] = {}
    for record in records:
        by_client.setdefault(record.call.client, []).append(record)
    demand = {client: sum(_demand(record) for record in own) for client, own in by_client.items()}
    service = {client: sum(_service(record) for record in own) for client, own in by_client.items()}
    fair = max_min_shares(demand, sum(service.values()))
    return tuple(
        ClientFigures(
            client=client,
            offered=len(own),
            good=sum(is_good(record, ttft_slo_s) for record in own),
            service=service[client],
            fair_share=fair[client],
            ttft_p50_s=quantile(sorted(record.ttft_s for record in own if record.ttft_s is not None), 0.5),
        )
        for client, own in sorted(by_client.items(), key=lambda item: (-demand[item[0]], item[0]))
    )


def max_min_shares(demand: dict[str, float], total: float) -> dict[str, float]:
    """Divide `total` max-min fairly (water filling): raise all shares equally, each up to its demand."""
    shares: dict[str, float] = {}
    left = total
    for number, (client, amount) in enumerate(sorted(demand.items(), key=lambda item: (item[1], item[0]))):
        shares[client] = min(amount, left / (len(demand) - number))
        left -= shares[client]
    return shares


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2), Jain et al. 1984."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def eta_figures(records: Iterable[CallRecord]) -> EtaFigures | None:
    known = [
        (record.eta, record.waited_s) for record in records if record.eta is not None and record.waited_s is not None
    ]
    pairs = [(eta, waited_s) for eta, waited_s in known if waited_s >= 1.0]
    if not pairs:
        return None
    mean_wait_s = statistics.fmean(waited_s for _, waited_s in pairs)
    return EtaFigures(
        measured=len(pairs),
        median_error_ratio=statistics.median(abs(eta.p50_s - waited_s) / waited_s for eta, waited_s in pairs),
        mean_error_ratio=statistics.fmean(abs(eta.p50_s - waited_s) for eta, waited_s in pairs) / mean_wait_s,
        bias_ratio=statistics.fmean(eta.p50_s - waited_s for eta, waited_s in pairs) / mean_wait_s,
        p90_coverage=statistics.fmean(waited_s <= eta.p90_s for eta, waited_s in pairs),
    )


def _demand(record: CallRecord) -> float:
    return PROMPT_WEIGHT * record.call.prompt_tokens + OUTPUT_WEIGHT * record.call.output_tokens


def _service(record: CallRecord) -> float:
    return PROMPT_WEIGHT * record.read_tokens + OUTPUT_WEIGHT * record.generated_tokens
