"""The facade without HTTP: the Python API."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from chatstream import ChatRequest, ChatStream, LoadSettings, Message, MockEngine, SamplingParams, SchedulerSettings
from chatstream.engines.base import Capacity
from chatstream.engines.openvino.settings import OpenVINOSettings
from chatstream.errors import (
    Cancelled,
    ConfigError,
    EngineError,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from chatstream.legacy import FINISH_TOKEN
from chatstream.sessions import MemoryStore
from chatstream.testing import FakeEngine, run_virtual
from chatstream.types import Done, Failed, FinishReason, PreparedPrompt, Queued, Started, Token, TokenLogprob, Usage
from tests.api.in_process import script
from tests.engines.batching.scripted import ScriptedRunner, scripted_engine
from tests.runtime.harness import in_virtual_time


def make(engine: FakeEngine | None = None, **options: Any) -> ChatStream:
    return ChatStream(engine=engine or FakeEngine(script, step_s=0.1), **{"max_concurrency": 1, **options})


async def collect(chat_stream: ChatStream, prompt: Any = "hello", **more: Any) -> list[Any]:
    return [event async for event in chat_stream.stream(prompt, **more)]


def hanging() -> ChatRequest:
    return ChatRequest(messages=(Message("user", "hang"),))


# --- streaming ------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_answer_is_started_tokens_done() -> None:
    async with make() as chat_stream:
        started, *tokens, done = await collect(chat_stream)
    assert isinstance(started, Started)
    assert started.waited_seconds == 0.0
    assert tokens == [Token("re hello"), Token(" and"), Token(" more")]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.usage) == (FinishReason.STOP, Usage(1, 3))
    assert done.request_id == started.request_id
    assert done.message_id


@in_virtual_time
async def test_a_store_that_is_empty_and_has_a_length_is_used_all_the_same() -> None:
    store = MemoryStore()
    async with make(FakeEngine(["x"]), sessions=store) as chat_stream:
        async for _ in await chat_stream.submit(ChatRequest(messages=(Message("user", "hello"),), conversation="k")):
            pass
    assert len(store) == 1


@in_virtual_time
async def test_a_prompt_may_be_a_text_messages_or_dicts() -> None:
    engine = FakeEngine(["x"])
    async with make(engine, system_prompt="be kind") as chat_stream:
        prompts: list[Any] = [
            "hello",
            [Message("user", "hello")],
            [{"role": "user", "content": "hello"}],
            ({"role": "system", "content": "s"}, Message("user", "a"), {"role": "assistant", "content": "b"}),
        ]
        for prompt in prompts:
            await collect(chat_stream, prompt)
    seen = [prompt.messages for prompt in engine.prompts.values()]
    assert seen[0] == seen[1] == seen[2] == (Message("system", "be kind"), Message("user", "hello"))
    assert [m.content for m in seen[3]] == ["be kind", "s", "a", "b"]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "x", "name": "bob"}],
        ["hello"],
    ],
)
@in_virtual_time
async def test_a_prompt_that_is_no_conversation_is_refused(prompt: Any) -> None:
    async with make() as chat_stream:
        with pytest.raises(InvalidRequest):
            await collect(chat_stream, prompt)
        assert chat_stream.stats().received == 0


@in_virtual_time
async def test_leaving_the_loop_early_cancels_the_request() -> None:
    async with make() as chat_stream:
        async with aclosing(chat_stream.stream("hang")) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
            assert chat_stream.stats().running == 1
        await asyncio.sleep(0.01)
        stats = chat_stream.stats()
        assert (stats.running, stats.cancelled) == (0, 1)


@in_virtual_time
async def test_a_waiting_request_gets_its_position_and_may_limit_its_wait() -> None:
    async with make() as chat_stream:
        running = await chat_stream.submit(hanging())
        events = chat_stream.stream("hello", max_wait_s=5.0)
        first = await anext(events)
        assert isinstance(first, Queued)
        assert first.position == 1
        with pytest.raises(QueueTimeout) as timeout:
            await anext(events)
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        assert timeout.value.retry_after_s is not None
        running.close()


@in_virtual_time
async def test_an_end_without_a_complete_answer_is_raised() -> None:
    async with make() as chat_stream:
        with pytest.raises(EngineError):
            await collect(chat_stream, "fail")
        stream = await chat_stream.submit(hanging())
        asking = asyncio.create_task(collect(chat_stream, "hello"))
        await asyncio.sleep(0.01)
        (waiting,) = [view.request_id for view in chat_stream.requests() if view.position]
        assert chat_stream.cancel(waiting)
        with pytest.raises(Cancelled):
            await asking
        stream.close()


@in_virtual_time
async def test_a_full_queue_and_a_stopped_worker_reject_before_the_first_event() -> None:
    async with make(max_queue_size=1) as chat_stream:
        streams = [await chat_stream.submit(hanging()) for _ in range(2)]
        with pytest.raises(QueueFull) as refusal:
            await collect(chat_stream)
        assert refusal.value.retry_after_s is not None
        for stream in streams:
            stream.close()
    with pytest.raises(ShuttingDown):
        await collect(chat_stream)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
@in_virtual_time
async def test_a_wait_of_zero_or_less_is_refused(wrong: float) -> None:
    async with make() as chat_stream:
        with pytest.raises(InvalidRequest) as refusal:
            await collect(chat_stream, max_wait_s=wrong)
        assert refusal.value.param == "max_wait_seconds"


@in_virtual_time
async def test_a_prompt_that_can_never_be_answered_is_refused_at_once_and_frees_its_position() -> None:
    class Short(FakeEngine):
        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            if prompt[-1].content == "too long":
                raise PromptTooLong("too long")
            return await super().prepare(prompt, sampling)

    async with make(Short(script, step_s=0.1), max_queue_size=1) as chat_stream:
        running = await chat_stream.submit(hanging())
        with pytest.raises(PromptTooLong):
            await collect(chat_stream, "too long")
        assert chat_stream.stats().waiting == 0
        running.close()


@in_virtual_time
async def test_a_default_length_gives_way_to_a_long_prompt_but_a_wanted_one_does_not() -> None:
    class ShortContext(FakeEngine):
        """A context of 10 tokens, of which the prompt takes 8."""

        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            if (sampling.max_new_tokens or 1) > 2:
                raise PromptTooLong("too long")
            return await super().prepare(prompt, sampling)

    async with make(ShortContext(["x"]), max_new_tokens=5) as chat_stream:
        assert isinstance((await collect(chat_stream))[-1], Done)
        with pytest.raises(PromptTooLong):
            await collect(chat_stream, max_new_tokens=5)


# --- sampling -------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_sampling_of_a_request_overrides_the_constructors_and_that_the_checkpoints() -> None:
    class Checkpoint(FakeEngine):
        @property
        def default_sampling(self) -> SamplingParams:
            return SamplingParams(temperature=0.6, top_k=20, top_p=0.95)

    seen: list[SamplingParams] = []
    engine = Checkpoint(lambda request: seen.append(request.sampling) or ["x"])  # type: ignore[func-returns-value]
    async with make(engine, temperature=0.7, max_new_tokens=99, seed=1) as chat_stream:
        await collect(chat_stream)
        await collect(chat_stream, temperature=0.0, top_k=5)
    assert seen[0] == SamplingParams(temperature=0.7, top_k=20, top_p=0.95, max_new_tokens=99, seed=1)
    assert seen[1] == SamplingParams(temperature=0.0, top_k=5, top_p=0.95, max_new_tokens=99, seed=1)


@in_virtual_time
async def test_a_request_sent_during_the_load_gets_the_checkpoints_defaults_too() -> None:
    class Loading(FakeEngine):
        @property
        def default_sampling(self) -> SamplingParams:
            return SamplingParams(temperature=0.6) if self.health().is_ready else SamplingParams()

    seen: list[SamplingParams] = []
    chat_stream = make(Loading(lambda request: seen.append(request.sampling) or ["x"]))  # type: ignore[func-returns-value]
    early = asyncio.create_task(collect(chat_stream))
    await asyncio.sleep(1.0)
    async with chat_stream:
        await early
    assert seen == [SamplingParams(temperature=0.6)]


@in_virtual_time
async def test_every_sampling_default_of_the_constructor_reaches_the_engine() -> None:
    given = {
        "max_new_tokens": 9, "temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1,
        "frequency_penalty": 0.3, "presence_penalty": -0.4, "seed": 5,
    }  # fmt: skip
    seen: list[SamplingParams] = []
    engine = FakeEngine(lambda request: seen.append(request.sampling) or ["x"])  # type: ignore[func-returns-value]
    async with make(engine, **given) as chat_stream:
        await collect(chat_stream)
    assert seen == [SamplingParams(**given)]  # type: ignore[arg-type]


@in_virtual_time
async def test_a_token_mask_reaches_the_engine() -> None:
    def mask(generated_ids: object) -> None:
        return None

    seen = []
    engine = FakeEngine(lambda request: seen.append(request.token_mask) or ["x"])  # type: ignore[func-returns-value]
    async with make(engine) as chat_stream:
        await collect(chat_stream, token_mask=mask)
        await collect(chat_stream)
    assert seen == [mask, None]


@in_virtual_time
async def test_log_probabilities_come_with_their_tokens_if_requested() -> None:
    async with make() as chat_stream:
        assert (await collect(chat_stream, logprobs=1))[1:-1] == [
            Token(text, (TokenLogprob(text, 0.0, ((text, 0.0),)),)) for text in ("re hello", " and", " more")
        ]


@pytest.mark.parametrize("stop", ["a", ["a"], ("a",)])
@in_virtual_time
async def test_stop_may_be_one_string_or_several(stop: Any) -> None:
    seen: list[SamplingParams] = []
    engine = FakeEngine(lambda request: seen.append(request.sampling) or ["x"])  # type: ignore[func-returns-value]
    async with make(engine) as chat_stream:
        await collect(chat_stream, stop=stop)
    assert seen[0].stop == ("a",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 3.0},
        {"stop": 5},
        {"stop": [5]},
        {"beams": 4},
        {"top_k": 0},
        {"min_p": -1},
        {"frequency_penalty": 5},
        {"presence_penalty": True},
        {"logprobs": 21},
        {"logprobs": True},
    ],
)
@in_virtual_time
async def test_wrong_sampling_is_refused_by_name(wrong: dict[str, Any]) -> None:
    async with make() as chat_stream:
        with pytest.raises(InvalidRequest) as refusal:
            await collect(chat_stream, **wrong)
        assert refusal.value.param == next(iter(wrong))
        assert chat_stream.stats().received == 0


@in_virtual_time
async def test_a_request_that_ends_within_its_submission_leaves_nothing_behind() -> None:
    async with make() as chat_stream:
        for _ in range(3):
            await collect(chat_stream, max_wait_s=1e-300)
        assert not any(chat_stream.records().values())


@in_virtual_time
async def test_text_that_is_not_unicode_is_refused() -> None:
    async with make() as chat_stream:
        with pytest.raises(InvalidRequest, match="Unicode"):
            await collect(chat_stream, "\ud800")


# --- cancelling -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_cancel_ends_a_request_and_is_harmless_twice() -> None:
    async with make() as chat_stream:
        stream = await chat_stream.submit(hanging())
        assert chat_stream.cancel(stream.request_id)
        assert chat_stream.cancel(stream.request_id)
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        await asyncio.sleep(59.0)
        assert chat_stream.cancel(stream.request_id)  # remembered
        await asyncio.sleep(2.0)
        assert not chat_stream.cancel(stream.request_id)
        assert not chat_stream.cancel("unknown")


@in_virtual_time
async def test_the_owner_and_the_operator_may_cancel_a_request() -> None:
    async with make() as chat_stream:
        for owner, by, may in (
            ("", "client", False),
            ("b", "client", False),
            ("a", "client", True),
            ("", "admin", True),
        ):
            stream = await chat_stream.submit(ChatRequest(messages=(Message("user", "hang"),), owner="a"))
            assert chat_stream.cancel(stream.request_id, owner=owner, by=by) == may
            assert (stream.end is not None) == may
            stream.close()
            await asyncio.sleep(0.01)


# --- the console conversation ---------------------------------------------------------------------------------------


@in_virtual_time
async def test_console_input_is_one_conversation_in_the_0_3_format() -> None:
    engine = FakeEngine(lambda r: ["a", "b"] if len(r.prompt.messages) == 1 else ["c"])
    async with make(engine) as chat_stream:
        first = [piece async for piece in chat_stream.handle_console_input("one")]
        second = [piece async for piece in chat_stream.handle_console_input("two")]
        assert first == [
            ("a" + FINISH_TOKEN, "a", "begin"), ("ab" + FINISH_TOKEN, "b", "mid"), ("ab" + FINISH_TOKEN, "", "end")
        ]  # fmt: skip
        assert [(new, position) for _, new, position in second] == [("c", "begin"), ("", "end")]
        contents = [m.content for m in list(engine.prompts.values())[-1].messages]
        assert contents == ["one", "ab", "two"]
        assert await chat_stream.forget("console")
        assert not await chat_stream.forget("console")


# --- lifecycle ------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_requests_before_the_start_wait_and_are_served_once_it_runs() -> None:
    chat_stream = make()
    asking = asyncio.create_task(collect(chat_stream))
    await asyncio.sleep(10.0)
    assert (chat_stream.stats().waiting, chat_stream.not_ready_because()) == (1, "not started")
    await chat_stream.start_queue_worker()
    await chat_stream.start_queue_worker()
    events = await asking
    assert [type(event) for event in (events[0], events[1], events[-1])] == [Queued, Started, Done]
    assert chat_stream.not_ready_because() == ""
    await chat_stream.stop_queue_worker()
    await chat_stream.stop_queue_worker()
    assert chat_stream.not_ready_because() == "shutting down"


@in_virtual_time
async def test_a_stop_lets_the_running_finish_and_a_start_serves_again() -> None:
    chat_stream = make()
    await chat_stream.start_queue_worker()
    asking = asyncio.create_task(collect(chat_stream, "long"))
    await asyncio.sleep(0.05)
    await chat_stream.stop_queue_worker()
    assert isinstance((await asking)[-1], Done)
    async with chat_stream:
        assert isinstance((await collect(chat_stream))[-1], Done)


@in_virtual_time
async def test_running_requests_are_ended_after_the_grace_time() -> None:
    chat_stream = make(grace_s=3.0)
    await chat_stream.start_queue_worker()
    asking = asyncio.create_task(collect(chat_stream, "hang"))
    await asyncio.sleep(0.05)
    await chat_stream.stop_queue_worker()
    with pytest.raises(ShuttingDown):
        await asking
    assert asyncio.get_running_loop().time() == pytest.approx(3.05)


@in_virtual_time
async def test_a_drained_server_keeps_its_engine() -> None:
    async with make() as chat_stream:
        await chat_stream.drain()
        assert chat_stream.engine.health().is_ready
        with pytest.raises(ShuttingDown):
            await collect(chat_stream)
        await chat_stream.start_queue_worker()
        assert isinstance((await collect(chat_stream))[-1], Done)


@in_virtual_time
async def test_the_lifespan_is_a_start_and_a_stop() -> None:
    chat_stream = make()
    async with chat_stream.lifespan(None):
        assert chat_stream.stats().is_open
    assert chat_stream.stats().is_draining


@in_virtual_time
async def test_limits_change_at_once_but_not_beyond_what_the_engine_can_run() -> None:
    class Small(FakeEngine):
        @property
        def capacity(self) -> Capacity:
            return Capacity(max_concurrency=2)

    async with make(Small(script, step_s=0.1)) as chat_stream:
        streams = [await chat_stream.submit(hanging()) for _ in range(3)]
        chat_stream.set_limits(max_concurrency=2, max_queue_size=9)
        stats = chat_stream.stats()
        assert (stats.running, stats.waiting, stats.max_queue_size) == (2, 1, 9)
        with pytest.raises(ConfigError, match="2 this engine can run"):
            chat_stream.set_limits(max_concurrency=3)
        for stream in streams:
            stream.close()
    with pytest.raises(ConfigError, match="2 this engine can run"):
        await make(Small(), max_concurrency=3).start_queue_worker()


HELLO = len("u:Hello;a:")
"""Tokens of a conversation of one message, by `CharCodec`."""


@pytest.mark.parametrize(
    ("context_len", "options", "warning"),
    [
        (2 * HELLO, {}, ""),
        (100, {"max_new_tokens": 99}, ""),
        (100, {"max_new_tokens": 100}, "max_new_tokens is 100, but the context has 100 tokens: answers end when"),
        (2 * HELLO - 1, {}, "10 of the context's 19 tokens are used by the chat template"),
        (
            29,
            {"system_prompt": "Hush!"},
            "18 of the context's 29 tokens are used by the chat template and system_prompt",
        ),
        (100, {"system_prompt": "unspeakable"}, "could not be prepared: the template refuses this"),
    ],
)
@pytest.mark.anyio
async def test_settings_that_leave_little_of_the_context_are_logged_at_the_start(
    context_len: int, options: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the warning the operator did not notice; later requests failed with prompt_too_long."""
    async with ChatStream(engine=scripted_engine(ScriptedRunner(context_len=context_len)), **options):
        pass
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning in logged for logged in warnings] == ([True] if warning else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no room in the context after the chat template: the prompt has 10 tokens"),
        (
            {"system_prompt": "Hush!"},
            "no room in the context after the chat template and system_prompt: the prompt has 18",
        ),
    ],
)
@pytest.mark.anyio
async def test_a_context_without_room_for_a_message_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async with ChatStream(engine=scripted_engine(ScriptedRunner(context_len=HELLO)), **options):
            pass


