"""The bundled demo model: a first answer without a download, a GPU or torch.

A Llama of two million parameters that answers simple questions about ChatStream, in English and Japanese, trained by
`scripts/demo_model/train.py`. The checkpoint has Hugging Face's format, so `chatstream serve` on that folder with the
transformers engine gives the same answers.

    llama.py      the network          kv_cache.py   keys and values of each slot, and attention
    sampling.py   logits to a token    codec.py      text to tokens and back
    runner.py     the step loop's `ModelRunner`, made of all these
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.loading.memory import free_host_bytes, in_words
from chatstream.types import SamplingParams

MODEL_NAME = "chatstream-demo"
PREFIX_CACHE_BYTES = 32 * 2**20
"""Room for 16,000 tokens."""
CHECKPOINT = Path(__file__).parent / "checkpoint"


def load(folder: Path = CHECKPOINT) -> LoadedModel:
    """Load the network, its caches and its tokenizer. Takes a fraction of a second."""
    # Imported here, because a parent process that only names the engine needs no numpy.
    import numpy as np

    from chatstream.engines.demo.codec import DemoCodec
    from chatstream.engines.demo.kv_cache import slots_that_fit
    from chatstream.engines.demo.llama import Llama
    from chatstream.engines.demo.runner import NumpyRunner

    config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    model = Llama.load(folder)
    free_bytes = free_host_bytes()
    max_slots = slots_that_fit(free_bytes // 2, model.shape)
    return LoadedModel(
        NumpyRunner(model, max_slots),
        DemoCodec(folder),
        default_sampling=SamplingParams(
            max_new_tokens=config["max_new_tokens"], temperature=config["temperature"], top_p=config["top_p"]
        ),
        speed_key=f"numpy {np.__version__}",
        prefix_cache_bytes=PREFIX_CACHE_BYTES,
        limits=f"{max_slots} sequence{'s' * (max_slots > 1)} fit half of the {in_words(free_bytes)} of free memory",
    )


def create_engine(**step_engine_options: Any) -> StepEngine:
    """The engine that `chatstream serve` starts without a model name. Takes the options of `StepEngine`."""
    return StepEngine(MODEL_NAME, load, **step_engine_options)
