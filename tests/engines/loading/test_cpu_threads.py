"""As many threads as there are cores to use."""

from __future__ import annotations

from collections.abc import Callable

import loky
import pytest

from chatstream.engines.loading.cpu_threads import choose_num_threads


@pytest.fixture(autouse=True)
def _nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A machine of so many physical cores and CPUs that may be used."""

    def is_there(num_cores: int, num_cpus: int) -> None:
        monkeypatch.setattr(
            loky, "cpu_count", lambda only_physical_cores=False: num_cores if only_physical_cores else num_cpus
        )

    return is_there


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 7), (64, 63)])
def test_a_thread_for_each_core_and_one_core_left_where_there_are_several(
    num_cores: int, expected: int, machine: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(num_cores, 2 * num_cores)
    assert choose_num_threads(None) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert choose_num_threads(None) == num_cores, "who sets the variable has thought about it"


@pytest.mark.parametrize(("told", "expected"), [("3", 3), ("3,2", 3), ("0", 1), ("many", 7), ("", 7)])
def test_the_variable_of_openmp_is_kept_to(
    told: str, expected: int, machine: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8, 16)
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert choose_num_threads(None) == expected


def test_a_number_that_is_asked_for_is_taken_and_too_many_are_warned_of(
    machine: Callable[[int, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(4, 8)
    assert choose_num_threads(8) == 8
    assert not caplog.records
    assert choose_num_threads(9) == 9
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("num_threads is 9, but only 8 CPUs are usable")
    assert line.endswith("set num_threads to at most 3")
