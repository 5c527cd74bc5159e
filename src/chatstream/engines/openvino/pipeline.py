"""The continuous batching of OpenVINO GenAI as token ids: requests in, tokens out, one step at a time.

docs/openvino.md lists the observed behaviour of the library, the reason for much of this code. All calls come from one
thread. `step` holds Python's lock until it ends: no other thread of the process runs meanwhile.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from chatstream.types import SamplingParams

BLOCK_TOKENS = 32
"""Tokens in one block of the cache on a CPU."""
MIN_TEMPERATURE = 1e-5
"""Below this, sampling is practically greedy, and float32 would divide by zero."""
MAX_MIN_P = 1.0 - 1e-6
"""The library requires a value below 1."""


class Pipeline:
    """A model with its cache and its sampling."""

    def __init__(
        self,
        directory: Path,
        *,
        num_blocks: int,
        step_tokens: int,
        prefix_caching: bool,
        properties: Mapping[str, object],
    ) -> None:
        """Raises `RuntimeError` if the model cannot be loaded."""
        scheduler = openvino_genai.SchedulerConfig()
        # With a number of blocks the library reserves address space at once and takes memory as it is used. Without it,
        # the cache would be copied each time it grows, and have no limit.
        scheduler.num_kv_blocks = num_blocks
        scheduler.max_num_batched_tokens = step_tokens
        scheduler.max_num_seqs = step_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = prefix_caching
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", dict(properties))
        # Two requests with the same id would break the step for every request.
        self._request_ids = itertools.count()

    def add(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> Generation:
        """Add a request; it takes part from the next step on. The ids must be in the model's vocabulary: the library
        reads others as some other token."""
        config = generation_config(sampling, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        prompt = openvino.Tensor(np.array([prompt_ids], dtype=np.int64))
        return Generation(self._pipeline.add_request(next(self._request_ids), prompt, config))

    def step(self) -> None:
        """Compute one more token for each request with a complete prompt, and more prompt tokens for the others.

        Cancelled requests are not computed, and their memory is free afterwards. An exception concerns every request,
        and the pipeline can no longer be used.
        """
        self._pipeline.step()

    @property
    def has_requests(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for keys and values; known after the first step."""
        return int(self._pipeline.get_metrics().cache_size_in_bytes)


class Generation:
    """One request in a `Pipeline`."""

    def __init__(self, handle: openvino_genai.py_openvino_genai.GenerationHandle) -> None:
        self._handle = handle

    def take(self) -> list[int]:
        """The tokens generated since the last call, including the token that ends the answer."""
        tokens: list[int] = []
        while self._handle.can_read():
            for output in self._handle.read().values():
                tokens += output.generated_ids
        return tokens

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, CANCEL, or IGNORED if the cache had no room for the request."""
        return str(self._handle.get_status().name)

    def cancel(self) -> None:
        """Exclude the request from the next step, which frees its memory. No effect on an ended request."""
        self._handle.cancel()


def generation_config(
    sampling: SamplingParams, *, max_new_tokens: int, eos_token_ids: frozenset[int]
) -> openvino_genai.GenerationConfig:
    """Translate `sampling` to the library's options, without stop strings: the engine finds these in the text."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    # Without end tokens the library would read those of the model's files, and fail if there are none.
    config.ignore_eos = not eos_token_ids
    config.stop_token_ids = set(eos_token_ids) or {0}
    config.eos_token_id = min(config.stop_token_ids)
    config.repetition_penalty = sampling.repetition_penalty
    config.do_sample = sampling.temperature >= MIN_TEMPERATURE
    if config.do_sample:
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        config.min_p = min(sampling.min_p, MAX_MIN_P)
        if sampling.top_k is not None:
            config.top_k = sampling.top_k
        config.rng_seed = _seed(sampling.seed)
    return config


def _seed(seed: int | None) -> int:
    """Reduce a seed to 32 bits. The library would use only the lower 32 bits of a longer one."""
    return secrets.randbits(32) if seed is None else random.Random(seed % 2**64).getrandbits(32)
