"""A checkpoint, by its Hugging Face name or directory, to a model and its tokenizer. What is wrong is one clear line.

Nothing is served half: what is missing, of another size or damaged is refused, and before minutes of reading weights
where it can be known before.
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
"""For the first word from the model hub. What is in the cache is served without it."""


def read_checkpoint(
    name: str, tokenizer: PreTrainedTokenizerBase | None, settings: LoadSettings, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, with a tokenizer of its own unless one is given. Raises `ConfigError`."""
    where = {"local_files_only": _must_be_local(name), "trust_remote_code": settings.trust_remote_code}
    config = _config(name, where)
    if tokenizer is None:
        with one_line(f"cannot load the tokenizer of {name}", name):
            tokenizer = AutoTokenizer.from_pretrained(name, **where)
    assert tokenizer is not None
    return _model(name, config, settings.dtype, where, progress), tokenizer


def refuse_wrong_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, codec: Codec, model: PreTrainedModel) -> None:
    """Raises `ConfigError` for the tokenizer of another model, and for a chat template that is none or not for it."""
    num_known = embedding_size(model)
    if tokenizer.vocab_size > num_known:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {num_known}: they do not belong together"
        )
    # Some checkpoints add a token or two that they never use.
    if len(tokenizer) > num_known:
        logger.warning(
            "the tokenizer adds %d tokens that the model does not know; a prompt with one of them is refused",
            len(tokenizer) - num_known,
        )
    try:
        token_ids = codec.encode_chat((Message("user", "Hello"),))
    except Exception as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise ConfigError(f"the chat template is broken: {first_line(error.__cause__)}") from error
        logger.debug("the chat template refuses a conversation of one message", exc_info=error)
        return
    # On a GPU one of them would end the whole process, so each request with it is refused: here that is every one.
    if unknown := [token_id for token_id in token_ids if token_id >= num_known]:
        raise ConfigError(
            f"cannot serve {name}: its tokenizer makes {codec.token_text(unknown[0])!r} of every conversation, token "
            f"{unknown[0]}, and the model knows {num_known} tokens"
        )


def refuse_encoder_decoder(config: PreTrainedConfig, name: str) -> None:
    if config.is_encoder_decoder:
        raise ConfigError(f"cannot load {name}: {config.model_type} is an encoder-decoder, not a causal language model")


@contextmanager
def one_line(what: str, name: str | None = None) -> Iterator[None]:
    """The many ways in which a checkpoint can be broken raise as many types; to the operator they are one."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {_damaged_file(name) or _reason(error)}") from error


def _must_be_local(name: str) -> bool:
    """Whether to look for this model on this machine only. Raises `ConfigError` where that is in vain."""
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"cannot load {name}: there is no such directory")
    # Asked once, and not again for each file of the checkpoint with growing pauses in between, as the library would.
    with one_line(f"cannot load {name}"):
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
        logger.warning("%s cannot be reached; %s comes from the cache", hub, name)
        return True
    return False


def _config(name: str, where: dict[str, Any]) -> PreTrainedConfig:
    with one_line(f"cannot load {name}", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    refuse_encoder_decoder(config, name)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise ConfigError(f"cannot load {name}: {config.model_type} is not a causal language model")
    return config


def _model(
    name: str, config: PreTrainedConfig, dtype: str, where: dict[str, Any], progress: Progress
) -> PreTrainedModel:
    # The attention is the library's default: "sdpa", or "eager" for the models that have no other.
    with one_line(f"cannot load {name}", name), progress.of_libraries() as download_bar:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            tqdm_class=download_bar,
            **where,
        )
    model: PreTrainedModel = loaded[0]
    _refuse_other_weights(name, loaded[1])
    return model


def _refuse_other_weights(name: str, info: dict[str, Any]) -> None:
    """The library fills what is missing or of another size with random numbers; such a model would serve noise."""
    if mismatched := sorted(info["mismatched_keys"]):
        weight, found, expected = mismatched[0]
        raise ConfigError(
            f"cannot load {name}: {len(mismatched)} weights have other sizes than config.json says, such as {weight}, "
            f"{tuple(found)} in place of {tuple(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"cannot load {name}: {len(missing)} weights are missing, such as {missing[0]}")
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights of the checkpoint are not used, such as %s", name, len(unused), unused[0])


def _reason(error: Exception) -> str:
    text = first_line(error)
    if "does not recognize this architecture" in str(error):
        return f"transformers {transformers.__version__} does not know this model type; a newer one may. {text}"
    if "instantiate the backend tokenizer" in text:
        return "there is no tokenizer.json, nor another file that transformers could make it of"
    if isinstance(error, pickle.UnpicklingError):
        return "the weights' file is damaged, or holds more than weights"
    if isinstance(error, KeyError):
        return f"its files lack, or transformers does not know, {text}"
    # "Validation error for field 'hidden_size':", and on the next line what is wrong with it.
    return " ".join(str(error).split())[:300] if text.endswith(":") else text


def _damaged_file(name: str | None) -> str | None:
    """Which of a directory's files it is, and what is wrong with it: the libraries only say the latter."""
    if name is None:
        return None
    directory = Path(name)
    for path in sorted(directory.glob("*.json")) + sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:  # safetensors would say of one that may not be read that it is not there
                if path.suffix == ".json":
                    json.load(file)
                else:
                    safetensors.safe_open(path, framework="pt")
        except Exception as error:
            return f"{path.name} cannot be read: {first_line(error)}"
    return None
