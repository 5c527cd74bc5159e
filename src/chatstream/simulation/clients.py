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
    """Leave when the first token has not come after so long; counts for each attempt. None: never."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts must be at least 1, not {self.max_attempts!r}", param="max_attempts")
        for name in ("retry_delay_s", "patience_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{name} must be above 0 seconds, not {value!r}", param=name)

    def delay_s(self, retry_after_s: float | None, rng: Random) -> float:
        """From a refusal (or from losing patience, which names no time) to the next attempt."""
        told_s = self.retry_delay_s if self.retry_delay_s is not None else retry_after_s
        return (told_s if told_s is not None else 1.0) * rng.uniform(1.0, 1.0 + self.jitter)
