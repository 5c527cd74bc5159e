"""The whole engine with the real library: the contract, ends of answers, bad input, disconnects and failures."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from chatstream.engines.base import EngineHealth
from chatstream.engines.openvino import create_engine
from chatstream.engines.process import ProcessEngine
from chatstream.errors import (
    ChatStreamError,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    UnsupportedParameter,
)
from chatstream.testing import check_engine
from chatstream.types import FinishReason, GenerationRequest, Message, PreparedPrompt, SamplingParams
from tests.engines.openvino.recording import (
    CONTEXT_GIB,
    CONTEXT_LEN,
    TINY,
    VOCAB_SIZE,
    RecordingPipeline,
    close_after,
    collect,
    engine_on,
    engine_that_fails_once,
    greedy,
    read_to_the_end,
    request_of,
    run_all,
    text_of,
)

pytestmark = pytest.mark.anyio

PROMPT = [10, 20, 30, 40]
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_memory_gib": 0.01, "num_threads": 1}


# --- the contract -------------------------------------------------------------------------------------------------


async def test_the_engine_keeps_the_contract() -> None:
    await check_engine(create_engine(TINY, **SETTINGS))


async def test_the_engine_keeps_the_contract_in_a_child_process() -> None:
    await check_engine(ProcessEngine(partial(create_engine, str(TINY), **SETTINGS)))


async def test_capacity_and_default_sampling_are_known_after_the_start() -> None:
    engine = create_engine(TINY, **SETTINGS)
    assert (engine.model_name, engine.health().is_ready, engine.health().detail) == ("tiny", False, "not started")
    await engine.start()
    assert engine.capacity.context_len == CONTEXT_LEN
    assert engine.capacity.can_preempt is False
    assert engine.default_sampling == SamplingParams(
        max_new_tokens=40, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1
    )
    await engine.stop()
    assert engine.health().detail == "stopped"


async def test_the_engine_starts_again_after_a_stop() -> None:
    engine = create_engine(TINY, **SETTINGS)
    texts = []
    for _ in range(2):
        await engine.start()
        texts.append(await text_of(engine, request_of(PROMPT, greedy(10))))
        await engine.stop()
    assert texts[0] == texts[1] != ""


async def test_stop_ends_running_and_waiting_requests() -> None:
    async with engine_on(kv_memory_gib=CONTEXT_GIB) as bench:
        streams = [bench.engine.stream(request_of(PROMPT, greedy(), f"r{n}")) for n in range(2)]
        await anext(streams[0])
        waiting = asyncio.ensure_future(anext(streams[1]))
        await asyncio.sleep(0)
        await bench.engine.stop()
        with pytest.raises(EngineUnavailable):
            await waiting
        with pytest.raises(EngineUnavailable):
            await read_to_the_end(streams[0])


# --- how an answer ends -------------------------------------------------------------------------------------------


async def test_an_answer_ends_after_max_new_tokens() -> None:
    async with engine_on() as bench:
        deltas = await collect(bench.engine, request_of(PROMPT, greedy(7)))
    assert [d.num_tokens for d in deltas] == [1] * 7
    assert [d.num_prompt_tokens for d in deltas] == [4] + [0] * 6
    assert deltas[-1].finish_reason == FinishReason.LENGTH


async def test_an_answer_ends_where_the_context_is_full() -> None:
    async with engine_on(context_len=24) as bench:
        deltas = await collect(bench.engine, request_of(PROMPT, greedy()))
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 20


async def test_an_answer_ends_before_the_end_token_of_the_checkpoint(tmp_path: Path) -> None:
    async with engine_on() as bench:
        await collect(bench.engine, request_of(PROMPT, greedy(20)))
        tokens = bench.pipeline.generations[0].tokens
    end = next(n for n in range(3, 20) if tokens[n] not in tokens[:n])
    directory = copy_of_tiny(tmp_path, generation_config=f'{{"eos_token_id": [{tokens[end]}]}}')
    async with engine_on(directory) as bench:
        deltas = await collect(bench.engine, request_of(PROMPT, greedy(20)))
    assert deltas[-1].finish_reason == FinishReason.STOP
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == end


async def test_a_stop_string_across_tokens_is_found_and_ends_the_computation() -> None:
    async with engine_on() as bench:
        pieces = [delta.text for delta in await collect(bench.engine, request_of(PROMPT, greedy(60))) if delta.text]
        whole = "".join(pieces)
        border = len("".join(pieces[:9]))
        stop = whole[border - 2 : border + 2]
        before = bench.pipeline.num_steps
        deltas = await collect(bench.engine, request_of(PROMPT, greedy(60, stop=("never", stop))))
        await text_of(bench.engine, request_of([5], greedy(1)))
    assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == FinishReason.STOP
    assert bench.pipeline.num_steps - before == len(deltas) + 2, "one step releases the request, one runs the next one"


# --- bad input ----------------------------------------------------------------------------------------------------

BAD: list[tuple[GenerationRequest, type[ChatStreamError]]] = [
    (request_of([5, VOCAB_SIZE], greedy(5)), InvalidRequest),
    (request_of([-1], greedy(5)), InvalidRequest),
    (request_of([2**63], greedy(5)), InvalidRequest),
    (request_of([], greedy(5)), InvalidRequest),
    (request_of([5] * CONTEXT_LEN, greedy(5)), PromptTooLong),
    (request_of([5] * 5000, greedy(5)), PromptTooLong),
    (request_of([5], greedy(5, frequency_penalty=0.5)), UnsupportedParameter),
    (request_of([5], greedy(5, presence_penalty=-0.5)), UnsupportedParameter),
    (request_of([5], greedy(5, logprobs=0)), UnsupportedParameter),
    (request_of([5], greedy(5), token_mask=lambda generated: None), UnsupportedParameter),
]


async def test_100_bad_requests_in_a_row_harm_no_other_request() -> None:
    good = request_of(PROMPT, greedy(101))
    async with engine_on() as bench:
        expected = await text_of(bench.engine, good)
        async with aclosing(bench.engine.stream(good)) as running:
            text = (await anext(running)).text
            for n in range(100):
                request, error = BAD[n % len(BAD)]
                with pytest.raises(error):
                    await collect(bench.engine, request)
                text += (await anext(running)).text
        assert text == expected
        assert await text_of(bench.engine, good) == expected
    assert len(bench.pipelines) == 1
    assert len(bench.pipeline.generations) == 3, "no bad request reached the library"


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "logprobs"])
async def test_an_unsupported_parameter_is_refused_by_name_in_prepare(name: str) -> None:
    async with engine_on() as bench:
        with pytest.raises(UnsupportedParameter) as refused:
            await bench.engine.prepare("hello", SamplingParams(**{name: 1}))
    assert refused.value.param == name


@pytest.mark.parametrize(
    "extreme",
    [
        SamplingParams(temperature=1e-30, max_new_tokens=5),
        SamplingParams(temperature=1e-5, max_new_tokens=5),
        SamplingParams(temperature=2, top_p=1e-9, max_new_tokens=5),
        SamplingParams(min_p=1.0, max_new_tokens=5),
        SamplingParams(top_k=2**31, max_new_tokens=5),
        SamplingParams(top_k=1, max_new_tokens=5),
        SamplingParams(repetition_penalty=1e-6, max_new_tokens=5),
        SamplingParams(repetition_penalty=10, temperature=0, max_new_tokens=5),
        SamplingParams(max_new_tokens=2**31),
    ],
    ids=str,
)
async def test_extreme_values_of_a_parameter_are_accepted(extreme: SamplingParams) -> None:
    async with engine_on() as bench:
        deltas = await collect(bench.engine, request_of(PROMPT, extreme))
        assert deltas[-1].finish_reason is not None


async def test_narrow_sampling_gives_the_likeliest_token() -> None:
    narrow: list[dict[str, Any]] = [{"temperature": 1e-5}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]
    async with engine_on() as bench:
        texts = [await text_of(bench.engine, request_of(PROMPT, SamplingParams(max_new_tokens=9, **n))) for n in narrow]
        assert set(texts) == {await text_of(bench.engine, request_of(PROMPT, greedy(9)))}


async def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths() -> None:
    async with engine_on() as bench:
        with pytest.raises(PromptTooLong, match=f"at most {CONTEXT_LEN - 10} fit the context of {CONTEXT_LEN}"):
            await bench.engine.prepare("many words " * 100, greedy(10))
        with pytest.raises(InvalidRequest, match="empty"):
            await bench.engine.prepare("", greedy(10))


async def test_nan_logits_of_one_request_change_no_other_answer(tmp_path: Path) -> None:
    """The model's logits are NaN after token 77. The library does not detect it; other requests are unaffected."""
    good = request_of(PROMPT, greedy(60))
    async with engine_on() as bench:
        expected = await text_of(bench.engine, good)
    async with engine_on(with_poison(tmp_path, 77)) as bench:
        running = asyncio.create_task(text_of(bench.engine, good))
        for sampling in [greedy(5), SamplingParams(max_new_tokens=5), SamplingParams(max_new_tokens=5, top_p=0.5)]:
            deltas = await collect(bench.engine, request_of([5, 77], sampling))
            assert deltas[-1].finish_reason is not None
        assert await running == expected


