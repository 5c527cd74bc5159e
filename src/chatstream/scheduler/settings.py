"""What an operator can set about the line."""

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
"""Where adaptive concurrency begins and ends when nobody gave a number."""
MAX_COUNT = 1_000_000
"""More requests than any one process holds: a number above it is a slip of the finger."""
MIN_PRIORITY, MAX_PRIORITY = -10, 10
"""Bounded, so that nobody can buy a head start of years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    # How many
    max_concurrency: int | Auto = 2
    """Generations at the same time. 2 is the original's default. "auto": adaptive, between `min_concurrency` and 64;
    it begins with 4, or with what `ChatStream` measures before it serves."""
    max_queue_size: int | Auto = 5
    """Requests that may wait beside the running ones; 0 refuses whoever cannot start at once. "auto": as many as can
    start within `ttft_slo_s` (else `max_wait_s`, else 30 s), by Little's law."""
    max_waiting_tokens: int | None = None
    """Tokens of prompts and answers that may wait together, by estimate; None: no bound of its own."""
    max_running_per_client: int | None = None
    """Slots that one client may hold; its other requests wait, and those behind them pass."""
    max_waiting_per_client: int | None = None
    """Requests of one client that may wait; the next one is refused `client_limit`."""

    # How long
    max_wait_s: float | None = None
    """Give up whoever has waited so long; a request may ask for less, not for more. None: for ever."""
    ttft_slo_s: float | None = None
    """The time to first token that is still good service. Who will probably not reach it is refused at the door, and
    who waits until it cannot be reached any more expires."""
    admit_probability: float = 0.5
    """Admit who starts in time at least so probably, by the distribution of the expected wait. 0: everybody."""

    # In what order
    policy: str = "fcfs"
    ageing_s: float = 60.0
    """Under `priority`: so many seconds of waiting outweigh one class."""
    spf_ageing_s_per_token: float = 0.05
    """Under `spf`: so many seconds of waiting outweigh one predicted token. 0.05: with more, little is gained."""
    client_weights: Mapping[str, float] = field(default_factory=dict)
    """Under `fair`: shares of clients; 1 for those who are not named."""

    # In slices, for engines that can preempt a generation
    slice_tokens: int | None = None
    """After so many tokens a generation hands its slot to a request that has waited for a second, and goes on later.
    None: never."""
    max_resident: int | None = None
    """Generations that have begun and not ended, those that are preempted among them. None: twice `max_concurrency`."""

    # Adaptive concurrency
    adaptive: Adaptive = "off"
    """on: the limit moves between `min_concurrency` and `max_concurrency`."""
    itl_target_s: float = 0.1
    """The gap between two tokens that 9 of 10 should not exceed. 0.1: as fast as people read."""
    min_concurrency: int = 1

    # When something is wrong
    stall_timeout_s: float | None = 300.0
    """Take the slot from a generation that made no progress for so long. Longer than any honest prefill."""
    abort_timeout_s: float | None = 30.0
    """Take the slot from an engine that does not let go of a cancelled or preempted request."""
    max_attempts: int = 2
    """Starts of one request, when the engine fails before its first token."""

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
                f"min_concurrency must be at most the {highest} of max_concurrency, not {self.min_concurrency}",
                param="min_concurrency",
            )
        if self.max_resident is not None and self.max_resident < highest:
            raise ConfigError(
                f"max_resident must be at least the {highest} of max_concurrency, not {self.max_resident}",
                param="max_resident",
            )
        if not isinstance(self.client_weights, Mapping):
            raise ConfigError("client_weights must be a mapping of clients to numbers", param="client_weights")
        for client, weight in self.client_weights.items():
            check_number(f"client_weights[{client!r}]", weight, above=0)

    @property
    def is_adaptive(self) -> bool:
        """The limit on generations moves by itself."""
        return self.adaptive == "on" or self.max_concurrency == "auto"

    @property
    def first_concurrency(self) -> int:
        """The limit at the start."""
        return max(AUTO_START, self.min_concurrency) if self.max_concurrency == "auto" else self.max_concurrency

    @property
    def highest_concurrency(self) -> int:
        """The limit never grows beyond this by itself; an operator may."""
        return AUTO_CEILING if self.max_concurrency == "auto" else self.max_concurrency


def check_policy(name: object) -> None:
    """Raises `ConfigError` unless a policy has this name."""
    check_choice("policy", name, QUEUES)


def check_queue_size(value: object) -> None:
    """Raises `ConfigError` unless `value` is "auto" or a count."""
    if value != "auto":
        check_int("max_queue_size", value, at_least=0, at_most=MAX_COUNT)
