"""Loading options of an exported model. Importing this module does not import OpenVINO."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_choice, check_int, check_number
from chatstream.engines.loading.settings import LoadSettings
from chatstream.errors import ConfigError

MODEL_FILE = "openvino_model.xml"

USED = ("device", "dtype", "context_len", "num_threads", "prefix_cache_bytes", "kv_memory_gib", "step_tokens")
"""Fields that this engine uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVINOSettings(LoadSettings):
    """Loading options of an exported model. Checked when created; an invalid value raises `ConfigError` that names it.

    `dtype` is the type of computation and of stored keys and values: float32, bfloat16, or OpenVINO's choice for this
    CPU and this export. `device` can only be the CPU. `prefix_cache_bytes` can only be 0, see `prefix_caching`.
    """

    kv_memory_gib: float | None = None
    """Memory for keys and values. It bounds the number of running sequences: one for each whole context that fits.
    Memory is taken as it is used. None: a quarter of the memory that the machine, or the container, has free beyond the
    weights."""
    step_tokens: int = 256
    """At most this many tokens are computed in a step: one for each generating sequence, the rest for prompts. This
    bounds how long a new prompt delays the other sequences. At most half this number of sequences can run at once."""

    def __post_init__(self) -> None:
        LoadSettings.__post_init__(self)
        for name in self.non_defaults():
            if name not in USED:
                raise ConfigError(f"the OpenVINO engine does not support {name}", param=name)
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"the OpenVINO engine computes on the CPU, not on {self.device}", param="device")
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        if self.prefix_cache_bytes:
            raise ConfigError(
                "the OpenVINO engine caches prefixes in the free part of kv_memory_gib: prefix_cache_bytes can only be "
                "0, which disables that cache",
                param="prefix_cache_bytes",
            )
        check_int("step_tokens", self.step_tokens, at_least=2)
        check_number("kv_memory_gib", self.kv_memory_gib, above=0, or_none=True)

    @property
    def prefix_caching(self) -> bool:
        """Whether keys and values of earlier sequences stay cached until their memory is needed. A prompt with a cached
        prefix, such as the next turn of a conversation, is computed from the first token that differs."""
        return self.prefix_cache_bytes is None
