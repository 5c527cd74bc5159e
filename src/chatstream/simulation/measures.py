"""What a run was worth to those who asked. Every figure is over the *offered* calls: who was refused counts as failed.

Definitions, once and for all:

    good          finished, and the first token came within the SLO of the time at which the client meant to send
    attainment    good / offered
    goodput       good per second of arrivals; `goodput_ratio` is that over what the engine can do with these lengths,
                  and may be above 1 when short requests are preferred
    service       weighted tokens: 1 a token of prompt, 2 a token of answer
    fair share    max-min: the served total is divided so that nobody gets more than it asked for, and nobody could
                  get more without somebody who has less getting less
    Jain          over service / fair share of the clients: 1 is perfectly fair, 1/n: one has everything. One starved
                  client of a thousand does not show in it; it shows in `worst_share`
    ETA error     over those who waited at least a second and started: the median of |wait - p50| / wait, the mean of
                  p50 - wait over the mean wait, and how often the wait was at most p90

The first tenth of the calls is left out as warm-up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatstream.simulation.engine import EngineModel
from chatstream.simulation.run import Run, Visit

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
WARM_UP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFigures:
    """One client of a run."""

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
    """How true the estimates were that people were given on arrival."""

    measured: int
    median_error_ratio: float
    """MdAPE."""
    mean_error_ratio: float
    """Mean absolute error / mean wait."""
    bias_ratio: float
    """Above 0: too pessimistic."""
    p90_coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. A time is None when there is nobody to take it from."""

    offered: int
    good: int
    finished: int
    refused: int
    expired: int
    abandoned: int
    attempts: int
    duration_s: float
    """From the first arrival that counts to the last one."""
    load: float | None
    """Work that was asked for, over what the engine can do. This and goodput are None when all came at one moment."""
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
    """The smallest service / fair share of any client."""
    eta: EtaFigures | None
    clients: tuple[ClientFigures, ...]
    """Those who asked for most first."""

    @property
    def attainment(self) -> float:
        return self.good / self.offered

    @property
    def attempts_per_request(self) -> float:
        return self.attempts / self.offered

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = asdict(self)
        figures["clients"] = [asdict(client) | {"attainment": client.attainment} for client in self.clients]
        return {"attainment": self.attainment, "attempts_per_request": self.attempts_per_request, **figures}


def measure(run: Run, *, ttft_slo_s: float, engine: EngineModel, num_slots: int, warm_up: float = WARM_UP) -> Figures:
    """The figures of a run with at least one call."""
    visits = run.visits[int(len(run.visits) * warm_up) :]
    good = [visit for visit in visits if is_good(visit, ttft_slo_s)]
    mean_prompt = statistics.fmean(visit.call.prompt_tokens for visit in visits)
    mean_output = statistics.fmean(visit.call.output_tokens for visit in visits)
    duration_s = visits[-1].call.at_s - visits[0].call.at_s
    request_s = engine.seconds_per_request(num_slots, mean_prompt, mean_output)
    offered_per_s = len(visits) / duration_s if duration_s else None
    goodput_per_s = len(good) / duration_s if duration_s else None
    ttfts_s = sorted(visit.ttft_s for visit in visits if visit.ttft_s is not None)
    waits_s = sorted(visit.waited_s for visit in visits if visit.waited_s is not None)
    clients = client_figures(visits, ttft_slo_s)
    shares = [one.service / one.fair_share for one in clients if one.fair_share > 0]
    return Figures(
        offered=len(visits),
        good=len(good),
        finished=sum(visit.end == "finished" for visit in visits),
        refused=sum(visit.end not in ("finished", "expired", "abandoned", "cancelled", "failed") for visit in visits),
        expired=sum(visit.end == "expired" for visit in visits),
        abandoned=sum(visit.end == "abandoned" for visit in visits),
        attempts=sum(visit.attempts for visit in visits),
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
        eta=eta_figures(visits),
        clients=clients,
    )


def is_good(visit: Visit, ttft_slo_s: float) -> bool:
    return visit.end == "finished" and visit.ttft_s is not None and visit.ttft_s <= ttft_slo_s


def attainment(visits: Sequence[Visit], ttft_slo_s: float) -> float:
    return sum(is_good(visit, ttft_slo_s) for visit in visits) / len(visits)


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The smallest value that at least the part `q` of them does not exceed."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def client_figures(visits: Iterable[Visit], ttft_slo_s: float) -> tuple[ClientFigures, ...]:
    by_client: dict[str, list[Visit]] = {}
    for visit in visits:
        by_client.setdefault(visit.call.client, []).append(visit)
    demand = {client: sum(_demand(visit) for visit in own) for client, own in by_client.items()}
    service = {client: sum(_service(visit) for visit in own) for client, own in by_client.items()}
    fair = max_min_shares(demand, sum(service.values()))
    return tuple(
        ClientFigures(
            client=client,
            offered=len(own),
            good=sum(is_good(visit, ttft_slo_s) for visit in own),
            service=service[client],
            fair_share=fair[client],
            ttft_p50_s=quantile(sorted(visit.ttft_s for visit in own if visit.ttft_s is not None), 0.5),
        )
        for client, own in sorted(by_client.items(), key=lambda item: (-demand[item[0]], item[0]))
    )


def max_min_shares(demand: dict[str, float], total: float) -> dict[str, float]:
    """Divide `total` by filling all glasses at the same pace; a full one gets no more."""
    shares: dict[str, float] = {}
    left = total
    for number, (client, wanted) in enumerate(sorted(demand.items(), key=lambda item: (item[1], item[0]))):
        shares[client] = min(wanted, left / (len(demand) - number))
        left -= shares[client]
    return shares


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2), Jain et al. 1984."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def eta_figures(visits: Iterable[Visit]) -> EtaFigures | None:
    told = [(visit.told, visit.waited_s) for visit in visits if visit.told is not None and visit.waited_s is not None]
    pairs = [(eta, waited_s) for eta, waited_s in told if waited_s >= 1.0]
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


def _demand(visit: Visit) -> float:
    return PROMPT_WEIGHT * visit.call.prompt_tokens + OUTPUT_WEIGHT * visit.call.output_tokens


def _service(visit: Visit) -> float:
    return PROMPT_WEIGHT * visit.read_tokens + OUTPUT_WEIGHT * visit.generated_tokens
