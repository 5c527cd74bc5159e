"""How a checkpoint is loaded; known before torch is."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_choice, check_int

MIN_CONTEXT_LEN = 16
"""Room for the few tokens with which a model is tried out when it is loaded."""

DTYPES = ("float32", "bfloat16", "float16")

PREPACK = ("auto", "on", "off")

CUDA_GRAPHS = ("auto", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to load. Checked when built; raises `ConfigError`."""

    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto: the checkpoint's own; on a CPU float32 in place of float16."""
    device: str | None = "auto"
    """auto | cpu | cuda | mps. auto: the best there is. None: wherever the model is."""
    context_len: int | None = None
    """Tokens of prompt and answer together; None: what the model allows, at most
    `checkpoint_defaults.DEFAULT_MAX_CONTEXT_LEN`."""
    prefix_cache_bytes: int | None = None
    """Host memory in which keys and values of finished turns and parked answers are kept, so that whoever begins alike
    need not compute them again. None: 15 % of what is free. 0: nothing is kept, and nobody shares anything."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    num_threads: int | None = None
    """CPU threads of torch, for the whole process. None: one a physical core that this process may use, less one from
    4 cores up, for the event loop; never more than OMP_NUM_THREADS says. More than there are free cores makes steps
    several times slower."""
    prepack: str = "auto"
    """Reorder the weights of linear layers for the CPU while loading (prepack.py). auto: where trying it out on this
    machine shows that it is faster, and never in a loaded model handed over, which may be used elsewhere too. on:
    always; a loaded model is converted in place. Costs a copy of the embedding where the head shares its weight."""
    cuda_graphs: str = "auto"
    """Capture steps in which everybody generates as CUDA graphs (decode_graphs.py). auto: on a GPU. off: nowhere."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"), or_none=True)
        check_choice("prepack", self.prepack, PREPACK)
        check_choice("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        for name, least in (("context_len", MIN_CONTEXT_LEN), ("num_threads", 1), ("prefix_cache_bytes", 0)):
            check_int(name, getattr(self, name), at_least=least, or_none=True)
