"""The shared engine for models whose batch we own: one thread, one token for everybody a step.

    plan -> runner.step(plan) -> detokenise, stop strings -> one hand-over to the event loop -> again

A step advances every running generation by exactly one token, so two of them never drift apart by more than one
while both generate. A newcomer's prompt is prefilled in chunks, at most one chunk a step, between the tokens of the
others (Sarathi-Serve, OSDI'24): nobody's stream stalls for longer than one chunk. Whoever is parked keeps its slot and
its place in the model's memory, and is in no plan.

The model's side is the small `ModelRunner` protocol (model.py); this file knows no array library and no network.
Everything heavy (loading, tokenising, forward passes) runs in two named threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from chatstream.engines.base import Capacity, EngineHealth
from chatstream.engines.detokenizer import StopStrings
from chatstream.engines.handover import Item, Outbox, hand_over, resolver
from chatstream.engines.model import LoadedModel, NextToken, PrefillChunk, StepPlan
from chatstream.engines.prompt_fitting import fit_prompt
from chatstream.errors import ChatStreamError, ConfigError, EngineError, EngineUnavailable
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    Usage,
)

logger = logging.getLogger(__name__)


class StepEngine:
    """An `Engine` that can park (base.py) over a `ModelRunner` and a `Codec`."""

    STOP_TIMEOUT_S = 30.0
    """How long `stop` waits for a step that does not end; the thread is a daemon and dies with the process."""

    def __init__(
        self,
        model_name: str,
        load: Callable[[], LoadedModel],
        *,
        prefill_chunk_tokens: int = 256,
        max_undelivered: int = 64,
    ) -> None:
        """`load` runs in the engine's thread at `start`. Raises `ConfigError` for impossible settings.

        `prefill_chunk_tokens` bounds how long a newcomer's prompt holds up the others: measured on 2 cores, 256
        costs 1.4x the newcomer's time to first token and makes the others' largest gap 2.2x smaller than a whole
        1,024-token prefill. `max_undelivered` is how many tokens a reader may lag behind before its generation
        pauses; the others go on.
        """
        if prefill_chunk_tokens < 1:
            raise ConfigError("prefill_chunk_tokens must be at least 1")
        if max_undelivered < 1:
            raise ConfigError("max_undelivered must be at least 1")
        self._model_name = model_name
        self._load = load
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_undelivered = max_undelivered
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
        # Owned by the engine's thread, in order of arrival.
        self._sequences: list[_Sequence] = []

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        if self._model is None:
            return Capacity(can_park=True)
        return Capacity(context_len=self._model.runner.context_len, can_park=True, speed_key=self._model.speed_key)

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
        is_ready = self._model is not None and self._thread is not None and self._thread.is_alive()
        return EngineHealth(is_ready, "" if is_ready else self._detail)

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
                await self._wait_obeyed(lambda: self._drop(sequence))

    async def park(self, request_id: str) -> None:
        await self._wait_obeyed(lambda: self._set_parked(request_id, True))

    def resume(self, request_id: str) -> None:
        self._commands.put(lambda: self._set_parked(request_id, False))

    def _ready_model(self) -> LoadedModel:
        if not self.health().is_ready or self._model is None:
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
        self._obeys = True
        report_loaded(None)
        while not self._is_stopping:
            try:
                self._obey_commands(may_wait=self._plan() is None)
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
        sequence.slot = _lowest_free({other.slot for other in self._sequences})
        self._sequences.append(sequence)
        sampling = sequence.request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        try:
            sequence.runner.open_slot(sequence.slot, sequence.prompt_ids, sampling)
        except Exception as error:
            logger.exception("request %s could not take a slot", sequence.request.request_id)
            self._fail([sequence], EngineError(f"the model refused the request: {error}"))

    def _set_parked(self, request_id: str, is_parked: bool) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id:
                sequence.is_parked = is_parked

    def _plan(self) -> StepPlan | None:
        """Everybody who generates and whose reader keeps up, and the next chunk of the earliest unfinished prompt.

        Those who are parked are as if they were not there.
        """
        sequences = [s for s in self._sequences if not s.is_parked]
        decode = tuple(s.slot for s in sequences if s.is_prefilled and not s.outbox.is_full)
        newcomer = next((s for s in sequences if not s.is_prefilled), None)
        if not decode and newcomer is None:
            return None
        return StepPlan(decode, newcomer.next_chunk(self._prefill_chunk_tokens) if newcomer else None)

    def _take_step(self, plan: StepPlan | None) -> None:
        if plan is None or self._is_stopping:
            return
        rows = {s.slot: s for s in self._sequences}
        assert self._model is not None
        try:
            tokens = self._model.runner.step(plan)
        except Exception as error:
            logger.exception("a step of %s failed", self._model_name)
            in_plan = [rows[slot] for slot in plan.decode_slots]
            in_plan += [rows[plan.prefill.slot]] if plan.prefill else []
            self._fail(in_plan, EngineError(f"the model failed: {error}"))
            return
        deliveries: list[tuple[Outbox, Item]] = []
        if plan.prefill is not None:
            newcomer = rows[plan.prefill.slot]
            newcomer.prefilled += len(plan.prefill.token_ids)
            if newcomer.slot not in tokens:
                deliveries.append((newcomer.outbox, newcomer.prompt_delta()))
        for slot, token in tokens.items():
            sequence = rows[slot]
            try:
                delta = sequence.advance(token)
            except Exception as error:
                logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
                self._fail([sequence], EngineError(f"the model failed: {error}"))
                continue
            if delta.finish_reason is not None:
                self._drop(sequence)
            sequence.outbox.tokens_sent += delta.num_tokens
            deliveries.append((sequence.outbox, delta))
        hand_over(deliveries)

    def _fail(self, sequences: Sequence[_Sequence], error: ChatStreamError) -> None:
        for sequence in list(sequences):
            self._drop(sequence)
            hand_over([(sequence.outbox, error)])

    def _drop(self, sequence: _Sequence) -> None:
        if sequence not in self._sequences:
            return  # it ended by itself in the step before the cancel arrived
        self._sequences.remove(sequence)
        try:
            sequence.runner.close_slot(sequence.slot)
        except Exception:
            logger.exception("slot %d could not be given back cleanly", sequence.slot)


class _Sequence:
    """One request inside the engine: how far its prompt and its answer are."""

    def __init__(self, request: GenerationRequest, model: LoadedModel, outbox: Outbox) -> None:
        self.request = request
        self.runner = model.runner
        self.outbox = outbox
        self.prompt_ids = request.prompt.token_ids
        self.slot = -1
        self.prefilled = 0
        self.is_parked = False
        self._prefilled_told = 0
        self._eos_token_ids = model.codec.eos_token_ids
        self._decoder = model.codec.open_decoder()
        chat_stops = model.chat_stops if request.prompt.messages else ()
        self._stops = StopStrings(request.sampling.stop + chat_stops)
        self._generated = 0
        room = model.runner.context_len - len(self.prompt_ids)
        wanted = request.sampling.max_new_tokens
        self._max_new_tokens = room if wanted is None else min(wanted, room)

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.prompt_ids)

    def next_chunk(self, max_tokens: int) -> PrefillChunk:
        length = len(self.prompt_ids)
        end = min(self.prefilled + max_tokens, length)
        return PrefillChunk(self.slot, self.prefilled, self.prompt_ids[self.prefilled : end], is_last=end == length)

    def prompt_delta(self) -> TokenDelta:
        """A part of the prompt was read, and not the last one."""
        return TokenDelta("", 0, num_prompt_tokens=self._newly_prefilled())

    def advance(self, next_token: NextToken | Exception) -> TokenDelta:
        """What this token adds to the answer. Raises the exception that stands in a token's place."""
        if isinstance(next_token, Exception):
            raise next_token
        token = next_token.token_id
        if token in self._eos_token_ids:
            return self._last_delta(self._stops.flush(), FinishReason.STOP, num_tokens=0)
        self._generated += 1
        text = self._stops.push(self._decoder.push(token))
        if self._stops.is_hit:
            return self._last_delta(text, FinishReason.STOP)
        if self._generated >= self._max_new_tokens:
            return self._last_delta(text + self._stops.flush(), FinishReason.LENGTH)
        return TokenDelta(text, num_prompt_tokens=self._newly_prefilled())

    def _last_delta(self, text: str, reason: FinishReason, num_tokens: int = 1) -> TokenDelta:
        usage = Usage(len(self.prompt_ids), self._generated)
        return TokenDelta(text, num_tokens, reason, usage, self._newly_prefilled())

    def _newly_prefilled(self) -> int:
        """Prompt tokens read since this was last asked."""
        told, self._prefilled_told = self._prefilled_told, self.prefilled
        return self.prefilled - told


def _lowest_free(taken: set[int]) -> int:
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
