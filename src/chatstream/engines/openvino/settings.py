"""How an exported model is loaded; known before OpenVINO is."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_choice, check_int, check_number

MODEL_FILE = "openvino_model.xml"
MIN_CONTEXT_LEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to load. Checked when built; raises `ConfigError`."""

    dtype: str = "auto"
    """auto | float32 | bfloat16: what is computed with, and what keys and values are kept in. auto: OpenVINO's choice
    for this CPU and this export."""
    context_len: int | None = None
    """Tokens of prompt and answer together; None: what the model allows, at most
    `checkpoint_defaults.DEFAULT_MAX_CONTEXT_LEN`."""
    kv_memory_gib: float | None = None
    """For keys and values. It bounds how many can generate at once: one for each whole context that fits. The memory is
    taken as it is used. None: a quarter of what the machine, or the container, has free beside the weights."""
    step_tokens: int = 256
    """At most this many tokens are computed in a step: one for each running answer, the rest for prompts. So it bounds
    how long a newcomer's prompt holds up the others. At most half as many can generate at once."""
    prefix_caching: bool = True
    """Keys and values of what was read and written stay in the cache until the room is needed; a prompt that begins
    alike, such as the next turn of a conversation, is read from where it differs."""
    num_threads: int | None = None
    """CPU threads; None: one a physical core that this process may use, less one from 4 cores up, for the event loop;
    never more than OMP_NUM_THREADS says."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_int("step_tokens", self.step_tokens, at_least=2)
        for name, least in (("context_len", MIN_CONTEXT_LEN), ("num_threads", 1)):
            check_int(name, getattr(self, name), at_least=least, or_none=True)
        check_number("kv_memory_gib", self.kv_memory_gib, above=0, or_none=True)
