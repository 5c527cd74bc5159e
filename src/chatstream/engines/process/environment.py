"""What a process that computes should find in its environment: libraries read it once, when the process starts."""

from __future__ import annotations

from collections.abc import Mapping

SPIN_ROUNDS = 3000
"""Enough for the pause between two operations: 8 streams of a 0.5B on two cores lose 6 to 15 % to endless ones. Beside
one busy process they are 13 times as fast (benchmarks/busy_machine.py)."""


def for_computing(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to this one. What the user has said stays; where nobody reads it, it does no harm."""
    return _huge_pages(environment) | _short_spins(environment)


def _huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """A model's memory lies in transparent huge pages, where the kernel gives them to who asks.

    A step reads all weights once; in pages of 4 KiB it looks up half a million addresses for each 2 GB. The first
    variable is for torch's memory, the second for everything from glibc's malloc.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb=" not in tunables:
        tunables = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    return {"THP_MEM_ALLOC_ENABLE": environment.get("THP_MEM_ALLOC_ENABLE", "1"), "GLIBC_TUNABLES": tunables}


def _short_spins(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's threads wait for each other some hundred times in a step, and go to sleep soon when they do.

    GCC's OpenMP lets them spin for 300,000 rounds first, about as long as the kernel lets a process run: whoever waits
    for one whose core was taken away keeps its own from everybody for that long.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return {}
    return {"GOMP_SPINCOUNT": str(SPIN_ROUNDS)}
