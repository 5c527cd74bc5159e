"""torch takes as many threads as were chosen, in the thread that computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import loky
import pytest
import torch

from chatstream.engines.model import Feed, NextToken
from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.runner import TransformersRunner
from chatstream.engines.transformers.threads import end_idle_workers, set_num_threads
from tests.engines.transformers.recording import answer, greedy, request_of

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_never_more_than_torch_was_told_before_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loky, "cpu_count", lambda only_physical_cores=False: 3)
    torch.set_num_threads(2)
    assert set_num_threads(None) == 2 == torch.get_num_threads()
    assert set_num_threads(3) == 3 == torch.get_num_threads()
    torch.set_num_threads(9)
    assert set_num_threads(None) == 3 == torch.get_num_threads()


async def test_the_number_holds_in_the_thread_that_computes(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps it per thread: set anywhere else, it would not hold in the engine's."""
    here = torch.get_num_threads()
    seen: set[tuple[str, int]] = set()
    real_step = TransformersRunner.step

    def step(self: TransformersRunner, feeds: Sequence[Feed]) -> Mapping[int, NextToken | Exception]:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return real_step(self, feeds)

    monkeypatch.setattr(TransformersRunner, "step", step)
    engine = create_engine(str(checkpoint("llama")), num_threads=here + 1)
    await engine.start()
    await answer(engine, request_of([50, 60, 70], greedy(3)))
    await engine.stop()
    assert seen == {("chatstream-engine", here + 1)}
    assert torch.get_num_threads() == here


@pytest.mark.skipif(not [*(Path(torch.__file__).parent / "lib").glob("libgomp*")], reason="torch has another OpenMP")
def test_a_thread_that_loaded_a_model_leaves_no_workers_behind() -> None:
    def num_threads_of_process() -> int:
        return len(os.listdir("/proc/self/task"))

    def compute() -> None:
        torch.set_num_threads(2)
        torch.ones(1 << 20).sum()

    def compute_and_let_go() -> tuple[int, int, int]:
        before = num_threads_of_process()
        compute()
        during = num_threads_of_process()
        end_idle_workers()
        return before, during, num_threads_of_process()

    with ThreadPoolExecutor(1) as pool:  # a thread of its own, for the workers belong to one
        before, during, after = pool.submit(compute_and_let_go).result()
    assert before < during
    assert after == before
