"""Read a checkpoint, by Hugging Face name or directory, into a model and its tokenizer. Each error is one line.

Missing, mismatched or damaged files are refused: where possible before the weights are read, which can take minutes.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import jinja2
import safetensors
import transformers
from huggingface_hub import hf_hub_url
from transformers import (
    CONFIG_NAME,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.text.codec import Codec
from chatstream.engines.transformers.forward import embedding_size, first_line
from chatstream.engines.transformers.progress import Progress
from chatstream.errors import ConfigError
from chatstream.types import Message

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
"""Timeout for the hub's first response. After it, a cached checkpoint is served without the hub."""


def read_checkpoint(
    name: str, tokenizer: PreTrainedTokenizerBase | None, settings: LoadSettings, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, on the CPU, and its tokenizer: `tokenizer` or the checkpoint's. Raises `ConfigError`."""
    where = {"local_files_only": _is_local_only(name), "trust_remote_code": settings.trust_remote_code}
    config = _config(name, where)
    if tokenizer is None:
        with as_config_error(f"cannot load the tokenizer of {name}", name):
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
    assert tokenizer is not None
    return _model(name, config, settings.dtype, where, progress), tokenizer


def refuse_wrong_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, codec: Codec, model: PreTrainedModel) -> None:
    """Raise `ConfigError` if the tokenizer belongs to another model, or its chat template is broken or unusable."""
    num_known = embedding_size(model)
    if tokenizer.vocab_size > num_known:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {num_known}: they do not belong together"
        )
    # Some checkpoints add a few tokens that they never use, so this is a warning.
    if len(tokenizer) > num_known:
        logger.warning(
            "the tokenizer adds %d tokens outside the model's vocabulary; a prompt with one of them is refused",
            len(tokenizer) - num_known,
        )
    try:
        token_ids = codec.encode_chat((Message("user", "Hello"),))
    except Exception as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise ConfigError(f"the chat template is broken: {first_line(error.__cause__)}") from error
        logger.debug("the chat template refuses a conversation of one message", exc_info=error)
        return
    # A request with an unknown token is refused, because on a GPU it would end the process. The chat template puts
    # this token into every conversation.
    if unknown := [token_id for token_id in token_ids if token_id >= num_known]:
        raise ConfigError(
            f"cannot serve {name}: its chat template puts {codec.token_text(unknown[0])!r}, token {unknown[0]}, into "
            f"every conversation, and the model has {num_known} tokens"
        )


def refuse_encoder_decoder(config: PreTrainedConfig, name: str) -> None:
    if config.is_encoder_decoder:
        raise ConfigError(f"cannot load {name}: {config.model_type} is an encoder-decoder, not a causal language model")


@contextmanager
def as_config_error(failure: str, name: str | None = None) -> Iterator[None]:
    """Raise any error of the libraries, which have many types, as a `ConfigError` of one line: `failure: reason`.

    `name`: the directory to check for damaged files.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{failure}: {_damaged_file(name) or _reason(error)}") from error


def _is_local_only(name: str) -> bool:
    """Whether the model can only come from this machine. Raises `ConfigError` if it cannot come from there either."""
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"cannot load {name}: there is no such directory")
    # One request. The library would retry for each file of the checkpoint, with growing pauses.
    with as_config_error(f"cannot load {name}"):
        url = hf_hub_url(name, CONFIG_NAME)
    try:
        huggingface_hub.get_session().head(url, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        hub = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, CONFIG_NAME), str):
            raise ConfigError(
                f"cannot load {name}: there is no such directory, it is not in the cache, and {hub} cannot be reached "
                f"({first_line(error)})"
            ) from error
        logger.warning("%s cannot be reached; %s is loaded from the cache", hub, name)
        return True
    return False


def _config(name: str, where: dict[str, Any]) -> PreTrainedConfig:
    with as_config_error(f"cannot load {name}", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    refuse_encoder_decoder(config, name)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise ConfigError(f"cannot load {name}: {config.model_type} is not a causal language model")
    return config


def _model(
    name: str, config: PreTrainedConfig, dtype: str, where: dict[str, Any], progress: Progress
) -> PreTrainedModel:
    # The attention is the library's default: "sdpa", or "eager" for models without it.
    with as_config_error(f"cannot load {name}", name), progress.capture_bars() as download_bar:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # refused below, with the name of the weight
            output_loading_info=True,
            tqdm_class=download_bar,
            **where,
        )
    model: PreTrainedModel = loaded[0]
    _refuse_wrong_weights(name, loaded[1])
    return model


def _refuse_wrong_weights(name: str, info: dict[str, Any]) -> None:
    """Raise `ConfigError` for missing or mismatched weights, which the library fills with random numbers."""
    if mismatched := sorted(info["mismatched_keys"]):
        weight, found, expected = mismatched[0]
        raise ConfigError(
            f"cannot load {name}: {len(mismatched)} weights differ in size from config.json, such as {weight}: "
            f"{tuple(found)} instead of {tuple(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"cannot load {name}: {len(missing)} weights are missing, such as {missing[0]}")
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights of the checkpoint are not used, such as %s", name, len(unused), unused[0])


def _reason(error: Exception) -> str:
    text = first_line(error)
    if "does not recognize this architecture" in str(error):
        return f"transformers {transformers.__version__} does not support this model type; a newer one may. {text}"
    if "instantiate the backend tokenizer" in text:
        return "there is no tokenizer.json, and no other file that transformers can convert to one"
    if isinstance(error, pickle.UnpicklingError):
        return "the file of the weights is damaged, or contains other objects than weights"
    if isinstance(error, KeyError):
        return f"{text} is missing from its files, or transformers does not support it"
    # "Validation error for field 'hidden_size':" has its reason on the next line.
    return " ".join(str(error).split())[:300] if text.endswith(":") else text


def _damaged_file(name: str | None) -> str | None:
    """Name the first damaged file of a directory and the reason: the libraries name only the reason."""
    if name is None:
        return None
    directory = Path(name)
    for path in sorted(directory.glob("*.json")) + sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:  # safetensors reports a file without read permission as missing
                if path.suffix == ".json":
                    json.load(file)
                else:
                    safetensors.safe_open(path, framework="pt")
        except Exception as error:
            return f"{path.name} cannot be read: {first_line(error)}"
    return None