# --- disconnects and slow readers ---------------------------------------------------------------------------------


async def test_a_closed_request_frees_its_memory_before_the_next_one_starts() -> None:
    """The cache has room for one request: the library would end every request if a prompt found no memory."""

    def nearly_whole_context(n: int) -> GenerationRequest:
        return request_of([50 + n] * (CONTEXT_LEN - 10), greedy(), f"r{n}")

    async with engine_on(kv_memory_gib=CONTEXT_GIB, step_tokens=64) as bench:
        assert bench.engine.capacity.max_concurrency == 1
        running = bench.engine.stream(nearly_whole_context(0))
        await anext(running)
        for n in range(1, 20):
            waiting = bench.engine.stream(nearly_whole_context(n))
            first_delta = asyncio.ensure_future(anext(waiting))
            await asyncio.sleep(0)
            await running.aclose()
            await first_delta
            running = waiting
        await running.aclose()
        assert (await collect(bench.engine, nearly_whole_context(50)))[-1].finish_reason == FinishReason.LENGTH


async def test_requests_beyond_the_capacity_wait_inside_the_engine() -> None:
    requests = [request_of([9 + n] * 40, greedy(30), f"r{n}") for n in range(6)]
    async with engine_on(kv_memory_gib=2 * CONTEXT_GIB) as bench:
        texts = await run_all(bench.engine, requests, len(requests))
        assert bench.pipeline.max_running == 2
        assert texts == [await text_of(bench.engine, request) for request in requests]


async def test_a_stalled_reader_delays_no_other_request_and_loses_no_delta() -> None:
    lazy, busy = request_of(PROMPT, greedy(100), "lazy"), request_of([7, 8], greedy(30), "busy")
    async with engine_on() as bench:
        expected = await text_of(bench.engine, lazy)
        async with aclosing(bench.engine.stream(lazy)) as stream:
            text = (await anext(stream)).text
            await run_all(bench.engine, [busy] * 4, 1)
            async for delta in stream:
                text += delta.text
        assert text == expected


async def test_200_requests_with_random_disconnects_leave_nothing_in_the_library() -> None:
    async with engine_on() as bench:

        async def one(n: int) -> None:
            request = request_of([5 + n % 300] * (1 + n % 50), SamplingParams(max_new_tokens=12, seed=n), f"r{n}")
            if n % 3:
                await collect(bench.engine, request)
            else:
                await close_after(bench.engine, request, n % 7)

        slots = asyncio.Semaphore(16)

        async def limited(n: int) -> None:
            async with slots:
                await one(n)

        await asyncio.gather(*map(limited, range(200)))
        assert not bench.pipeline.has_requests
        assert len(bench.pipelines) == 1


# --- failures -----------------------------------------------------------------------------------------------------


async def test_a_failed_step_ends_every_request_and_the_pipeline_is_not_used_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, may_fail, steps = threading.Event(), threading.Event(), []

    def fail(self: RecordingPipeline) -> None:
        steps.append(self)
        stepping.set()
        may_fail.wait()
        raise RuntimeError("Internal error")

    async with engine_on() as bench:
        expected = await text_of(bench.engine, request_of(PROMPT, greedy(50)))
        streams = [bench.engine.stream(request_of([60 + n], greedy(), f"r{n}")) for n in range(3)]
        for stream in streams:
            await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(RecordingPipeline, "step", fail)
            await asyncio.to_thread(stepping.wait)
            late = asyncio.create_task(collect(bench.engine, request_of([70], greedy(5), "added during the step")))
            await asyncio.sleep(0)
            may_fail.set()
            async with asyncio.timeout(20):
                for ending in (*map(read_to_the_end, streams), late):
                    with pytest.raises(EngineUnavailable, match="a step failed"):
                        await ending
                assert bench.engine.health() == EngineHealth(False, "a step failed")
                with pytest.raises(EngineUnavailable, match="a step failed"):
                    await bench.engine.prepare("hello", greedy(5))
            await bench.engine.stop()
        assert len(steps) == 1
        await bench.engine.start()
        assert await text_of(bench.engine, request_of(PROMPT, greedy(50))) == expected
    assert len(bench.pipelines) == 2
    assert "a step of tiny failed" in caplog.text


async def test_a_retry_after_a_failed_step_runs_in_the_next_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the retry reached the failed process, it would use up the second of the request's two attempts."""
    engine = ProcessEngine(partial(engine_that_fails_once, tmp_path / "it has failed"))
    await engine.start()
    with pytest.raises(EngineUnavailable, match="a step failed"):
        await collect(engine, request_of(PROMPT, greedy(5)))
    assert len(await collect(engine, request_of(PROMPT, greedy(5)))) == 5
    await engine.stop()
    assert "tiny failed: a step failed; reloading" in caplog.text


async def test_a_request_refused_by_the_library_fails_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with engine_on() as bench:
        with monkeypatch.context() as patch:
            patch.setattr(RecordingPipeline, "add", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(EngineError, match="refused the request"):
                await collect(bench.engine, request_of(PROMPT, greedy(5)))
        assert await text_of(bench.engine, request_of(PROMPT, greedy(5)))


async def test_a_conversation_is_answered_through_the_chat_template() -> None:
    async with engine_on() as bench:
        prepared = await bench.engine.prepare((Message("user", "Hello"),), greedy(5))
        assert isinstance(prepared, PreparedPrompt)
        deltas = await collect(bench.engine, GenerationRequest("chat", prepared, greedy(5)))
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.prompt_tokens == len(prepared.token_ids) > 5


# --- helpers ------------------------------------------------------------------------------------------------------


def copy_of_tiny(directory: Path, **json_files: str) -> Path:
    for file in TINY.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    for name, text in json_files.items():
        (directory / f"{name}.json").write_text(text, "utf-8")
    return directory


def with_poison(directory: Path, token_id: int) -> Path:
    """A copy of `tiny` in which the embedding of one token is NaN."""
    copy_of_tiny(directory)
    model = openvino.Core().read_model(TINY / "openvino_model.xml")
    (table,) = [op for op in model.get_ops() if op.get_friendly_name() == "self.model.embed_tokens.weight"]
    poisoned = np.array(table.data)
    poisoned[token_id] = np.nan
    for target in table.output(0).get_target_inputs():
        target.replace_source_output(opset13.constant(poisoned).output(0))
    openvino.save_model(model, directory / "openvino_model.xml", compress_to_fp16=False)
    return directory
