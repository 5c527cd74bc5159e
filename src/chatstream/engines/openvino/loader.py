"""Loads an exported directory into a running pipeline. Every error is one clear line."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino

from chatstream.engines.loading.checkpoint_defaults import context_len_of, sampling_of
from chatstream.engines.loading.cpu_threads import choose_num_threads
from chatstream.engines.loading.memory import free_host_bytes, in_words
from chatstream.engines.openvino.codec import ExportedCodec, read_json
from chatstream.engines.openvino.pipeline import BLOCK_TOKENS, Pipeline
from chatstream.engines.openvino.settings import MODEL_FILE, OpenVINOSettings
from chatstream.errors import ConfigError
from chatstream.types import SamplingParams

logger = logging.getLogger(__name__)

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model, as the engine needs it."""

    pipeline: Pipeline
    codec: ExportedCodec
    vocab_size: int
    context_len: int
    max_concurrency: int
    default_sampling: SamplingParams
    speed_key: str
    """See `Capacity.speed_key`."""


def load(directory: Path, settings: OpenVINOSettings) -> Loaded:
    """Read the model, reserve its cache and generate a first token. Call it in the engine thread.

    Raises `ConfigError` that states in one line what is wrong with the export or the settings.
    """
    config = read_json(directory / "config.json")
    generation = read_json(directory / "generation_config.json")
    codec = ExportedCodec(directory, _eos_token_ids(generation or config))
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    context_len = context_len_of(limit, settings.context_len)
    with _as_config_error(f"cannot load {directory}"):
        network = _Network(directory / MODEL_FILE)
    max_concurrency = _max_concurrency(directory, network, context_len, settings)
    properties = _properties(settings)
    with _as_config_error(f"cannot load {directory}"):
        pipeline = Pipeline(
            directory,
            num_blocks=max_concurrency * math.ceil(context_len / BLOCK_TOKENS),
            step_tokens=settings.step_tokens,
            prefix_caching=settings.prefix_caching,
            properties=properties,
        )
        _check_generates(pipeline)
    logger.info(
        "%s: context of %d tokens, %s reserved for keys and values, at most %d sequences at once",
        directory,
        context_len,
        in_words(pipeline.cache_bytes),
        max_concurrency,
    )
    digest = hashlib.sha256((directory / MODEL_FILE).read_bytes()).hexdigest()
    return Loaded(
        pipeline,
        codec,
        network.vocab_size,
        context_len,
        max_concurrency,
        sampling_of(generation),
        speed_key=f"{digest[:32]} {settings} {properties}, openvino {openvino.__version__}",
    )


class _Network:
    """The shapes of the exported network."""

    def __init__(self, file: Path) -> None:
        model = openvino.Core().read_model(file)
        states = [variable.info.data_shape for variable in model.get_variables()]
        # Keys or values of a layer: (batch, heads, tokens, features).
        if not states or any(shape.rank.get_length() != 4 for shape in states):
            raise ConfigError("the export has no key/value cache; export it with --task text-generation-with-past")
        self.kv_values_per_token = sum(shape[1].get_length() * shape[3].get_length() for shape in states)
        self.vocab_size = int(model.output("logits").partial_shape[2].get_length())


def _max_concurrency(directory: Path, network: _Network, context_len: int, settings: OpenVINOSettings) -> int:
    """The number of whole contexts that fit the memory. Then no request can run out of cache, which would end every
    request."""
    bytes_per_value = 4 if settings.dtype == "float32" else 2
    context_bytes = network.kv_values_per_token * bytes_per_value * _rounded_up(context_len)
    if settings.kv_memory_gib is not None:
        budget = int(settings.kv_memory_gib * _GIB)
    else:
        weights = sum(file.stat().st_size for file in directory.glob("openvino_model*.bin"))
        budget = max(free_host_bytes() - weights, 0) // 4
    if budget < context_bytes:
        raise ConfigError(
            f"keys and values of one context of {context_len} tokens take {in_words(context_bytes)}, but only "
            f"{in_words(budget)} are reserved for them: choose a smaller context_len or a larger kv_memory_gib",
            param="context_len",
        )
    return int(min(budget // context_bytes, settings.step_tokens // 2))


def _rounded_up(tokens: int) -> int:
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


def _properties(settings: OpenVINOSettings) -> dict[str, object]:
    num_threads = choose_num_threads(settings.num_threads)
    properties: dict[str, object] = {"INFERENCE_NUM_THREADS": num_threads, "sampler_num_threads": num_threads}
    if settings.dtype != "auto":
        precision = _PRECISIONS[settings.dtype]
        properties |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    return properties


def _check_generates(pipeline: Pipeline) -> None:
    """Generate one token: some errors of a model show only when it runs."""
    greedy = SamplingParams(temperature=0.0)
    generation = pipeline.add([0], greedy, max_new_tokens=1, eos_token_ids=frozenset())
    pipeline.step()
    if not generation.take():
        raise ConfigError("the model generates nothing")


def _eos_token_ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


@contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    """Raise errors of OpenVINO as `ConfigError`. Their last line states what is wrong; the lines before name source
    locations."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{what}: {lines[-1] if lines else type(error).__name__}") from error
