"""What the step loop requires of a model.

A `ModelRunner` computes; a `Codec` (engines/text/codec.py) converts between text and tokens. An engine for another
array library consists of these two classes and a function that returns a `LoadedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatstream.engines.text.codec import Codec, SampledToken
from chatstream.types import SamplingParams, TokenMask


@dataclass(frozen=True, slots=True)
class SlotInput:
    """The next tokens of one slot: the token sampled last, or a part of a prompt."""

    slot: int
    start: int
    """Position of the first token in the sequence; equals the number of tokens computed in the slot."""
    token_ids: tuple[int, ...]
    is_last: bool
    """These are the last known tokens of the sequence: `step` must sample the next one."""


class Saved(Protocol):
    """A copy of a slot's state, such as keys and values of its tokens. Immutable."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""


class ModelRunner(Protocol):
    """One model with its memory and its sampling. Called from the engine thread only.

    A slot contains the model's state of one sequence. Slots are small ints; the lowest free one is opened first, and
    memory may grow with the highest one. Any number of steps may skip an open slot, even in the middle of its
    prompt: because its reader lags, or because another prompt comes first. Its state must then stay as it is.
    """

    context_len: int
    """Length of prompt and answer together, in tokens."""
    max_slots: int | None
    """The number of slots that fit in memory. None: no bound."""
    supports_partial_prefix: bool
    """Whether `load` and `copy` can restore fewer tokens than were computed. False: they are called with all tokens."""

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Any:
        """Create the sampling state of one request: parameters, random state, token counts.

        `sampling.seed` is always set. Raises if the model cannot compute this prompt.
        """

    def open_slot(self, slot: int, sampler: Any) -> None:
        """Open an empty slot for a sequence. `sampler` is from `new_sampler`; a resumed sequence passes it again."""

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        """Compute all inputs, in one forward pass if possible. Return, by slot, a token for each input with `is_last`.

        There is at most one input per slot. An exception instead of a token fails that request only; a raised
        exception fails all requests of the step.
        """

    def close_slot(self, slot: int) -> None:
        """Close a slot, at any point of its sequence. Its memory can be reused."""

    def save(self, slot: int) -> Saved:
        """Return a copy of the slot's state."""

    def load(self, slot: int, saved: Any, num_tokens: int) -> None:
        """Restore the first `num_tokens` of `saved`, a result of `save`, into a slot that was just opened."""

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        """Like `load`, from the open slot `source`, whose state does not change."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The result of a loader: a model that is ready to run."""

    runner: ModelRunner
    codec: Codec
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    """Values of the sampling parameters that a request omits."""
    chat_stops: tuple[str, ...] = ()
    """Strings that end every answer to a conversation, in addition to the request's own stop strings."""
    speed_key: str | None = None
    """See `Capacity.speed_key`."""
    prefix_cache_bytes: int = 256 * 2**20
    """Bound of the prefix cache (prefix_cache.py)."""
    limits: str = ""
    """The reason for `runner.max_slots`; see `Capacity.limited_by`."""
    slow_because: str = ""
    """Why one step computes one request at a time. Empty: a step computes all requests in one pass."""
