"""The model's side of a step: feed everybody's tokens, choose the next ones.

Knows slots, lengths and tokens. How the model is fed is `forward.py`, how a token is chosen `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from chatstream.engines.model import Feed, NextToken, Saved
from chatstream.engines.prompt_fitting import check_prompt
from chatstream.engines.transformers.forward import Forward, embedding_size
from chatstream.engines.transformers.sampling import Sampler, sample
from chatstream.types import SamplingParams, TokenMask


@dataclass(slots=True)
class _Slot:
    sampler: Sampler
    length: int = 0
    """Tokens fed so far."""


class TransformersRunner:
    """A `ModelRunner` (engines/model.py) over any causal language model of `transformers`."""

    def __init__(
        self, model: PreTrainedModel, forward: Forward, context_len: int, max_slots: int | None = None
    ) -> None:
        self.context_len = context_len
        self.max_slots = max_slots
        self.can_load_part = forward.is_batched
        self._forward = forward
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
    def step(self, feeds: Sequence[Feed]) -> Mapping[int, NextToken | Exception]:
        results: dict[int, NextToken | Exception] = {}
        logits: list[torch.Tensor] = []  # each (number of its feeds, vocab_size)
        complete: list[int] = []
        for feed in feeds:
            # Counted before the pass: one that fails half-way has written memory that must be cleared too.
            self._slots[feed.slot].length = feed.start + len(feed.token_ids)
        for group in [list(feeds)] if self._forward.is_batched else [[feed] for feed in feeds]:
            for fed, outcome in self._pass(group):
                if isinstance(outcome, Exception):
                    results |= {feed.slot: outcome for feed in fed}
                    continue
                rows = [row for row, feed in enumerate(fed) if feed.is_last]
                if rows:
                    logits.append(outcome if len(rows) == len(fed) else outcome[rows])
                    complete += [fed[row].slot for row in rows]
        if complete:
            tokens = sample(torch.cat(logits), [self._slots[slot].sampler for slot in complete])
            results |= zip(complete, tokens, strict=True)
        return results

    @torch.inference_mode()
    def close_slot(self, slot: int) -> None:
        state = self._slots.pop(slot, None)
        if state is not None:
            self._forward.clear(slot, state.length)

    @torch.inference_mode()
    def save(self, slot: int) -> Saved:
        return self._forward.save(slot, self._slots[slot].length)

    @torch.inference_mode()
    def load(self, slot: int, saved: Saved, num_tokens: int) -> None:
        self._slots[slot].length = num_tokens
        self._forward.load(slot, saved, num_tokens)

    @torch.inference_mode()
    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self._slots[slot].length = num_tokens
        self._forward.copy(source, slot, num_tokens)

    def _pass(self, feeds: list[Feed]) -> list[tuple[list[Feed], torch.Tensor | Exception]]:
        """One pass; when it fails, each half by itself: whoever is to blame, or does not fit, ends alone."""
        try:
            return [(feeds, self._forward.feed(feeds))]
        except Exception as error:
            if len(feeds) == 1:
                return [(feeds, error)]
        middle = len(feeds) // 2
        return self._pass(feeds[:middle]) + self._pass(feeds[middle:])
