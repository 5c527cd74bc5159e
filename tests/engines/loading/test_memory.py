"""Free memory of the machine and of its container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from chatstream.engines.loading.memory import free_host_bytes, in_words

GIB = 2**30


def cgroup(path: Path, limit: str, used: str, file_pages: int = 0) -> Path:
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(used + "\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {file_pages}\nactive_file 7\n")
    return path


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> int:
    """Free memory of the machine, in bytes."""

    class Machine:
        available = 8 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    return Machine.available


def test_the_limit_of_a_container_bounds_the_free_memory(tmp_path: Path, available: int) -> None:
    assert free_host_bytes(cgroup(tmp_path, str(4 * GIB), str(1 * GIB))) == 3 * GIB


def test_cached_pages_of_files_count_as_free(tmp_path: Path, available: int) -> None:
    """A container that had just read its checkpoint appeared to have no free memory."""
    assert free_host_bytes(cgroup(tmp_path, str(4 * GIB), str(4 * GIB), file_pages=GIB)) == GIB


def test_without_a_tighter_limit_the_free_memory_is_the_machines(tmp_path: Path, available: int) -> None:
    assert free_host_bytes(cgroup(tmp_path, "max", str(1 * GIB))) == available
    assert free_host_bytes(cgroup(tmp_path, str(100 * GIB), str(1 * GIB))) == available


def test_a_container_above_its_limit_has_no_free_memory(tmp_path: Path, available: int) -> None:
    assert free_host_bytes(cgroup(tmp_path, str(1 * GIB), str(2 * GIB))) == 0


@pytest.mark.parametrize("limit", [None, "", "much"])
def test_without_a_readable_cgroup_there_is_no_limit(tmp_path: Path, available: int, limit: str | None) -> None:
    if limit is not None:
        cgroup(tmp_path, limit, "0")
    assert free_host_bytes(tmp_path) == available
    assert free_host_bytes(tmp_path, tmp_path / "no such file") == available


@pytest.mark.parametrize(("service_limit", "slice_limit", "left"), [("4", "max", 3), ("max", "4", 2), ("8", "3", 1)])
def test_the_tightest_limit_of_a_service_and_its_ancestors_applies(
    service_limit: str, slice_limit: str, left: int, tmp_path: Path, available: int
) -> None:
    """A `MemoryMax=` of systemd is in a group below the root, which was not read."""

    def in_gib(limit: str) -> str:
        return limit if limit == "max" else str(int(limit) * GIB)

    service = tmp_path / "system.slice" / "chat.service"
    service.mkdir(parents=True)
    cgroup(service, in_gib(service_limit), str(1 * GIB))
    cgroup(service.parent, in_gib(slice_limit), str(2 * GIB))
    (own := tmp_path / "own").write_text("12:cpuset:/elsewhere\n0::/system.slice/chat.service\n")
    assert free_host_bytes(tmp_path, own) == left * GIB


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0.00 MiB"), (2**16, "0.06 MiB"), (GIB - 2**20, "1023.00 MiB"), (GIB, "1.00 GiB")]
)
def test_an_amount_below_one_gib_is_in_mib(num_bytes: int, words: str) -> None:
    assert in_words(num_bytes) == words
