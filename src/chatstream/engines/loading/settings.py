"""The settings of loading a model, as one value for all engines. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypedDict

from chatstream.checks import check_choice, check_int
from chatstream.errors import ConfigError

MIN_CONTEXT_LEN = 16
"""Loading a model runs a trial of this length."""

DTYPES = ("float32", "bfloat16", "float16")

PREPACK = ("auto", "on", "off")

CUDA_GRAPHS = ("auto", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """The settings of loading a model. The constructor raises `ConfigError` with the name of an invalid field.

    An engine refuses every field that it does not support, unless the field has its default value.
    """

    device: str = "auto"
    """auto | cpu | cuda | mps. auto: the fastest device available; a loaded model stays on its device."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto: the dtype of the checkpoint, so that no bits are lost; on a CPU
    float32 replaces float16, which few CPUs can compute."""
    context_len: int | None = None
    """Length of prompt and answer together, in tokens. None: the maximum of the model, at most
    `checkpoint_defaults.DEFAULT_MAX_CONTEXT_LEN`, because memory is reserved for whole contexts."""
    num_threads: int | None = None
    """CPU threads of the whole process. None: one per physical core that this process may use, minus one for the event
    loop from 4 cores on, and at most OMP_NUM_THREADS. More threads than free cores make steps several times slower."""
    prepack: str = "auto"
    """Reorder the weights of linear layers for the CPU while loading (prepack.py). auto: if a trial on this machine
    shows that it is faster, and never for a loaded model, which the application may use elsewhere. on: always; a loaded
    model is converted in place. Takes a copy of the embedding if the head shares its weight."""
    cuda_graphs: str = "off"
    """Capture steps without prompt tokens as CUDA graphs (decode_graphs.py). off: never; the default, because the
    graphs have not been run on a GPU yet. auto: on a GPU; after a failure all steps run without graphs."""
    prefix_cache_bytes: int | None = None
    """Host memory of the prefix cache: keys and values of finished turns and preempted answers, reused by requests that
    begin with the same tokens. None: 15 % of the memory that is free after the model is loaded; the rest is for running
    requests. 0: no prefix cache, and running requests do not share prefixes."""
    trust_remote_code: bool = False
    """Run Python code from the checkpoint. Off by default, because that code has all rights of this process."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("prepack", self.prepack, PREPACK)
        check_choice("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        for name, least in (("context_len", MIN_CONTEXT_LEN), ("num_threads", 1), ("prefix_cache_bytes", 0)):
            check_int(name, getattr(self, name), at_least=least, or_none=True)
        if not isinstance(self.trust_remote_code, bool):
            # The string "false", from a file or the environment, is truthy.
            raise ConfigError(
                f"trust_remote_code must be True or False, not {self.trust_remote_code!r}", param="trust_remote_code"
            )

    def non_defaults(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        named = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return {name: value for name, value, default in named if value != default}


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadSettings` as keyword arguments, for type checkers. None: not given."""

    device: str | None
    dtype: str | None
    context_len: int | None
    num_threads: int | None
    prepack: str | None
    cuda_graphs: str | None
    prefix_cache_bytes: int | None
    trust_remote_code: bool | None
