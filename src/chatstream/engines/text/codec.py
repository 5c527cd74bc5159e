"""Between a model's tokens and text: what every engine that samples token ids asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chatstream.engines.text.detokenizer import Decoder
from chatstream.types import Message


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

    def token_text(self, token_id: int) -> str:
        """One token by itself, for people who look at log probabilities."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a step chose for one slot."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and filters; None: nobody asked."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, as many as were asked for, likeliest first."""
