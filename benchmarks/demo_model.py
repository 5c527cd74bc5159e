"""Speed of the bundled demo model on one core.

    python benchmarks/demo_model.py

Prints tokens per second for 1 to 16 concurrent streams and for a prompt of 256 tokens. Each figure is the best of
several rounds: on a shared machine the others include the work of other processes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before the import of numpy

from rich.console import Console
from rich.table import Table

from chatstream.engines.batching.model import ModelRunner, SlotInput
from chatstream.engines.demo import load
from chatstream.engines.text.codec import SampledToken
from chatstream.types import SamplingParams

PROMPT = tuple(range(6, 46))
ROUNDS, STEPS = 20, 20


def main() -> None:
    table = Table("streams", "step, ms", "tokens/s, each", "tokens/s, together", title="chatstream-demo, one core")
    for sampling in (SamplingParams(temperature=0.0, seed=0), SamplingParams(temperature=0.3, top_p=0.9, seed=0)):
        table.add_section()
        table.add_row("greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature}")
        for num_streams in (1, 2, 4, 8, 16):
            step_s = decode_step_s(num_streams, sampling)
            table.add_row(str(num_streams), f"{step_s * 1e3:.2f}", f"{1 / step_s:,.0f}", f"{num_streams / step_s:,.0f}")
    Console().print(table)
    chunk_s = prefill_s(256)
    Console().print(f"prefill: 256 tokens in {chunk_s * 1e3:.1f} ms, {256 / chunk_s:,.0f} tokens/s")


def decode_step_s(num_streams: int, sampling: SamplingParams) -> float:
    """Return the seconds of one step, at contexts of 40 to 460 tokens."""
    runner = load().runner
    newest = {slot: fill(runner, slot, PROMPT, sampling) for slot in range(num_streams)}
    lengths = itertools.count(len(PROMPT))

    def round_() -> None:
        for length in itertools.islice(lengths, STEPS):
            found = runner.step([SlotInput(slot, length, (token,), is_last=True) for slot, token in newest.items()])
            newest.update((slot, token_id(token)) for slot, token in found.items())

    return best_of(round_) / STEPS


def prefill_s(num_tokens: int) -> float:
    runner = load().runner

    def round_() -> None:
        fill(runner, 0, tuple(n % 2000 for n in range(num_tokens)), SamplingParams(seed=0))
        runner.close_slot(0)

    return best_of(round_)


def fill(runner: ModelRunner, slot: int, prompt: tuple[int, ...], sampling: SamplingParams) -> int:
    """Compute a prompt in a slot and return the first token."""
    runner.open_slot(slot, runner.new_sampler(prompt, sampling, None))
    return token_id(runner.step([SlotInput(slot, 0, prompt, is_last=True)])[slot])


def token_id(found: SampledToken | Exception) -> int:
    assert isinstance(found, SampledToken), found
    return found.token_id


def best_of(function: Callable[[], None]) -> float:
    times_s = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


if __name__ == "__main__":
    main()
