"""The demo model as a `ModelRunner` (engines/batching/model.py): slots, steps and sampling on numpy.

A step is one forward pass for everybody who decodes, and one for each part of a prompt. Knows no text.

numpy's matrix products may use the threads of its BLAS library. At this size one thread does nearly all there is to
gain, and changing the number for the whole process would not be ours to decide; whoever wants to bound it sets
OPENBLAS_NUM_THREADS=1 (or the variable of another BLAS) before Python starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chatstream.engines.batching.model import Feed
from chatstream.engines.demo.kv_cache import KVCache, SavedSlot
from chatstream.engines.demo.llama import Floats, Llama
from chatstream.engines.demo.sampling import TokenChooser
from chatstream.engines.text.codec import NextToken
from chatstream.engines.text.prompt_fitting import check_prompt
from chatstream.types import SamplingParams, TokenMask


class NumpyRunner:
    """See `ModelRunner`."""

    can_load_part = True

    def __init__(self, model: Llama, max_slots: int | None = None) -> None:
        self.context_len = model.shape.context_len
        self.max_slots = max_slots
        self.model = model
        self.cache = KVCache(model.shape)
        self._choosers: dict[int, TokenChooser] = {}

    def new_sampler(
        self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None = None
    ) -> TokenChooser:
        check_prompt(prompt_ids, self.model.shape.vocab_size, self.context_len)
        return TokenChooser(sampling, prompt_ids, self.model.shape.vocab_size, token_mask)

    def open_slot(self, slot: int, sampler: TokenChooser) -> None:
        self.cache.open(slot)
        self._choosers[slot] = sampler

    def close_slot(self, slot: int) -> None:
        self.cache.close(slot)
        self._choosers.pop(slot, None)

    def save(self, slot: int) -> SavedSlot:
        return self.cache.save(slot)

    def load(self, slot: int, saved: SavedSlot, num_tokens: int) -> None:
        self.cache.load(slot, saved, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self.cache.load(slot, self.cache.save(source), num_tokens)

    def step(self, feeds: Sequence[Feed]) -> Mapping[int, NextToken | Exception]:
        tokens: dict[int, NextToken | Exception] = {}
        # An infinity on its way through one row is found when that row's token is chosen.
        with np.errstate(over="ignore", invalid="ignore"):
            if decodes := sorted((f for f in feeds if len(f.token_ids) == 1 and f.is_last), key=lambda f: f.slot):
                tokens |= self._decode_all(decodes)
            for feed in feeds:
                if len(feed.token_ids) > 1 or not feed.is_last:
                    try:
                        hidden = self._prefill(feed)
                    except Exception as error:
                        tokens[feed.slot] = error
                        continue
                    if feed.is_last:
                        tokens[feed.slot] = self._choose(feed.slot, self.model.logits(hidden)[0])
        return tokens

    def _decode_all(self, feeds: Sequence[Feed]) -> dict[int, NextToken | Exception]:
        """One pass; when it fails, each by itself: whoever does not fit the memory ends alone."""
        try:
            logits = self._decode(feeds)
        except Exception as error:
            if len(feeds) == 1:
                return {feeds[0].slot: error}
            return {slot: result for feed in feeds for slot, result in self._decode_all([feed]).items()}
        return {feed.slot: self._choose(feed.slot, row) for feed, row in zip(feeds, logits, strict=True)}

    def _decode(self, feeds: Sequence[Feed]) -> Floats:
        """One position for each of these slots, in ascending order; (B, vocab)."""
        slots = [feed.slot for feed in feeds]
        positions = self.cache.lengths[slots]
        self.cache.reserve(int(positions.max()) + 1)
        hidden = self.model.hidden([feed.token_ids[0] for feed in feeds], positions, self.cache.decode(slots))
        self.cache.lengths[slots] += 1
        return self.model.logits(hidden)

    def _prefill(self, feed: Feed) -> Floats:
        """The positions of a part of a prompt; the hidden state of the last one, (1, hidden)."""
        start, num_tokens = int(self.cache.lengths[feed.slot]), len(feed.token_ids)
        assert feed.start == start
        self.cache.reserve(start + num_tokens)
        positions = np.arange(start, start + num_tokens)
        attend = self.cache.prefill(feed.slot, num_tokens)
        # Counted before the pass: one that fails half-way has written memory that must be cleared too.
        self.cache.lengths[feed.slot] += num_tokens
        return self.model.hidden(feed.token_ids, positions, attend)[-1:]

    def _choose(self, slot: int, logits: Floats) -> NextToken | Exception:
        try:
            token = self._choosers[slot].choose(logits)
        except (FloatingPointError, ValueError) as error:
            return error
        return token
