"""The demo model as a `ModelRunner` (engines/model.py): slots, steps and sampling on numpy.

A step is one forward pass for everybody who decodes, and one for the chunk of a prompt. Knows no text.

numpy's matrix products may use the threads of its BLAS library. At this size one thread does nearly all there is to
gain, and changing the number for the whole process would not be ours to decide; whoever wants to bound it sets
OPENBLAS_NUM_THREADS=1 (or the variable of another BLAS) before Python starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chatstream.engines.demo.kv_cache import KVCache
from chatstream.engines.demo.llama import Floats, Llama
from chatstream.engines.demo.sampling import TokenChooser
from chatstream.engines.model import NextToken, PrefillChunk, StepPlan
from chatstream.types import SamplingParams


class NumpyRunner:
    """See `ModelRunner`."""

    def __init__(self, model: Llama) -> None:
        self.context_len = model.shape.context_len
        self._model = model
        self._cache = KVCache(model.shape)
        self._choosers: dict[int, TokenChooser] = {}
        self._last_tokens: dict[int, int] = {}

    def open_slot(self, slot: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._cache.open(slot)
        self._choosers[slot] = TokenChooser(sampling, prompt_ids, self._model.shape.vocab_size)

    def close_slot(self, slot: int) -> None:
        self._cache.close(slot)
        self._choosers.pop(slot, None)
        self._last_tokens.pop(slot, None)

    def step(self, plan: StepPlan) -> Mapping[int, NextToken | Exception]:
        tokens: dict[int, NextToken | Exception] = {}
        # An infinity on its way through one row is found when that row's token is chosen.
        with np.errstate(over="ignore", invalid="ignore"):
            if plan.decode_slots:
                slots = sorted(plan.decode_slots)
                for slot, logits in zip(slots, self._decode(slots), strict=True):
                    tokens[slot] = self._choose(slot, logits)
            if plan.prefill is not None:
                hidden = self._prefill(plan.prefill)
                if plan.prefill.is_last:
                    tokens[plan.prefill.slot] = self._choose(plan.prefill.slot, self._model.logits(hidden)[0])
        return tokens

    def _decode(self, slots: Sequence[int]) -> Floats:
        """One position for each slot; (B, vocab)."""
        positions = self._cache.lengths[list(slots)]
        self._cache.reserve(int(positions.max()) + 1)
        tokens = [self._last_tokens[slot] for slot in slots]
        hidden = self._model.hidden(tokens, positions, self._cache.decode(slots))
        self._cache.lengths[list(slots)] += 1
        return self._model.logits(hidden)

    def _prefill(self, chunk: PrefillChunk) -> Floats:
        """The chunk's positions; the hidden state of the last one, (1, hidden)."""
        start, num_tokens = int(self._cache.lengths[chunk.slot]), len(chunk.token_ids)
        assert chunk.start == start
        self._cache.reserve(start + num_tokens)
        positions = np.arange(start, start + num_tokens)
        hidden = self._model.hidden(chunk.token_ids, positions, self._cache.prefill(chunk.slot, num_tokens))
        self._cache.lengths[chunk.slot] += num_tokens
        return hidden[-1:]

    def _choose(self, slot: int, logits: Floats) -> NextToken | Exception:
        try:
            token = self._choosers[slot].choose(logits)
        except (FloatingPointError, ValueError) as error:
            return error
        self._last_tokens[slot] = token.token_id
        return token
