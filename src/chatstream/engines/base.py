"""What ChatStream asks of anything that generates text.

An engine knows no HTTP, no session and no queue. It is handed one request per slot, never more than the limit
in force, and yields the answer piece by piece. To write one you need this file and `chatstream.types`.

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

`chatstream.testing.FakeEngine` is a complete one; `chatstream.testing.check_engine` tests yours.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from chatstream.types import GenerationRequest, Message, PreparedPrompt, PromptInput, SamplingParams, TokenDelta


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine can hold. None: no bound of its own."""

    max_concurrency: int | None = None
    """Generations it can run at the same time, not counting those that are preempted. Asking for more is refused when
    the limit is set."""
    context_len: int | None = None
    """Prompt and answer together, in tokens."""
    can_preempt: bool = False
    """The engine is a `Preemptible` too."""
    speed_key: str | None = None
    """What its speed depends on besides the machine: checkpoint, type of the weights, device, threads, versions. Two
    engines with one key are equally fast here. None: nobody knows, or it is computed elsewhere; then
    `max_concurrency="auto"` measures nothing at the start."""
    limited_by: str = ""
    """Where `max_concurrency` comes from, for the operator who asks for more."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether a request handed over now would run."""

    is_ready: bool
    detail: str = ""
    """For the operator, when it is not ready: how far loading is, or what is wrong."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing, for operators. Counts are since its start; None: it does not know."""

    is_batched: bool = True
    """Everybody's tokens in one forward pass; otherwise one request after the other, because of `slow_because`."""
    slow_because: str = ""
    num_slots: int = 0
    """Sequences in the model's memory now."""
    num_cached_sequences: int | None = None
    """Sequences that have left it and are kept, for those that begin alike."""
    prefix_cache_bytes: int | None = None
    prompt_tokens: int | None = None
    """Read, those of `reused_prompt_tokens` too."""
    reused_prompt_tokens: int | None = None
    """Prompt tokens that did not have to be computed, because somebody had begun alike."""


class Engine(Protocol):
    """The contract. All methods are called on the event loop and must not block it."""

    @property
    def model_name(self) -> str:
        """The name clients ask for (`/v1/models`)."""

    @property
    def capacity(self) -> Capacity:
        """Known after `start`."""

    @property
    def default_sampling(self) -> SamplingParams:
        """What a request gets where it says nothing. Known after `start`."""

    async def start(self) -> None:
        """Load what is needed. Called once, before the first `prepare`.

        Raises `ConfigError` with one clear line when the model cannot be loaded.
        """

    async def stop(self) -> None:
        """Give everything back. Streams still open end with `EngineUnavailable`.

        Calling it twice is harmless, and so is calling it after a `start` that failed or was given up.
        """

    def health(self) -> EngineHealth:
        """Cheap, and honest while the engine loads, hangs or is gone."""

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        """Turn a prompt into what `stream` takes: apply the chat template, tokenise, check that it fits.

        A str is continued as it stands; messages go through the chat template. With `may_drop_history` the oldest
        turns are left out until the rest fits (a system message and the last message always stay).

        Raises `PromptTooLong` (nothing more can be left out), `InvalidRequest`, or `UnsupportedParameter` naming a
        sampling parameter this engine cannot honour. Must not need a slot: it runs while others generate. Where
        `capacity` tells a context, it is called once after `start`, to see that a conversation fits.
        """

    def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Generate. Called when the request has its slot; usually written as an `async def` that yields.

        - Yield one `TokenDelta` a step; the last one, and only it, carries `finish_reason` and `usage`.
        - The first one carries `num_prompt_tokens`, if the engine knows. One that reads a long prompt in several steps
          yields a delta without text and without a generated token after each of them but the last: what it has cost
          so far, and a sign of life.
        - The consumer may be slow: when it does not ask for the next delta, pause (do not buffer without bound).
        - It may stop at any moment, before the first delta too: `aclose()` is called or the task is cancelled.
          Stop generating within one step and give memory back *before* `aclose()` returns: the slot is handed to
          the next request right after. Let `CancelledError` and `GeneratorExit` pass.
        - Raise `EngineUnavailable` when the engine, not this request, failed: if no token was yielded yet the
          request is tried again once. Raise `EngineError` when this request failed. Anything else raised here is
          treated as `EngineError`; it never harms other requests.
        """


class Preemptible(Protocol):
    """What an engine with `capacity.can_preempt` can do besides: leave a generation where it is, and go on with it
    later.

    So one slot serves several generations in turns. A preempted one costs memory but no computing; its answer is, token
    for token, what it would have been.
    """

    async def preempt(self, request_id: str) -> None:
        """Compute nothing more for this request, neither its prompt nor its answer, until `resume`.

        Returns when that is so, at most one step later: no delta is made after it, and those made before can be read
        without waiting (the last one may be among them). Everything else about `stream` stays as it is: closing or
        cancelling it gives its memory back, `stop` ends it with `EngineUnavailable`.

        A request is known from the moment its stream is asked for the first delta until that has ended. An unknown id
        and one that is preempted already are harmless. Whoever stops waiting has preempted it all the same. Raises
        nothing.
        """

    def resume(self, request_id: str) -> None:
        """Let it go on, from the next step.

        Of `preempt` and `resume` the later call counts, even when the former has not returned yet. An id that is not
        preempted is harmless. Raises nothing.
        """


@runtime_checkable
class Reporting(Protocol):
    """What an engine may do besides: tell operators what it is doing."""

    def stats(self) -> EngineStats | None:
        """Cheap, at any time. None: nothing is known now."""


def stats_of(engine: Engine) -> EngineStats | None:
    """None where the engine does not say."""
    return engine.stats() if isinstance(engine, Reporting) else None


def as_messages(prompt: PromptInput) -> tuple[Message, ...]:
    """The prompt as a conversation: a bare text is one user message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt
