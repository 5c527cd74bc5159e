"""Environment variables for a process that computes. Libraries read them once, at startup."""

from __future__ import annotations

from collections.abc import Mapping

SPIN_ROUNDS = 3000
"""Long enough for the pause between two operations: 8 streams of a 0.5B model on two cores lose 6 to 15 % against
endless spinning. Next to one busy process they are 13 times as fast (benchmarks/busy_machine.py)."""


def for_computing(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `environment`. Variables that the user has set are kept; libraries that are absent ignore
    theirs."""
    return _huge_pages(environment) | _short_spins(environment)


def _huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Request transparent huge pages for the model's memory, where the kernel gives them on request.

    A step reads all weights once; with pages of 4 KiB it looks up half a million addresses for each 2 GB. The first
    variable applies to torch's memory, the second to every allocation of glibc's malloc.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb=" not in tunables:
        tunables = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    return {"THP_MEM_ALLOC_ENABLE": environment.get("THP_MEM_ALLOC_ENABLE", "1"), "GLIBC_TUNABLES": tunables}


def _short_spins(environment: Mapping[str, str]) -> dict[str, str]:
    """Let torch's threads sleep soon when they wait for each other, which they do some hundred times in a step.

    GCC's OpenMP spins for 300,000 rounds first, about one time slice of the kernel. When the core of one thread is
    taken away, the threads that wait for it would block their own cores for that long.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return {}
    return {"GOMP_SPINCOUNT": str(SPIN_ROUNDS)}
