"""`Codec`: what an engine that samples token ids requires of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chatstream.engines.text.detokenizer import Decoder
from chatstream.types import Message


class Codec(Protocol):
    """Text to tokens and back, for one model. Thread-safe: two threads may call it at once."""

    eos_token_ids: frozenset[int]

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text that the model continues, without a template."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation in the model's chat template, up to the beginning of the answer.

        Raises `InvalidRequest` when the template refuses the messages.
        """

    def open_decoder(self) -> Decoder:
        """A new decoder, for one answer."""

    def token_text(self, token_id: int) -> str:
        """The text of a single token, for log probabilities."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that a step sampled for one slot."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and filters. None: not requested."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log probabilities, most likely first; the requested number of them."""
