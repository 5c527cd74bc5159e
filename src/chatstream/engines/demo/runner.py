"""The demo model as a `ModelRunner` (engines/batching/model.py): slots, steps and sampling on numpy.

A step is one forward pass for all slots that decode, and one for each part of a prompt.

numpy's matrix products may use the threads of its BLAS library. At this size one thread gives almost the full speed.
The runner does not change the number, which applies to the whole process; to bound it, set OPENBLAS_NUM_THREADS=1 (or
the variable of another BLAS) before Python starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.demo.kv_cache import KVCache, SavedSlot
from chatstream.engines.demo.llama import Floats, Llama
from chatstream.engines.demo.sampling import Sampler
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.text.prompt_fitting import check_prompt
from chatstream.types import SamplingParams, TokenMask


class NumpyRunner:
    """See `ModelRunner`."""

    supports_partial_prefix = True

    def __init__(self, model: Llama, max_slots: int | None = None) -> None:
        self.context_len = model.shape.context_len
        self.max_slots = max_slots
        self.model = model
        self.cache = KVCache(model.shape)
        self._samplers: dict[int, Sampler] = {}

    def new_sampler(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None = None
    ) -> Sampler:
        check_prompt(prompt_ids, self.model.shape.vocab_size, self.context_len)
        return Sampler(sampling, prompt_ids, self.model.shape.vocab_size, token_mask)

    def open_slot(self, slot: int, sampler: Sampler) -> None:
        self.cache.open(slot)
        self._samplers[slot] = sampler

    def close_slot(self, slot: int) -> None:
        self.cache.close(slot)
        self._samplers.pop(slot, None)

    def save(self, slot: int) -> SavedSlot:
        return self.cache.save(slot)

    def load(self, slot: int, saved: SavedSlot, num_tokens: int) -> None:
        self.cache.load(slot, saved, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self.cache.load(slot, self.cache.save(source), num_tokens)

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        tokens: dict[int, SampledToken | Exception] = {}
        # Sampling detects rows with infinities, so numpy's warnings are not needed.
        with np.errstate(over="ignore", invalid="ignore"):
            if decodes := sorted((f for f in inputs if len(f.token_ids) == 1 and f.is_last), key=lambda f: f.slot):
                tokens |= self._decode_all(decodes)
            for item in inputs:
                if len(item.token_ids) > 1 or not item.is_last:
                    try:
                        hidden = self._prefill(item)
                    except Exception as error:
                        tokens[item.slot] = error
                        continue
                    if item.is_last:
                        tokens[item.slot] = self._choose(item.slot, self.model.logits(hidden)[0])
        return tokens

    def _decode_all(self, inputs: Sequence[SlotInput]) -> dict[int, SampledToken | Exception]:
        """Decode all slots in one pass. If that fails, decode each slot by itself, so that only a slot without memory
        fails."""
        try:
            logits = self._decode(inputs)
        except Exception as error:
            if len(inputs) == 1:
                return {inputs[0].slot: error}
            return {slot: result for item in inputs for slot, result in self._decode_all([item]).items()}
        return {item.slot: self._choose(item.slot, row) for item, row in zip(inputs, logits, strict=True)}

    def _decode(self, inputs: Sequence[SlotInput]) -> Floats:
        """Decode one position for each of these slots, in ascending order. Returns the logits, (B, vocab)."""
        slots = [item.slot for item in inputs]
        positions = self.cache.lengths[slots]
        self.cache.reserve(int(positions.max()) + 1)
        hidden = self.model.hidden([item.token_ids[0] for item in inputs], positions, self.cache.decode(slots))
        self.cache.lengths[slots] += 1
        return self.model.logits(hidden)

    def _prefill(self, item: SlotInput) -> Floats:
        """Compute a part of a prompt. Returns the hidden state of its last position, (1, hidden)."""
        start, num_tokens = int(self.cache.lengths[item.slot]), len(item.token_ids)
        assert item.start == start
        self.cache.reserve(start + num_tokens)
        positions = np.arange(start, start + num_tokens)
        attend = self.cache.prefill(item.slot, num_tokens)
        # Set before the pass: a pass that fails half-way has written memory that must be cleared too.
        self.cache.lengths[item.slot] += num_tokens
        return self.model.hidden(item.token_ids, positions, attend)[-1:]

    def _choose(self, slot: int, logits: Floats) -> SampledToken | Exception:
        try:
            token = self._samplers[slot].choose(logits)
        except (FloatingPointError, ValueError) as error:
            return error
        return token
