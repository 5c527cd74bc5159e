"""What people do when they are refused or have to wait."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random

from chatstream.checks import check_int, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientBehaviour:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    max_attempts: int = 1
    """How often one call is sent at most; 1: whoever is refused goes away for good."""
    retry_delay_s: float | None = None
    """Come back after so long whatever the server says. None: when the server says."""
    jitter: float = 0.3
    """Nobody comes back earlier than told, and up to this part later, so that they do not all come at once."""
    patience_s: float | None = None
    """Give up when the first token has not come so long after it was first asked for, retries included; also when
    told to come back later than that. None: never."""

    def __post_init__(self) -> None:
        check_int("max_attempts", self.max_attempts, at_least=1)
        for name in ("retry_delay_s", "patience_s"):
            check_seconds(name, getattr(self, name), or_none=True)

    def back_s(self, asked_s: float, attempts: int, retry_after_s: float | None, now_s: float, rng: Random) -> float:
        """When somebody who is refused now sends again; infinity: not any more.

        `asked_s` is when the call was meant to be sent first, `attempts` how often it was.
        """
        told_s = self.retry_delay_s if self.retry_delay_s is not None else retry_after_s
        if attempts >= self.max_attempts or told_s is None:
            return inf
        back_s = now_s + told_s * rng.uniform(1.0, 1.0 + self.jitter)
        return inf if self.patience_s is not None and back_s >= asked_s + self.patience_s else back_s
