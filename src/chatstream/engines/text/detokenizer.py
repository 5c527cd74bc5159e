"""Token ids to text, piece by piece: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Decoder(Protocol):
    """Turns the tokens of one answer into text as they come."""

    def push(self, token_id: int) -> str:
        """The text this token completes; "" while a character is incomplete. Special tokens give no text."""


class TokenizersDecoder:
    """A `Decoder` over a Hugging Face `tokenizers.Tokenizer`.

    `DecodeStream` holds back the bytes of an unfinished character; an answer cut off there ends before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        """Tokens that have given no text yet."""

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # Where single bytes are tokens, one that makes no character spoils all of its run, and the library takes
            # back what it has given out of it. So that piece is told anew, as if the text began with it.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, held) or "" for held in self._held)
        if text:
            self._held.clear()
        return text or ""


class TokenTexts:
    """What each token says by itself in the middle of a text, special tokens too; U+FFFD for a part of a character.

    Remembers as many as most vocabularies have: where log probabilities are told, the same tokens come all the time.
    """

    MAX_REMEMBERED = 2**17

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` turns ids into text without leaving out special tokens. It must be safe to call from two threads."""
        self._decode = decode
        self.of = lru_cache(self.MAX_REMEMBERED)(self._of)

    def _of(self, token_id: int) -> str:
        # Behind itself: many decoders drop the space before the first word of a text.
        alone, twice = self._decode([token_id]), self._decode([token_id, token_id])
        is_whole = "\ufffd" not in alone and twice.startswith(alone)
        return twice[len(alone) :] if is_whole else alone


class StopStrings:
    """Cuts a stream of text before the first of several stop strings, wherever the pieces happen to break.

    The law: the concatenation of everything returned equals the whole text up to the first stop string in it
    (the one that ends first; of those the longest), and no character that belongs to it is ever returned early.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.is_hit = False
        """A stop string has appeared; whatever comes after it is dropped."""

    def push(self, text: str) -> str:
        """Text that is now safe to show."""
        if self.is_hit or not text:
            return ""
        if not self._stops:
            return text
        first_new = len(self._held)
        self._held += text
        for end in range(first_new + 1, len(self._held) + 1):
            found = [stop for stop in self._stops if self._held.endswith(stop, 0, end)]
            if found:
                self.is_hit = True
                shown, self._held = self._held[: end - max(map(len, found))], ""
                return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text held back, once the answer has ended without a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _possible_beginning(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
