"""The number of sequences that fit, and the errors for more."""

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


def test_slots_of_full_length_divide_the_free_memory() -> None:
    budget = kv_budget(10 * GIB, SequenceBytes(2**17), 8192, host_free_bytes=4 * GIB)
    assert budget.max_slots == 7
    assert budget.prefix_cache_bytes == int(4 * GIB * memory.SHARE_FOR_PREFIX_CACHE)
    assert budget.limits == (
        "7 sequences of 8192 tokens fit 7.00 GiB of memory for keys and values, at 1.00 GiB each; "
        "lower context_len to run more"
    )
    assert kv_budget(2 * GIB, SequenceBytes(2**17), 8192).limits.startswith("1 sequence of 8192 tokens fit")


def test_a_fixed_state_does_not_grow_with_the_context() -> None:
    """The 2.8 MiB of a Mamba were counted as 0; counted for each token they would be 22 GiB."""
    state = SequenceBytes(per_token=0, fixed=GIB)
    assert kv_budget(10 * GIB, state, 8192).max_slots == kv_budget(10 * GIB, state, 64).max_slots == 7


@pytest.mark.parametrize(
    ("free_gib", "sequence", "prefix_cache_bytes", "message"),
    [
        (
            1,
            SequenceBytes(2**17),
            None,
            "context_len must be at most 5734: one sequence of 8192 tokens takes 1.00 GiB ",
        ),
        (1, SequenceBytes(2**16, GIB // 2), None, "context_len must be at most 3276: one sequence of 8192 tokens"),
        (1, SequenceBytes(0, GIB), None, "free more memory: one sequence of 8192 tokens takes 1.00 GiB of memory"),
        (
            9,
            SequenceBytes(2**17),
            8 * GIB,
            "free more memory: .* 0.00 MiB is available, besides the 8.00 GiB of prefix_cache_bytes",
        ),
        (9, SequenceBytes(2**17), 10 * GIB, "prefix_cache_bytes is 10.00 GiB, but 9.00 GiB of memory is free"),
    ],
)
def test_a_context_or_a_cache_that_does_not_fit_is_refused_with_the_limit(
    free_gib: int, sequence: SequenceBytes, prefix_cache_bytes: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kv_budget(free_gib * GIB, sequence, 8192, prefix_cache_bytes=prefix_cache_bytes)


@given(
    free=st.integers(0, 2**40),
    sequence=st.builds(SequenceBytes, st.integers(0, 2**22), st.integers(0, 2**30)),
    context_len=st.integers(16, 10**6),
    prefix_cache_bytes=st.none() | st.integers(0, 2**40),
    is_on_gpu=st.booleans(),
)
def test_slots_and_prefix_cache_fit_in_memory_and_the_advised_context_is_the_longest(
    free: int, sequence: SequenceBytes, context_len: int, prefix_cache_bytes: int | None, is_on_gpu: bool
) -> None:
    def budget_of(context_len: int) -> KVBudget:
        host = GIB if is_on_gpu else None
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
    assert budget.max_slots * sequence.of(context_len) + (0 if is_on_gpu else budget.prefix_cache_bytes) <= free


# --- limits that do not fit -----------------------------------------------------------------------------------------


SLOT_BYTES = 2 * 2 * 2 * 8 * 4 * checkpoints.CONTEXT_LEN
"""Keys and values of the small llama: 2 layers of 2 heads of 8 numbers of 4 bytes."""


@pytest.fixture
def memory_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: int(3.5 * SLOT_BYTES / memory.SHARE_FOR_SLOTS))


@pytest.mark.usefixtures("memory_for_three")
@pytest.mark.anyio
async def test_a_limit_that_does_not_fit_in_memory_is_refused_at_startup(checkpoint: Callable[[str], Path]) -> None:
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
        pass  # as the message advises


@pytest.mark.usefixtures("memory_for_three")
def test_the_server_refuses_such_a_limit_in_one_line(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0", "--max-concurrency", "4"]
    assert run(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "3 sequences" in line]
    assert line.startswith("chatstream: --max-concurrency is more than the 3 ")
    assert line.endswith("lower --context-len to run more")


def test_the_server_names_the_context_that_fits_if_the_models_own_does_not(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server started, and the kernel ended it when the first conversation had grown."""
    monkeypatch.setattr(loader, "free_bytes", lambda device: int(0.5 * SLOT_BYTES / memory.SHARE_FOR_SLOTS) + 1)
    assert run(["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "one sequence" in line]
    assert "--context-len must be at most 80: one sequence of 160 tokens takes 0.04 MiB of memory" in line


def test_the_server_names_the_prefix_cache_by_its_option(
    checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The message named 0.00 GiB of memory and a prefix cache, but no option."""
    arguments = ["serve", str(checkpoint("llama")), "--engine-in", "thread", "--port", "0"]
    assert run([*arguments, "--prefix-cache-mib", "99999999"]) == 2
    assert "chatstream: --prefix-cache-mib is 97656.25 GiB, but " in capsys.readouterr().err
