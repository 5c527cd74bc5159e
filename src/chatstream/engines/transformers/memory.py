"""How much memory there is for keys and values, and how many sequences that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatstream.engines.loading.memory import free_host_bytes, in_words
from chatstream.engines.loading.settings import MIN_CONTEXT_LEN
from chatstream.errors import ConfigError

SHARE_FOR_SLOTS = 0.7
SHARE_FOR_POOL = 0.15
"""Of what is free once the model is loaded. The rest is for the forward pass itself and for everybody else."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """What was decided when the model was loaded. The memory itself is taken as it is needed."""

    max_slots: int
    """Sequences of full length; at least one."""
    prefix_cache_bytes: int
    limits: str
    """Where `max_slots` comes from, in words."""


@dataclass(frozen=True, slots=True)
class SequenceBytes:
    """What a sequence takes while it runs."""

    per_token: int
    fixed: int = 0
    """However long it is: the state of models that have one."""

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
    """`free_bytes`: where the slots are. `host_free_bytes`: where the pool is, if that is another memory.

    `prefix_cache_bytes`: None for the default size. Raises `ConfigError` when it or one sequence does not fit.
    """
    is_asked_for = prefix_cache_bytes is not None
    free_for_pool = free_bytes if host_free_bytes is None else host_free_bytes
    if prefix_cache_bytes is None:
        prefix_cache_bytes = int(free_for_pool * SHARE_FOR_POOL)
    if prefix_cache_bytes > free_for_pool:
        raise ConfigError(
            f"prefix_cache_bytes is {in_words(prefix_cache_bytes)}, and {in_words(free_for_pool)} of memory are free",
            param="prefix_cache_bytes",
        )
    for_slots = int(free_bytes * SHARE_FOR_SLOTS)
    if host_free_bytes is None:
        for_slots = max(0, min(for_slots, int(free_bytes * (SHARE_FOR_SLOTS + SHARE_FOR_POOL)) - prefix_cache_bytes))
    slot_bytes = max(1, sequence.of(context_len))
    max_slots = for_slots // slot_bytes
    if not max_slots:
        fitting = (for_slots - sequence.fixed) // max(1, sequence.per_token)
        advice = f"context_len must be at most {fitting}" if fitting >= MIN_CONTEXT_LEN else "more has to be free"
        raise ConfigError(
            f"{advice}: one sequence of {context_len} tokens takes {in_words(slot_bytes)} of memory for keys and "
            f"values, and there are {in_words(for_slots)}"
            + (f", beside the {in_words(prefix_cache_bytes)} of prefix_cache_bytes" if is_asked_for else ""),
            param="context_len",
        )
    limits = (
        f"{max_slots} sequence{'s' * (max_slots > 1)} of {context_len} tokens fit {in_words(for_slots)} of memory for "
        f"keys and values, at {in_words(slot_bytes)} each; a smaller context_len lets more run"
    )
    return KVBudget(max_slots, prefix_cache_bytes, limits)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()
