"""How an exported model is loaded; known before OpenVINO is."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_choice, check_int, check_number
from chatstream.engines.loading.settings import LoadSettings
from chatstream.errors import ConfigError

MODEL_FILE = "openvino_model.xml"

USED = ("device", "dtype", "context_len", "num_threads", "prefix_cache_bytes", "kv_memory_gib", "step_tokens")
"""Fields with a meaning for this engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVINOSettings(LoadSettings):
    """How an exported model is loaded. Checked when built; a wrong value raises `ConfigError` that names it.

    `dtype` is what is computed with, and what keys and values are kept in: float32, bfloat16, or OpenVINO's choice for
    this CPU and this export. `device` can only be the CPU. `prefix_cache_bytes` can only be 0, see `prefix_caching`.
    """

    kv_memory_gib: float | None = None
    """For keys and values. It bounds how many can generate at once: one for each whole context that fits. The memory is
    taken as it is used. None: a quarter of what the machine, or the container, has free beside the weights."""
    step_tokens: int = 256
    """At most this many tokens are computed in a step: one for each running answer, the rest for prompts. So it bounds
    how long a newcomer's prompt holds up the others. At most half as many can generate at once."""

    def __post_init__(self) -> None:
        LoadSettings.__post_init__(self)
        for name in self.non_defaults():
            if name not in USED:
                raise ConfigError(f"the OpenVINO engine has no use for {name}", param=name)
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"the OpenVINO engine computes on the CPU, not on {self.device}", param="device")
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.prefix_cache_bytes:
            raise ConfigError(
                "the OpenVINO engine keeps earlier turns in what kv_memory_gib leaves: prefix_cache_bytes can only be "
                "0, which turns that off",
                param="prefix_cache_bytes",
            )
        check_int("step_tokens", self.step_tokens, at_least=2)
        check_number("kv_memory_gib", self.kv_memory_gib, above=0, or_none=True)

    @property
    def prefix_caching(self) -> bool:
        """Keys and values of what was read and written stay in the cache until the room is needed; a prompt that begins
        alike, such as the next turn of a conversation, is read from where it differs."""
        return self.prefix_cache_bytes is None
