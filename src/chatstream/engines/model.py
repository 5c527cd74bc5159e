"""What the step loop asks of a model: `ModelRunner` computes, `Codec` turns text into tokens and back.

Whoever writes an engine for another array library writes these two and a function that returns a `LoadedModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chatstream.engines.detokenizer import Decoder
from chatstream.types import Message, SamplingParams


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next part of a newcomer's prompt."""

    slot: int
    start: int
    """Position of the first token; equals the number of tokens the slot already holds."""
    token_ids: tuple[int, ...]
    is_last: bool
    """The prompt is complete with this chunk: its last row yields the first generated token."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. A runner may do it in one forward pass or in two.

    An open slot may be left out of any number of steps, in its prompt too: its reader lags, it is parked, or another
    prompt comes first. It then goes on where it was.
    """

    decode_slots: tuple[int, ...]
    """Each feeds the token it sampled last and yields exactly one more."""
    prefill: PrefillChunk | None


@dataclass(frozen=True, slots=True)
class NextToken:
    """What a step chose for one slot."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and filters; None: nobody asked."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, as many as were asked for, likeliest first."""


class ModelRunner(Protocol):
    """One model with its KV memory and its sampling. Called from the engine's thread only."""

    context_len: int
    """Prompt and answer together, in tokens."""

    def open_slot(self, slot: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """A request takes a slot. Slots are small ints, the lowest free one first; KV memory may grow with them.

        `prompt_ids` are given for repetition penalties; they are fed by `step`. `sampling.seed` is always set.
        """

    def step(self, plan: StepPlan) -> Mapping[int, NextToken | Exception]:
        """Compute one step; the next token by slot, for every decode slot and a prefill chunk that is the last.

        The runner remembers each token it sampled and feeds it in the next step. An exception as a value fails
        that request alone; one that is raised fails all requests of the plan.
        """

    def close_slot(self, slot: int) -> None:
        """The request has ended, wherever it was. The slot's memory may be used again."""


class Codec(Protocol):
    """Text to tokens and back for one model. Methods may be called from two threads at once."""

    eos_token_ids: frozenset[int]

    def encode_text(self, text: str) -> list[int]:
        """A text to be continued as it stands."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation through the model's chat template, up to where the answer begins.

        Raises `InvalidRequest` when the template refuses it.
        """

    def open_decoder(self) -> Decoder:
        """A fresh decoder for one answer."""


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
