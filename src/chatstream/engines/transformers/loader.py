"""Load a checkpoint, by name or directory, or a loaded model, into a `LoadedModel`: device, dtype, threads, memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.loading.checkpoint_defaults import context_len_of, sampling_of
from chatstream.engines.loading.memory import free_host_bytes
from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.transformers.checkpoint import (
    as_config_error,
    read_checkpoint,
    refuse_encoder_decoder,
    refuse_wrong_tokenizer,
)
from chatstream.engines.transformers.codec import TransformersCodec
from chatstream.engines.transformers.decode_graphs import capture_on
from chatstream.engines.transformers.forward import choose_forward
from chatstream.engines.transformers.memory import free_bytes, kv_budget
from chatstream.engines.transformers.prepack import packing_obstacle, prepack, unpack_read_layers
from chatstream.engines.transformers.progress import OnProgress, Progress
from chatstream.engines.transformers.runner import TransformersRunner
from chatstream.engines.transformers.speed_key import speed_key
from chatstream.engines.transformers.threads import set_num_threads
from chatstream.errors import ConfigError

logger = logging.getLogger(__name__)


def load(
    source: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: LoadSettings,
    on_progress: OnProgress | None = None,
) -> LoadedModel:
    """Load all that the step loop needs. Blocks while weights are read; call it in the engine thread.

    `on_progress` is called in that thread. Raises `ConfigError`, in one line, for errors of the checkpoint, the
    tokenizer or the settings.
    """
    num_threads = set_num_threads(settings.num_threads)
    keeps_device = settings.device == "auto" and not isinstance(source, str)
    device = None if keeps_device else _device(settings.device)
    name = source if isinstance(source, str) else type(source).__name__
    progress = Progress(name, on_progress)
    if isinstance(source, str):
        model, tokenizer = read_checkpoint(source, tokenizer, settings, progress)
        if settings.dtype == "auto" and device is not None and device.type == "cpu" and model.dtype == torch.float16:
            # Not bfloat16: it is as small, but drops 3 of the 10 bits of precision of the stored weights.
            model = model.float()
    else:
        assert tokenizer is not None, "create_engine requires it"
        model = source
        refuse_encoder_decoder(model.config, name)
    generation_config: Any = model.generation_config
    codec = TransformersCodec(tokenizer, generation_config)
    refuse_wrong_tokenizer(name, tokenizer, codec, model)
    if device is not None:
        with as_config_error(f"cannot move {name} to {device}"):
            model = _moved(model, device)
    if model.device.type == "cpu" and model.dtype == torch.float16:
        logger.warning("most CPUs compute float16 in software; bfloat16 and float32 are faster")
    model.eval()
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context_len = context_len_of(limit, settings.context_len)
    with torch.inference_mode():
        _arrange_weights(model, settings.prepack, progress, owns_model=isinstance(source, str))
        capture = capture_on(model.device, settings.cuda_graphs)
        choice = choose_forward(model, context_len, capture)
        unpack_read_layers(model)
    budget = kv_budget(
        free_bytes(model.device),
        choice.sequence_bytes,
        context_len,
        host_free_bytes=free_host_bytes() if model.device.type == "cuda" else None,
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )
    logger.info("%s: %s on %s, %d threads; %s", name, model.dtype, model.device, num_threads, budget.limits)
    choice.forward.bound_slots(budget.max_slots)
    return LoadedModel(
        runner=TransformersRunner(model, choice.forward, context_len, budget.max_slots),
        codec=codec,
        default_sampling=sampling_of(generation_config.to_diff_dict() if generation_config is not None else {}),
        chat_stops=codec.chat_stops,
        speed_key=speed_key(model, with_graphs=capture is not None),
        prefix_cache_bytes=budget.prefix_cache_bytes,
        limits=budget.limits,
        slow_because=choice.slow_because,
    )


def _arrange_weights(model: PreTrainedModel, setting: str, progress: Progress, *, owns_model: bool) -> None:
    """Copy the weights into memory, packed if `setting` (`LoadSettings.prepack`) asks for it.

    `owns_model`: the loader has read the model; False: the caller has passed it. Raises `ConfigError`.
    """
    is_on_cpu = model.device.type == "cpu"
    is_packed = False
    if setting == "on" or (setting == "auto" and owns_model and is_on_cpu):
        obstacle = packing_obstacle(model, must_gain=setting == "auto")
        is_packed = obstacle is None
        if obstacle is not None and setting == "on":
            raise ConfigError(f"the weights cannot be prepacked: {obstacle}", param="prepack")
        if obstacle is not None:
            logger.info("the weights are not prepacked: %s", obstacle)
    stage = "packing weights" if is_packed else "copying weights"
    add_bytes = progress.byte_counter(stage, sum(parameter.nbytes for parameter in model.parameters()))
    if is_packed:
        prepack(model, add_bytes)
    if owns_model and is_on_cpu and not getattr(model, "is_quantized", False):
        # The weights may still be mapped from the checkpoint's file. If that file is overwritten, the running model
        # would change or the process would end (SIGBUS).
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
            add_bytes(tensor.nbytes)


def _device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    elif not available[name]:
        raise ConfigError(f"device {name} is not available here", param="device")
    return torch.device(name)


def _moved(model: Any, device: torch.device) -> PreTrainedModel:
    # Quantised weights were read onto their device, and cannot be moved.
    moved: PreTrainedModel = model if getattr(model, "is_quantized", False) else model.to(device)
    return moved
