"""Asking a request's token mask, whose code is not ours, on behalf of any engine. Knows no array library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatstream.types import TokenMask


def allowed_tokens(mask: TokenMask | None, generated_ids: Sequence[int], vocab_size: int) -> Any:
    """A numpy array of bools, (at most vocab_size,): which tokens may come next. None: all.

    Raises `ValueError` when the mask fails, gives something else, or lets no token come.
    """
    if mask is None:
        return None
    try:
        allowed = mask(generated_ids)
    except BaseException as error:  # libraries written in Rust panic with one
        raise ValueError(f"token_mask failed: {error!r}") from error
    if allowed is None:
        return None
    if getattr(allowed, "dtype", None) != "bool" or allowed.ndim != 1 or len(allowed) > vocab_size:
        raise ValueError(f"token_mask must give a numpy array of at most {vocab_size} bools, or None")
    if not allowed.any():
        raise ValueError("token_mask allows no token")
    return allowed
