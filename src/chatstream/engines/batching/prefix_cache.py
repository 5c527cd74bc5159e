"""The prefix cache: computed state of sequences that are not in a slot, from finished turns and preempted generations.

The next turn of a conversation begins with all tokens of the previous turn, and many conversations begin with the same
system prompt. A new sequence reuses the entry with the longest common prefix and computes only the rest. Entries are
matched by tokens, not by text: a template may render an old turn differently, and the tokens of a generated text need
not be those that the tokenizer makes of it. RadixAttention (Zheng et al. 2023) uses a tree for this; at a few hundred
entries a linear search takes less time than the launch of a forward pass.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NewType

from chatstream.engines.batching.model import Saved

Tokens = NewType("Tokens", bytes)
"""Token ids, 8 bytes each, so that a comparison is one memcmp."""
TOKEN_BYTES = 8
MAX_ENTRIES = 512
"""Bound of the search time: every new sequence is compared with every entry."""


class PrefixCache:
    """An LRU cache from token prefixes to saved state, bounded in bytes."""

    def __init__(self, max_bytes: int, *, supports_partial_prefix: bool = True) -> None:
        """`max_bytes` 0 disables the cache. `supports_partial_prefix`: see `ModelRunner`."""
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._supports_partial_prefix = supports_partial_prefix
        self._entries: OrderedDict[Tokens, Saved] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def store(self, tokens: Tokens, save: Callable[[], Saved]) -> None:
        """Add the state that `save` returns for `tokens`, and remove entries that are a prefix of `tokens`.

        `save` is not called if an entry already covers `tokens`. State larger than the whole cache is not stored.
        """
        if not self.max_bytes or self._touch_covering_entry(tokens):
            return
        saved = save()
        if saved.nbytes > self.max_bytes:
            return
        if self._supports_partial_prefix:
            for shorter in [entry for entry in self._entries if tokens.startswith(entry)]:
                self._remove(shorter)
        self._entries[tokens] = saved
        self.nbytes += saved.nbytes
        while self.nbytes > self.max_bytes or len(self._entries) > MAX_ENTRIES:
            self._remove(next(iter(self._entries)))

    def longest_prefix(self, tokens: Tokens) -> tuple[Saved, int] | None:
        """The entry with the longest common prefix, and the length of that prefix in tokens.

        Without support for partial prefixes, only an entry of exactly these tokens matches. It is removed, because no
        other sequence can use it.
        """
        if not self._supports_partial_prefix:
            return (self._remove(tokens), len(tokens) // TOKEN_BYTES) if tokens in self._entries else None
        best, best_entry = 0, None
        for entry in self._entries:
            if _token(entry, best) == _token(tokens, best):  # else its common prefix is not longer
                length = common_prefix(entry, tokens)
                if length > best:
                    best, best_entry = length, entry
        if best_entry is None:
            return None
        self._entries.move_to_end(best_entry)
        return self._entries[best_entry], best

    def discard(self, tokens: Tokens) -> None:
        """Remove the entry of exactly these tokens, if there is one."""
        if tokens in self._entries:
            self._remove(tokens)

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def _touch_covering_entry(self, tokens: Tokens) -> bool:
        """Mark the entry that makes a new one for `tokens` superfluous as used. False: there is none."""
        if tokens in self._entries:
            covering: Tokens | None = tokens
        elif self._supports_partial_prefix:
            covering = next((entry for entry in self._entries if entry.startswith(tokens)), None)
        else:
            covering = None
        if covering is not None:
            self._entries.move_to_end(covering)
        return covering is not None

    def _remove(self, tokens: Tokens) -> Saved:
        saved = self._entries.pop(tokens)
        self.nbytes -= saved.nbytes
        return saved


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Pack token ids. Raises `OverflowError` for an id that does not fit 64 bits."""
    return Tokens(array("q", token_ids).tobytes())


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix, in tokens. Binary search, so that the comparisons are memcmps."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * TOKEN_BYTES : middle * TOKEN_BYTES] == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def _token(tokens: Tokens, index: int) -> bytes:
    return tokens[index * TOKEN_BYTES : (index + 1) * TOKEN_BYTES]
