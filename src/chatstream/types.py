"""Shared value types: frozen dataclasses without logic beyond their own checks.

Imported by all rooms, and imports none above it. Times are float seconds; token counts are ints.
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
"""What a request waits for: a free slot; an earlier request of its conversation; an earlier request of its client,
which runs its maximum; or the start of the server."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


PromptInput: TypeAlias = str | tuple[Message, ...]
"""A text to continue without a template, or a conversation for the model's chat template."""


class FinishReason(StrEnum):
    """Why a complete generation ended. The values are those on the wire."""

    STOP = "stop"
    """The model ended its answer, or a stop string appeared (it is not part of the text)."""
    LENGTH = "length"
    """`max_new_tokens` were generated, or the context is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Checked at construction.

    Raises `InvalidRequest` that names the wrong field, by its name on the wire.
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
    """Subtracted from a token's logit for each occurrence in the answer, as in the OpenAI API. -2 to 2."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if it occurs in the answer, as in the OpenAI API. -2 to 2."""
    seed: int | None = None
    """Same seed and same request: same text, whatever else runs. None: a new seed for each request."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    logprobs: int | None = None
    """Report each token's log probability, and those of this many likeliest tokens (0 to 20). None: report none."""

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
    """Empty for an engine that does not tokenise."""
    messages: tuple[Message, ...] = ()
    """The messages that the tokens were made from, after dropping old turns."""
    dropped_messages: int = 0
    """Number of oldest messages dropped so that the rest fits the context."""


class TokenMask(Protocol):
    """Restricts the next token of one answer, for example by a grammar."""

    def __call__(self, generated_ids: Sequence[int], /) -> Any:
        """Return the allowed tokens: a bool numpy array by token id, (vocab_size,) or shorter; None: all.

        Called on the engine thread before each token, with all ids of the answer so far; the step of all sequences
        waits for it. Ids beyond the end of the array are forbidden. The mask applies to the end-of-sequence token too.
        This request alone ends with an error if the call raises, or returns another dtype, more entries than the
        vocabulary has, or no allowed token.
        """


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """The input of one generation, passed to the engine when the request has a slot."""

    request_id: str
    prompt: PreparedPrompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    token_mask: TokenMask | None = None
    """Called before each token. An engine without support raises `UnsupportedParameter` before the generation."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log probability: before temperature, penalties and filters, after the token mask."""

    token: str
    """The token's text; U+FFFD for a part of a character."""
    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens and their log probabilities, likeliest first; fewer than requested if fewer are allowed."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The tokens that one step adds to one answer."""

    text: str
    """The new text only. May be empty: incomplete characters and possible stop strings are withheld."""
    num_tokens: int = 1
    """Tokens generated since the previous delta."""
    finish_reason: FinishReason | None = None
    """Set on the last delta, and only there."""
    usage: Usage | None = None
    """Set on the last delta."""
    num_prompt_tokens: int = 0
    """Prompt tokens prefilled since the previous delta. Each counts once, at the latest with the first generated token.

    An engine that prefills a long prompt in parts reports each part in a delta without text or generated tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """If requested: one for each token generated since the previous delta, even if its text is withheld."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits. The request at position 1 starts next."""

    type = "queued"
    request_id: str
    position: int
    eta_seconds: float | None = None
    """Median of the expected time until the start. None until there is a basis for an estimate."""
    eta_p90_seconds: float | None = None
    """90th percentile of the expected time until the start."""
    position_kind: PositionKind = "exact"
    """exact: the position never grows. estimate: the policy may start later requests earlier."""
    waits_for: WaitsFor = "slot"


@dataclass(frozen=True, slots=True)
class Started:
    """The request has a slot. Sent exactly once, before the first token, also if the request never waited."""

    type = "started"
    request_id: str
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Token:
    """New text of the answer."""

    type = "token"
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Log probabilities of the tokens in this event, if requested; then the text may be empty."""


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
"""The events of one request, in order. Exactly one `Done` or `Failed` ends every stream."""
