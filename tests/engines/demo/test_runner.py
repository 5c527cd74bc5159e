"""Slots on numpy: every request gets the tokens that it would get alone, whatever other requests run."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from chatstream import ChatStream
from chatstream.engines import demo
from chatstream.engines.batching.model import SlotInput
from chatstream.engines.demo import CHECKPOINT
from chatstream.engines.demo.codec import DemoCodec
from chatstream.engines.demo.kv_cache import KVCache, slots_that_fit
from chatstream.engines.demo.llama import Llama
from chatstream.engines.demo.runner import NumpyRunner
from chatstream.engines.text.codec import SampledToken
from chatstream.errors import ConfigError
from chatstream.types import Message, SamplingParams

QUESTIONS = (
    "What is a slot?",
    "なぜ待つのですか？",
    "hi",
    "Tell me a story about a queue.",
    "what happens when I leave?",
    "トークンとは何ですか",
    "Explain ChatStream in detail, please.",
    "FastAPI example",
)
GREEDY = SamplingParams(temperature=0.0, seed=0)
NUM_TOKENS = 40

model = Llama.load(CHECKPOINT)
codec = DemoCodec(CHECKPOINT)


def encode(text: str) -> tuple[int, ...]:
    return tuple(codec.encode_chat([Message("user", text)]))


PROMPTS = [encode(question) for question in QUESTIONS]


@dataclass
class Job:
    """One request of a schedule: it joins at step `joins_at` and ends after `num_tokens` tokens, or with its
    answer."""

    slot: int
    prompt: tuple[int, ...]
    sampling: SamplingParams = GREEDY
    joins_at: int = 0
    num_tokens: int = NUM_TOKENS


def run(runner: NumpyRunner, jobs: Iterable[Job], chunk: int = 8) -> list[list[int]]:
    """The tokens of each job, in the order of the jobs. A step carries at most one chunk of one prompt, as in the step
    loop."""
    waiting, running = list(jobs), []
    tokens: dict[int, list[int]] = {id(job): [] for job in waiting}
    prefilled: dict[int, int] = {}
    order = list(waiting)
    for step in range(10_000):
        for job in list(waiting):
            if job.joins_at <= step and job.slot not in {other.slot for other in running}:
                open_slot(runner, job.slot, job.prompt, job.sampling)
                prefilled[id(job)] = 0
                waiting.remove(job)
                running.append(job)
        prefilling = next((job for job in running if prefilled[id(job)] < len(job.prompt)), None)
        inputs = [
            SlotInput(job.slot, len(job.prompt) + len(tokens[id(job)]) - 1, (tokens[id(job)][-1],), is_last=True)
            for job in reversed(running)
            if tokens[id(job)]
        ]
        if prefilling is not None:
            start = prefilled[id(prefilling)]
            part = prefilling.prompt[start : start + chunk]
            prefilled[id(prefilling)] += len(part)
            inputs.append(SlotInput(prefilling.slot, start, part, is_last=start + len(part) == len(prefilling.prompt)))
        chosen = runner.step(inputs)
        for job in list(running):
            if job.slot in chosen:
                token = token_of(chosen[job.slot])
                tokens[id(job)].append(token)
                if token in codec.eos_token_ids or len(tokens[id(job)]) == job.num_tokens:
                    runner.close_slot(job.slot)
                    running.remove(job)
        if not waiting and not running:
            return [tokens[id(job)] for job in order]
    raise AssertionError("the schedule never ended")


def open_slot(runner: NumpyRunner, slot: int, prompt: tuple[int, ...], sampling: SamplingParams = GREEDY) -> None:
    runner.open_slot(slot, runner.new_sampler(prompt, sampling))


def token_of(result: SampledToken | Exception) -> int:
    assert isinstance(result, SampledToken)
    return result.token_id


@pytest.fixture(scope="session")
def expected(reference: Any) -> list[list[int]]:
    """The tokens that transformers generates for each prompt alone: up to NUM_TOKENS, end token included."""
    import torch

    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        generated = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=NUM_TOKENS,
        )
        answers.append(generated[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("num_slots", [1, 4, 8])
def test_greedy_tokens_are_those_of_transformers_alone(expected: list[list[int]], num_slots: int) -> None:
    jobs = [Job(slot=n % num_slots, prompt=prompt, joins_at=3 * n) for n, prompt in enumerate(PROMPTS)]
    assert run(NumpyRunner(model), jobs) == expected


def test_a_request_that_ends_early_changes_no_other_answer(expected: list[list[int]]) -> None:
    jobs = [Job(slot=n, prompt=prompt, num_tokens=NUM_TOKENS if n % 2 else 3 + n) for n, prompt in enumerate(PROMPTS)]
    assert run(NumpyRunner(model), jobs) == [
        tokens[: job.num_tokens] for tokens, job in zip(expected, jobs, strict=True)
    ]


def test_a_slot_used_before_gives_what_a_fresh_one_gives(expected: list[list[int]]) -> None:
    runner = NumpyRunner(model)
    run(runner, [Job(slot=0, prompt=PROMPTS[6] * 8, num_tokens=60), Job(slot=1, prompt=PROMPTS[0])])
    again = [Job(slot=1, prompt=PROMPTS[2]), Job(slot=0, prompt=PROMPTS[3])]
    assert run(runner, again) == [expected[2], expected[3]]


def test_a_slot_closed_during_its_prompt_gives_what_a_fresh_one_gives(expected: list[list[int]]) -> None:
    runner = NumpyRunner(model)
    open_slot(runner, 0, PROMPTS[4])
    runner.step([SlotInput(0, 0, PROMPTS[4][:5], is_last=False)])
    runner.close_slot(0)
    assert run(runner, [Job(slot=0, prompt=PROMPTS[5])]) == [expected[5]]


def first_token(runner: NumpyRunner, slot: int) -> int:
    open_slot(runner, slot, PROMPTS[slot])
    return token_of(runner.step([SlotInput(slot, 0, PROMPTS[slot], is_last=True)])[slot])


def next_input(slot: int, tokens: list[int]) -> SlotInput:
    return SlotInput(slot, len(PROMPTS[slot]) + len(tokens) - 1, (tokens[-1],), is_last=True)


def test_a_slot_continues_from_a_full_or_partial_copy_of_another_one(expected: list[list[int]]) -> None:
    runner = NumpyRunner(model)
    tokens = [first_token(runner, 0)]
    saved = runner.save(0)
    for slot, num_tokens in ((1, len(PROMPTS[0])), (2, len(PROMPTS[0]) - 3)):
        open_slot(runner, slot, PROMPTS[0])
        if slot == 1:
            runner.load(slot, saved, num_tokens)
        else:
            runner.copy(0, slot, num_tokens)
    rest = SlotInput(2, len(PROMPTS[0]) - 3, PROMPTS[0][-3:], is_last=True)
    assert token_of(runner.step([rest])[2]) == tokens[0]
    for _ in range(10):
        results = runner.step([replace(next_input(0, tokens), slot=slot) for slot in range(3)])
        assert len({token_of(token) for token in results.values()}) == 1
        tokens.append(token_of(results[0]))
    assert tokens == expected[0][:11]
    shape = model.shape
    assert saved.nbytes == len(PROMPTS[0]) * 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def test_a_slot_left_out_of_some_steps_resumes_where_it_was(expected: list[list[int]]) -> None:
    runner = NumpyRunner(model)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for slot in tokens:
        tokens[slot].append(first_token(runner, slot))
    for step in range(30):
        slots = (0, 1) if step % 3 == 0 else (1,)
        for slot, token in runner.step([next_input(slot, tokens[slot]) for slot in slots]).items():
            tokens[slot].append(token_of(token))
    assert tokens == {0: expected[0][:11], 1: expected[1][:31]}


def test_the_same_seed_gives_the_same_tokens_whatever_other_requests_run() -> None:
    def sampled(seed: int) -> Job:
        warm = SamplingParams(temperature=2.0, top_p=0.99, top_k=500, repetition_penalty=1.2, seed=seed)
        return Job(slot=0, prompt=PROMPTS[0], sampling=warm)

    alone = [run(NumpyRunner(model), [sampled(seed)])[0] for seed in range(4)]
    others = [Job(slot=n, prompt=PROMPTS[n], sampling=SamplingParams(seed=n), num_tokens=20 + n) for n in range(1, 6)]
    busy = [run(NumpyRunner(model), [*others, replace(sampled(seed), joins_at=9)])[-1] for seed in range(4)]
    assert busy == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_the_whole_context_can_be_filled(reference: Any) -> None:
    import torch

    runner = NumpyRunner(model)
    prompt = (PROMPTS[6] * 100)[: runner.context_len - 3]
    (tokens,) = run(runner, [Job(slot=0, prompt=prompt, num_tokens=3)], chunk=256)
    with torch.no_grad():
        logits = reference(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, -3:]
    assert tokens == logits.argmax(-1).tolist()


class Poisoned(Llama):
    """A network whose hidden state is NaN wherever the input token is `poison`."""

    poison = PROMPTS[2][-3]

    def hidden(self, token_ids: Any, positions: Any, attend: Any) -> Any:
        hidden = super().hidden(token_ids, positions, attend)
        hidden[np.asarray(token_ids) == self.poison] = np.nan
        return hidden


def test_a_row_that_is_not_finite_fails_alone(expected: list[list[int]]) -> None:
    runner = NumpyRunner(Poisoned.load(CHECKPOINT))
    firsts = [first_token(runner, slot) for slot in range(3)]
    tokens = runner.step([next_input(slot, [Poisoned.poison if slot == 2 else firsts[slot]]) for slot in range(3)])
    assert isinstance(tokens[2], FloatingPointError)
    assert {slot: token_of(tokens[slot]) for slot in (0, 1)} == {slot: expected[slot][1] for slot in (0, 1)}


def test_memory_grows_with_use_up_to_a_bound() -> None:
    cache = KVCache(model.shape)
    for slot in range(5):
        cache.open(slot)
    cache.reserve(300)
    shape = model.shape
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    assert cache.num_bytes == 8 * 512 * per_token
    cache.reserve(shape.context_len)
    assert cache.num_bytes == 8 * shape.context_len * per_token
    # The four old slots exist until the eight new ones are filled.
    assert slots_that_fit(cache.num_bytes * 3 // 2, shape) == 8
    assert slots_that_fit(cache.num_bytes * 3 // 2 - 1, shape) == 4
    assert slots_that_fit(0, shape) == 1


@pytest.mark.anyio
async def test_a_max_concurrency_beyond_the_memory_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: 100,000 were accepted, and would have needed 256 GiB."""
    monkeypatch.setattr(demo, "free_host_bytes", lambda: 64 * 2**20)
    message = "more than the 8 this engine can run: 8 sequences fit half of the 64.00 MiB of free memory"
    with pytest.raises(ConfigError, match=message):
        async with ChatStream(max_concurrency=100_000):
            pass
    async with ChatStream(max_concurrency=8):
        pass


def test_a_closed_slot_keeps_nothing_of_its_sequence() -> None:
    runner = NumpyRunner(model)
    run(runner, [Job(slot=0, prompt=PROMPTS[0], num_tokens=5)])
    runner.cache.lengths[0] = len(PROMPTS[0]) + 5
    remaining = runner.cache.save(0)
    assert remaining.keys.size
    assert not remaining.keys.any()
    assert not remaining.values.any()
