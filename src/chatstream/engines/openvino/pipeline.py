"""OpenVINO GenAI's continuous batching behind ints: requests in, tokens out, one step at a time.

docs/openvino.md tells what was found out about the library, and why some of this is as it is. Everything is called
from one thread. `step` holds Python's lock until it has ended: no other thread of the process runs meanwhile.
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
"""Of a block of the cache on a CPU."""
MIN_TEMPERATURE = 1e-5
"""Below this, sampling is greedy in all but name, and float32 would divide by zero."""
MAX_MIN_P = 1.0 - 1e-6
"""The library wants less than 1."""


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
        """Raises whatever is wrong with the model, as `RuntimeError`."""
        scheduler = openvino_genai.SchedulerConfig()
        # Said in blocks, the memory is reserved at once and taken as it is used. Without, the cache would be
        # copied each time it grows, and have no limit.
        scheduler.num_kv_blocks = num_blocks
        scheduler.max_num_batched_tokens = step_tokens
        scheduler.max_num_seqs = step_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = prefix_caching
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", dict(properties))
        # Two requests with one number would break the step for everybody.
        self._numbers = itertools.count()

    def add(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> Generation:
        """It takes part from the next step. The ids must be the model's own: others are read as some token or other."""
        config = generation_config(sampling, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        prompt = openvino.Tensor(np.array([prompt_ids], dtype=np.int64))
        return Generation(self._pipeline.add_request(next(self._numbers), prompt, config))

    def step(self) -> None:
        """One more token for everybody who has read its prompt, and more of the prompts of the others.

        Those who were cancelled are not computed any more, and their memory is free after it. What it raises is about
        everybody in it, and the pipeline is of no use any more.
        """
        self._pipeline.step()

    @property
    def has_requests(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    @property
    def cache_bytes(self) -> int:
        """Reserved for keys and values; known after the first step."""
        return int(self._pipeline.get_metrics().cache_size_in_bytes)


class Generation:
    """One request in a `Pipeline`."""

    def __init__(self, handle: openvino_genai.py_openvino_genai.GenerationHandle) -> None:
        self._handle = handle

    def take(self) -> list[int]:
        """The tokens it got since this was last asked, the one that ends the answer among them."""
        tokens: list[int] = []
        while self._handle.can_read():
            for output in self._handle.read().values():
                tokens += output.generated_ids
        return tokens

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, CANCEL, or IGNORED when it found no room in the cache."""
        return str(self._handle.get_status().name)

    def cancel(self) -> None:
        """It is out of the next step, and what it held is free after that. Harmless when it has ended."""
        self._handle.cancel()


def generation_config(
    sampling: SamplingParams, *, max_new_tokens: int, eos_token_ids: frozenset[int]
) -> openvino_genai.GenerationConfig:
    """`sampling` in the library's words. Stop strings are not among them: they are looked for in the text."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    # Without any the library would take what it finds beside the model, and choke on finding nothing.
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
    """The library's generator takes 32 bits, and would take only the lower ones of a longer seed."""
    return secrets.randbits(32) if seed is None else random.Random(seed % 2**64).getrandbits(32)
