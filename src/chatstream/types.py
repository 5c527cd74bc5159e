"""The words of the house: frozen values that cross every border.

No logic beyond checking themselves, and no import from the rooms above.
Times are float seconds; token counts are ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias

from chatstream.checks import check_int, check_number
from chatstream.errors import ChatStreamError, InvalidRequest

Role: TypeAlias = Literal["system", "user", "assistant"]
PositionKind: TypeAlias = Literal["exact", "estimate"]
WaitsFor: TypeAlias = Literal["slot", "conversation", "client_limit", "opening"]
"""Why a request waits: for a free slot; for an earlier request of its conversation; for another request of its client,
which runs as many as one client may; or until the server starts to serve."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


PromptInput: TypeAlias = str | tuple[Message, ...]
"""A text to be continued as it stands, or a conversation for the model's chat template."""


class FinishReason(StrEnum):
    """Why a generation ended by itself. The values are the ones on the wire."""

    STOP = "stop"
    """The model ended its answer, or a stop string appeared (it is not part of the text)."""
    LENGTH = "length"
    """`max_new_tokens` were generated, or the context is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen. Checked when built.

    Raises `InvalidRequest` naming the field (its name on our wire) when a value cannot be honoured.
    """

    max_new_tokens: int | None = None
    """At most this many generated tokens; None: until the context is full."""
    temperature: float = 1.0
    """0 is greedy. 0 to 2, as in the OpenAI API."""
    top_k: int | None = None
    """Only the k likeliest tokens; None: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; at least one is always kept."""
    min_p: float = 0.0
    """Only tokens at least this part as likely as the likeliest (Nguyen et al. 2024); 0: all."""
    repetition_penalty: float = 1.0
    """> 1 makes tokens of the prompt and of the answer so far less likely (Keskar et al. 2019, as in Hugging Face)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit each time that it comes in the answer, as in the OpenAI API. -2 to 2."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once it has come in the answer, as in the OpenAI API. -2 to 2."""
    seed: int | None = None
    """Same seed and same request: same text, whatever else runs. None: a fresh one each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    logprobs: int | None = None
    """Tell each token's log probability, and those of so many of the likeliest (0 to 20); None: tell nothing."""

    MAX_STOP_STRINGS = 16
    MAX_STOP_CHARS = 256
    MAX_LOGPROBS = 20

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_new_tokens", 1, 2**31),
            ("top_k", 1, 2**31),
            ("seed", -(2**63), 2**64 - 1),
            ("logprobs", 0, self.MAX_LOGPROBS),
        ):
            check_int(name, getattr(self, name), at_least=least, at_most=most, or_none=True, error=InvalidRequest)
        for name, low, high in (
            ("temperature", 0, 2),
            ("min_p", 0, 1),
            ("frequency_penalty", -2, 2),
            ("presence_penalty", -2, 2),
        ):
            check_number(name, getattr(self, name), at_least=low, at_most=high, error=InvalidRequest)
        check_number("top_p", self.top_p, above=0, at_most=1, error=InvalidRequest)
        check_number("repetition_penalty", self.repetition_penalty, above=0, at_most=10, error=InvalidRequest)
        stop: object = self.stop
        if not (
            isinstance(stop, tuple)
            and len(stop) <= self.MAX_STOP_STRINGS
            and all(isinstance(s, str) and 0 < len(s) <= self.MAX_STOP_CHARS for s in stop)
        ):
            raise InvalidRequest(
                f"stop must be at most {self.MAX_STOP_STRINGS} non-empty strings of at most {self.MAX_STOP_CHARS} "
                "characters",
                param="stop",
            )


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt in the form its engine takes, made by `Engine.prepare`."""

    token_ids: tuple[int, ...] = ()
    """Empty for an engine that does not tokenise (an upstream server)."""
    messages: tuple[Message, ...] = ()
    """What the tokens were made from, after dropping old turns."""
    dropped_messages: int = 0
    """Oldest messages left out so that the rest fits the context."""


class TokenMask(Protocol):
    """What may come next in one answer: the place for a grammar."""

    def __call__(self, generated_ids: Sequence[int], /) -> Any:
        """A numpy array of bools by token id, (vocab_size,) or shorter; None: every token may come.

        Called before each token with all ids of the answer so far, in the engine's thread: everybody's next token
        waits for it. What lies beyond the end of the array may not come. The token that ends an answer is a token
        too: forbidden, it does not come. An exception, something else than bools, more of them than the model has
        tokens, or no token that may come ends this request with an error, and no other.
        """


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What an engine is asked to generate, once the request has its slot."""

    request_id: str
    prompt: PreparedPrompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    token_mask: TokenMask | None = None
    """Asked before every token. An engine that cannot refuses the request: `UnsupportedParameter`, before it begins."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token and how likely the model found it: before temperature, penalties and filters, and after the
    token mask."""

    token: str
    """Its text; U+FFFD where it is a part of a character."""
    logprob: float
    """The natural logarithm of its probability."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens and theirs, likeliest first: as many as were asked for, fewer if no more may come."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step of an engine adds to one answer."""

    text: str
    """The new text only. May be empty: half a character, or the possible beginning of a stop string, is held back."""
    num_tokens: int = 1
    """Tokens generated since the delta before this one."""
    finish_reason: FinishReason | None = None
    """Set on the last delta, and only there."""
    usage: Usage | None = None
    """Set on the last delta."""
    num_prompt_tokens: int = 0
    """Prompt tokens read since the delta before this one: each counts once, and all of them by the first generated one.

    An engine that reads a long prompt in chunks says so with deltas of no text and no generated token."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """If they were asked for: one for each generated token since the delta before this one, whether its text is here
    or still held back."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits. Position 1 is the next to start."""

    type = "queued"
    request_id: str
    position: int
    eta_seconds: float | None = None
    """It starts in so long, as likely earlier as later. None until there is a basis."""
    eta_p90_seconds: float | None = None
    """Nine of ten start by then."""
    position_kind: PositionKind = "exact"
    """exact: it never grows. estimate: under a policy where somebody may come in front."""
    waits_for: WaitsFor = "slot"


@dataclass(frozen=True, slots=True)
class Started:
    """The request has a slot. Comes exactly once, before the first token, also to those who never waited."""

    type = "started"
    request_id: str
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Token:
    """New text of the answer."""

    type = "token"
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens generated with it, if they were asked for; then the text may be empty."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete."""

    type = "done"
    request_id: str
    message_id: str
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a complete answer."""

    type = "error"
    request_id: str
    error: ChatStreamError


StreamEvent: TypeAlias = Queued | Started | Token | Done | Failed
"""What happens to one request, in order. Exactly one `Done` or `Failed` ends every stream."""
