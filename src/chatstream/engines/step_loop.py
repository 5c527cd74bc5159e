"""The shared engine for models whose batch we own: one thread, one token for everybody a step.

    plan -> runner.step(plan) -> detokenise, stop strings -> one hand-over to the event loop -> again

A step advances every running generation by exactly one token, so two of them never drift apart by more than one
while both generate. In the same step newcomers' prompts are read, as many tokens as keep it short (prompt_budget.py):
nobody's stream stalls. What a sequence has computed outlives its slot (prefix_pool.py): the next turn of a
conversation, whoever begins with the same system prompt, and a generation that was parked go on from there. To the
model a parked generation that goes on is a newcomer whose prompt is everything said so far.

The model's side is the small `ModelRunner` protocol (model.py); this file knows no array library and no network.
Everything heavy (loading, tokenising, forward passes) runs in two named threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from chatstream.engines.answer import Answer
from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.engines.handover import Item, Outbox, hand_over, resolver
from chatstream.engines.model import Feed, LoadedModel, NextToken
from chatstream.engines.prefix_pool import PrefixPool, Tokens, as_tokens, common_prefix
from chatstream.engines.prompt_budget import PromptBudget
from chatstream.engines.prompt_fitting import fit_prompt
from chatstream.errors import ChatStreamError, ConfigError, EngineError, EngineUnavailable
from chatstream.types import (
    GenerationRequest,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
)

logger = logging.getLogger(__name__)


MIN_SHARED_TOKENS = 16
"""A shorter beginning in common is computed again: that costs less than looking after it."""


class StepEngine:
    """An `Engine` that can park (base.py) over a `ModelRunner` and a `Codec`."""

    STOP_TIMEOUT_S = 30.0
    """How long `stop` waits for a step that does not end; the thread is a daemon and dies with the process."""

    def __init__(
        self,
        model_name: str,
        load: Callable[[], LoadedModel],
        *,
        max_prompt_tokens_per_step: int = 512,
        itl_target_s: float | None = None,
        max_undelivered: int = 64,
        step_timeout_s: float = 120.0,
    ) -> None:
        """`load` runs in the engine's thread at `start`. Raises `ConfigError` for impossible settings.

        Beside others who generate, a step reads as many prompt tokens as keep it within `itl_target_s`; without a
        target, within 1.8 times a step without prompts; with one of `inf`, as many as there are. Never more than
        `max_prompt_tokens_per_step`. `max_undelivered` is how many tokens a reader may lag behind before its
        generation pauses; the others go on. A step that takes longer than `step_timeout_s` makes the engine unhealthy.
        """
        for name, value in (
            ("max_prompt_tokens_per_step", max_prompt_tokens_per_step),
            ("max_undelivered", max_undelivered),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1", param=name)
        for name, seconds in (("itl_target_s", itl_target_s), ("step_timeout_s", step_timeout_s)):
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{name} must be above 0 seconds", param=name)
        self._model_name = model_name
        self._load = load
        self._budget = PromptBudget(max_prompt_tokens_per_step, itl_target_s)
        self._max_undelivered = max_undelivered
        self._step_timeout_s = step_timeout_s
        self._model: LoadedModel | None = None
        self._thread: threading.Thread | None = None
        self._loaded: asyncio.Future[None] | None = None
        """Set by the first start; done when the model is there."""
        self._encoder: ThreadPoolExecutor | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_stopping = False
        self._obeys = False
        """Commands are still read. Set to False before the last ones are taken, so that none is left unread."""
        self._detail = "not started"
        self._step_began_s: float | None = None
        """On the monotonic clock; None between two steps."""
        # Owned by the engine's thread.
        self._sequences: list[_Sequence] = []
        """In order of arrival."""
        self._pool = PrefixPool(0)
        self._prompt_tokens = self._reused_tokens = 0

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        if self._model is None:
            return Capacity(can_park=True)
        runner = self._model.runner
        return Capacity(
            runner.max_slots,
            runner.context_len,
            can_park=True,
            limited_by=self._model.limits,
            speed_key=self._model.speed_key,
        )

    @property
    def default_sampling(self) -> SamplingParams:
        if self._model is None:
            return SamplingParams()
        sampling = self._model.default_sampling
        if sampling.max_new_tokens is not None:
            return sampling
        # Long enough for an answer, short enough that a conversation still fits beside it.
        return replace(sampling, max_new_tokens=max(1, min(1024, self._model.runner.context_len // 4)))

    def health(self) -> EngineHealth:
        began_s = self._step_began_s
        if began_s is not None and time.monotonic() - began_s > self._step_timeout_s:
            return EngineHealth(False, f"a step has not ended for more than {self._step_timeout_s:.0f} s")
        is_ready = self._model is not None and self._thread is not None and self._thread.is_alive()
        return EngineHealth(is_ready, "" if is_ready else self._detail)

    def stats(self) -> EngineStats:
        slow_because = self._model.slow_because if self._model else ""
        return EngineStats(
            is_batched=not slow_because,
            slow_because=slow_because,
            num_slots=sum(s.slot is not None for s in tuple(self._sequences)),
            num_kept=len(self._pool),
            kept_bytes=self._pool.nbytes,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
        )

    def tell_progress(self, stage: str, share: float) -> None:
        """For `load`: how far it is, from 0 to 1. Seen in `health` meanwhile."""
        self._detail = f"loading: {stage}, {share:.0%}"

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loaded is None:
            self._detail = "loading"
            self._is_stopping = False
            self._loaded = loop.create_future()
            self._loaded.add_done_callback(self._on_loaded)
            self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chatstream-encode")
            self._thread = threading.Thread(
                target=self._run, args=(resolver(loop, self._loaded),), name="chatstream-engine", daemon=True
            )
            self._thread.start()
        # Whoever asks meanwhile waits for the same load, and whoever gives up waiting does not end it.
        await asyncio.shield(self._loaded)

    def _on_loaded(self, loaded: asyncio.Future[None]) -> None:
        error = loaded.exception()
        if error is not None:
            self._detail = f"could not load: {error}"
            self._loaded = self._thread = None

    async def stop(self) -> None:
        thread, self._thread, self._loaded = self._thread, None, None
        if thread is None:
            return
        self._detail = "stopped"
        self._commands.put(self._stop)
        await asyncio.to_thread(thread.join, self.STOP_TIMEOUT_S)
        if thread.is_alive():
            logger.error("%s did not finish its step within %.0f s; left behind", self._model_name, self.STOP_TIMEOUT_S)
        if self._encoder is not None:
            self._encoder.shutdown(wait=False)
        self._model = None

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        model = self._ready_model()
        assert self._encoder is not None
        fit = partial(
            fit_prompt,
            model.codec,
            prompt,
            context_len=model.runner.context_len,
            wanted=sampling.max_new_tokens or 1,
            may_drop_history=may_drop_history,
        )
        return await asyncio.get_running_loop().run_in_executor(self._encoder, fit)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._ready_model()
        outbox = Outbox(asyncio.get_running_loop(), self._max_undelivered, self._wake)
        sequence = _Sequence(request, model, outbox)
        self._commands.put(lambda: self._add(sequence))
        has_ended = False
        try:
            while not has_ended:
                delta = await outbox.get()
                if isinstance(delta, ChatStreamError):
                    has_ended = True
                    raise delta
                has_ended = delta.finish_reason is not None
                yield delta
        finally:
            if not has_ended:
                await self._wait_obeyed(lambda: self._drop(sequence, keep=True))

    async def park(self, request_id: str) -> None:
        await self._wait_obeyed(lambda: self._set_parked(request_id, True))

    def resume(self, request_id: str) -> None:
        self._commands.put(lambda: self._set_parked(request_id, False))

    def _ready_model(self) -> LoadedModel:
        if self._model is None or self._thread is None or not self._thread.is_alive():
            raise EngineUnavailable(f"the model is not available: {self._detail}")
        return self._model

    async def _wait_obeyed(self, command: Callable[[], None]) -> None:
        """Returns when the engine's thread has done it: at most one step later, and before the step after that."""
        loop = asyncio.get_running_loop()
        obeyed: asyncio.Future[None] = loop.create_future()
        resolve = resolver(loop, obeyed)

        def obey() -> None:
            command()
            resolve(None)

        self._commands.put(obey)
        if self._obeys:
            await obeyed

    def _wake(self) -> None:
        self._commands.put(lambda: None)

    # --- the engine's thread ----------------------------------------------------------------------------------

    def _run(self, report_loaded: Callable[[Exception | None], None]) -> None:
        try:
            self._model = self._load()
        except ConfigError as error:
            report_loaded(error)
            return
        except BaseException as error:  # libraries written in Rust panic with one
            logger.debug("loading %s failed", self._model_name, exc_info=error)
            report_loaded(ConfigError(f"cannot load {self._model_name}: {error}"))
            return
        self._pool = PrefixPool(self._model.pool_bytes, can_load_part=self._model.runner.can_load_part)
        self._obeys = True
        report_loaded(None)
        while not self._is_stopping:
            try:
                self._obey_commands(may_wait=not self._plan())
                # The commands may have changed the picture; a plan is cheap and is made from the newest one.
                self._take_step(self._plan())
            except BaseException:
                # A bug of ours, or a panic of a library. Nobody may hang because of it: everybody is told, and the
                # next request works.
                logger.exception("the step loop of %s failed", self._model_name)
                self._fail(self._sequences, EngineUnavailable("the engine failed"))
        self._obeys = False
        self._obey_commands(may_wait=False)
        self._fail(self._sequences, EngineUnavailable("the engine was stopped"))
        self._pool.clear()

    def _stop(self) -> None:
        self._is_stopping = True

    def _obey_commands(self, *, may_wait: bool) -> None:
        try:
            self._commands.get(block=may_wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _add(self, sequence: _Sequence) -> None:
        request = sequence.request
        sampling = request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        self._sequences.append(sequence)
        try:
            sequence.token_ids.extend(request.prompt.token_ids)
            sequence.sampler = sequence.runner.new_sampler(request.prompt.token_ids, sampling, request.token_mask)
        except Exception as error:
            logger.warning("request %s was refused by the model", request.request_id, exc_info=error)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))

    def _set_parked(self, request_id: str, is_parked: bool) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id and sequence.is_parked != is_parked:
                sequence.is_parked, sequence.was_parked = is_parked, True
                if is_parked:
                    self._release(sequence, keep=sequence.is_generating or sequence.runner.can_load_part)

    def _plan(self) -> list[Feed]:
        """The newest token of everybody who generates and whose reader keeps up, and of prompts what the budget allows.

        Prompts are read in order of arrival. Those who are parked are as if they were not there.
        """
        active = [s for s in self._sequences if not s.is_parked and not s.outbox.is_full]
        for sequence in active:
            if sequence.slot is None and sequence.num_generated:
                self._open(sequence)  # it was parked: with all it had computed it generates again
        feeds = [s.next_feed(1) for s in active if s.is_generating]
        room = self._budget.tokens(len(feeds))
        for sequence in active:
            if room == 0:
                break
            if sequence.is_generating:
                continue
            if sequence.slot is None and (sequence.num_generated or not self._open(sequence)):
                continue
            feed = sequence.next_feed(room)
            room -= len(feed.token_ids)
            feeds.append(feed)
        return feeds

    def _open(self, sequence: _Sequence) -> bool:
        """Give it a slot, with what somebody who began alike has computed. False: not yet, or it has failed."""
        runner = sequence.runner
        in_slots = [s for s in self._sequences if s.slot is not None]
        if runner.max_slots is not None and len(in_slots) >= runner.max_slots:
            return False
        # One token at least has to be fed: the model's answer to it is what comes next.
        wanted = as_tokens(sequence.token_ids[:-1])
        shares = self._pool.max_bytes > 0 and runner.can_load_part
        alike = [(common_prefix(s.tokens(), wanted), s) for s in in_slots] if shares else []
        living, source = max(((min(n, s.fed), s) for n, s in alike), key=lambda pair: pair[0], default=(0, None))
        kept = self._pool.find(wanted)
        held = max(living, kept[1] if kept else 0)
        being_read = max((n for n, s in alike if n > s.fed and not s.is_generating and not s.outbox.is_full), default=0)
        if being_read >= held + MIN_SHARED_TOKENS:
            return False  # wait for whoever is reading just that
        sequence.slot = slot = _lowest_free({s.slot for s in in_slots})
        try:
            runner.open_slot(slot, sequence.sampler)
            if held >= (1 if sequence.was_parked else MIN_SHARED_TOKENS):
                if source is not None and source.slot is not None and living == held:
                    runner.copy(source.slot, slot, held)
                elif kept is not None:
                    runner.load(slot, kept[0], held)
                sequence.fed = held
                self._reused_tokens += max(0, min(held, sequence.num_prompt_tokens) - sequence.prompt_read)
        except Exception as error:
            logger.exception("request %s could not take a slot", sequence.request.request_id)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))
            return False
        return True

    def _release(self, sequence: _Sequence, *, keep: bool) -> None:
        """Give its slot back; what it has computed may go to the pool."""
        slot = sequence.slot
        if slot is None:
            return
        try:
            if keep and sequence.fed:
                self._pool.keep(sequence.tokens_in_slot(), partial(sequence.runner.save, slot))
        except Exception:
            logger.exception("what request %s has computed could not be kept", sequence.request.request_id)
        try:
            sequence.runner.close_slot(slot)
        except Exception:
            logger.exception("slot %d could not be given back cleanly", slot)
        sequence.slot, sequence.fed = None, 0

    def _take_step(self, feeds: Sequence[Feed]) -> None:
        if not feeds or self._is_stopping:
            return
        rows = {s.slot: s for s in self._sequences if s.slot is not None}
        num_generating = sum(rows[feed.slot].is_generating for feed in feeds)
        assert self._model is not None
        began_s = self._step_began_s = time.monotonic()
        try:
            tokens = self._model.runner.step(feeds)
        except Exception as error:
            logger.exception("a step of %s failed", self._model_name)
            self._fail([rows[feed.slot] for feed in feeds], EngineError(f"the model failed: {error}"))
            return
        finally:
            self._step_began_s = None
        num_prompt_tokens = sum(len(feed.token_ids) for feed in feeds) - num_generating
        self._budget.note(num_generating, num_prompt_tokens, time.monotonic() - began_s)
        deliveries: list[tuple[Outbox, Item]] = []
        for feed in feeds:
            sequence = rows[feed.slot]
            sequence.fed += len(feed.token_ids)
            try:
                delta = sequence.advance(tokens[feed.slot]) if feed.slot in tokens else sequence.prompt_delta()
            except Exception as error:
                logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
                self._fail([sequence], EngineError(f"the model failed: {error}"))
                continue
            self._prompt_tokens += delta.num_prompt_tokens
            if delta.finish_reason is not None:
                self._drop(sequence, keep=True)
            sequence.outbox.tokens_sent += delta.num_tokens
            deliveries.append((sequence.outbox, delta))
        hand_over(deliveries)

    def _fail(self, sequences: Sequence[_Sequence], error: ChatStreamError) -> None:
        for sequence in list(sequences):
            self._drop(sequence, keep=False)
            hand_over([(sequence.outbox, error)])

    def _drop(self, sequence: _Sequence, *, keep: bool) -> None:
        if sequence in self._sequences:  # else it ended by itself in the step before the cancel arrived
            self._sequences.remove(sequence)
            is_worth_it = sequence.runner.can_load_part and sequence.fed >= MIN_SHARED_TOKENS
            self._release(sequence, keep=keep and is_worth_it)


