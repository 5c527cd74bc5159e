"""What the model remembers of sequences that are not in a slot: finished turns, and generations that are parked.

The next turn of a conversation begins with all the tokens of the turn before, and many conversations begin with the
same system prompt. Whoever begins like something that is kept takes that part over and computes only the rest.
Matched by longest common prefix of tokens, not of text: a template may render an old turn differently, and what was
generated need not be what the tokenizer makes of its text. (RadixAttention, Zheng et al. 2023, has a tree for this;
a few hundred entries are searched faster than a forward pass begins.)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from chatstream.engines.model import Saved

Tokens = NewType("Tokens", bytes)
"""Token ids, 8 bytes each: compared at the speed of memory."""
MAX_ENTRIES = 512
"""Each is looked at for every newcomer: about a millisecond for all of them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One sequence in the pool."""

    tokens: Tokens
    saved: Saved


class PrefixPool:
    """Bounded by bytes; whatever was not used for longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # least recently used first
        self._next_key = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: Tokens, saved: Saved) -> None:
        """Takes the place of whatever it begins with. Something larger than the whole pool is not kept."""
        if saved.nbytes > self._max_bytes:
            return
        for key, old in list(self._kept.items()):
            if tokens.startswith(old.tokens):
                self._drop(key)
        self._kept[self._next_key] = Kept(tokens, saved)
        self._next_key += 1
        self.nbytes += saved.nbytes
        while self.nbytes > self._max_bytes or len(self._kept) > MAX_ENTRIES:
            self._drop(next(iter(self._kept)))

    def find(self, tokens: Tokens) -> tuple[Kept, int] | None:
        """What has the longest beginning in common with these tokens, and how long that is."""
        best_key, best = -1, 0
        for key, kept in self._kept.items():
            shared = common_prefix(kept.tokens, tokens)
            if shared > best:
                best_key, best = key, shared
        return self._used(best_key, best) if best else None

    def find_exactly(self, tokens: Tokens) -> tuple[Kept, int] | None:
        """What holds these tokens and no more."""
        for key, kept in self._kept.items():
            if kept.tokens == tokens:
                return self._used(key, len(tokens) // 8)
        return None

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0

    def _used(self, key: int, num_tokens: int) -> tuple[Kept, int]:
        self._kept.move_to_end(key)
        return self._kept[key], num_tokens

    def _drop(self, key: int) -> None:
        self.nbytes -= self._kept.pop(key).saved.nbytes


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    return Tokens(array("q", token_ids).tobytes())


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens at the beginning are the same."""
    if a[:8] != b[:8]:
        return 0  # nearly always
    low, high = 0, min(len(a), len(b)) // 8
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * 8 : middle * 8] == b[low * 8 : middle * 8]:
            low = middle
        else:
            high = middle - 1
    return low