class PickyEngine(FakeEngine):
    """An engine with a known context that refuses most conversations."""

    @property
    def capacity(self) -> Capacity:
        return replace(super().capacity, context_len=1000)

    async def prepare(self, *args: Any, **kwargs: Any) -> PreparedPrompt:
        raise KeyError("a topic")


def test_an_engine_that_cannot_prepare_the_test_conversation_is_served_and_tried_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine's exception made the start fail, and the check was repeated after each drain."""

    async def run() -> None:
        async with ChatStream(engine=PickyEngine()) as chat_stream:
            await chat_stream.start_queue_worker()

    run_virtual(run())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["a test conversation of one message could not be prepared: 'a topic'"]


# --- the constructor ------------------------------------------------------------------------------------------------


def test_both_names_of_the_limit_are_equivalent_and_exclude_each_other() -> None:
    assert ChatStream(num_of_concurrent_executions=7).stats().max_concurrency == 7
    assert ChatStream(max_concurrency=7).stats().max_concurrency == 7
    assert (ChatStream().stats().max_concurrency, ChatStream().stats().max_queue_size) == (2, 5)
    for both in ((2, 2), (1, 2)):
        with pytest.raises(ConfigError, match="give one"):
            ChatStream(max_concurrency=both[0], num_of_concurrent_executions=both[1])


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("token_sampler", "temperature"),
        ("num_gpus", "device"),
        ("chat_prompt_clazz", "chat template"),
        ("request_handler", "sessions="),
        ("client_roles", "api_keys"),
        ("too_many_request_as_http_error", "429"),
        ("probe_mode_enabled", "mock engine"),
    ],
)
def test_a_removed_setting_names_its_replacement(name: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is no longer a setting.*{instead}"):
        ChatStream(**{name: None})


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_concurency": 2},
        {"max_queue_size": -1},
        {"max_queue_size": 1.5},
        {"max_wait_s": 0},
        {"policy": "random"},
        {"temperature": 9.0},
        {"max_new_tokens": 0},
        {"top_p": 0},
        {"min_p": 2},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": -3},
        {"grace_s": -1},
        {"max_body_bytes": 0},
        {"dtype": "int3"},
        {"load": {"dtype": "float32"}},
        {"mock_params": {"typ": "echo"}, "use_mock_response": True},
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_loaded(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ChatStream(**wrong)


@pytest.fixture
def loaded_as(monkeypatch: pytest.MonkeyPatch) -> list[LoadSettings]:
    """The load settings of each engine created from now on."""
    made: list[LoadSettings] = []

    def create_engine(model: str, tokenizer: object, load: LoadSettings, **options: Any) -> MockEngine:
        made.append(load)
        return MockEngine()

    monkeypatch.setattr("chatstream.engines.transformers.create_engine", create_engine)
    return made


def test_loading_keywords_override_the_fields_of_load(loaded_as: list[LoadSettings]) -> None:
    load = LoadSettings(device="cpu", dtype="bfloat16", context_len=64)
    ChatStream("any", load=load)
    ChatStream("any", load=load, context_len=128, num_threads=1)
    ChatStream("any", load=load, dtype="auto")
    ChatStream("any", load=load, dtype=None, prefix_cache_bytes=None)
    ChatStream("any", prefix_cache_bytes=0, trust_remote_code=True)
    ChatStream("any", load=load, cuda_graphs="auto")
    ChatStream("any", load=replace(load, cuda_graphs="auto"), cuda_graphs="off")
    assert loaded_as == [
        load,
        LoadSettings(device="cpu", dtype="bfloat16", context_len=128, num_threads=1),
        LoadSettings(device="cpu", context_len=64),
        load,
        LoadSettings(prefix_cache_bytes=0, trust_remote_code=True),
        replace(load, cuda_graphs="auto"),
        load,
    ]


def test_settings_of_one_engine_are_refused_as_load() -> None:
    """The Transformers engine would ignore `kv_memory_gib`."""
    with pytest.raises(ConfigError, match="load must be a LoadSettings, not OpenVINOSettings"):
        ChatStream("any", load=OpenVINOSettings(kv_memory_gib=1.0))


def test_a_mock_can_be_configured_by_the_0_3_names() -> None:
    params = {"type": "echo", "initial_wait_sec": 0.5, "time_per_token_sec": 0}
    chat_stream = ChatStream(use_mock_response=True, mock_params=params)
    assert isinstance(chat_stream.engine, MockEngine)
    assert chat_stream.engine.model_name == "mock-echo"
    with pytest.raises(ConfigError, match="type must be one of"):
        ChatStream(use_mock_response=True, mock_params={"type": "loud"})


def test_keywords_override_the_scheduler_settings() -> None:
    chat_stream = ChatStream(scheduler=SchedulerSettings(max_concurrency=9, max_queue_size=8), max_queue_size=3)
    stats = chat_stream.stats()
    assert (stats.max_concurrency, stats.max_queue_size) == (9, 3)


@in_virtual_time
async def test_max_wait_s_of_the_scheduler_settings_applies() -> None:
    async with make(scheduler=SchedulerSettings(max_wait_s=2.0)) as chat_stream:
        running = await chat_stream.submit(hanging())
        with pytest.raises(QueueTimeout):
            await collect(chat_stream)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)
        running.close()


def test_two_instances_share_nothing() -> None:
    one, two = make(), make()
    assert one.router is one.router
    assert one.router is not two.router
    assert one.access is not two.access


def test_the_repr_shows_the_state_of_the_queue() -> None:
    assert repr(make(max_queue_size=4, name="node:3")) == (
        "<ChatStream node:3 fake <QueueWorker <Scheduler running=0/1 waiting=0/4 fcfs closed>>>"
    )


class CannotPreempt(FakeEngine):
    @property
    def capacity(self) -> Capacity:
        return Capacity()


@pytest.mark.parametrize(
    ("settings", "param"), [({"slice_tokens": 8}, "slice_tokens"), ({"policy": "fair-token"}, "policy")]
)
@in_virtual_time
async def test_time_slices_need_an_engine_that_can_preempt(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError, match="preempt") as error:
        await ChatStream(engine=CannotPreempt(), scheduler=SchedulerSettings(**settings)).start_queue_worker()
    assert error.value.param == param
    async with ChatStream(engine=FakeEngine(), scheduler=SchedulerSettings(**settings)):
        pass


@in_virtual_time
async def test_a_failed_start_stops_the_engine_and_rejects_waiting_requests() -> None:
    engine = CannotPreempt()
    chat_stream = make(engine, scheduler=SchedulerSettings(slice_tokens=5))
    waiting = await chat_stream.submit(hanging())
    with pytest.raises(ConfigError, match="preempt"):
        async with chat_stream:
            pass
    assert not engine.health().is_ready
    *_, failed = [event async for event in waiting]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ShuttingDown)


