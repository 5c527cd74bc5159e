"""Decoder-only causal language models of Hugging Face on torch, with many requests in one batch.

    from chatstream.engines.transformers import create_engine

    engine = create_engine("Qwen/Qwen3-0.6B")

Needs `pip install "openchatstream[transformers]"`; importing this package does not.

    loader.py         from a name, a directory or a loaded model to a `LoadedModel`
    checkpoint.py     reads a checkpoint; refuses an incomplete or damaged one
    progress.py       progress of a load, for the log and a callback
    prepack.py        linear weights in the layout that the CPU's kernels read
    threads.py        torch's CPU threads
    speed_key.py      what the speed of a loaded model depends on
    memory.py         memory for keys and values, and the number of sequences that fit
    codec.py          text to tokens and back
    runner.py         one step: logits of all inputs, then the sampled tokens
    forward.py        forward passes, batched over slots or one request at a time
    kv_cache.py       keys and values of all running generations, over slot_memory.py
    attention.py      attention of a row of tokens over those slots
    decode_graphs.py  decode steps captured as CUDA graphs; same_logits.py compares them with plain ones
    sampling.py       logits to tokens, all rows at once
    transfer.py       host values to device tensors
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.loading.settings import LoadSettings
from chatstream.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["create_engine"]


def create_engine(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load: LoadSettings | None = None,
    *,
    model_name: str | None = None,
    **step_engine_options: Any,
) -> StepEngine:
    """Create an engine over a model: a Hugging Face name, a directory, or a loaded model and its tokenizer.

    A loaded model keeps its dtype, and its device unless `load` sets one. `model_name` is the name that clients ask
    for; by default the Hugging Face name, or the last component of the directory. `step_engine_options` are those of
    `StepEngine`.

    Raises `ConfigError` for invalid settings and when torch, transformers or loky is not installed. Errors of the
    checkpoint itself are raised by `engine.start()`, which loads it.
    """
    missing = [name for name in ("torch", "transformers", "loky") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'this engine needs {" and ".join(missing)}: pip install "openchatstream[transformers]"; '
            'in a clone: pip install -e ".[transformers]"'
        )
    settings = load or LoadSettings()
    if not isinstance(model, str):
        if tokenizer is None:
            raise ConfigError("a loaded model needs its tokenizer: pass tokenizer too")
        if settings.dtype != "auto":
            raise ConfigError("a loaded model keeps its dtype: convert it before you pass it", param="dtype")
        # The model was most likely loaded in this thread, and idle OpenMP workers remain.
        from chatstream.engines.transformers.threads import end_idle_workers

        end_idle_workers()

    def load_model() -> LoadedModel:
        # Takes seconds, so it runs in `engine.start()`: a server opens its port first.
        from chatstream.engines.transformers import loader

        return loader.load(model, tokenizer, settings, engine.report_progress)

    engine = StepEngine(model_name or _name(model), load_model, **step_engine_options)
    return engine


def _name(model: str | PreTrainedModel) -> str:
    if not isinstance(model, str):
        return Path(model.config.name_or_path or "").name or type(model).__name__
    return Path(model).resolve().name if Path(model).is_dir() else model
