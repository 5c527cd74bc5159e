"""From what a user names — nothing, a model's name, a model object — to an engine. Imports only the one it needs."""

from __future__ import annotations

from typing import Any

from chatstream.engines.base import Engine
from chatstream.errors import ConfigError


def engine_for(
    model: Any = None,
    tokenizer: Any = None,
    *,
    device: Any = None,
    dtype: str = "auto",
    context_len: int | None = None,
) -> Engine:
    """The bundled demo model when `model` is None; else the Transformers engine.

    `model` is a Hugging Face name, a local directory, or a loaded model (then with its `tokenizer`). Nothing is loaded
    from disk or network before `Engine.start`. Raises `ConfigError`.
    """
    if model is None:
        if tokenizer is not None:
            raise ConfigError("a tokenizer without a model; give both, or none for the demo model", param="tokenizer")
        from chatstream.engines import demo

        return demo.create_engine()
    from chatstream.engines import transformers

    return transformers.create_engine(model, tokenizer, device=device or "auto", dtype=dtype, context_len=context_len)
