"""How many sequences fit, and what is said of more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream import ChatStream
from chatstream.cli.app import run
from chatstream.engines.transformers import create_engine, loader, memory
from chatstream.engines.transformers.memory import kv_budget
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
