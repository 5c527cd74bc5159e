"""What the engine's process is told when it starts, and what the user has said instead."""

from __future__ import annotations

import pytest

from chatstream.engines.process.environment import SPIN_ROUNDS, for_computing


@pytest.mark.parametrize(
    ("said", "tunables"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_huge_pages_are_asked_for_where_the_user_has_not_decided(said: dict[str, str], tunables: str) -> None:
    assert for_computing(said)["GLIBC_TUNABLES"] == tunables
    assert for_computing(said)["THP_MEM_ALLOC_ENABLE"] == "1"
    assert for_computing(said | {"THP_MEM_ALLOC_ENABLE": "0"})["THP_MEM_ALLOC_ENABLE"] == "0"


def test_threads_that_wait_for_each_other_sleep_soon_where_the_user_has_not_decided() -> None:
    assert for_computing({})["GOMP_SPINCOUNT"] == str(SPIN_ROUNDS)
    assert "GOMP_SPINCOUNT" not in for_computing({"OMP_WAIT_POLICY": "ACTIVE"})
    assert "GOMP_SPINCOUNT" not in for_computing({"GOMP_SPINCOUNT": "1"})  # which is there already
