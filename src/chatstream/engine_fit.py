"""Checks that an engine supports the limits, the policy and time slices. Each check raises `ConfigError`."""

from __future__ import annotations

from chatstream.engines.base import Capacity
from chatstream.errors import ConfigError
from chatstream.scheduler import QUEUES, SchedulerSettings
from chatstream.scheduler.settings import check_policy


def check_max_concurrency(capacity: Capacity, max_concurrency: int) -> None:
    most = capacity.max_concurrency
    if most is not None and max_concurrency > most:
        why = f": {capacity.limited_by}" if capacity.limited_by else ""
        raise ConfigError(f"max_concurrency is more than the {most} this engine can run{why}", param="max_concurrency")


def check_slices(capacity: Capacity, settings: SchedulerSettings) -> None:
    if settings.slice_tokens is not None and not capacity.can_preempt:
        raise ConfigError("slice_tokens needs an engine that can preempt a generation", param="slice_tokens")


def check_policy_fits(capacity: Capacity, policy: str, settings: SchedulerSettings) -> None:
    """Raises also when there is no such policy."""
    check_policy(policy)
    if QUEUES[policy](settings).slice_tokens is not None and not capacity.can_preempt:
        raise ConfigError(f"the policy {policy} needs an engine that can preempt a generation", param="policy")
