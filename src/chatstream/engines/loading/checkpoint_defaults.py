"""Defaults for a checkpoint: length of its context, sampling parameters, length of an answer. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_MAX_CONTEXT_LEN = 8192
"""Applies if the model allows more or states no limit, because keys and values take memory that is reserved for whole
contexts or grows with the longest conversation. The option `context_len` overrides it."""


def context_len_of(limit: int | None, wanted: int | None) -> int:
    """Length of prompt and answer together, in tokens. `limit`: of the model. `wanted`: from the settings.

    Raises `ConfigError`.
    """
    if wanted is None:
        return min(limit or DEFAULT_MAX_CONTEXT_LEN, DEFAULT_MAX_CONTEXT_LEN)
    if limit is not None and wanted > limit:
        raise ConfigError(f"context_len {wanted} is more than the model's {limit} tokens", param="context_len")
    return wanted


def sampling_of(generation_config: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters that the checkpoint's `generation_config.json` recommends."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if values.get("top_k") == 0:  # means "all" in transformers
        del values["top_k"]
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        logger.warning("ignored the sampling defaults of the checkpoint: %s", error)
        return SamplingParams()


def answer_len(context_len: int) -> int:
    """Default length of an answer, in tokens: at most 1024, and a quarter of the context, so that a chat fits."""
    return max(1, min(1024, context_len // 4))
