"""The real step loop over a model without computation, which counts the tokens of each sequence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel, SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.types import GenerationRequest, Message, PreparedPrompt, SamplingParams, TokenMask

NUM_STREAMS = 8


class CountingRunner:
    """A `ModelRunner` that measures, for each pair of slots, the token difference since both generate."""

    context_len = 1_000_000
    max_slots: int | None = None
    supports_partial_prefix = False

    def __init__(self) -> None:
        self.steps = self.tokens = self.violations = self.largest = 0
        self._counts: dict[int, int] = {}
        self._since: dict[tuple[int, int], tuple[int, int]] = {}

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> None:
        pass

    def open_slot(self, slot: int, sampler: object) -> None:
        pass

    def close_slot(self, slot: int) -> None:
        self._counts.pop(slot, None)
        self._since = {pair: counts for pair, counts in self._since.items() if slot not in pair}

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        counts = self._counts
        last = [item.slot for item in inputs if item.is_last]
        self.steps += 1
        self.tokens += sum(slot in counts for slot in last)
        for slot in counts.keys() & last:
            counts[slot] += 1
        for pair in combinations(counts, 2):
            f, g = self._since.setdefault(pair, (counts[pair[0]], counts[pair[1]]))
            difference = abs((counts[pair[0]] - f) - (counts[pair[1]] - g))
            self.largest = max(self.largest, difference)
            self.violations += difference > 1
        for slot in last:
            counts.setdefault(slot, 0)  # its prompt is complete
        return dict.fromkeys(last, SampledToken(1))


class Words:
    """A codec with a single word."""

    eos_token_ids: frozenset[int] = frozenset()

    def encode_text(self, text: str) -> list[int]:
        return [1] * len(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [1] * sum(len(message.content) for message in messages)

    def open_decoder(self) -> Words:
        return self

    def token_text(self, token_id: int) -> str:
        return "x"

    def push(self, token: int) -> str:
        return "x"

    def flush(self) -> str:
        return ""


def measure_steps(num_steps: int) -> tuple[int, int, int, int]:
    """Return steps, tokens, the largest token difference of two generating sequences, and its violations of 1."""
    runner = CountingRunner()

    async def run() -> None:
        # The readers never lag behind, so no sequence is paused.
        model = LoadedModel(runner, Words(), prefix_cache_bytes=0)  # type: ignore[arg-type]  # no prefix cache
        engine = StepEngine("nothing", lambda: model, max_undelivered=1_000_000)
        await engine.start()
        rng = random.Random(1)

        async def one(number: int) -> None:
            while runner.steps < num_steps:
                sampling = SamplingParams(max_new_tokens=rng.randrange(20, 2000))
                prompt = PreparedPrompt(token_ids=(1,) * rng.randrange(1, 3000))
                request = GenerationRequest(request_id=f"{number}", prompt=prompt, sampling=sampling)
                async for _ in engine.stream(request):
                    pass

        try:
            await asyncio.gather(*(one(number) for number in range(NUM_STREAMS)))
        finally:
            await engine.stop()

    asyncio.run(run())
    return runner.steps, runner.tokens, runner.largest, runner.violations
