"""Under any schedule, the tokens of each request are those of `model.generate` alone.

Requests start, disconnect, are preempted and resume at random moments. Some share a system prompt, some are the next
turn of a conversation, some fill the context to its end. All is seeded, so a failure repeats.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.transformers import decode_graphs, kv_cache, slot_memory
from chatstream.engines.transformers.forward import SlotForward
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.engines.transformers.runner import TransformersRunner
from chatstream.types import GenerationRequest, Message, SamplingParams
from tests.engines.batching import lockstep
from tests.engines.batching.lockstep import Play, check_texts, play_alone, play_at_random
from tests.engines.transformers import checkpoints
from tests.engines.transformers.recording import generate_alone, greedy, request_of
from tests.engines.transformers.replay import RecordedPass

EOS_TOKEN_IDS = frozenset({1, 3})
FIRST_WORD, LAST_WORD = 4, 330
"""The ids between them are not special tokens."""


class IdCodec:
    """A `Codec` with token ids as text, so that a comparison of texts compares tokens."""

    eos_token_ids = EOS_TOKEN_IDS

    def encode_text(self, text: str) -> list[int]:
        return [int(token_id) for token_id in text.split()]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        raise NotImplementedError

    def open_decoder(self) -> IdCodec:
        return self

    def push(self, token_id: int) -> str:
        return self.token_text(token_id)

    def token_text(self, token_id: int) -> str:
        return f"{token_id} "


@dataclass(frozen=True)
class Setting:
    """The limits of the engine that plays a schedule."""

    max_active: int
    max_prompt_tokens_per_step: int
    max_padding_tokens: int = 512
    prefix_cache_bytes: int = 2**26

    @property
    def num_long(self) -> int:
        """Number of additional requests that fill all slots."""
        return 17 if self.max_active == 16 else 0


SETTINGS = {
    "16 slots in one run, no prefix cache": Setting(16, 64, prefix_cache_bytes=0),
    "16 slots, a run for each": Setting(16, 40, max_padding_tokens=0),
    "4 slots, small prefix cache": Setting(4, 20, max_padding_tokens=20, prefix_cache_bytes=45_000),
    "one prompt token a step": Setting(8, 1),
}


def conversations(alone: Callable[[GenerationRequest], list[int]], num_long: int = 0) -> list[GenerationRequest]:
    """Requests with different prompts, in random order except for the turns of a conversation. `num_long`: number of
    additional requests with long answers, which start first."""
    rng = random.Random(11)

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, LAST_WORD) for _ in range(count)]

    system = words(21)
    first_turns = [system + words(n) for n in (1, 4, 17)] + [words(n) for n in (1, 1, 2, 30)]
    requests = [request_of(prompt, greedy(rng.randint(8, 30)), f"first {n}") for n, prompt in enumerate(first_turns)]
    for turn in ("second", "third"):
        for n, request in enumerate(requests[-3:]):
            history = [*request.prompt.token_ids, *alone(request)]
            requests.append(request_of(history + words(3 + n), greedy(8 + n), f"{turn} {n}"))
    context_len = checkpoints.CONTEXT_LEN
    requests.insert(5, request_of(system + words(context_len - 40), greedy(None), "to the end"))
    requests.insert(9, request_of(words(context_len - 1), greedy(None), "one free token"))
    return [request_of(words(3 + n), greedy(60), f"long {n}") for n in range(num_long)] + requests


@pytest.fixture(scope="module")
def alone(reference: Callable[[str], PreTrainedModel]) -> Callable[[str, GenerationRequest], list[int]]:
    """The tokens of `generate`, without the end token."""

    @cache
    def answer(kind: str, request: GenerationRequest) -> list[int]:
        max_len = checkpoints.CONTEXT_LEN - len(request.prompt.token_ids)
        bounded = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens or max_len)
        tokens = generate_alone(reference(kind), replace(request, sampling=bounded))
        return tokens[:-1] if tokens[-1] in EOS_TOKEN_IDS else tokens

    return answer


@pytest.fixture(scope="module")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    # One thread: in such small passes two threads mostly wait for each other.
    settings = LoadSettings(device="cpu", num_threads=1)
    return cache(lambda kind: replace(load(str(checkpoint(kind)), None, settings), codec=IdCodec()))


def play(
    model: LoadedModel, requests: list[GenerationRequest], setting: Setting, monkeypatch: pytest.MonkeyPatch, seed: int
) -> Play:
    monkeypatch.setattr(kv_cache, "MAX_PADDING_TOKENS", setting.max_padding_tokens)
    monkeypatch.setattr(lockstep.Schedule, "MAX_ACTIVE", setting.max_active)
    monkeypatch.setattr(lockstep.Schedule, "START_WEIGHT", 8 if setting.num_long else 2)
    return asyncio.run(
        play_at_random(
            replace(model, prefix_cache_bytes=setting.prefix_cache_bytes),
            requests,
            seed,
            max_prompt_tokens_per_step=setting.max_prompt_tokens_per_step,
            itl_target_s=inf,
        )
    )


# Each architecture in two of the settings; llama and gemma3 in all.
CASES = [
    (kind, name)
    for n, kind in enumerate(checkpoints.BATCHED)
    for m, name in enumerate(SETTINGS)
    if kind in ("llama", "gemma3") or (n + m) % 4 < 2
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_greedy_tokens_are_those_of_generate(
    kind: str,
    setting: str,
    loaded: Callable[[str], LoadedModel],
    alone: Callable[[str, GenerationRequest], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = conversations(lambda request: alone(kind, request), SETTINGS[setting].num_long)
    played = play(loaded(kind), requests, SETTINGS[setting], monkeypatch, seed=2)
    check_texts(played, ["".join(f"{token_id} " for token_id in alone(kind, request)) for request in requests])
    if SETTINGS[setting].num_long:
        assert max(len(step.inputs) for step in played.schedule.steps) == 16
    assert played.schedule.num_preempted_in_answer > 5
    assert any(reader.is_cancelled for reader in played.readers)
    assert (played.reused_tokens > 0) == (SETTINGS[setting].prefix_cache_bytes > 0)


@pytest.mark.parametrize(
    ("kind", "max_active"),
    [(kind, (16, 4)[n % 2]) for n, kind in enumerate(checkpoints.BATCHED)] + [("llama", 4), ("gemma2", 16)],
)
def test_captured_and_replayed_steps_give_the_same_tokens(
    kind: str,
    max_active: int,
    reference: Callable[[str], PreTrainedModel],
    alone: Callable[[str, GenerationRequest], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: static shapes, operations without Python, memory that moves as it grows."""
    monkeypatch.setattr(decode_graphs, "CAPTURED_AT_STEP", 1)
    for module in (decode_graphs, slot_memory):
        monkeypatch.setattr(module, "CAPACITY_STEP_TOKENS", 32)
    forward = SlotForward(reference(kind), checkpoints.CONTEXT_LEN, capture=RecordedPass)
    model = LoadedModel(TransformersRunner(reference(kind), forward, checkpoints.CONTEXT_LEN), IdCodec())
    setting = Setting(max_active, 1000)  # whole prompts: most steps only decode
    requests = conversations(lambda request: alone(kind, request), setting.num_long)
    played = play(model, requests, setting, monkeypatch, seed=3)
    check_texts(played, ["".join(f"{token_id} " for token_id in alone(kind, request)) for request in requests])
    assert forward.graphs is not None
    assert not forward.graphs.has_failed
    assert forward.graphs.num_replays > 20
    assert played.reused_tokens > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_sampled_tokens_are_those_of_their_seed(
    setting: str, loaded: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("gemma2")
    requests = [
        replace(
            request,
            sampling=SamplingParams(
                max_new_tokens=20, seed=n, temperature=1.1, top_p=0.95, min_p=0.01, frequency_penalty=0.3
            ),
        )
        for n, request in enumerate(conversations(lambda request: [7, 8, 9]))
    ]
    expected = asyncio.run(play_alone(replace(model, prefix_cache_bytes=0), requests))
    check_texts(play(model, requests, SETTINGS[setting], monkeypatch, seed=4), expected)
