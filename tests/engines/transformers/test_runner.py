"""A step: its tokens, and which request fails with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.transformers import sampling
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.types import SamplingParams

NUM_STEPS = 5
FEW = [SamplingParams(seed=1), SamplingParams(seed=2, top_k=5), SamplingParams(seed=3, temperature=0)]
TOO_MUCH = SamplingParams(seed=4, top_p=0.999)


def steps_of(path: Path, all_params: Sequence[SamplingParams]) -> list[Mapping[int, SampledToken | Exception]]:
    """Results of each step, for the slots that got a token in the step before."""
    runner = load(str(path), None, LoadSettings(device="cpu")).runner
    inputs = [SlotInput(slot, 0, (50 + slot, 60), is_last=True) for slot in range(len(all_params))]
    for item, params in zip(inputs, all_params, strict=True):
        runner.open_slot(item.slot, runner.new_sampler(item.token_ids, params, None))
    results = []
    for _ in range(NUM_STEPS):
        step = runner.step(inputs)
        results.append(step)
        inputs = [
            SlotInput(slot, 1 + len(results), (token.token_id,), is_last=True)
            for slot, token in step.items()
            if isinstance(token, SampledToken)
        ]
    return results


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_request_that_fails_in_sampling_fails_alone_and_does_not_change_other_tokens(
    kind: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests have been sampled in the same step when memory runs out."""
    expected = steps_of(checkpoint(kind), FEW)
    draw = sampling.draw_filtered

    def draw_in_little_memory(logits: torch.Tensor, samplers: Sequence[sampling.Sampler], *how: Any) -> torch.Tensor:
        if any(one.params == TOO_MUCH for one in samplers):
            raise torch.OutOfMemoryError("no memory to sort the vocabulary")
        return draw(logits, samplers, *how)

    monkeypatch.setattr(sampling, "draw_filtered", draw_in_little_memory)
    first, *others = steps_of(checkpoint(kind), [*FEW, TOO_MUCH])
    assert isinstance(first[3], torch.OutOfMemoryError)
    assert [{slot: first[slot] for slot in range(3)}, *others] == expected
