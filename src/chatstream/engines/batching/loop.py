"""The step loop: one token per running request and step. Runs in the engine thread.

    plan -> runner.step(plan) -> detokenise, stop strings -> hand the deltas to the event loop -> repeat

A step advances every generating sequence by exactly one token, so two of them never drift apart by more than one token.
The same step computes prompt tokens of new sequences, at a number that keeps the step short (prompt_budget.py), so no
stream stalls. Computed state outlives its slot (prefix_cache.py): the next turn of a conversation, a request with the
same system prompt and a preempted generation reuse it. A preempted generation resumes like a new sequence whose prompt
is the old prompt and the answer so far.

The model is behind the `ModelRunner` protocol (model.py). This module knows no array library and no event loop.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

from chatstream.engines.base import EngineStats
from chatstream.engines.batching.model import LoadedModel, ModelRunner, SlotInput
from chatstream.engines.batching.prefix_cache import PrefixCache, Tokens, as_tokens, common_prefix
from chatstream.engines.batching.prompt_budget import PromptBudget
from chatstream.engines.batching.sequence import Sequence
from chatstream.engines.thread.handover import DeltaBuffer, Item, hand_over
from chatstream.errors import ChatStreamError, EngineError

logger = logging.getLogger(__name__)

MIN_SHARED_TOKENS = 16
"""A shorter common prefix is computed again, which costs less than a copy."""


class StepLoop:
    """The `Work` (engine_thread.py) of a `ModelRunner`: plans each step and processes the tokens that it returns."""

    survives_failure = True

    def __init__(self, budget: PromptBudget) -> None:
        self.step_began_s: float | None = None
        """Start of the running step on the monotonic clock; None between two steps."""
        self._budget = budget
        self._model: LoadedModel | None = None
        self._sequences: list[Sequence] = []
        """In order of arrival."""
        self._prefix_cache = PrefixCache(0)
        self._prompt_tokens = self._reused_tokens = 0

    def stats(self) -> EngineStats:
        """Thread-safe."""
        slow_because = self._model.slow_because if self._model else ""
        return EngineStats(
            is_batched=not slow_because,
            slow_because=slow_because,
            num_slots=sum(s.slot is not None for s in tuple(self._sequences)),
            num_cached_sequences=len(self._prefix_cache),
            prefix_cache_bytes=self._prefix_cache.nbytes,
            prompt_tokens=self._prompt_tokens,
            reused_prompt_tokens=self._reused_tokens,
        )

    # --- as `Work` ----------------------------------------------------------------------------------------------

    def set_model(self, model: LoadedModel) -> None:
        self._model = model
        self._prefix_cache = PrefixCache(
            model.prefix_cache_bytes, supports_partial_prefix=model.runner.supports_partial_prefix
        )

    def run_step(self) -> bool:
        inputs = self._plan()
        if inputs:
            self._take_step(inputs)
        return bool(inputs)

    def end_all(self, error: ChatStreamError) -> None:
        self._fail(self._sequences, error)

    def close(self) -> None:
        self._prefix_cache.clear()
        self._model = None

    # --- commands -----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        sampling = request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        self._sequences.append(sequence)
        try:
            sequence.token_ids.extend(request.prompt.token_ids)
            sequence.sampler = sequence.runner.new_sampler(request.prompt.token_ids, sampling, request.token_mask)
        except ChatStreamError as error:
            self._fail([sequence], error)
        except Exception as error:
            logger.warning("the model refused request %s", request.request_id, exc_info=error)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))

    def set_preempted(self, request_id: str, is_preempted: bool) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id and sequence.is_preempted != is_preempted:
                sequence.is_preempted, sequence.was_preempted = is_preempted, True
                if is_preempted:
                    self._release(sequence, cache=sequence.is_generating or sequence.runner.supports_partial_prefix)

    def drop(self, sequence: Sequence, *, cache: bool) -> None:
        """Remove a sequence. `cache`: its computed state may enter the prefix cache. No effect if it has ended."""
        if sequence in self._sequences:  # else it ended in the step before the command ran
            self._sequences.remove(sequence)
            is_reusable = sequence.runner.supports_partial_prefix and sequence.num_computed >= MIN_SHARED_TOKENS
            self._release(sequence, cache=cache and is_reusable)
            if sequence.is_preempted and not sequence.runner.supports_partial_prefix:
                self._prefix_cache.discard(as_tokens(sequence.token_ids[:-1]))  # no other sequence can use it

    # --- a step -------------------------------------------------------------------------------------------------

    def _plan(self) -> list[SlotInput]:
        """Inputs of the next step: one token for each generating sequence, then prompt tokens within the budget.

        Skips preempted sequences and those whose buffer is full. Prompts advance in order of arrival.
        """
        active = [s for s in self._sequences if not s.is_preempted and not s.buffer.is_full]
        for sequence in active:
            if sequence.slot is None and sequence.num_generated:
                self._open(sequence)  # resumed; if its computed state is cached, it generates in this step
        # In slot order, so that slots next to each other in memory are computed together (`ModelRunner.step`).
        inputs = sorted((s.next_input(1) for s in active if s.is_generating), key=lambda item: item.slot)
        budget = self._budget.next_step_tokens(len(inputs), len(active) - len(inputs))
        for sequence in active:
            if budget == 0:
                break
            if sequence.is_generating:
                continue
            if sequence.slot is None and (sequence.num_generated or not self._open(sequence)):
                continue
            item = sequence.next_input(budget)
            budget -= len(item.token_ids)
            inputs.append(item)
        return inputs

    def _open(self, sequence: Sequence) -> bool:
        """Open a slot for a sequence and restore the longest computed prefix into it. Return whether a slot was opened.

        False: all slots are in use, another sequence is computing the same prefix, or the sequence has failed.
        """
        runner = sequence.runner
        in_slots = [s for s in self._sequences if s.slot is not None]
        if runner.max_slots is not None and len(in_slots) >= runner.max_slots:
            return False
        # Without the last token: the model has to compute it, because its logits give the next token.
        prefix = as_tokens(sequence.token_ids[:-1])
        is_shared = self._prefix_cache.max_bytes > 0 and runner.supports_partial_prefix
        prefix_matches = [(s, common_prefix(s.tokens(), prefix)) for s in in_slots] if is_shared else []
        num_cached, restore = self._best_prefix(runner, prefix, prefix_matches)
        in_prefill = (
            n for s, n in prefix_matches if n > s.num_computed and not s.is_generating and not s.buffer.is_full
        )
        if max(in_prefill, default=0) >= num_cached + MIN_SHARED_TOKENS:
            return False  # wait until that sequence has computed the common prefix
        sequence.slot = _lowest_free({s.slot for s in in_slots})
        try:
            runner.open_slot(sequence.slot, sequence.sampler)
            if num_cached >= (1 if sequence.was_preempted else MIN_SHARED_TOKENS):
                restore(sequence.slot)
                sequence.num_computed = num_cached
                num_reused = min(num_cached, sequence.num_prompt_tokens) - sequence.num_reported
                self._reused_tokens += max(0, num_reused)
        except Exception as error:
            logger.exception("could not open a slot for request %s", sequence.request.request_id)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))
            return False
        return True

    def _best_prefix(
        self, runner: ModelRunner, tokens: Tokens, prefix_matches: SequenceOf[tuple[Sequence, int]]
    ) -> tuple[int, Callable[[int], None]]:
        """The longest computed prefix of `tokens`: its length, and a function that restores it into an open slot.

        `prefix_matches`: the sequences in slots, each with the length of its common prefix, computed or not.
        """
        num_cached, restore = 0, lambda slot: None
        entry = self._prefix_cache.longest_prefix(tokens)
        if entry is not None:
            saved, num_cached = entry
            restore = partial(runner.load, saved=saved, num_tokens=num_cached)
        num_in_slot, source = max(((min(n, s.num_computed), s.slot) for s, n in prefix_matches), default=(0, None))
        if source is not None and num_in_slot >= num_cached:
            num_cached, restore = num_in_slot, lambda slot: runner.copy(source, slot, num_in_slot)
        return num_cached, restore

    def _release(self, sequence: Sequence, *, cache: bool) -> None:
        """Close the sequence's slot, if it has one. `cache`: first save its state to the prefix cache."""
        slot = sequence.slot
        if slot is None:
            return
        try:
            if cache and sequence.num_computed:
                self._prefix_cache.store(sequence.tokens_in_slot(), partial(sequence.runner.save, slot))
        except Exception:
            logger.exception("could not cache the state of request %s", sequence.request.request_id)
        try:
            sequence.runner.close_slot(slot)
        except Exception:
            logger.exception("could not close slot %d", slot)
        sequence.slot, sequence.num_computed = None, 0

    def _take_step(self, inputs: SequenceOf[SlotInput]) -> None:
        by_slot = {s.slot: s for s in self._sequences if s.slot is not None}
        num_generating = sum(by_slot[item.slot].is_generating for item in inputs)
        assert self._model is not None
        began_s = self.step_began_s = time.monotonic()
        try:
            tokens = self._model.runner.step(inputs)
        except Exception as error:
            logger.exception("a step failed")
            self._fail([by_slot[item.slot] for item in inputs], EngineError(f"the model failed: {error}"))
            return
        finally:
            self.step_began_s = None
        num_prompt_tokens = sum(len(item.token_ids) for item in inputs) - num_generating
        self._budget.record_step(num_generating, num_prompt_tokens, time.monotonic() - began_s)
        deliveries: list[tuple[DeltaBuffer, Item]] = []
        for item in inputs:
            sequence = by_slot[item.slot]
            sequence.num_computed += len(item.token_ids)
            try:
                delta = sequence.advance(tokens[item.slot]) if item.slot in tokens else sequence.prompt_delta()
            except BaseException as error:  # a panic of a Rust library; only this sequence is affected
                logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
                self._fail([sequence], EngineError(f"the model failed: {error}"))
                continue
            self._prompt_tokens += delta.num_prompt_tokens
            if delta.finish_reason is not None:
                self.drop(sequence, cache=True)
            sequence.buffer.tokens_sent += delta.num_tokens
            deliveries.append((sequence.buffer, delta))
        hand_over(deliveries)

    def _fail(self, sequences: SequenceOf[Sequence], error: ChatStreamError) -> None:
        for sequence in list(sequences):
            self.drop(sequence, cache=False)
            hand_over([(sequence.buffer, error)])


def _lowest_free(in_use: set[int | None]) -> int:
    return next(slot for slot in range(len(in_use) + 1) if slot not in in_use)
