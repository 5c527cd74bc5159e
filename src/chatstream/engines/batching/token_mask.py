"""Calls a request's token mask, which is foreign code, and validates the result. Knows no array library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatstream.types import TokenMask


def allowed_tokens(mask: TokenMask | None, generated_ids: Sequence[int], vocab_size: int) -> Any:
    """The tokens allowed next: a numpy array of bools, of shape (at most vocab_size,). None: all tokens.

    Raises `ValueError` if the mask raises, returns anything else, or allows no token.
    """
    if mask is None:
        return None
    try:
        allowed = mask(generated_ids)
    except BaseException as error:  # a panic of a Rust library is a BaseException
        raise ValueError(f"token_mask failed: {error!r}") from error
    if allowed is None:
        return None
    if getattr(allowed, "dtype", None) != "bool" or allowed.ndim != 1 or len(allowed) > vocab_size:
        raise ValueError(f"token_mask must return a numpy array of at most {vocab_size} bools, or None")
    if not allowed.any():
        raise ValueError("token_mask allows no token")
    return allowed
