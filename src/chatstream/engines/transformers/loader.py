"""A checkpoint, by name or directory, or a model at hand, to a `LoadedModel`. Whatever is wrong is one clear line."""

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
import torch
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

from chatstream.engines.model import LoadedModel
from chatstream.engines.transformers.codec import HuggingFaceCodec
from chatstream.engines.transformers.forward import choose_forward, embedding_size, first_line
from chatstream.engines.transformers.prepack import prepack, restore_read, why_not
from chatstream.engines.transformers.progress import OnProgress, Progress
from chatstream.engines.transformers.runner import TransformersRunner
from chatstream.engines.transformers.settings import DEFAULT_MAX_CONTEXT_LEN, LoadSettings
from chatstream.engines.transformers.speed_key import speed_key
from chatstream.engines.transformers.threads import set_num_threads
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.types import SamplingParams

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 5.0
"""For the first word from the model hub. What is in the cache is served without it."""

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: LoadSettings,
    on_progress: OnProgress | None = None,
) -> LoadedModel:
    """Everything the step loop needs. Takes as long as reading the weights does; call it in the engine's thread.

    `on_progress` is told how far it is, in that thread. Raises `ConfigError` saying in one line what is wrong with the
    checkpoint, the tokenizer or the settings.
    """
    num_threads = set_num_threads(settings.num_threads)
    device = _device(settings.device) if settings.device is not None else None
    name = source if isinstance(source, str) else type(source).__name__
    progress = Progress(name, on_progress)
    if isinstance(source, str):
        # The tokenizer first: what is wrong with it is known before minutes of reading weights.
        where = {"local_files_only": _must_be_local(source), "trust_remote_code": settings.trust_remote_code}
        config = _config(source, where)
        tokenizer = tokenizer or _tokenizer(source, where)
        model = _model(source, config, device, settings.dtype, where, progress)
    else:
        model = source
        _refuse_encoder_decoder(model.config, name)
        tokenizer = tokenizer or _tokenizer(name, {"trust_remote_code": settings.trust_remote_code})
    _refuse_wrong_tokenizer(tokenizer, model)
    if device is not None:
        with _one_line(f"cannot move {name} to {device}"):
            model = _placed(model, device)
    model.eval()
    context_len = _context_len(model, settings.context_len)
    with torch.inference_mode():
        _arrange_weights(model, settings.prepack, progress, is_ours=isinstance(source, str))
        forward = choose_forward(model, context_len)
        restore_read(model)
    logger.info(
        "%s: %s on %s, context of %d tokens, %d threads", name, model.dtype, model.device, context_len, num_threads
    )
    codec = HuggingFaceCodec(tokenizer, model.generation_config)
    return LoadedModel(
        runner=TransformersRunner(model, forward, context_len),
        codec=codec,
        default_sampling=default_sampling(model),
        chat_stops=codec.chat_stops,
        speed_key=speed_key(model),
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


def _must_be_local(name: str) -> bool:
    """Whether to look for this model on this machine only. Raises `ConfigError` where that is in vain."""
    if Path(name).is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"cannot load {name}: there is no such directory")
    # Asked once, and not again for each file of the checkpoint with growing pauses in between, as the library would.
    with _one_line(f"cannot load {name}"):
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
    with _one_line(f"cannot load {name}", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, **where)
    _refuse_encoder_decoder(config, name)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise ConfigError(f"cannot load {name}: {config.model_type} is not a causal language model")
    return config


def _tokenizer(name: str, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    with _one_line(f"cannot load the tokenizer of {name}", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **where)
    return tokenizer


def _model(
    name: str,
    config: PreTrainedConfig,
    device: torch.device | None,
    dtype: str,
    where: dict[str, Any],
    progress: Progress,
) -> PreTrainedModel:
    # The attention is the library's default: "sdpa", or "eager" for the models that have no other.
    with _one_line(f"cannot load {name}", name), progress.of_libraries() as download_bar:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if dtype == "auto" else _DTYPES[dtype],
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            tqdm_class=download_bar,
            **where,
        )
    model: PreTrainedModel = loaded[0]
    _refuse_other_weights(name, loaded[1])
    if device is not None and device.type == "cpu" and model.dtype == torch.float16:
        if dtype == "float16":
            logger.warning("few CPUs compute in float16; bfloat16 and float32 are faster on the others")
        else:
            # Not bfloat16, which is as small, but drops 3 of the 10 bits of precision the weights were stored with.
            model = model.float()
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


def _arrange_weights(model: PreTrainedModel, wanted: str, progress: Progress, *, is_ours: bool) -> None:
    """Bring the weights into memory, in the order in which they are fastest to compute with."""
    is_on_cpu = model.device.type == "cpu"
    is_packed = False
    if wanted == "on" or (wanted == "auto" and is_ours and is_on_cpu):
        reason = why_not(model, must_gain=wanted == "auto")
        is_packed = reason is None
        if reason is not None and wanted == "on":
            raise ConfigError(f"the weights cannot be prepacked: {reason}", param="prepack")
        if reason is not None:
            logger.info("the weights are not prepacked: %s", reason)
    what = "packing weights" if is_packed else "copying weights"
    done = progress.bytes_of(what, sum(parameter.nbytes for parameter in model.parameters()))
    if is_packed:
        prepack(model, done)
    if is_ours and is_on_cpu and not getattr(model, "is_quantized", False):
        # What was read may still lie in the checkpoint's file, mapped into memory: whoever writes a new checkpoint in
        # its place would change the model while it runs, or end the process (SIGBUS).
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
            done(tensor.nbytes)


def _refuse_wrong_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
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
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is broken: {first_line(error)}") from error
        except Exception as error:
            logger.debug("the chat template refuses a conversation of one message", exc_info=error)


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
def _one_line(what: str, name: str = "") -> Iterator[None]:
    """The many ways in which a checkpoint can be broken raise as many types; to the operator they are one."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {_damaged_file(Path(name)) or _reason(error)}") from error


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


def _damaged_file(directory: Path) -> str | None:
    """Which of many files it is, and what is wrong with it: the libraries only say the latter."""
    for path in sorted(directory.glob("*.json")) + sorted(directory.glob("*.safetensors")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            else:
                safetensors.safe_open(path, framework="pt")
        except Exception as error:
            return f"{path.name} cannot be read: {first_line(error)}"
    return None
