"""Synthetic workloads with published parameters: arrival times and lengths, drawn from a seed.

The parameters of the named workloads were fitted to public traces; the traces themselves are not part of this
project. Azure: the LLM inference traces of 2023 (CC-BY). ServeGen: Alibaba's characterisation of production clients
(2025). BurstGPT: Wang et al. 2024. `conv` is the default of the benchmark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log
from random import Random
from statistics import fmean
from typing import NamedTuple

from chatstream.errors import ConfigError
from chatstream.simulation.distributions import (
    GammaGaps,
    Gaps,
    Lengths,
    LogNormalGaps,
    LogNormals,
    Quantiles,
    RedrawnGammaGaps,
    SwayingGammaGaps,
    Zipf,
    log_normal,
)
from chatstream.simulation.engine import EngineModel

MAX_REQUESTS = 5_000_000
"""Maximum number of calls of a run; more would take gigabytes of memory."""


class Call(NamedTuple):
    """One request of a client, at the intended time of its first attempt. `CallRecord` holds its outcome."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    """Length of the answer; known to the engine only, not to the scheduler."""
    client: str = ""
    priority: int = 0
    max_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Spike:
    """The arrival rate is multiplied by `factor` for `duration_s` seconds."""

    start_s: float
    duration_s: float
    factor: float

    def at_s(self, calm_s: float) -> float:
        """Map a time without the spike to the time with it."""
        inside_s = calm_s - self.start_s
        if inside_s <= 0:
            return calm_s
        if inside_s <= self.factor * self.duration_s:
            return self.start_s + inside_s / self.factor
        return calm_s - (self.factor - 1) * self.duration_s

    def calm_s(self, at_s: float) -> float:
        """Inverse of `at_s`."""
        return at_s + (self.factor - 1) * min(max(0.0, at_s - self.start_s), self.duration_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Arrivals, lengths and clients of a synthetic workload."""

    gaps: Gaps
    prompt: Lengths
    output: Lengths
    num_clients: int = 50
    zipf_slope: float = 1.2
    """The demand of client n is proportional to n ** -slope; with 0 all clients are equal."""
    is_bursty_per_client: bool = False
    """Draw `gaps` for each client separately and merge the arrivals."""
    spike: Spike | None = None
    abuser_load: float = 0.0
    """Load of one additional client, `abuser`, as a multiple of the capacity; 0: no such client."""
    load: float = 0.8
    """Default load, as a multiple of the capacity."""

    def capacity_per_s(self, engine: EngineModel, num_slots: int) -> float:
        """Maximum sustained requests per second."""
        return 1 / engine.seconds_per_request(num_slots, self.prompt.mean, self.output.mean)

    def calls_at_load(
        self, load: float, engine: EngineModel, num_slots: int, *, seed: int, duration_s: float
    ) -> list[Call]:
        """Return calls, sorted by time, with a total work of `load` times the capacity over about `duration_s`.

        The rate follows from the drawn lengths, so two seeds differ in arrival times and lengths but not in load. With
        a spike, `load` applies before and after it.
        """
        calm_s = self.spike.calm_s(duration_s) if self.spike else duration_s
        lengths = self._lengths(load * self.capacity_per_s(engine, num_slots) * calm_s, seed)
        mean_prompt, mean_output = (fmean(pair[kind] for pair in lengths) for kind in (0, 1))
        rate_per_s = load / engine.seconds_per_request(num_slots, mean_prompt, mean_output)
        calls = self._calls(lengths, rate_per_s, seed)
        if self.abuser_load:
            calls += self._abuse(engine, num_slots, seed=seed, duration_s=duration_s)
            calls.sort(key=lambda call: call.at_s)
        return calls

    def calls_at_rate(self, rate_per_s: float, *, seed: int, duration_s: float) -> list[Call]:
        """Return calls, sorted by time, at this mean rate."""
        calm_s = self.spike.calm_s(duration_s) if self.spike else duration_s
        return self._calls(self._lengths(rate_per_s * calm_s, seed), rate_per_s, seed)

    def _lengths(self, count: float, seed: int) -> list[tuple[int, int]]:
        if count > MAX_REQUESTS:
            raise ConfigError(
                f"the workload has {count:,.0f} requests, at most {MAX_REQUESTS:,} fit: reduce duration or load"
            )
        rng = Random(f"lengths {seed}")
        return [(self.prompt.draw(rng), self.output.draw(rng)) for _ in range(max(1, round(count)))]

    def _calls(self, lengths: Sequence[tuple[int, int]], rate_per_s: float, seed: int) -> list[Call]:
        rng = Random(f"arrivals {seed}")
        arrivals = self._arrivals_per_client if self.is_bursty_per_client else self._arrivals
        at = self.spike.at_s if self.spike else float
        return [
            Call(at(at_s), *pair, client)
            for (at_s, client), pair in zip(arrivals(len(lengths), rate_per_s, rng), lengths, strict=True)
        ]

    def _arrivals(self, count: int, rate_per_s: float, rng: Random) -> list[tuple[float, str]]:
        clients = Zipf(self.zipf_slope, self.num_clients)
        times_s = _spread(self.gaps, count, count / rate_per_s, rng)
        return [(at_s, f"client {clients.draw(rng)}") for at_s in times_s]

    def _arrivals_per_client(self, count: int, rate_per_s: float, rng: Random) -> list[tuple[float, str]]:
        clients = Zipf(self.zipf_slope, self.num_clients)
        counts = Counter(clients.draw(rng) for _ in range(count))
        return sorted(
            (at_s, f"client {number}")
            for number in range(1, self.num_clients + 1)
            for at_s in _spread(self.gaps, counts[number], count / rate_per_s, rng)
        )

    def _abuse(self, engine: EngineModel, num_slots: int, *, seed: int, duration_s: float) -> list[Call]:
        alone = Workload(gaps=self.gaps, prompt=self.prompt, output=self.output)
        calls = alone.calls_at_load(self.abuser_load, engine, num_slots, seed=seed + 1_000_003, duration_s=duration_s)
        return [call._replace(client=ABUSER) for call in calls]


