"""What people do when they are refused or have to wait."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random

from chatstream.errors import ConfigError


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
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts must be at least 1, not {self.max_attempts!r}", param="max_attempts")
        for name in ("retry_delay_s", "patience_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{name} must be above 0 seconds, not {value!r}", param=name)

    def back_s(self, asked_s: float, attempts: int, retry_after_s: float | None, now_s: float, rng: Random) -> float:
        """When somebody who is refused now sends again; infinity: not any more.

        `asked_s` is when the call was meant to be sent first, `attempts` how often it was.
        """
        told_s = self.retry_delay_s if self.retry_delay_s is not None else retry_after_s
        if attempts >= self.max_attempts or told_s is None:
            return inf
        back_s = now_s + told_s * rng.uniform(1.0, 1.0 + self.jitter)
        return inf if self.patience_s is not None and back_s >= asked_s + self.patience_s else back_s
