"""How many sequences fit, and what is said of more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream import ChatStream
from chatstream.cli.app import run
from chatstream.engines.transformers import create_engine, loader, memory
from chatstream.engines.transformers.memory import KVBudget, SequenceBytes, kv_budget
from chatstream.errors import ConfigError
from tests.engines.transformers import checkpoints

GIB = 2**30


def test_slots_of_full_length_share_what_is_free() -> None:
    budget = kv_budget(10 * GIB, SequenceBytes(2**17), 8192, host_free_bytes=4 * GIB)
    assert budget.max_slots == 7
    assert budget.prefix_cache_bytes == int(4 * GIB * memory.SHARE_FOR_POOL)
    assert budget.limits == (
        "7 sequences of 8192 tokens fit 7.00 GiB of memory for keys and values, at 1.00 GiB each; "
        "a smaller context_len lets more run"
    )
    assert kv_budget(2 * GIB, SequenceBytes(2**17), 8192).limits.startswith("1 sequence of 8192 tokens fit")


def test_a_state_counts_once_however_long_the_context() -> None:
    """2.8 MiB of a Mamba were taken for nothing, and would be 22 GiB if each token had them."""
    state = SequenceBytes(per_token=0, fixed=GIB)
    assert kv_budget(10 * GIB, state, 8192).max_slots == kv_budget(10 * GIB, state, 64).max_slots == 7


@pytest.mark.parametrize(
    ("free_gib", "sequence", "prefix_cache_bytes", "said"),
    [
        (
            1,
            SequenceBytes(2**17),
            None,
            "context_len must be at most 5734: one sequence of 8192 tokens takes 1.00 GiB ",
        ),
        (1, SequenceBytes(2**16, GIB // 2), None, "context_len must be at most 3276: one sequence of 8192 tokens"),
        (1, SequenceBytes(0, GIB), None, "more has to be free: one sequence of 8192 tokens takes 1.00 GiB of memory"),
        (
            9,
            SequenceBytes(2**17),
            8 * GIB,
            "more has to be free: .* there are 0.00 MiB, beside the 8.00 GiB of prefix_cache_bytes",
        ),
        (9, SequenceBytes(2**17), 10 * GIB, "prefix_cache_bytes is 10.00 GiB, and 9.00 GiB of memory are free"),
    ],
)
def test_what_does_not_fit_once_is_refused_with_what_does(
    free_gib: int, sequence: SequenceBytes, prefix_cache_bytes: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        kv_budget(free_gib * GIB, sequence, 8192, prefix_cache_bytes=prefix_cache_bytes)


@given(
    free=st.integers(0, 2**40),
    sequence=st.builds(SequenceBytes, st.integers(0, 2**22), st.integers(0, 2**30)),
    context_len=st.integers(16, 10**6),
    prefix_cache_bytes=st.none() | st.integers(0, 2**40),
    is_elsewhere=st.booleans(),
)
def test_never_more_slots_than_fit_beside_the_pool_and_the_advice_is_right(
    free: int, sequence: SequenceBytes, context_len: int, prefix_cache_bytes: int | None, is_elsewhere: bool
) -> None:
    def budget_of(context_len: int) -> KVBudget:
        host = GIB if is_elsewhere else None
        return kv_budget(free, sequence, context_len, host_free_bytes=host, prefix_cache_bytes=prefix_cache_bytes)

    try:
        budget = budget_of(context_len)
    except ConfigError as error:
        if fitting := re.match(r"context_len must be at most (\d+)", error.message):
            assert budget_of(int(fitting[1])).max_slots == 1
            with pytest.raises(ConfigError):
                budget_of(int(fitting[1]) + 1)
        return
    assert budget.max_slots >= 1
    assert budget.prefix_cache_bytes == prefix_cache_bytes or prefix_cache_bytes is None
    assert budget.max_slots * sequence.of(context_len) + (0 if is_elsewhere else budget.prefix_cache_bytes) <= free


# --- a limit that cannot hold ---------------------------------------------------------------------------------------


SLOT_BYTES = 2 * 2 * 2 * 8 * 4 * checkpoints.CONTEXT_LEN
"""Keys and values of the small llama: 2 layers of 2 heads of 8 numbers, both, 4 bytes each."""


@pytest.fixture
def room_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: int(3.5 * SLOT_BYTES / memory.SHARE_FOR_SLOTS))


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
    assert line.startswith("chatstream: --max-concurrency is more than the 3 ")
    assert line.endswith("a smaller --context-len lets more run")


def test_the_server_says_which_context_fits_where_the_models_own_does_not(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to start, and the kernel ended it when the first conversation had grown."""
    monkeypatch.setattr(loader, "free_bytes", lambda device: int(0.5 * SLOT_BYTES / memory.SHARE_FOR_SLOTS) + 1)
    assert run(["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "one sequence" in line]
    assert "--context-len must be at most 80: one sequence of 160 tokens takes 0.04 MiB of memory" in line


def test_the_server_calls_the_prefix_cache_as_it_was_given(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told that there are 0.00 GiB of memory beside a prefix cache, and no option."""
    arguments = ["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0"]
    assert run([*arguments, "--prefix-cache-mib", "99999999"]) == 2
    assert "chatstream: --prefix-cache-mib is 97656.25 GiB, and " in capsys.readouterr().err
