"""The engine contract: what ChatStream requires of anything that generates text.

An engine knows no HTTP, no session and no queue. It receives one request per slot, never more requests than the
current limit, and yields each answer as a series of deltas. This file and `chatstream.types` suffice to write one:

    class Shout:
        model_name = "shout"
        capacity = Capacity()
        default_sampling = SamplingParams()

        async def start(self) -> None: ...
        async def stop(self) -> None: ...
        def health(self) -> EngineHealth: return EngineHealth(is_ready=True)

        async def prepare(self, prompt, sampling, *, may_drop_history=False):
            return PreparedPrompt(messages=as_messages(prompt))

        async def stream(self, request):
            words = request.prompt.messages[-1].content.upper().split()
            for n, word in enumerate(words, start=1):
                is_last = n == len(words)
                yield TokenDelta(
                    word + " ",
                    finish_reason=FinishReason.STOP if is_last else None,
                    usage=Usage(prompt_tokens=len(words), completion_tokens=n) if is_last else None,
                    num_prompt_tokens=len(words) if n == 1 else 0,
                )

`chatstream.testing.check_engine` tests an engine against this contract; `chatstream.testing.FakeEngine` is a complete
example. An engine that can preempt generations also has the methods of `Preemptible`; one that has figures for
operators, that of `Reporting`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from chatstream.types import GenerationRequest, Message, PreparedPrompt, PromptInput, SamplingParams, TokenDelta


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine can run. None: the engine has no bound of its own."""

    max_concurrency: int | None = None
    """Generations that can run at the same time; preempted generations do not count. A higher `max_concurrency` of
    ChatStream is refused when it is set."""
    context_len: int | None = None
    """Length of prompt and answer together, in tokens."""
    can_preempt: bool = False
    """The engine also implements `Preemptible`."""
    speed_key: str | None = None
    """Everything but the machine that determines the engine's speed: checkpoint, dtype of the weights, device, threads,
    versions. On one machine, engines with equal keys are equally fast. None: unknown, or the model runs on another
    machine; `max_concurrency="auto"` then skips the measurement at startup."""
    limited_by: str = ""
    """The reason for `max_concurrency`, quoted in the error when an operator sets a higher limit."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine can generate now."""

    is_ready: bool
    detail: str = ""
    """For operators, when the engine is not ready: the progress of loading, or what is wrong."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of an engine, for operators. Totals count from its start. None: unknown."""

    is_batched: bool = True
    """One forward pass computes the tokens of all running requests. False: one pass per request, for the reason given
    in `slow_because`."""
    slow_because: str = ""
    num_slots: int = 0
    """Sequences that occupy a slot of the model's memory now."""
    num_cached_sequences: int | None = None
    """Entries of the prefix cache."""
    prefix_cache_bytes: int | None = None
    """Memory used by the prefix cache."""
    prompt_tokens: int | None = None
    """Total prompt tokens processed, `reused_prompt_tokens` included."""
    reused_prompt_tokens: int | None = None
    """Total prompt tokens taken from the computation of other sequences instead of being computed."""


class Engine(Protocol):
    """What every engine implements. All methods are called on the event loop and must not block it."""

    @property
    def model_name(self) -> str:
        """The name under which clients address the model (`/v1/models`)."""

    @property
    def capacity(self) -> Capacity:
        """What the engine can run. Final once `start` has returned."""

    @property
    def default_sampling(self) -> SamplingParams:
        """Values of the sampling parameters that a request omits. Final once `start` has returned."""

    async def start(self) -> None:
        """Load the model. Called once, before the first `prepare`.

        Raises `ConfigError` with a message of one line when the model cannot be loaded.
        """

    async def stop(self) -> None:
        """Release all resources. Streams that are still open end with `EngineUnavailable`.

        Idempotent. Also called after a `start` that failed or was cancelled.
        """

    def health(self) -> EngineHealth:
        """The current health. Cheap, and correct at any time: while the engine loads, hangs or has died."""

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        """Convert a prompt to the input of `stream`: apply the chat template, tokenise, check that it fits the context.

        A str is continued without a template; messages go through the chat template. With `may_drop_history`, drop the
        oldest turns until the rest fits; the system message and the last message always stay.

        Raises `PromptTooLong` when the prompt does not fit and nothing more can be dropped, `InvalidRequest`, or
        `UnsupportedParameter` with the name of a sampling parameter that this engine does not support. Must not need a
        slot: it runs while other requests generate. If `capacity.context_len` is set, `prepare` is called once after
        `start` with a short message, to check that a conversation fits.
        """

    def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Generate the answer. Called once the request has a slot; usually an `async def` that yields.

        - Yield one `TokenDelta` per step. The last delta, and no other, carries `finish_reason` and `usage`.
        - The first delta carries `num_prompt_tokens`, if the engine counts them. An engine that processes a long prompt
          in several steps yields after each of these steps, except the last, a delta without text and with
          `num_tokens=0`: it reports the cost so far, and that the request is alive.
        - The consumer may be slow. While it does not request the next delta, pause; do not buffer without a bound.
        - The consumer may stop at any time, even before the first delta: it calls `aclose()` or cancels the task. Stop
          generating within one step and release the memory *before* `aclose()` returns, because the slot then passes
          to the next request at once. Do not suppress `CancelledError` or `GeneratorExit`.
        - Raise `EngineUnavailable` when the engine failed, not this request. If no token was yielded, the request is
          retried once. Raise `EngineError` when this request failed. Any other exception counts as `EngineError`.
          An exception never affects other requests.
        """


class Preemptible(Protocol):
    """What an engine with `capacity.can_preempt` implements in addition: suspend a generation and resume it later.

    Several generations can then share one slot, one after the other. A preempted generation may keep its memory, but is
    not computed. Preemption does not change the answer: it is the same, token for token.
    """

    async def preempt(self, request_id: str) -> None:
        """Suspend this request, in its prompt or its answer, until `resume`.

        Returns when the request is suspended, at most one step later. No delta is produced after that. Deltas produced
        before, possibly the last one of the answer, can be read without waiting. `stream` keeps its other promises:
        closing or cancelling it releases the memory, and `stop` ends it with `EngineUnavailable`.

        A request exists from the first `anext` of its stream until the stream ends. An unknown id, or one that is
        already preempted, has no effect. If the caller is cancelled while it waits, the request is preempted all the
        same. Raises nothing.
        """

    def resume(self, request_id: str) -> None:
        """Continue this request from the next step.

        The latest call of `preempt` or `resume` counts, even while an earlier `preempt` has not returned. An id that is
        not preempted has no effect. Raises nothing.
        """


@runtime_checkable
class Reporting(Protocol):
    """Optional: an engine that reports figures to operators."""

    def stats(self) -> EngineStats | None:
        """The current figures. Cheap; may be called at any time. None: no figures are available now."""


def stats_of(engine: Engine) -> EngineStats | None:
    """The figures of an engine. None: it is not `Reporting`, or has no figures now."""
    return engine.stats() if isinstance(engine, Reporting) else None


def as_messages(prompt: PromptInput) -> tuple[Message, ...]:
    """The prompt as a conversation; a str becomes one user message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt
