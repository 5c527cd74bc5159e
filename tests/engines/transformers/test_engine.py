"""The whole engine over a real model: interleaving, ends of answers, disconnects and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.errors import PromptTooLong
from chatstream.types import FinishReason, GenerationRequest, Message, SamplingParams
from tests.engines.transformers.checkpoints import CONTEXT_LEN
from tests.engines.transformers.recording import (
    Bench,
    answer,
    collect,
    engine_on,
    greedy,
    prompt_of,
    request_of,
    run_all,
)

pytestmark = pytest.mark.anyio


def inputs_of(bench: Bench, slot: int) -> list[SlotInput]:
    return [item for step in bench.recorder.steps for item in step.inputs if item.slot == slot]


async def text_on_a_fresh_engine(path: Path, request: GenerationRequest) -> str:
    async with engine_on(path) as bench:
        return (await answer(bench.engine, request))[0]


# --- interleaving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4, 8])
async def test_each_step_gives_every_generating_request_exactly_one_token(
    concurrency: int, checkpoint: Callable[[str], Path]
) -> None:
    async with engine_on(checkpoint("llama"), max_prompt_tokens_per_step=4, max_undelivered=1000) as bench:
        requests = [request_of(prompt_of(3 + 3 * n, seed=n), greedy(100), f"r{n}") for n in range(concurrency)]
        await run_all(bench.engine, requests, concurrency)
    for step in bench.recorder.steps:
        assert len(set(step.slots)) == len(step.slots), "a slot was computed twice"
        assert step.generating <= set(step.slots), "a generating slot was skipped"
        assert set(step.results) == {item.slot for item in step.inputs if item.is_last}
        assert step.generating <= set(step.results)
        assert all(isinstance(token, SampledToken) for token in step.results.values())
    assert max(len(step.generating) for step in bench.recorder.steps) == concurrency


# --- ends of answers ----------------------------------------------------------------------------------------------


async def test_an_answer_ends_after_max_new_tokens(checkpoint: Callable[[str], Path]) -> None:
    async with engine_on(checkpoint("llama")) as bench:
        deltas = await collect(bench.engine, request_of(prompt_of(5), greedy(7)))
    usage = deltas[-1].usage
    assert deltas[-1].finish_reason == FinishReason.LENGTH
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 7)
    assert len(deltas) == 7


async def test_an_answer_ends_when_the_context_is_full(checkpoint: Callable[[str], Path]) -> None:
    async with engine_on(checkpoint("qwen3"), LoadSettings(device="cpu", context_len=24)) as bench:
        assert bench.engine.capacity.context_len == 24
        deltas = await collect(bench.engine, request_of(prompt_of(10, seed=3), greedy()))
    assert deltas[-1].finish_reason == FinishReason.LENGTH
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 14


async def test_an_answer_ends_before_the_end_token(
    checkpoint: Callable[[str], Path], reference: Callable[[str], PreTrainedModel]
) -> None:
    model = reference("qwen3")
    with torch.inference_mode():
        output: Any = model.generate(torch.tensor([prompt_of(6)]), max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    tokens = output[0, 6:].tolist()
    end = next(n for n in range(5, 20) if tokens[n] not in tokens[:n])
    loaded = load(str(checkpoint("qwen3")), None, LoadSettings(device="cpu"))
    loaded.codec.eos_token_ids = frozenset({tokens[end]})
    engine = StepEngine("tiny", lambda: loaded)
    await engine.start()
    deltas = await collect(engine, request_of(prompt_of(6), greedy(20)))
    await engine.stop()
    assert deltas[-1].finish_reason == FinishReason.STOP
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == end


async def test_a_stop_string_is_found_across_tokens_and_is_not_part_of_the_answer(
    checkpoint: Callable[[str], Path],
) -> None:
    async with engine_on(checkpoint("llama")) as bench:
        deltas = await collect(bench.engine, request_of(prompt_of(8), greedy(40)))
        pieces = [delta.text for delta in deltas if delta.text]
        whole = "".join(pieces)
        border = len("".join(pieces[:10]))
        stop = whole[border - 2 : border + 2]
        cut = whole[: whole.index(stop)]
        text, reason = await answer(bench.engine, request_of(prompt_of(8), greedy(40, stop=("never", stop))))
    assert (text, reason) == (cut, FinishReason.STOP)
    assert 0 < len(cut) < len(whole)


async def test_a_chat_stop_ends_an_answer_to_a_conversation_but_not_to_a_text(
    checkpoint: Callable[[str], Path],
) -> None:
    loaded = load(str(checkpoint("llama")), None, LoadSettings(device="cpu"))

    async def texts(chat_stops: tuple[str, ...]) -> tuple[str, str]:
        engine = StepEngine("tiny", lambda: replace(loaded, chat_stops=chat_stops))
        await engine.start()
        prepared = [await engine.prepare(prompt, greedy(30)) for prompt in ((Message("user", "hello"),), "hello")]
        chat, plain = [(await answer(engine, GenerationRequest("r", p, greedy(30))))[0] for p in prepared]
        await engine.stop()
        return chat, plain

    chat, plain = await texts(())
    stop = chat[len(chat) // 2 :][:3]
    assert await texts((stop,)) == (chat[: chat.index(stop)], plain)


# --- prompts ------------------------------------------------------------------------------------------------------


async def test_a_prompt_that_does_not_fit_is_refused_with_the_limits(checkpoint: Callable[[str], Path]) -> None:
    async with engine_on(checkpoint("llama")) as bench:
        with pytest.raises(PromptTooLong, match=f"at most {CONTEXT_LEN - 10} fit the context of {CONTEXT_LEN}"):
            await bench.engine.prepare("日" * 400, greedy(10))


async def test_old_turns_are_dropped_whole_but_never_the_system_message_or_the_last(
    checkpoint: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    system = Message("system", "be brief")
    turns = [Message(("user", "assistant")[n % 2], f"turn {n} " * 3) for n in range(13)]
    async with engine_on(checkpoint("llama")) as bench:
        with pytest.raises(PromptTooLong):
            await bench.engine.prepare((system, *turns), greedy(20))
        prepared = await bench.engine.prepare((system, *turns), greedy(20), may_drop_history=True)
    assert prepared.messages == (system, *turns[prepared.dropped_messages :])
    assert 0 < prepared.dropped_messages <= 12
    assert len(prepared.token_ids) <= CONTEXT_LEN - 20
    conversation = [{"role": m.role, "content": m.content} for m in prepared.messages]
    whole = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert list(prepared.token_ids) == whole, "the prompt is not a whole template"
    longer = [{"role": m.role, "content": m.content} for m in (system, *turns[prepared.dropped_messages - 2 :])]
    assert len(tokenizer.apply_chat_template(longer, return_dict=False)) > CONTEXT_LEN - 40, (
        "more turns were dropped than necessary"
    )


# --- sampling -----------------------------------------------------------------------------------------------------


async def test_the_same_seed_gives_the_same_text_at_any_concurrency(checkpoint: Callable[[str], Path]) -> None:
    variants: list[dict[str, Any]] = [{}, {"top_k": 9}, {"top_p": 0.8}, {"repetition_penalty": 1.4, "top_k": 40}]
    requests = [
        request_of(prompt_of(4 + n, seed=n), SamplingParams(max_new_tokens=20, seed=n + 1, **variants[n % 4]), f"r{n}")
        for n in range(8)
    ]
    texts = []
    for concurrency in (1, 4, 8):
        async with engine_on(checkpoint("llama"), max_prompt_tokens_per_step=5) as bench:
            texts.append(await run_all(bench.engine, requests, concurrency))
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 8


async def test_without_a_seed_answers_differ(checkpoint: Callable[[str], Path]) -> None:
    async with engine_on(checkpoint("llama")) as bench:
        request = request_of(prompt_of(5), SamplingParams(max_new_tokens=20, temperature=2.0))
        assert len(set(await run_all(bench.engine, [request] * 3, 3))) == 3


# --- disconnects --------------------------------------------------------------------------------------------------


async def test_a_disconnect_frees_the_slot_within_a_step_and_does_not_affect_its_next_occupant(
    checkpoint: Callable[[str], Path],
) -> None:
    path = checkpoint("llama")
    next_request = request_of(prompt_of(12, seed=9), greedy(25), "new")
    expected = await text_on_a_fresh_engine(path, next_request)
    async with engine_on(path, max_prompt_tokens_per_step=5) as bench:
        staying = asyncio.create_task(answer(bench.engine, request_of(prompt_of(4, seed=1), greedy(120), "stays")))
        other = bench.engine.stream(request_of(prompt_of(30, seed=2), greedy(120), "other"))
        for _ in range(10):
            await anext(other)
        (slot,) = [s for s, a in bench.recorder.open.items() if len(a.prompt_ids) == 30]
        num_steps = len(bench.recorder.steps)
        await other.aclose()
        assert slot not in bench.recorder.open
        late = [step for step in bench.recorder.steps[num_steps:] if slot in step.slots]
        # One step may have been running already, and one may have started before the engine thread read the command.
        assert len(late) <= 2
        assert (await answer(bench.engine, next_request))[0] == expected
        assert [a.slot for a in bench.recorder.answers if a.prompt_ids == next_request.prompt.token_ids] == [slot]
        await staying


async def test_a_disconnect_during_the_prompt_frees_the_slot(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("mistral")
    next_request = request_of(prompt_of(12, seed=9), greedy(25), "new")
    expected = await text_on_a_fresh_engine(path, next_request)
    async with engine_on(path, max_prompt_tokens_per_step=1, max_undelivered=1) as bench:
        # A slow reader: the other prompt advances by one token for each delta that is read.
        pace = bench.engine.stream(request_of(prompt_of(3, seed=1), greedy(120), "pace"))
        await anext(pace)
        other = asyncio.create_task(collect(bench.engine, request_of(prompt_of(120, seed=2), greedy(20), "other")))
        while not inputs_of(bench, slot=1):
            await anext(pace)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        assert not any(item.is_last for item in inputs_of(bench, slot=1))
        assert set(bench.recorder.open) == {0}
        assert (await answer(bench.engine, next_request))[0] == expected
        await pace.aclose()


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_copy(checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    """A model for one test, which may damage it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    return model


@pytest.mark.parametrize("num_failures", [1, 3])
async def test_a_failed_pass_is_retried_in_halves_and_fails_only_requests_that_fail_alone(
    num_failures: int, model_copy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = create_engine(model_copy, tokenizer)
    await engine.start()
    requests = [request_of(prompt_of(6 + n, seed=n), greedy(20), f"r{n}") for n in range(2)]
    expected = [(await answer(engine, request))[0] for request in requests]
    calls = 0

    def fail(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        nonlocal calls
        if kwargs["input_ids"].shape[1] == 2 or calls >= 5:
            calls += 1
            if 5 <= calls < 5 + num_failures:
                raise RuntimeError("device error")

    model_copy.register_forward_pre_hook(fail, with_kwargs=True)
    results = await asyncio.gather(*(answer(engine, r) for r in requests), return_exceptions=True)
    if num_failures == 1:
        assert [result[0] for result in results if isinstance(result, tuple)] == expected
    else:
        assert [str(result) for result in results] == ["the model failed: device error"] * 2
    assert [(await answer(engine, request))[0] for request in requests] == expected
    await engine.stop()
