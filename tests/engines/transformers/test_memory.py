"""How many sequences fit, and what is said of more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatstream import ChatStream
from chatstream.cli.app import run
from chatstream.engines.transformers import create_engine, loader, memory
from chatstream.engines.transformers.memory import free_bytes, free_host_bytes, kv_budget
from chatstream.errors import ConfigError
from tests.engines.transformers import checkpoints

GIB = 2**30


def test_slots_of_full_length_share_what_is_free() -> None:
    budget = kv_budget(free_bytes=10 * GIB, pool_free_bytes=4 * GIB, bytes_per_token=2**17, context_len=8192)
    assert budget.max_slots == 7
    assert budget.pool_bytes == int(4 * GIB * memory.SHARE_FOR_POOL)
    assert budget.limits == (
        "7 sequences of 8192 tokens fit 7.00 GiB of memory for keys and values, at 1.00 GiB each; "
        "a smaller context_len lets more run"
    )


@given(
    free=st.integers(0, 2**40), per_token=st.integers(0, 2**22), context_len=st.integers(1, 10**6), pool=st.integers(0)
)
def test_there_is_a_slot_and_never_more_than_fit(free: int, per_token: int, context_len: int, pool: int) -> None:
    budget = kv_budget(free, min(pool, free), per_token, context_len)
    assert budget.max_slots >= 1
    assert budget.max_slots == 1 or budget.max_slots * per_token * context_len + budget.pool_bytes <= free


# --- what is free ---------------------------------------------------------------------------------------------------


def cgroup(path: Path, limit: str, used: str, file_pages: int = 0) -> Path:
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(used + "\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {file_pages}\nactive_file 7\n")
    return path


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the machine has left."""

    class Machine:
        available = 8 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    return Machine.available


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, available: int) -> None:
    assert free_host_bytes(cgroup(tmp_path, str(4 * GIB), str(1 * GIB))) == 3 * GIB


def test_pages_of_files_that_were_read_are_as_good_as_free(tmp_path: Path, available: int) -> None:
    """A container that had just read its checkpoint seemed to have no memory left."""
    assert free_host_bytes(cgroup(tmp_path, str(4 * GIB), str(4 * GIB), file_pages=GIB)) == GIB


def test_a_container_without_a_limit_or_with_a_large_one_has_what_the_machine_has(
    tmp_path: Path, available: int
) -> None:
    assert free_host_bytes(cgroup(tmp_path, "max", str(1 * GIB))) == available
    assert free_host_bytes(cgroup(tmp_path, str(100 * GIB), str(1 * GIB))) == available


def test_a_container_above_its_limit_has_nothing(tmp_path: Path, available: int) -> None:
    assert free_host_bytes(cgroup(tmp_path, str(1 * GIB), str(2 * GIB))) == 0


@pytest.mark.parametrize("limit", [None, "", "much"])
def test_no_container_and_nothing_readable_is_no_limit(tmp_path: Path, available: int, limit: str | None) -> None:
    if limit is not None:
        cgroup(tmp_path, limit, "0")
    assert free_host_bytes(tmp_path) == available
    assert free_bytes(torch.device("cpu")) <= available


# --- a limit that cannot hold ---------------------------------------------------------------------------------------


@pytest.fixture
def room_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the small llama: 2 layers of 2 heads of 8 numbers, both, 4 bytes each."""
    slot_bytes = 2 * 2 * 2 * 8 * 4 * checkpoints.CONTEXT_LEN
    monkeypatch.setattr(loader, "free_bytes", lambda device: int(3.5 * slot_bytes / memory.SHARE_FOR_SLOTS))


@pytest.mark.usefixtures("room_for_three")
@pytest.mark.anyio
async def test_a_limit_that_memory_cannot_hold_is_refused_at_the_start(checkpoint: Callable[[str], Path]) -> None:
    path = str(checkpoint("llama"))
    engine = create_engine(path)
    await engine.start()
    assert engine.capacity.max_concurrency == 3
    assert "3 sequences of 160 tokens fit" in (engine.capacity.limited_by or "")
    await engine.stop()
    async with ChatStream(path, max_concurrency=3):
        pass
    with pytest.raises(ConfigError, match=r"max_concurrency is more than the 3 .* 3 sequences of 160 tokens fit"):
        async with ChatStream(path, max_concurrency=4):
            pass
    async with ChatStream(path, max_concurrency=4, context_len=100):
        pass  # as the message says


@pytest.mark.usefixtures("room_for_three")
def test_the_server_says_so_in_one_line(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0", "--max-concurrency", "4"]
    assert run(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "3 sequences" in line]
    assert "--max-concurrency" in line
