"""What the model remembers of sequences that are not in a slot: finished turns, and generations that are preempted.

The next turn of a conversation begins with all the tokens of the turn before, and many conversations begin with the
same system prompt. Whoever begins like something that is kept takes that part over and computes only the rest.
Matched by longest common prefix of tokens, not of text: a template may render an old turn differently, and what was
generated need not be what the tokenizer makes of its text. (RadixAttention, Zheng et al. 2023, has a tree for this;
a few hundred entries are searched faster than a forward pass begins.)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NewType

from chatstream.engines.batching.model import Saved

Tokens = NewType("Tokens", bytes)
"""Token ids, 8 bytes each: compared at the speed of memory."""
TOKEN_BYTES = 8
MAX_ENTRIES = 512
"""Each is looked at for every newcomer."""


class PrefixCache:
    """Bounded by bytes; whatever was not used for longest goes first."""

    def __init__(self, max_bytes: int, *, supports_partial_prefix: bool = True) -> None:
        """`supports_partial_prefix`: see `ModelRunner`."""
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._can_load_part = supports_partial_prefix
        self._kept: OrderedDict[Tokens, Saved] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: Tokens, save: Callable[[], Saved]) -> None:
        """Takes the place of whatever it begins with. `save` is not called where something kept begins with it.

        Something larger than the whole pool is not kept.
        """
        if not self.max_bytes or self._is_covered(tokens):
            return
        saved = save()
        if saved.nbytes > self.max_bytes:
            return
        if self._can_load_part:
            for shorter in [kept for kept in self._kept if tokens.startswith(kept)]:
                self._drop(shorter)
        self._kept[tokens] = saved
        self.nbytes += saved.nbytes
        while self.nbytes > self.max_bytes or len(self._kept) > MAX_ENTRIES:
            self._drop(next(iter(self._kept)))

    def find(self, tokens: Tokens) -> tuple[Saved, int] | None:
        """What has the longest beginning in common with these tokens, and how long that is.

        Where parts are of no use: what holds just these tokens. It leaves the pool, for nobody else will ask for it.
        """
        if not self._can_load_part:
            return (self._drop(tokens), len(tokens) // TOKEN_BYTES) if tokens in self._kept else None
        best, found = 0, None
        for kept in self._kept:
            if _token(kept, best) == _token(tokens, best):  # else it cannot have more in common
                shared = common_prefix(kept, tokens)
                if shared > best:
                    best, found = shared, kept
        if found is None:
            return None
        self._kept.move_to_end(found)
        return self._kept[found], best

    def discard(self, tokens: Tokens) -> None:
        """What holds just these tokens, if it is there, is of no use to anybody."""
        if tokens in self._kept:
            self._drop(tokens)

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0

    def _is_covered(self, tokens: Tokens) -> bool:
        if tokens in self._kept:
            longer: Tokens | None = tokens
        elif self._can_load_part:
            longer = next((kept for kept in self._kept if kept.startswith(tokens)), None)
        else:
            longer = None
        if longer is not None:
            self._kept.move_to_end(longer)
        return longer is not None

    def _drop(self, tokens: Tokens) -> Saved:
        saved = self._kept.pop(tokens)
        self.nbytes -= saved.nbytes
        return saved


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Raises `OverflowError` for ids that do not fit 64 bits."""
    return Tokens(array("q", token_ids).tobytes())


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many tokens at the beginning are the same."""
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
