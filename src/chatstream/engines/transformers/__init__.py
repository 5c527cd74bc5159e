"""Decoder-only causal language models of Hugging Face, generated for several clients at once on torch.

    from chatstream.engines.transformers import create_engine

    engine = create_engine("Qwen/Qwen3-0.6B")

Needs `pip install "openchatstream[transformers]"`; importing this package does not.
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
    """An engine over a model: its Hugging Face name, a directory, or a loaded model together with its tokenizer.

    A loaded model keeps its dtype, and its device unless one is given. `step_engine_options` are described at
    `StepEngine`. `model_name` is what clients ask for; by default the Hugging Face name, or the directory's last
    component.

    Raises `ConfigError` for settings that cannot be right and when torch or transformers is not installed. What is
    wrong with the checkpoint itself is said by `engine.start()`, which loads it.
    """
    missing = [name for name in ("torch", "transformers", "loky") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'this engine needs {" and ".join(missing)}: pip install "openchatstream[transformers]"')
    settings = load or LoadSettings()
    if not isinstance(model, str):
        if tokenizer is None:
            raise ConfigError("a loaded model needs its tokenizer too")
        if settings.dtype != "auto":
            raise ConfigError("a loaded model keeps its dtype: convert it before handing it over", param="dtype")
        # It was most likely loaded in this thread.
        from chatstream.engines.transformers.threads import end_idle_workers

        end_idle_workers()

    def load_model() -> LoadedModel:
        # Takes seconds, so not before the engine starts: a server opens its port first.
        from chatstream.engines.transformers import loader

        return loader.load(model, tokenizer, settings, engine.tell_progress)

    engine = StepEngine(model_name or _name(model), load_model, **step_engine_options)
    return engine


def _name(model: str | PreTrainedModel) -> str:
    if not isinstance(model, str):
        return Path(model.config.name_or_path or "").name or type(model).__name__
    return Path(model).resolve().name if Path(model).is_dir() else model