@in_virtual_time
async def test_a_cancelled_start_stops_the_engine() -> None:
    class SlowToReturn(FakeEngine):
        async def start(self) -> None:
            await super().start()
            await asyncio.sleep(10.0)

    engine = SlowToReturn()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0), make(engine):
            pass
    assert not engine.health().is_ready


@in_virtual_time
async def test_a_policy_that_the_engine_does_not_support_is_refused_at_run_time_too() -> None:
    async with ChatStream(engine=CannotPreempt()) as chat_stream:
        with pytest.raises(ConfigError, match="preempt"):
            chat_stream.set_policy("fair-token")
        chat_stream.set_policy("fair")
        assert chat_stream.stats().policy == "fair"


class SlowToLoad(FakeEngine):
    async def start(self) -> None:
        await asyncio.sleep(5.0)
        await super().start()


@in_virtual_time
async def test_a_drain_started_during_the_load_stays() -> None:
    chat_stream = ChatStream(engine=SlowToLoad())
    starting = asyncio.create_task(chat_stream.start_queue_worker())
    await asyncio.sleep(1.0)
    chat_stream.start_drain(by="admin")
    await starting
    assert chat_stream.stats().is_draining
    with pytest.raises(ShuttingDown):
        await chat_stream.submit(ChatRequest(messages=(Message("user", "hello"),)))
    await chat_stream.start_queue_worker()
    assert chat_stream.stats().is_open
    await chat_stream.stop_queue_worker()


@in_virtual_time
async def test_a_start_during_a_stop_has_no_effect() -> None:
    chat_stream = ChatStream(engine=FakeEngine(["x"] * 30, step_s=0.1))
    await chat_stream.start_queue_worker()
    stream = await chat_stream.submit(ChatRequest(messages=(Message("user", "hello"),)))
    stopping = asyncio.create_task(chat_stream.stop_queue_worker(10.0))
    await asyncio.sleep(1.0)
    await chat_stream.start_queue_worker()
    await stopping
    assert chat_stream.stats().is_draining
    stream.close()


@pytest.mark.parametrize("priority", ["a", 1.5, True])
def test_a_priority_is_a_whole_number(priority: Any) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        ChatRequest(priority=priority)


@pytest.mark.parametrize(("text", "tokens"), [("word " * 80, 100), ("東京の天気は晴れ" * 10, 60), ("", 0)])
def test_a_prompt_is_estimated_by_its_bytes(text: str, tokens: int) -> None:
    """An estimate by characters admitted four times the allowed Japanese tokens."""
    assert ChatRequest(messages=(Message("user", text),)).estimated_prompt_tokens == tokens
