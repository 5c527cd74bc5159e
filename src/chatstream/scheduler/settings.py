"""The settings of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from chatstream.checks import check_choice, check_int, check_number, check_seconds
from chatstream.errors import ConfigError
from chatstream.scheduler.policies import QUEUES

Auto: TypeAlias = Literal["auto"]
Adaptive: TypeAlias = Literal["off", "on"]

AUTO_START, AUTO_CEILING = 4, 64
"""First value and ceiling of the adaptive limit with `max_concurrency="auto"`."""
MAX_COUNT = 1_000_000
"""More requests than fit into one process: a larger number is a typing error."""
MIN_PRIORITY, MAX_PRIORITY = -10, 10
"""Bounded, because the head start grows with the priority (`ageing_s` for each step)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Checked when built; a wrong value raises a `ConfigError` that names the setting. Times are seconds."""

    # Sizes
    max_concurrency: int | Auto = 2
    """Maximum number of running requests. 2: the default of the original ChatStream. "auto": adaptive, between
    `min_concurrency` and 64; starts with 4, or with the value that `ChatStream` measures at startup."""
    max_queue_size: int | Auto = 5
    """Maximum number of waiting requests; 0 rejects a request that cannot start at once. "auto": the number that can
    start within `ttft_slo_s` (else `max_wait_s`, else 30 s), by Little's law."""
    max_waiting_tokens: int | None = None
    """Maximum total of the estimated tokens (prompt and answer) of the waiting requests. None: no limit."""
    max_running_per_client: int | None = None
    """Maximum number of running requests of one client. Its other requests are held, and requests behind them may
    start first. None: no limit."""
    max_waiting_per_client: int | None = None
    """Maximum number of waiting requests of one client; the next one is rejected with `client_limit`. None: no
    limit."""

    # Waiting times
    max_wait_s: float | None = None
    """A request that has not started within this time expires. A request may ask for less, not for more. None: no
    limit."""
    ttft_slo_s: float | None = None
    """The longest acceptable time to first token. A request that will probably miss it is rejected on arrival; a
    waiting request expires when it can no longer meet it. None: no objective."""
    admit_probability: float = 0.5
    """Admit a request whose probability to start in time is at least this. 0: admit every request."""

    # Order of the queue
    policy: str = "fcfs"
    ageing_s: float = 60.0
    """Policy `priority`: seconds of waiting that outweigh one step of priority."""
    spf_ageing_s_per_token: float = 0.05
    """Policy `spf`: seconds of waiting that outweigh one predicted token. 0.05: larger values gain little."""
    client_weights: Mapping[str, float] = field(default_factory=dict)
    """Policy `fair`: weights of clients; a client that is not listed has weight 1."""

    # Time slices, for engines that can preempt a generation
    slice_tokens: int | None = None
    """After this number of tokens a generation is preempted if another request has waited for a second, and resumes
    later. None: no time slices."""
    max_resident: int | None = None
    """While this number of requests has state in the engine (running, preempted and leaving), a preempted request
    resumes before a new one starts. No slot stays free for it. None: twice the concurrency limit."""

    # Adaptive concurrency
    adaptive: Adaptive = "off"
    """on: the limit moves between `min_concurrency` and `max_concurrency`."""
    itl_target_s: float = 0.1
    """Target of the adaptive limit for the gap between two tokens: at most one gap in ten is longer. 0.1: reading
    speed."""
    min_concurrency: int = 1
    """Floor of the adaptive limit."""

    # Faults
    stall_timeout_s: float | None = 300.0
    """A generation without progress for this long loses its slot. 300: longer than any normal prefill. None: never."""
    abort_timeout_s: float | None = 30.0
    """A cancelled or preempted request that the engine has not released after this time loses its slot. None: never."""
    max_attempts: int = 2
    """Maximum number of starts of one request, when the engine fails before the first token."""

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if self.max_concurrency != "auto":
            check_int("max_concurrency", self.max_concurrency, at_least=1, at_most=MAX_COUNT)
        check_queue_size(self.max_queue_size)
        for name in ("max_attempts", "min_concurrency"):
            check_int(name, getattr(self, name), at_least=1, at_most=MAX_COUNT)
        for name in ("max_running_per_client", "slice_tokens", "max_resident"):
            check_int(name, getattr(self, name), at_least=1, at_most=MAX_COUNT, or_none=True)
        check_int("max_waiting_tokens", self.max_waiting_tokens, at_least=1, or_none=True)
        check_int("max_waiting_per_client", self.max_waiting_per_client, at_least=0, at_most=MAX_COUNT, or_none=True)
        for name in ("max_wait_s", "ttft_slo_s", "stall_timeout_s", "abort_timeout_s"):
            check_seconds(name, getattr(self, name), or_none=True)
        for name in ("itl_target_s", "ageing_s"):
            check_seconds(name, getattr(self, name))
        check_number("spf_ageing_s_per_token", self.spf_ageing_s_per_token, above=0)
        check_number("admit_probability", self.admit_probability, at_least=0, at_most=1)
        check_choice("adaptive", self.adaptive, get_args(Adaptive))
        highest = self.highest_concurrency
        if self.min_concurrency > highest:
            raise ConfigError(
                f"min_concurrency must be at most max_concurrency ({highest}), not {self.min_concurrency}",
                param="min_concurrency",
            )
        if self.max_resident is not None and self.max_resident < highest:
            raise ConfigError(
                f"max_resident must be at least max_concurrency ({highest}), not {self.max_resident}",
                param="max_resident",
            )
        if not isinstance(self.client_weights, Mapping):
            raise ConfigError("client_weights must be a mapping of clients to numbers", param="client_weights")
        for client, weight in self.client_weights.items():
            check_number(f"client_weights[{client!r}]", weight, above=0)

    @property
    def is_adaptive(self) -> bool:
        """True when the scheduler adjusts the concurrency limit."""
        return self.adaptive == "on" or self.max_concurrency == "auto"

    @property
    def first_concurrency(self) -> int:
        """The concurrency limit at startup."""
        return max(AUTO_START, self.min_concurrency) if self.max_concurrency == "auto" else self.max_concurrency

    @property
    def highest_concurrency(self) -> int:
        """Ceiling of the adaptive limit. An operator may set a higher limit."""
        return AUTO_CEILING if self.max_concurrency == "auto" else self.max_concurrency


def check_policy(name: object) -> None:
    """Raises `ConfigError` unless `name` is the name of a policy."""
    check_choice("policy", name, QUEUES)


def check_queue_size(value: object) -> None:
    """Raises `ConfigError` unless `value` is "auto" or a count."""
    if value != "auto":
        try:
            check_int("max_queue_size", value, at_least=0, at_most=MAX_COUNT)
        except ConfigError as error:
            raise ConfigError(error.message.replace("must be", 'must be "auto" or', 1), param=error.param) from None
