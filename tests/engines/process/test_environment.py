"""Environment variables of the engine's process; values that the user has set are kept."""

from __future__ import annotations

import pytest

from chatstream.engines.process.environment import SPIN_ROUNDS, for_computing


@pytest.mark.parametrize(
    ("environment", "tunables"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_huge_pages_are_requested_unless_the_user_has_decided(environment: dict[str, str], tunables: str) -> None:
    assert for_computing(environment)["GLIBC_TUNABLES"] == tunables
    assert for_computing(environment)["THP_MEM_ALLOC_ENABLE"] == "1"
    assert for_computing(environment | {"THP_MEM_ALLOC_ENABLE": "0"})["THP_MEM_ALLOC_ENABLE"] == "0"


def test_spinning_is_shortened_unless_the_user_has_decided() -> None:
    assert for_computing({})["GOMP_SPINCOUNT"] == str(SPIN_ROUNDS)
    assert "GOMP_SPINCOUNT" not in for_computing({"OMP_WAIT_POLICY": "ACTIVE"})
    assert "GOMP_SPINCOUNT" not in for_computing({"GOMP_SPINCOUNT": "1"})  # set already, to another value
