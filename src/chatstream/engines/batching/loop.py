"""The loop of models whose batch we own: one token for everybody a step. Runs in the engine's thread.

    plan -> runner.step(plan) -> detokenise, stop strings -> one hand-over to the event loop -> again

A step advances every running generation by exactly one token, so two of them never drift apart by more than one
while both generate. In the same step newcomers' prompts are read, as many tokens as keep it short (prompt_budget.py):
nobody's stream stalls. What a sequence has computed outlives its slot (prefix_pool.py): the next turn of a
conversation, whoever begins with the same system prompt, and a generation that was preempted go on from there. To the
model a preempted generation that goes on is a newcomer whose prompt is everything said so far.

The model's side is the small `ModelRunner` protocol (model.py); this file knows no array library and no event loop.
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
from chatstream.engines.thread.handover import Item, Outbox, hand_over
from chatstream.errors import ChatStreamError, EngineError

logger = logging.getLogger(__name__)

MIN_SHARED_TOKENS = 16
"""A shorter beginning in common is computed again: that costs less than looking after it."""


class StepLoop:
    """The `Work` (engine_thread.py) of a `ModelRunner`: who is in the next step, and what becomes of its tokens."""

    survives_failure = True

    def __init__(self, budget: PromptBudget) -> None:
        self.step_began_s: float | None = None
        """On the monotonic clock; None between two steps."""
        self._budget = budget
        self._model: LoadedModel | None = None
        self._sequences: list[Sequence] = []
        """In order of arrival."""
        self._prefix_cache = PrefixCache(0)
        self._prompt_tokens = self._reused_tokens = 0

    def stats(self) -> EngineStats:
        """May be called in any thread."""
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

    def begin(self, model: LoadedModel) -> None:
        self._model = model
        self._prefix_cache = PrefixCache(
            model.prefix_cache_bytes, supports_partial_prefix=model.runner.supports_partial_prefix
        )

    def turn(self) -> bool:
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
            logger.warning("request %s was refused by the model", request.request_id, exc_info=error)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))

    def set_preempted(self, request_id: str, is_preempted: bool) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id and sequence.is_preempted != is_preempted:
                sequence.is_preempted, sequence.was_preempted = is_preempted, True
                if is_preempted:
                    self._release(sequence, keep=sequence.is_generating or sequence.runner.supports_partial_prefix)

    def drop(self, sequence: Sequence, *, keep: bool) -> None:
        if sequence in self._sequences:  # else it ended by itself in the step before the cancel arrived
            self._sequences.remove(sequence)
            is_worth_it = sequence.runner.supports_partial_prefix and sequence.num_computed >= MIN_SHARED_TOKENS
            self._release(sequence, keep=keep and is_worth_it)
            if sequence.is_preempted and not sequence.runner.supports_partial_prefix:
                self._prefix_cache.discard(as_tokens(sequence.token_ids[:-1]))  # nobody else can go on from there

    # --- a step -------------------------------------------------------------------------------------------------

    def _plan(self) -> list[SlotInput]:
        """The newest token of everybody who generates and whose reader keeps up, and of prompts what the budget allows.

        Prompts are read in order of arrival. Those who are preempted are as if they were not there.
        """
        active = [s for s in self._sequences if not s.is_preempted and not s.outbox.is_full]
        for sequence in active:
            if sequence.slot is None and sequence.num_generated:
                self._open(sequence)  # it was preempted: with all it had computed it generates again
        # By slot: neighbours in memory are computed together (`ModelRunner.step`).
        inputs = sorted((s.next_input(1) for s in active if s.is_generating), key=lambda item: item.slot)
        room = self._budget.tokens(len(inputs), len(active) - len(inputs))
        for sequence in active:
            if room == 0:
                break
            if sequence.is_generating:
                continue
            if sequence.slot is None and (sequence.num_generated or not self._open(sequence)):
                continue
            item = sequence.next_input(room)
            room -= len(item.token_ids)
            inputs.append(item)
        return inputs

    def _open(self, sequence: Sequence) -> bool:
        """Give it a slot, with what somebody who began alike has computed. False: not yet, or it has failed."""
        runner = sequence.runner
        in_slots = [s for s in self._sequences if s.slot is not None]
        if runner.max_slots is not None and len(in_slots) >= runner.max_slots:
            return False
        # One token at least has to be fed: the model's answer to it is what comes next.
        wanted = as_tokens(sequence.token_ids[:-1])
        shares = self._prefix_cache.max_bytes > 0 and runner.supports_partial_prefix
        alike = [(s, common_prefix(s.tokens(), wanted)) for s in in_slots] if shares else []
        held, restore = self._best_prefix(runner, wanted, alike)
        being_read = (n for s, n in alike if n > s.num_computed and not s.is_generating and not s.outbox.is_full)
        if max(being_read, default=0) >= held + MIN_SHARED_TOKENS:
            return False  # wait for whoever is reading just that
        sequence.slot = _lowest_free({s.slot for s in in_slots})
        try:
            runner.open_slot(sequence.slot, sequence.sampler)
            if held >= (1 if sequence.was_preempted else MIN_SHARED_TOKENS):
                restore(sequence.slot)
                sequence.num_computed = held
                self._reused_tokens += max(0, min(held, sequence.num_prompt_tokens) - sequence.prompt_read)
        except Exception as error:
            logger.exception("request %s could not take a slot", sequence.request.request_id)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))
            return False
        return True

    def _best_prefix(
        self, runner: ModelRunner, wanted: Tokens, alike: SequenceOf[tuple[Sequence, int]]
    ) -> tuple[int, Callable[[int], None]]:
        """How many of these tokens from the first on are computed already, and what puts them into an open slot.

        `alike`: who has a slot, and how long a beginning it has in common, computed or not.
        """
        held, restore = 0, lambda slot: None
        kept = self._prefix_cache.find(wanted)
        if kept is not None:
            saved, held = kept
            restore = partial(runner.load, saved=saved, num_tokens=held)
        living, source = max(((min(n, s.num_computed), s.slot) for s, n in alike), default=(0, None))
        if source is not None and living >= held:
            held, restore = living, lambda slot: runner.copy(source, slot, living)
        return held, restore

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        """Give its slot back; what it has computed may go to the pool."""
        slot = sequence.slot
        if slot is None:
            return
        try:
            if keep and sequence.num_computed:
                self._prefix_cache.keep(sequence.tokens_in_slot(), partial(sequence.runner.save, slot))
        except Exception:
            logger.exception("what request %s has computed could not be kept", sequence.request.request_id)
        try:
            sequence.runner.close_slot(slot)
        except Exception:
            logger.exception("slot %d could not be given back cleanly", slot)
        sequence.slot, sequence.num_computed = None, 0

    def _take_step(self, inputs: SequenceOf[SlotInput]) -> None:
        rows = {s.slot: s for s in self._sequences if s.slot is not None}
        num_generating = sum(rows[item.slot].is_generating for item in inputs)
        assert self._model is not None
        began_s = self.step_began_s = time.monotonic()
        try:
            tokens = self._model.runner.step(inputs)
        except Exception as error:
            logger.exception("a step failed")
            self._fail([rows[item.slot] for item in inputs], EngineError(f"the model failed: {error}"))
            return
        finally:
            self.step_began_s = None
        num_prompt_tokens = sum(len(item.token_ids) for item in inputs) - num_generating
        self._budget.note(num_generating, num_prompt_tokens, time.monotonic() - began_s)
        deliveries: list[tuple[Outbox, Item]] = []
        for item in inputs:
            sequence = rows[item.slot]
            sequence.num_computed += len(item.token_ids)
            try:
                delta = sequence.advance(tokens[item.slot]) if item.slot in tokens else sequence.prompt_delta()
            except BaseException as error:  # libraries written in Rust panic with one; it is this one's text alone
                logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
                self._fail([sequence], EngineError(f"the model failed: {error}"))
                continue
            self._prompt_tokens += delta.num_prompt_tokens
            if delta.finish_reason is not None:
                self.drop(sequence, keep=True)
            sequence.outbox.tokens_sent += delta.num_tokens
            deliveries.append((sequence.outbox, delta))
        hand_over(deliveries)

    def _fail(self, sequences: SequenceOf[Sequence], error: ChatStreamError) -> None:
        for sequence in list(sequences):
            self.drop(sequence, keep=False)
            hand_over([(sequence.outbox, error)])


def _lowest_free(taken: set[int | None]) -> int:
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
