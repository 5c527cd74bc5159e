"""The number of threads follows the usable cores."""

from __future__ import annotations

from collections.abc import Callable

import loky
import pytest

from chatstream.engines.loading.cpu_threads import choose_num_threads


@pytest.fixture(autouse=True)
def _no_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Simulates a machine: number of usable physical cores, number of usable CPUs."""

    def simulate(num_cores: int, num_cpus: int) -> None:
        monkeypatch.setattr(
            loky, "cpu_count", lambda only_physical_cores=False: num_cores if only_physical_cores else num_cpus
        )

    return simulate


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 7), (64, 63)])
def test_one_thread_per_core_and_one_core_reserved_from_four_on(
    num_cores: int, expected: int, machine: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(num_cores, 2 * num_cores)
    assert choose_num_threads(None) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert choose_num_threads(None) == num_cores, "the variable overrides the reserved core"


@pytest.mark.parametrize(("omp_num_threads", "expected"), [("3", 3), ("3,2", 3), ("0", 1), ("many", 7), ("", 7)])
def test_omp_num_threads_is_an_upper_bound(
    omp_num_threads: str, expected: int, machine: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(8, 16)
    monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    assert choose_num_threads(None) == expected


def test_a_given_number_is_used_with_a_warning_above_the_usable_cpus(
    machine: Callable[[int, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(4, 8)
    assert choose_num_threads(8) == 8
    assert not caplog.records
    assert choose_num_threads(9) == 9
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("num_threads is 9, but only 8 CPUs are usable")
    assert line.endswith("set num_threads to at most 3")
