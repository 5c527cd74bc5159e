"""The number of torch's CPU threads is set in the thread that computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import loky
import pytest
import torch

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.text.codec import SampledToken
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


def test_the_default_is_at_most_the_thread_count_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loky, "cpu_count", lambda only_physical_cores=False: 3)
    torch.set_num_threads(2)
    assert set_num_threads(None) == 2 == torch.get_num_threads()
    assert set_num_threads(3) == 3 == torch.get_num_threads()
    torch.set_num_threads(9)
    assert set_num_threads(None) == 3 == torch.get_num_threads()


async def test_the_number_is_set_in_the_engine_thread(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps the number for each thread, so it must be set in the engine thread."""
    here = torch.get_num_threads()
    seen: set[tuple[str, int]] = set()
    real_step = TransformersRunner.step

    def step(self: TransformersRunner, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return real_step(self, inputs)

    monkeypatch.setattr(TransformersRunner, "step", step)
    engine = create_engine(str(checkpoint("llama")), load=LoadSettings(num_threads=here + 1))
    await engine.start()
    await answer(engine, request_of([50, 60, 70], greedy(3)))
    await engine.stop()
    assert seen == {("chatstream-engine", here + 1)}
    assert torch.get_num_threads() == here


@pytest.mark.skipif(not [*(Path(torch.__file__).parent / "lib").glob("libgomp*")], reason="torch has another OpenMP")
def test_end_idle_workers_ends_the_workers_of_the_calling_thread() -> None:
    """Workers are counted by the name that they inherit from their thread, because other tests have threads too."""

    def named_threads() -> set[int]:
        found = set()
        for path in Path("/proc/self/task").glob("*/comm"):
            with suppress(OSError):  # the thread has just ended
                if path.read_text() == "omp-test\n":
                    found.add(int(path.parent.name))
        return found

    def compute_and_end_workers() -> None:
        Path("/proc/thread-self/comm").write_text("omp-test")
        myself = threading.get_native_id()
        torch.set_num_threads(2)
        torch.ones(1 << 20).sum()
        assert len(named_threads()) == 2
        end_idle_workers()
        deadline_s = time.monotonic() + 30.0
        while named_threads() != {myself}:  # the kernel lists a thread until shortly after its end
            assert time.monotonic() < deadline_s

    with ThreadPoolExecutor(1) as pool:  # a new thread, because workers belong to one
        pool.submit(compute_and_end_workers).result()
