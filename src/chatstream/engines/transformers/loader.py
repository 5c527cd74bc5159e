"""A checkpoint, by name or directory, or a model at hand, to a `LoadedModel`. Whatever is wrong is one clear line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chatstream.engines.model import LoadedModel
from chatstream.engines.transformers.codec import HuggingFaceCodec
from chatstream.engines.transformers.forward import choose_forward, first_line
from chatstream.engines.transformers.runner import TransformersRunner
from chatstream.engines.transformers.settings import DEFAULT_MAX_CONTEXT_LEN, LoadSettings
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import SamplingParams

logger = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: LoadSettings
) -> LoadedModel:
    """Everything the step loop needs. Takes as long as reading the weights does; call it in the engine's thread.

    Raises `ConfigError` saying in one line what is wrong with the checkpoint, the tokenizer or the settings.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = _device(settings.device) if settings.device is not None else None
    name = source if isinstance(source, str) else type(source).__name__
    model = _model(source, device, settings) if isinstance(source, str) else source
    _refuse_encoder_decoder(model.config, name)
    if tokenizer is None:
        with _one_line(f"cannot load the tokenizer of {name}"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    if device is not None:
        with _one_line(f"cannot move {name} to {device}"):
            model = _placed(model, device)
    model.eval()
    context_len = _context_len(model, settings.context_len)
    codec = HuggingFaceCodec(tokenizer, model.generation_config)
    with torch.inference_mode():
        forward = choose_forward(model, context_len)
    logger.info("%s: %s on %s, context of %d tokens", name, model.dtype, model.device, context_len)
    return LoadedModel(
        runner=TransformersRunner(model, forward, context_len),
        codec=codec,
        default_sampling=default_sampling(model),
        chat_stops=codec.chat_stops,
    )


def default_sampling(model: PreTrainedModel) -> SamplingParams:
    """What the checkpoint's generation_config.json recommends, as far as it says anything."""
    config: Any = model.generation_config
    said: dict[str, Any] = config.to_diff_dict() if config is not None else {}
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    values = {name: said[name] for name in names if said.get(name) is not None}
    if values.get("top_k") == 0:  # the library's word for "all"
        del values["top_k"]
    try:
        return SamplingParams(**values)
    except InvalidRequest as error:
        logger.warning("the checkpoint's sampling defaults are not used: %s", error)
        return SamplingParams()


def _model(name: str, device: torch.device | None, settings: LoadSettings) -> PreTrainedModel:
    with _one_line(f"cannot load {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    _refuse_encoder_decoder(config, name)
    # The attention is the library's default: "sdpa", or "eager" for the models that have no other.
    with _one_line(f"cannot load {name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if settings.dtype == "auto" else _DTYPES[settings.dtype],
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    # The library fills what is missing with random numbers; such a model would serve noise.
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ConfigError(f"cannot load {name}: {len(missing)} weights are missing, such as {missing[0]}")
    on_cpu = device is not None and device.type == "cpu"
    if settings.dtype == "auto" and on_cpu and model.dtype == torch.float16:
        # CPUs compute float16 in software or not at all. bfloat16 would be as small, but drops 3 of the 10 bits of
        # precision the weights were stored with; float32 keeps them all.
        model = model.float()
    return model


def _refuse_encoder_decoder(config: PreTrainedConfig, name: str) -> None:
    if config.is_encoder_decoder:
        raise ConfigError(f"cannot load {name}: {config.model_type} is an encoder-decoder, not a causal language model")


def _device(wanted: str) -> torch.device:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, is_there in has.items() if is_there)
    elif not has[wanted]:
        raise ConfigError(f"device {wanted} is not available here")
    return torch.device(wanted)


def _placed(model: Any, device: torch.device) -> PreTrainedModel:
    # Quantised weights were placed while they were read and may not be moved.
    placed: PreTrainedModel = model if getattr(model, "is_quantized", False) else model.to(device)
    return placed


def _context_len(model: PreTrainedModel, wanted: int | None) -> int:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if wanted is None:
        return min(limit or DEFAULT_MAX_CONTEXT_LEN, DEFAULT_MAX_CONTEXT_LEN)
    if limit is not None and wanted > limit:
        raise ConfigError(f"context_len {wanted} is more than the model's {limit} tokens")
    return wanted


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """The many ways in which a checkpoint can be broken raise as many types; to the operator they are one."""
    try:
        yield
    except Exception as error:
        detail = first_line(error)
        if "does not recognize this architecture" in str(error):
            detail = f"transformers {transformers.__version__} does not know this model type; a newer one may. {detail}"
        elif "for this kind of AutoModel" in str(error):
            detail = "it is not a causal language model"
        raise ConfigError(f"{what}: {detail}") from error
