"""Shrinks a failing seed to the smallest run that still fails."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tests.reliability.world import World, faults_of, run_world


class FailingSeed(AssertionError):
    """A seed broke a promise. The message has the smallest failing run and its command."""


def check_seed(seed: int, *, num_requests: int = 10, faults: Collection[str] | None = None) -> World:
    """Run one world. Raises `FailingSeed` with the smallest run that also fails."""
    try:
        return run_world(seed, num_requests=num_requests, faults=faults)
    except Exception as failure:
        raise FailingSeed(_shrunk(seed, num_requests, faults, failure)) from failure


def _shrunk(seed: int, num_requests: int, faults: Collection[str] | None, failure: Exception) -> str:
    """Reduce the number of requests, then remove each fault without which the run still fails."""
    needed: Sequence[str] = sorted(faults_of(seed) if faults is None else faults)
    num_requests = next((fewer for fewer in range(1, num_requests) if _fails(seed, fewer, needed)), num_requests)
    for name in list(needed):
        without = [other for other in needed if other != name]
        if _fails(seed, num_requests, without):
            needed = without
    again = f"scripts/nightly --seed {seed} --requests {num_requests} --faults '{','.join(needed)}'"
    return f"{type(failure).__name__}: {failure}\nthe smallest run that fails:\n    {again}"


def _fails(seed: int, num_requests: int, faults: Collection[str]) -> bool:
    try:
        run_world(seed, num_requests=num_requests, faults=faults)
    except Exception:
        return True
    return False
