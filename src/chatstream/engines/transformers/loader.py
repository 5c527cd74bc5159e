"""A checkpoint, by name or directory, or a model at hand, to a `LoadedModel`: where and how it computes."""

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
    one_line,
    read_checkpoint,
    refuse_encoder_decoder,
    refuse_wrong_tokenizer,
)
from chatstream.engines.transformers.codec import TransformersCodec
from chatstream.engines.transformers.decode_graphs import capture_on
from chatstream.engines.transformers.forward import choose_forward
from chatstream.engines.transformers.memory import free_bytes, kv_budget
from chatstream.engines.transformers.prepack import prepack, restore_read, why_not
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
    """Everything the step loop needs. Takes as long as reading the weights does; call it in the engine's thread.

    `on_progress` is told how far it is, in that thread. Raises `ConfigError` saying in one line what is wrong with the
    checkpoint, the tokenizer or the settings.
    """
    num_threads = set_num_threads(settings.num_threads)
    stays = settings.device == "auto" and not isinstance(source, str)
    device = None if stays else _device(settings.device)
    name = source if isinstance(source, str) else type(source).__name__
    progress = Progress(name, on_progress)
    if isinstance(source, str):
        model, tokenizer = read_checkpoint(source, tokenizer, settings, progress)
        if settings.dtype == "auto" and device is not None and device.type == "cpu" and model.dtype == torch.float16:
            # Not bfloat16, which is as small, but drops 3 of the 10 bits of precision the weights were stored with.
            model = model.float()
    else:
        assert tokenizer is not None, "create_engine has seen to it"
        model = source
        refuse_encoder_decoder(model.config, name)
    generation_config: Any = model.generation_config
    codec = TransformersCodec(tokenizer, generation_config)
    refuse_wrong_tokenizer(name, tokenizer, codec, model)
    if device is not None:
        with one_line(f"cannot move {name} to {device}"):
            model = _placed(model, device)
    if model.device.type == "cpu" and model.dtype == torch.float16:
        logger.warning("few CPUs compute in float16; bfloat16 and float32 are faster on the others")
    model.eval()
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context_len = context_len_of(limit, settings.context_len)
    with torch.inference_mode():
        _arrange_weights(model, settings.prepack, progress, is_ours=isinstance(source, str))
        capture = capture_on(model.device, settings.cuda_graphs)
        choice = choose_forward(model, context_len, capture)
        restore_read(model)
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


def _device(wanted: str) -> torch.device:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, is_there in has.items() if is_there)
    elif not has[wanted]:
        raise ConfigError(f"device {wanted} is not available here", param="device")
    return torch.device(wanted)


def _placed(model: Any, device: torch.device) -> PreTrainedModel:
    # Quantised weights were placed while they were read and may not be moved.
    placed: PreTrainedModel = model if getattr(model, "is_quantized", False) else model.to(device)
    return placed