class _Sequence:
    """One request inside the engine: how far its prompt and its answer are."""

    def __init__(self, request: GenerationRequest, model: LoadedModel, outbox: Outbox) -> None:
        self.request = request
        self.runner = model.runner
        self.outbox = outbox
        self.answer = Answer(request, model.codec, context_len=model.runner.context_len, chat_stops=model.chat_stops)
        self.token_ids = array("q")
        """The prompt and what was generated. Packed: it is compared with others' at every newcomer."""
        self.num_prompt_tokens = len(request.prompt.token_ids)
        self.prompt_read = 0
        """Prompt tokens that were told to the reader."""
        self.sampler: Any = None
        self.slot: int | None = None
        self.fed = 0
        """Tokens the slot holds: a beginning of `token_ids`."""
        self.is_parked = self.was_parked = False

    @property
    def is_generating(self) -> bool:
        """One token has to be fed, the one that was chosen last."""
        return self.fed >= self.num_prompt_tokens and self.fed == len(self.token_ids) - 1

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def tokens(self) -> Tokens:
        """What the slot holds, or will when its prompt is read."""
        return as_tokens(self.token_ids)

    def tokens_in_slot(self) -> Tokens:
        return as_tokens(self.token_ids[: self.fed])

    def next_feed(self, max_tokens: int) -> Feed:
        assert self.slot is not None
        length = len(self.token_ids)
        end = min(self.fed + max_tokens, length)
        return Feed(self.slot, self.fed, tuple(self.token_ids[self.fed : end]), is_last=end == length)

    def advance(self, next_token: NextToken | Exception) -> TokenDelta:
        """What this token adds to the answer. Raises the exception that stands in a token's place."""
        if isinstance(next_token, Exception):
            raise next_token
        self.token_ids.append(next_token.token_id)
        return self.answer.advance(next_token, num_prompt_tokens=self._newly_read())

    def prompt_delta(self) -> TokenDelta:
        """A part of the prompt was read, and not the last one."""
        return TokenDelta("", 0, num_prompt_tokens=self._newly_read())

    def _newly_read(self) -> int:
        """Prompt tokens read since this was last asked; those that are read again after a pause do not count."""
        before, self.prompt_read = self.prompt_read, max(self.prompt_read, min(self.fed, self.num_prompt_tokens))
        return self.prompt_read - before


def _lowest_free(taken: set[int | None]) -> int:
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
