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
    """Sequences of full length; at least one."""
    pool_bytes: int
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


def kv_budget(free_bytes: int, pool_bytes: int, sequence: SequenceBytes, context_len: int) -> KVBudget:
    """Raises `ConfigError` when there is not even memory for one sequence."""

def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()


def in_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
