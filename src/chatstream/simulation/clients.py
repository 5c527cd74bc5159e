"""How clients retry and how long they wait."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random

from chatstream.checks import check_int, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientBehaviour:
    """Retries and patience of all clients. An invalid value raises `ConfigError` with the name of the setting."""

    max_attempts: int = 1
    """Maximum number of times a call is sent. With 1, a rejected call is not retried."""
    retry_delay_s: float | None = None
    """Delay before a retry, instead of the `Retry-After` of the rejection. None: use `Retry-After`."""
    jitter: float = 0.3
    """Each delay is extended by a random share of itself, at most this one, so that retries do not coincide."""
    patience_s: float | None = None
    """A client gives up when it has no first token this long after the first attempt, or when its next retry would be
    later than that. None: never."""

    def __post_init__(self) -> None:
        check_int("max_attempts", self.max_attempts, at_least=1)
        for name in ("retry_delay_s", "patience_s"):
            check_seconds(name, getattr(self, name), or_none=True)

    def retry_at_s(
        self, asked_s: float, attempts: int, retry_after_s: float | None, now_s: float, rng: Random
    ) -> float:
        """Return the time of the next attempt of a call that is rejected now, infinity if the client gives up.

        `asked_s` is the intended time of the first attempt, `attempts` the number of attempts so far.
        """
        delay_s = self.retry_delay_s if self.retry_delay_s is not None else retry_after_s
        if attempts >= self.max_attempts or delay_s is None:
            return inf
        retry_at_s = now_s + delay_s * rng.uniform(1.0, 1.0 + self.jitter)
        return inf if self.patience_s is not None and retry_at_s >= asked_s + self.patience_s else retry_at_s
