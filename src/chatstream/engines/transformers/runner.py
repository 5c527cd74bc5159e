"""The model's side of a step: feed everybody's newest token, feed a newcomer's prompt, choose the next tokens.

Knows slots, lengths and tokens. How the model is fed is `forward.py`, how a token is chosen `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from chatstream.engines.model import NextToken, PrefillChunk, StepPlan
from chatstream.engines.transformers.forward import Feed, Forward, embedding_size
from chatstream.engines.transformers.sampling import Sampler, sample
from chatstream.types import SamplingParams


@dataclass(slots=True)
class _Slot:
    prompt_ids: tuple[int, ...]
    sampler: Sampler
    length: int = 0
    """Tokens fed so far."""
    last_token: int = -1
    """Sampled, and fed in the next step."""

    def next_feed(self, slot: int, token_ids: tuple[int, ...]) -> Feed:
        feed = Feed(slot, self.length, token_ids)
        # Counted before the pass: one that fails half-way has written memory that must be cleared too.
        self.length += len(token_ids)
        return feed


class TransformersRunner:
    """A `ModelRunner` (engines/model.py) over any causal language model of `transformers`."""

    def __init__(self, model: PreTrainedModel, forward: Forward, context_len: int) -> None:
        self.context_len = context_len
        self._forward = forward
        self._device = model.device
        self._vocab_size = embedding_size(model)
        self._slots: dict[int, _Slot] = {}

    @torch.inference_mode()
    def open_slot(self, slot: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raises `ValueError` for ids the model has no embedding for: on a GPU they would end the whole process."""
        if not all(0 <= token_id < self._vocab_size for token_id in prompt_ids):
            raise ValueError(f"the prompt has token ids outside the model's vocabulary of {self._vocab_size}")
        sampler = Sampler(sampling, prompt_ids, self._vocab_size, self._device)
        self._slots[slot] = _Slot(tuple(prompt_ids), sampler)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> Mapping[int, NextToken | Exception]:
        results: dict[int, NextToken | Exception] = {}
        logits: list[torch.Tensor] = []  # each (number of its slots, vocab_size)
        slots: list[int] = []
        for feeds, has_next_token in self._passes(plan):
            try:
                fed = self._forward.feed(feeds)
            except Exception as error:
                # Those of this pass only. A newcomer whose prompt does not fit the memory ends alone.
                results |= {feed.slot: error for feed in feeds}
                continue
            if has_next_token:
                logits.append(fed)
                slots += [feed.slot for feed in feeds]
        if slots:
            tokens = sample(torch.cat(logits), [self._slots[slot].sampler for slot in slots])
            for slot, token in zip(slots, tokens, strict=True):
                results[slot] = token
                if not isinstance(token, Exception):
                    self._slots[slot].last_token = token.token_id
        return results

    @torch.inference_mode()
    def close_slot(self, slot: int) -> None:
        state = self._slots.pop(slot, None)
        if state is not None:
            self._forward.clear(slot, state.length)

    def _passes(self, plan: StepPlan) -> list[tuple[list[Feed], bool]]:
        """What is fed together, and whether it yields next tokens. Decodes first: they must not wait for memory that
        a newcomer takes."""
        states = [(slot, self._slots[slot]) for slot in plan.decode_slots]
        decodes = [state.next_feed(slot, (state.last_token,)) for slot, state in states]
        groups = [decodes] if self._forward.is_batched else [[feed] for feed in decodes]
        passes = [(group, True) for group in groups if group]
        if plan.prefill is not None and (feed := self._prefill_feed(plan.prefill)) is not None:
            passes.append(([feed], plan.prefill.is_last))
        return passes

    def _prefill_feed(self, chunk: PrefillChunk) -> Feed | None:
        state = self._slots[chunk.slot]
        if self._forward.is_batched:
            return state.next_feed(chunk.slot, chunk.token_ids)
        # A model of unknown kind may not be able to continue a prompt, so it gets the whole one when it is complete.
        return state.next_feed(chunk.slot, state.prompt_ids) if chunk.is_last else None
