"""How a model is loaded, as one value for every engine that loads one; known before torch is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypedDict

from chatstream.checks import check_choice, check_int
from chatstream.errors import ConfigError

MIN_CONTEXT_LEN = 16
"""Room for the few tokens with which a model is tried out when it is loaded."""

DTYPES = ("float32", "bfloat16", "float16")

PREPACK = ("auto", "on", "off")

CUDA_GRAPHS = ("auto", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How a model is loaded. Checked when built; a wrong value raises `ConfigError` that names it.

    A field with its default says nothing; an engine refuses any other value that it has no use for.
    """

    device: str = "auto"
    """auto | cpu | cuda | mps. auto: the best there is; a loaded model stays where it is."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto: the checkpoint's own, which keeps all bits of the weights; on a CPU
    float32 in place of float16, which few CPUs compute."""
    context_len: int | None = None
    """Tokens of prompt and answer together; None: what the model allows, at most
    `checkpoint_defaults.DEFAULT_MAX_CONTEXT_LEN`, because memory is reserved for whole contexts."""
    num_threads: int | None = None
    """CPU threads, for the whole process. None: one a physical core that this process may use, less one from 4 cores
    up, for the event loop; never more than OMP_NUM_THREADS says. More than there are free cores makes steps several
    times slower."""
    prepack: str = "auto"
    """Reorder the weights of linear layers for the CPU while loading (prepack.py). auto: where trying it out on this
    machine shows that it is faster, and never in a loaded model handed over, which may be used elsewhere too. on:
    always; a loaded model is converted in place. Costs a copy of the embedding where the head shares its weight."""
    cuda_graphs: str = "off"
    """Capture steps without prompt tokens as CUDA graphs (decode_graphs.py). off: nowhere, the default because the
    graphs have not been run on a GPU yet. auto: on a GPU; after a failure all steps run without graphs."""
    prefix_cache_bytes: int | None = None
    """Host memory for keys and values of finished turns and preempted answers: a request that begins with the same
    tokens does not compute them again. None: 15 % of what is free once the model is loaded, which leaves the rest to
    running requests. 0: nothing is kept, and requests share nothing."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. False: such code may do anything that this process may."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("prepack", self.prepack, PREPACK)
        check_choice("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        for name, least in (("context_len", MIN_CONTEXT_LEN), ("num_threads", 1), ("prefix_cache_bytes", 0)):
            check_int(name, getattr(self, name), at_least=least, or_none=True)
        if not isinstance(self.trust_remote_code, bool):
            # "false", from a file or the environment, would be true.
            raise ConfigError(
                f"trust_remote_code must be True or False, not {self.trust_remote_code!r}", param="trust_remote_code"
            )

    def non_defaults(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        named = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return {name: value for name, value, default in named if value != default}


class LoadKeywords(TypedDict, total=False):
    """The fields of `LoadSettings` as keyword arguments, for type checkers; None: not given."""

    device: str | None
    dtype: str | None
    context_len: int | None
    num_threads: int | None
    prepack: str | None
    cuda_graphs: str | None
    prefix_cache_bytes: int | None
    trust_remote_code: bool | None
