"""Memory for keys and values, and the number of sequences that fit in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatstream.engines.loading.memory import free_host_bytes, in_words
from chatstream.engines.loading.settings import MIN_CONTEXT_LEN
from chatstream.errors import ConfigError

SHARE_FOR_SLOTS = 0.7
SHARE_FOR_PREFIX_CACHE = 0.15
"""Shares of the memory that is free once the model is loaded. The rest is for the forward pass and other processes."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Limits set when the model is loaded. The memory itself is allocated with use."""

    max_slots: int
    """Sequences of full length that fit; at least one."""
    prefix_cache_bytes: int
    limits: str
    """How `max_slots` was computed, for the operator."""


@dataclass(frozen=True, slots=True)
class SequenceBytes:
    """Memory of a running sequence."""

    per_token: int
    fixed: int = 0
    """Independent of its length: the recurrent state of models that have one."""

    def of(self, num_tokens: int) -> int:
        return self.fixed + self.per_token * num_tokens


def kv_budget(
    free_bytes: int,
    sequence: SequenceBytes,
    context_len: int,
    *,
    host_free_bytes: int | None = None,
    prefix_cache_bytes: int | None = None,
) -> KVBudget:
    """Divide free memory into slots and the prefix cache.

    `free_bytes`: on the model's device. `host_free_bytes`: on the host, for the prefix cache; None if that is the same
    memory. `prefix_cache_bytes`: None for the default size. Raises `ConfigError` if the prefix cache or one sequence
    of full length does not fit.
    """
    is_explicit = prefix_cache_bytes is not None
    free_for_prefix_cache = free_bytes if host_free_bytes is None else host_free_bytes
    if prefix_cache_bytes is None:
        prefix_cache_bytes = int(free_for_prefix_cache * SHARE_FOR_PREFIX_CACHE)
    if prefix_cache_bytes > free_for_prefix_cache:
        raise ConfigError(
            f"prefix_cache_bytes is {in_words(prefix_cache_bytes)}, but {in_words(free_for_prefix_cache)} of memory is "
            "free",
            param="prefix_cache_bytes",
        )
    for_slots = int(free_bytes * SHARE_FOR_SLOTS)
    if host_free_bytes is None:
        shared = int(free_bytes * (SHARE_FOR_SLOTS + SHARE_FOR_PREFIX_CACHE))
        for_slots = max(0, min(for_slots, shared - prefix_cache_bytes))
    slot_bytes = max(1, sequence.of(context_len))
    max_slots = for_slots // slot_bytes
    if not max_slots:
        fitting = (for_slots - sequence.fixed) // max(1, sequence.per_token)
        advice = f"context_len must be at most {fitting}" if fitting >= MIN_CONTEXT_LEN else "free more memory"
        raise ConfigError(
            f"{advice}: one sequence of {context_len} tokens takes {in_words(slot_bytes)} of memory for keys and "
            f"values, and {in_words(for_slots)} is available"
            + (f", besides the {in_words(prefix_cache_bytes)} of prefix_cache_bytes" if is_explicit else ""),
            param="context_len",
        )
    limits = (
        f"{max_slots} sequence{'s' * (max_slots > 1)} of {context_len} tokens fit {in_words(for_slots)} of memory for "
        f"keys and values, at {in_words(slot_bytes)} each; lower context_len to run more"
    )
    return KVBudget(max_slots, prefix_cache_bytes, limits)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; for all but CUDA, of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()
