"""What the step loop asks of a model: a `ModelRunner` computes, and a `Codec` (engines/text/codec.py) turns text into
tokens and back.

An engine for another array library is these two classes and a function that returns a `LoadedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatstream.engines.text.codec import Codec, SampledToken
from chatstream.types import SamplingParams, TokenMask


@dataclass(frozen=True, slots=True)
class SlotInput:
    """The next tokens of one slot: usually the one that was chosen last, of a newcomer a part of its prompt."""

    slot: int
    start: int
    """Position of the first token; equals the number of tokens the slot already holds."""
    token_ids: tuple[int, ...]
    is_last: bool
    """Nothing more is known of this sequence: the next token is to be chosen."""


class Saved(Protocol):
    """What a model remembers of the first tokens of a sequence, outside any slot. Immutable."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""


class ModelRunner(Protocol):
    """One model with its memory and its sampling. Called from the engine's thread only.

    A slot holds what the model remembers of one sequence. Slots are small ints, the lowest free one first; memory may
    grow with them. An open slot may be left out of any number of steps, in its prompt too: its reader lags, or another
    prompt comes first. It then goes on where it was.
    """

    context_len: int
    """Prompt and answer together, in tokens."""
    max_slots: int | None
    """As many as there is memory for; None: no bound of its own."""
    supports_partial_prefix: bool
    """`load` and `copy` also take fewer tokens than there are. Otherwise: all, and then one more token is fed."""

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Any:
        """How one request's tokens are chosen, and what has to be remembered for that: random state, tokens seen.

        `sampling.seed` is always set. Raises for a prompt that the model cannot be fed.
        """

    def open_slot(self, slot: int, sampler: Any) -> None:
        """A sequence takes a slot, which is empty. `sampler` is one of `new_sampler`, perhaps used before."""

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        """Feed everybody's tokens, in one forward pass if it can; the next token, by slot, for each input that is the
        last of its sequence.

        At most one input a slot. An exception as a value fails that request alone; one that is raised fails all.
        """

    def close_slot(self, slot: int) -> None:
        """The sequence has left, wherever it was. The slot's memory may be used again."""

    def save(self, slot: int) -> Saved:
        """A copy of what the slot holds."""

    def load(self, slot: int, saved: Any, num_tokens: int) -> None:
        """Put the first `num_tokens` of what `save` returned into a slot that was just opened."""

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        """The same from another open slot, which keeps what it has."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a loader returns."""

    runner: ModelRunner
    codec: Codec
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    """What the checkpoint's authors recommend where a request does not say."""
    chat_stops: tuple[str, ...] = ()
    """End every answer to a conversation, besides the request's own: where the next speaker would begin."""
    speed_key: str | None = None
    """See `Capacity.speed_key`."""
    prefix_cache_bytes: int = 256 * 2**20
    """What may be kept of finished and preempted sequences, for those that begin alike (prefix_cache.py)."""
    limits: str = ""
    """What bounds `runner.max_slots`, for the operator who asks for more."""
    slow_because: str = ""
    """Why this model is not served in the fast way. Empty: it is."""
