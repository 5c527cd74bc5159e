"""What holds for a checkpoint where nobody says otherwise: its context, its sampling, the length of an answer. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_MAX_CONTEXT_LEN = 8192
"""Used where the model allows more, or names no limit: memory for keys and values is shared out in whole contexts, or
grows with the longest conversation. Ask for more by `context_len`."""


def context_len_of(limit: int | None, wanted: int | None) -> int:
    """Tokens of prompt and answer together. `limit` is the model's own. Raises `ConfigError`."""
    if wanted is None:
        return min(limit or DEFAULT_MAX_CONTEXT_LEN, DEFAULT_MAX_CONTEXT_LEN)
    if limit is not None and wanted > limit:
        raise ConfigError(f"context_len {wanted} is more than the model's {limit} tokens", param="context_len")
    return wanted


def sampling_of(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the checkpoint's `generation_config.json` recommends, as far as it says anything."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if values.get("top_k") == 0:  # the library's word for "all"
        del values["top_k"]
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        logger.warning("the checkpoint's sampling defaults are not used: %s", error)
        return SamplingParams()


def answer_len(context_len: int) -> int:
    """Tokens: long enough for an answer, short enough that a conversation still fits beside it."""
    return max(1, min(1024, context_len // 4))
