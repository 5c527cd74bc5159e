"""Token ids to text, incrementally: whole characters only, and no text that may be part of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Decoder(Protocol):
    """Incremental decoder of one answer."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete. Special tokens have no text."""


class TokenizersDecoder:
    """A `Decoder` over a Hugging Face `tokenizers.Tokenizer`.

    `DecodeStream` withholds the bytes of an incomplete character; an answer that ends there ends before the character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []
        """Tokens without text so far."""

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # With byte tokens, a byte that is not part of a character invalidates its whole run of bytes, and the
            # library retracts text that it has already returned. Decode the run again, as the beginning of a text.
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(self._tokenizer, pending) or "" for pending in self._pending)
        if text:
            self._pending.clear()
        return text or ""


class TokenTexts:
    """The text of each single token in the middle of a text, special tokens included; U+FFFD for part of a character.

    Texts are cached, because the same tokens recur in log probabilities. The cache covers most vocabularies.
    """

    MAX_CACHED = 2**17

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` returns the text of token ids, special tokens included. It must be thread-safe."""
        self._decode = decode
        self.of = lru_cache(self.MAX_CACHED)(self._of)

    def _of(self, token_id: int) -> str:
        # Decode the token after itself, because many decoders drop the space before the first word of a text.
        alone, twice = self._decode([token_id]), self._decode([token_id, token_id])
        is_whole = "\ufffd" not in alone and twice.startswith(alone)
        return twice[len(alone) :] if is_whole else alone


class StopStrings:
    """Cuts a stream of text before the first of several stop strings, independent of how the text is split into pieces.

    Invariant: the concatenation of all returned texts is the whole text up to the first stop string (the one that ends
    first; of several that end there, the longest). No character of that stop string is ever returned.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._withheld = ""
        self.is_hit = False
        """A stop string has appeared; the text after it is dropped."""

    def push(self, text: str) -> str:
        """Add a piece of text and return the text that can no longer be part of a stop string."""
        if self.is_hit or not text:
            return ""
        if not self._stops:
            return text
        first_new = len(self._withheld)
        self._withheld += text
        for end in range(first_new + 1, len(self._withheld) + 1):
            found = [stop for stop in self._stops if self._withheld.endswith(stop, 0, end)]
            if found:
                self.is_hit = True
                released, self._withheld = self._withheld[: end - max(map(len, found))], ""
                return released
        split = len(self._withheld) - self._partial_stop_len()
        released, self._withheld = self._withheld[:split], self._withheld[split:]
        return released

    def flush(self) -> str:
        """Return the withheld text. Call it when the answer has ended without a stop string."""
        released, self._withheld = self._withheld, ""
        return released

    def _partial_stop_len(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._withheld)), 0, -1):
            tail = self._withheld[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
