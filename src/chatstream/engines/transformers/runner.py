"""The model's side of a step: compute the logits of all inputs, then sample the next tokens.

It handles slots, lengths and tokens. Forward passes are in `forward.py`, sampling is in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from chatstream.engines.batching.model import Saved, SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.text.prompt_fitting import check_prompt
from chatstream.engines.transformers.forward import Forward, embedding_size
from chatstream.engines.transformers.sampling import Sampler, sample
from chatstream.types import SamplingParams, TokenMask


@dataclass(slots=True)
class _Slot:
    sampler: Sampler
    length: int = 0
    """Tokens computed so far."""


class TransformersRunner:
    """A `ModelRunner` (engines/batching/model.py) over any causal language model of `transformers`."""

    def __init__(
        self, model: PreTrainedModel, forward: Forward, context_len: int, max_slots: int | None = None
    ) -> None:
        self.context_len = context_len
        self.max_slots = max_slots
        self.supports_partial_prefix = forward.is_batched
        self.forward = forward
        self._vocab_size = embedding_size(model)
        self._slots: dict[int, _Slot] = {}

    @torch.inference_mode()
    def new_sampler(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None = None
    ) -> Sampler:
        check_prompt(prompt_ids, self._vocab_size, self.context_len)
        return Sampler(sampling, prompt_ids, token_mask)

    def open_slot(self, slot: int, sampler: Sampler) -> None:
        self._slots[slot] = _Slot(sampler)

    @torch.inference_mode()
    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        for item in inputs:
            # Set before the pass: a pass that fails may have written memory, which must be cleared too.
            self._slots[item.slot].length = item.start + len(item.token_ids)
        results: dict[int, SampledToken | Exception] = {}
        complete: list[tuple[int, torch.Tensor]] = []  # slots and their logits, (1, vocab_size) each
        for group in [list(inputs)] if self.forward.is_batched else [[item] for item in inputs]:
            for item, logits in zip(group, _results_or_errors(self._logits, group), strict=True):
                if isinstance(logits, Exception):
                    results[item.slot] = logits
                elif item.is_last:
                    complete.append((item.slot, logits))
        tokens = _results_or_errors(self._sample, complete)
        return results | {slot: token for (slot, _), token in zip(complete, tokens, strict=True)}

    @torch.inference_mode()
    def close_slot(self, slot: int) -> None:
        state = self._slots.pop(slot, None)
        if state is not None:
            self.forward.clear(slot, state.length)

    @torch.inference_mode()
    def save(self, slot: int) -> Saved:
        return self.forward.save(slot, self._slots[slot].length)

    @torch.inference_mode()
    def load(self, slot: int, saved: Saved, num_tokens: int) -> None:
        self._slots[slot].length = num_tokens
        self.forward.load(slot, saved, num_tokens)

    @torch.inference_mode()
    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self._slots[slot].length = num_tokens
        self.forward.copy(source, slot, num_tokens)

    def _logits(self, inputs: Sequence[SlotInput]) -> Sequence[torch.Tensor]:
        return [*self.forward.logits_after(inputs)[:, None]]  # each (1, vocab_size)

    def _sample(self, complete: Sequence[tuple[int, torch.Tensor]]) -> Sequence[SampledToken | Exception]:
        samplers = [self._slots[slot].sampler for slot, _ in complete]
        return sample(torch.cat([logits for _, logits in complete]), samplers)


_T = TypeVar("_T")
_R = TypeVar("_R")


def _results_or_errors(compute: Callable[[Sequence[_T]], Sequence[_R]], items: Sequence[_T]) -> list[_R | Exception]:
    """Compute all items at once. If that fails, compute each half by itself, so that an error fails only its item."""
    if not items:
        return []
    try:
        return [*compute(items)]
    except Exception as error:
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return _results_or_errors(compute, items[:middle]) + _results_or_errors(compute, items[middle:])