ABUSER = "abuser"


def _spread(gaps: Gaps, count: int, duration_s: float, rng: Random) -> list[float]:
    """Return arrival times within the duration, scaled to the exact mean rate, as `vllm bench serve` does."""
    if not count:
        return []
    times_s = list(accumulate(gaps.draw(count + 1, count / duration_s, rng)))
    return [at_s * duration_s / times_s[-1] for at_s in times_s[:-1]]


def _table(
    lowest: float,
    p5: float,
    p25: float,
    p50: float,
    p75: float,
    p90: float,
    p95: float,
    p99: float,
    highest: float,
    *,
    mean: float,
) -> Quantiles:
    probabilities = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    values = (lowest, p5, p25, p50, p75, p90, p95, p99, highest)
    return Quantiles(tuple(zip(probabilities, values, strict=True)), mean)


CHAT_PROMPT = _table(20, 181, 396, 1020, 1189, 2734, 4083, 4142, 14050, mean=1155)
CHAT_OUTPUT = LogNormals(((0.284, 4.727, 1.021), (0.435, 4.573, 0.364), (0.281, 6.006, 0.05)), at_most=1000)

WORKLOADS: dict[str, Workload] = {
    # Azure 2023, conversations: 19,366 requests in 58 minutes. Indices of dispersion over windows of 5.5, 55 and 332
    # requests: 1.4, 4.0, 20.6 in the trace; 1.5, 4.5, 19 with these gaps.
    "conv": Workload(gaps=SwayingGammaGaps(0.87, rate_cv=0.25, every=700), prompt=CHAT_PROMPT, output=CHAT_OUTPUT),
    # Azure 2023, code: 8,819 requests; long prompts, short answers, bursts (CV of the gaps: 13.2).
    "code": Workload(
        gaps=LogNormalGaps(cv=13.2),
        prompt=_table(3, 75, 578, 1469, 2744, 5187, 7303, 7436, 7437, mean=2048),
        output=_table(1, 6, 9, 13, 24, 55, 90, 251, 1899, mean=28),
    ),
    # ServeGen m-large: 162 clients with independent bursts.
    "multi": Workload(
        gaps=GammaGaps(0.84),
        prompt=_table(4, 64, 329, 688, 1163, 2369, 2417, 5850, 40000, mean=1023),
        output=_table(1, 1, 11, 67, 179, 461, 620, 971, 8000, mean=162),
        num_clients=162,
        zipf_slope=1.16,
        is_bursty_per_client=True,
    ),
    # ServeGen deepseek-r1: very long answers.
    "reason": Workload(
        gaps=GammaGaps(1 / 1.9**2),
        prompt=log_normal(1377, 2.9, at_most=65536),
        output=_table(30, 232, 429, 730, 1451, 3465, 5705, 12584, 32768, mean=1502),
        num_clients=73,
        zipf_slope=1.35,
        is_bursty_per_client=True,
    ),
    # ServeGen m-small: classification and similar tasks; answers with median 3 and p99 180 tokens.
    "small": Workload(
        gaps=GammaGaps(1 / 3.1**2),
        prompt=log_normal(147, 1.0, at_most=8192),
        output=LogNormals(((1.0, log(3), 1.76),), at_most=2048),
        num_clients=43,
        zipf_slope=1.4,
        is_bursty_per_client=True,
    ),
    # BurstGPT.
    "burst": Workload(gaps=RedrawnGammaGaps(0.25, 0.5, 60.0), prompt=Zipf(1.1, 1023), output=Zipf(1.1, 1023)),
    # Lengths of the ShareGPT benchmark, Poisson arrivals.
    "sharegpt": Workload(
        gaps=GammaGaps(1.0), prompt=log_normal(190, 1.5, at_most=8192), output=log_normal(270, 1.0, at_most=2048)
    ),
    # One client at ten times the capacity; fifty equal clients at half of it in total.
    "abuse": Workload(
        gaps=GammaGaps(0.87), prompt=CHAT_PROMPT, output=CHAT_OUTPUT, abuser_load=10.0, zipf_slope=0.0, load=0.5
    ),
    # Five times the arrival rate for two minutes.
    "spike": Workload(
        gaps=GammaGaps(0.87), prompt=CHAT_PROMPT, output=CHAT_OUTPUT, spike=Spike(600.0, 120.0, 5.0), load=0.7
    ),
}
