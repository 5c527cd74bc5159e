"""How much memory there is for keys and values, and how many sequences that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatstream.engines.memory import free_host_bytes

SHARE_FOR_SLOTS = 0.7
SHARE_FOR_POOL = 0.15
"""Of what is free once the model is loaded. The rest is for the forward pass itself and for everybody else."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """What was decided when the model was loaded. The memory itself is taken as it is needed."""

    max_slots: int
    """Sequences of full length."""
    pool_bytes: int
    limits: str
    """Where `max_slots` comes from, in words."""


def kv_budget(free_bytes: int, pool_free_bytes: int, bytes_per_token: int, context_len: int) -> KVBudget:
    """At least one slot: whoever has no room even for that learns it from the first request that does not fit."""
    slot_bytes = max(1, bytes_per_token * context_len)
    for_slots = int(free_bytes * SHARE_FOR_SLOTS)
    max_slots = max(1, for_slots // slot_bytes)
    limits = (
        f"{max_slots} sequences of {context_len} tokens fit {in_gib(for_slots)} of memory for keys and values, "
        f"at {in_gib(slot_bytes)} each; a smaller context_len lets more run"
    )
    return KVBudget(max_slots, int(pool_free_bytes * SHARE_FOR_POOL), limits)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def in_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
