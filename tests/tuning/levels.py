"""Synthetic measured levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chatstream.tuning import Level


def level(num_streams: int, step_s: float, *, p99_s: float | None = None, p90_s: float | None = None) -> Level:
    """Return a level with this step time; longer gaps only where given."""
    return Level(
        num_streams=num_streams,
        tokens_per_s=num_streams / step_s,
        itl_p50_s=step_s,
        itl_p90_s=p90_s or step_s,
        itl_p99_s=p99_s or step_s,
        ttft_s=2 * step_s,
        num_joined=20,
        num_gaps=1000,
        window_s=3.0,
    )


def levels(step_s: Callable[[int], float], numbers: Iterable[int], *, tail: float = 1.0) -> list[Level]:
    """Return levels by a formula of the step time. `tail`: p99 gap as a multiple of the step time."""
    return [level(n, step_s(n), p99_s=tail * step_s(n)) for n in numbers]
