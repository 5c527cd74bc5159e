"""Resumable streams: no event is lost or repeated, and logs are bounded in time and memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from sys import getsizeof

import pytest

from chatstream.errors import (
    Cancelled,
    ChatStreamError,
    ConfigError,
    EngineError,
    InvalidRequest,
    NotFound,
    ShuttingDown,
)
from chatstream.runtime import RequestStream, RuntimeSettings
from chatstream.runtime.resumable import EVENT_BYTES, LOG_BYTES, LOGPROB_BYTES, ResumableStats
from chatstream.testing import FakeEngine, Fault, VirtualTimeLoop, run_virtual
from chatstream.testing.fake_engine import Step
from chatstream.types import Done, Failed, GenerationRequest, SamplingParams, StreamEvent, Token, TokenDelta
from tests.runtime.harness import Harness, eventually, in_virtual_time, kinds, read, text

GRACE_S = 30.0
STEP_S = 0.1
WORDS = [f"w{n} " for n in range(40)]
ANSWER = "".join(WORDS)
TOKEN_BYTES = EVENT_BYTES + getsizeof("w10 ")
"""Size of most tokens."""
NOTHING = ResumableStats(live=0, ended=0, disconnected=0, unread=0, bytes=0)


class ResumableHarness(Harness):
    """A harness with resumable requests."""

    def submit_resumable(self, request_id: str, **details: object) -> RequestStream:
        stream = self.submit(request_id, **details)
        self.worker.resumables.keep(stream)
        return stream

    def resume(self, request_id: str, last_id: int = 0) -> RequestStream:
        return self.worker.resumables.attach(request_id, last_id)

    def ended_by(self, request_id: str) -> str:
        (end,) = self.ends[request_id]
        return end.by

    @property
    def kept(self) -> ResumableStats:
        return self.worker.resumables.stats()

    async def check_nothing_is_left(self) -> None:
        """Also no log and no timer."""
        await super().check_nothing_is_left()
        assert self.kept == NOTHING
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert loop.num_timers == 0


@asynccontextmanager
async def open_harness(
    script: list[Step] | list[str] = WORDS, n: int = 1, engine: FakeEngine | None = None, **runtime: object
) -> AsyncIterator[ResumableHarness]:
    harness = ResumableHarness(
        engine or FakeEngine(list(script), step_s=STEP_S),
        max_concurrency=n,
        runtime=RuntimeSettings(resume_grace_s=GRACE_S, **runtime),  # type: ignore[arg-type]
    )
    yield harness
    await harness.worker.stop()
    await harness.check_nothing_is_left()


async def take(stream: RequestStream, count: int) -> list[StreamEvent]:
    return [await anext(stream) for _ in range(count)]


def now_s() -> float:
    return asyncio.get_running_loop().time()


# --- a reader comes back ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_resumed_stream_continues_with_the_next_event_and_the_same_numbers() -> None:
    async with open_harness() as harness:
        first = harness.submit_resumable("a")
        before = await take(first, 11)
        first.close()
        await asyncio.sleep(10 * STEP_S)
        second = harness.resume("a", first.last_id)
        numbers, after = [], []
        async for event in second:
            numbers.append(second.last_id)
            after.append(event)
        assert kinds(before) == ["started"] + ["token"] * 10
        assert text(before) + text(after) == ANSWER
        assert numbers == list(range(12, 43))
        assert harness.ended_by("a") == ""
        assert now_s() == pytest.approx(len(WORDS) * STEP_S)  # the generation did not pause


@in_virtual_time
async def test_without_an_event_id_a_resumed_stream_starts_at_the_first_event() -> None:
    async with open_harness() as harness:
        first = harness.submit_resumable("a")
        await take(first, 20)
        first.close()
        assert text(await read(harness.resume("a"))) == ANSWER
        assert text(await read(harness.resume("a"))) == ANSWER


@in_virtual_time
async def test_an_event_that_arrived_partly_is_sent_again() -> None:
    async with open_harness() as harness:
        (await read(harness.submit_resumable("a")))[-1]
        stream = harness.worker.resumables.attach("a", 3, has_whole_event=False)
        assert (await anext(stream), stream.last_id) == (Token(WORDS[1]), 3)
        stream.close()


@in_virtual_time
async def test_a_disconnected_request_keeps_its_position_and_only_the_newest_is_sent() -> None:
    async with open_harness([Fault.HANG]) as harness:
        others = [harness.submit(f"o{n}") for n in range(4)]
        first = harness.submit_resumable("a")
        assert [event.position for event in await take(first, 1)] == [4]  # type: ignore[union-attr]
        first.close()
        for other in others[1:]:
            await asyncio.sleep(2.0)
            other.close()
            await eventually(lambda: harness.worker.stats().running == 1)
        await asyncio.sleep(2.0)
        second = harness.resume("a", 1)
        (queued,) = await take(second, 1)
        assert (queued.position, second.last_id) == (1, 2)  # type: ignore[union-attr]
        assert second.next_nowait() is None
        second.close()
        others[0].close()
        await eventually(lambda: harness.worker.stats().waiting == 0)  # the request has started without a reader
        assert (await anext(harness.resume("a", 2))).type == "started"


@in_virtual_time
async def test_a_disconnected_request_is_counted_by_requests_behind_it() -> None:
    async with open_harness([Fault.HANG]) as harness:
        harness.submit("running")
        harness.submit_resumable("a").close()
        behind = harness.submit("b")
        assert (await anext(behind)).position == 2  # type: ignore[union-attr]
        await asyncio.sleep(GRACE_S + 2.0)
        assert (await anext(behind)).position == 1  # type: ignore[union-attr]


@in_virtual_time
async def test_a_generation_does_not_pause_without_a_reader() -> None:
    async with open_harness(max_buffered_tokens=2) as harness:
        harness.submit_resumable("a").close()
        await asyncio.sleep(len(WORDS) * STEP_S + 0.01)
        assert harness.worker.stats().running == 0
        assert text(await read(harness.resume("a"))) == ANSWER


@in_virtual_time
async def test_baseline_a_request_that_is_not_resumable_ends_with_its_reader() -> None:
    async with open_harness() as harness:
        stream = harness.submit("a")
        await take(stream, 5)
        stream.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert harness.worker.stats().running == 0
        assert harness.ended_by("a") == "client_disconnected"
        with pytest.raises(NotFound):
            harness.resume("a")


# --- how long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_started", [True, False])
@in_virtual_time
async def test_a_request_that_is_not_resumed_is_cancelled_after_the_grace_time(has_started: bool) -> None:
    async with open_harness([Fault.HANG]) as harness:
        if not has_started:
            harness.submit("running")
        stream = harness.submit_resumable("a")
        await asyncio.sleep(5.0)
        stream.close()
        await asyncio.sleep(GRACE_S - 0.01)
        assert "a" not in harness.ends
        assert harness.kept.disconnected == 1
        await asyncio.sleep(0.02)
        assert harness.ended_by("a") == "client_disconnected"
        assert harness.ends["a"][0].has_started == has_started
        assert harness.kept == NOTHING
        with pytest.raises(NotFound):
            harness.resume("a")


@in_virtual_time
async def test_the_grace_time_restarts_at_each_disconnect() -> None:
    async with open_harness([Fault.HANG]) as harness:
        stream = harness.submit_resumable("a")
        for _ in range(3):
            stream.close()
            await asyncio.sleep(GRACE_S - 1.0)
            stream = harness.resume("a")
            await asyncio.sleep(GRACE_S + 1.0)  # no timer runs while a reader is attached
        stream.close()
        await asyncio.sleep(GRACE_S - 1.0)
        assert harness.worker.stats().running == 1
        await asyncio.sleep(2.0)
        assert harness.worker.stats().running == 0


@pytest.mark.parametrize("has_reader_at_the_end", [True, False])
@in_virtual_time
async def test_an_answer_stays_readable_for_the_grace_time_after_its_end(has_reader_at_the_end: bool) -> None:
    async with open_harness() as harness:
        stream = harness.submit_resumable("a")
        if has_reader_at_the_end:
            await read(stream)
        stream.close()
        end_s = len(WORDS) * STEP_S
        await asyncio.sleep(end_s + GRACE_S - 0.01 - now_s())
        assert text(await read(harness.resume("a"))) == ANSWER
        await asyncio.sleep(0.02)
        assert harness.kept == NOTHING
        with pytest.raises(NotFound):
            harness.resume("a")


@in_virtual_time
async def test_a_request_that_ended_before_keep_is_kept_too() -> None:
    async with open_harness() as harness:
        stream = harness.submit("a")
        await asyncio.sleep(len(WORDS) * STEP_S + 1.0)
        harness.worker.resumables.keep(stream)
        stream.close()
        assert text(await read(harness.resume("a"))) == ANSWER
        await asyncio.sleep(GRACE_S)
        assert harness.kept == NOTHING


@in_virtual_time
async def test_a_reader_attached_at_the_end_of_the_grace_time_reads_on() -> None:
    async with open_harness() as harness:
        await read(harness.submit_resumable("a"))
        slow = harness.resume("a")
        await take(slow, 5)
        await asyncio.sleep(GRACE_S + 1.0)
        assert harness.kept == NOTHING
        assert len(await read(slow)) == len(WORDS) + 2 - 5
        slow.close()


@in_virtual_time
async def test_a_request_cancelled_without_a_reader_reports_it_to_the_next_reader() -> None:
    async with open_harness() as harness:
        stream = harness.submit_resumable("a")
        await take(stream, 3)
        stream.close()
        assert harness.worker.cancel("a")
        (end,) = (event for event in await read(harness.resume("a", 3)) if event.type == "error")
        assert isinstance(end, Failed)
        assert isinstance(end.error, Cancelled)
        await eventually(lambda: "a" in harness.ends)
        assert harness.ended_by("a") == "client"
        await asyncio.sleep(GRACE_S)
        assert harness.kept == NOTHING


@pytest.mark.parametrize("has_started", [True, False])
@in_virtual_time
async def test_a_stop_ends_disconnected_requests_like_all_others(has_started: bool) -> None:
    async with open_harness([Fault.HANG]) as harness:
        if not has_started:
            harness.submit("running")
        harness.submit_resumable("a").close()
        stopping = asyncio.create_task(harness.worker.stop(grace_s=5.0))
        await asyncio.sleep(6.0)
        await stopping
        error = harness.ends["a"][0].event.error  # type: ignore[union-attr]
        assert isinstance(error, ShuttingDown)
        await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_disconnected_request_may_finish_within_the_grace_time_of_a_stop() -> None:
    async with open_harness() as harness:
        harness.submit_resumable("a").close()
        await harness.worker.stop(grace_s=60.0)
        assert isinstance(harness.ends["a"][0].event, Done)


# --- one reader at a time ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_later_reader_takes_over_and_the_earlier_one_ends_without_a_last_event() -> None:
    async with open_harness() as harness:
        first = harness.submit_resumable("a")
        earlier = asyncio.create_task(all_of(first))
        await asyncio.sleep(10.5 * STEP_S)
        second = harness.resume("a", 5)
        seen = await earlier
        assert kinds(seen) == ["started"] + ["token"] * 10
        first.close()  # as a response does at its end: no effect
        assert harness.kept.disconnected == 0
        assert text(seen[:5]) + text(await all_of(second)) == ANSWER


@in_virtual_time
async def test_a_refused_attach_does_not_take_over() -> None:
    async with open_harness() as harness:
        first = harness.submit_resumable("a")
        await take(first, 3)
        for number in (4, 10**9, -1):
            with pytest.raises(InvalidRequest, match="event") as refusal:
                harness.resume("a", number)
            assert refusal.value.param == "event_id"
        assert text(await all_of(first)) == "".join(WORDS[2:])


async def all_of(stream: RequestStream) -> list[StreamEvent]:
    return [event async for event in stream]


# --- how much --------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_log_probabilities_count_towards_the_kept_bytes() -> None:
    class WithLogprobs(FakeEngine):
        def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
            return super().stream(replace(request, sampling=SamplingParams(logprobs=1)))

    sizes = []
    for engine in (FakeEngine(WORDS), WithLogprobs(WORDS)):
        async with open_harness(engine=engine) as harness:
            await all_of(harness.submit_resumable("a"))
            sizes.append(harness.kept.bytes)
    assert sizes[1] - sizes[0] == len(WORDS) * 2 * LOGPROB_BYTES


@in_virtual_time
async def test_a_full_log_drops_its_oldest_events_and_names_the_first_resumable_one() -> None:
    async with open_harness(max_resume_bytes_per_request=10 * TOKEN_BYTES) as harness:
        stream = harness.submit_resumable("a")
        await asyncio.sleep(5.5 * STEP_S)
        assert len(await take(stream, 6)) == 6
        stream.close()
        await asyncio.sleep(len(WORDS) * STEP_S)
        assert harness.kept.bytes <= LOG_BYTES + 10 * TOKEN_BYTES + EVENT_BYTES
        for number in (0, 6, 30):
            with pytest.raises(InvalidRequest, match=r"events up to 31 .* resume at event 31 or later"):
                harness.resume("a", number)
        rest = await read(harness.resume("a", 31))
        assert text(rest) == "".join(WORDS[30:])


@in_virtual_time
async def test_a_generation_pauses_for_an_attached_reader_that_would_lose_events() -> None:
    async with open_harness(max_resume_bytes_per_request=10 * TOKEN_BYTES, reader_stall_timeout_s=15.0) as harness:
        stream = harness.submit_resumable("a")
        await asyncio.sleep(10.0)
        assert harness.worker.stats().running == 1
        assert sum(map(len, harness.engine.generated.values())) < 15
        assert text(await read(stream)) == ANSWER


@in_virtual_time
async def test_a_stalled_reader_is_dismissed_and_its_request_continues() -> None:
    async with open_harness(max_resume_bytes_per_request=10 * TOKEN_BYTES, reader_stall_timeout_s=15.0) as harness:
        stream = harness.submit_resumable("a")
        await asyncio.sleep(16.0 + len(WORDS) * STEP_S)
        assert harness.worker.stats().running == 0
        assert harness.ended_by("a") == ""
        assert await all_of(stream) == []
        assert text(await read(harness.resume("a", 31))) == "".join(WORDS[30:])


@in_virtual_time
async def test_the_earliest_ended_logs_without_a_reader_are_removed_first() -> None:
    an_answer = LOG_BYTES + 42 * TOKEN_BYTES
    async with open_harness(n=4, max_resume_bytes=3 * an_answer) as harness:
        for name in "abc":
            await read(stream := harness.submit_resumable(name))
            stream.close()
        reader = harness.resume("a")
        await read(harness.submit_resumable("d"))
        assert harness.kept.bytes <= 3 * an_answer
        with pytest.raises(NotFound):
            harness.resume("b")
        assert text(await read(reader)) == ANSWER
        for name in "acd":
            assert text(await read(harness.resume(name))) == ANSWER


@in_virtual_time
async def test_an_ended_log_with_a_reader_is_not_removed() -> None:
    async with open_harness(n=2, max_resume_bytes=LOG_BYTES + 42 * TOKEN_BYTES) as harness:
        there = harness.submit_resumable("a")
        await asyncio.sleep(len(WORDS) * STEP_S + 1.0)
        await read(harness.submit_resumable("b"))
        assert text(await read(there)) == ANSWER
        assert text(await read(harness.resume("a"))) == ANSWER


@in_virtual_time
async def test_a_log_without_room_keeps_its_newest_event_and_no_generation_pauses() -> None:
    async with open_harness(n=2, max_resume_bytes=2 * LOG_BYTES + 20 * TOKEN_BYTES) as harness:
        harness.submit_resumable("a").close()
        await asyncio.sleep(2.5)  # its log has filled the memory
        harness.submit_resumable("b").close()
        await asyncio.sleep(1.0)
        assert harness.kept.bytes <= 2 * LOG_BYTES + 22 * TOKEN_BYTES
        assert len(harness.engine.generated["b"]) == 9
        assert text(await take(harness.resume("b", 10), 1)) == WORDS[9]


@in_virtual_time
async def test_the_bound_of_all_logs_holds_also_while_they_all_grow() -> None:
    bound = 4 * LOG_BYTES + 20 * TOKEN_BYTES
    async with open_harness(n=4, max_resume_bytes=bound) as harness:
        for name in "abcd":
            harness.submit_resumable(name).close()
        for _ in range(60):
            await asyncio.sleep(STEP_S)
            assert harness.kept.bytes <= bound + 4 * TOKEN_BYTES  # one event per log if nothing else can be dropped
        assert len(harness.ends) == 4
        assert all(isinstance(end.event, Done) for (end,) in harness.ends.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"resume_grace_s": -1.0},
        {"resume_grace_s": float("inf")},
        {"resume_grace_s": None},
        {"max_resume_bytes": 0},
        {"max_resume_bytes_per_request": 0},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RuntimeSettings(**wrong)  # type: ignore[arg-type]


# --- all of it at once -----------------------------------------------------------------------------------------------


class Crowd:
    """A thousand clients whose connections break at random; some never reconnect.

    `resumes_at`: "last" resumes after the last event, as documented; "now" would lose events, "start" would repeat
    them.
    """

    def __init__(self, seed: int, resumes_at: str = "last") -> None:
        self.rng = random.Random(seed)
        self.resumes_at = resumes_at
        self.scripts: dict[str, list[Step]] = {}
        self.seen: dict[str, list[tuple[int, StreamEvent]]] = {}
        self.num_connections = 0
        self.num_waiting_disconnects = 0
        self.harness = ResumableHarness(
            FakeEngine(lambda request: self.scripts[request.request_id], step_s=0.02),
            is_started=False,
            max_concurrency=8,
            max_queue_size=200,
            abort_timeout_s=5.0,
            runtime=RuntimeSettings(
                max_buffered_tokens=4,
                resume_grace_s=3.0,
                reader_stall_timeout_s=2.0,
                max_resume_bytes_per_request=100_000,
                max_resume_bytes=600_000,
            ),
        )

    async def run(self, num_requests: int) -> None:
        self.harness.worker.start()
        clients = []
        for n in range(num_requests):
            await asyncio.sleep(self.rng.expovariate(9.0))
            clients.append(asyncio.create_task(self.client(f"r{n}")))
        await asyncio.gather(*clients)
        await asyncio.sleep(60.0)
        assert self.harness.kept == NOTHING
        assert all(len(self.harness.ends[request_id]) == 1 for request_id in self.seen)
        await self.harness.worker.stop()
        await self.harness.check_nothing_is_left()

    async def client(self, request_id: str) -> None:
        rng = self.rng
        script: list[Step] = [f"{request_id}.{n} " for n in range(rng.randint(1, 40))]
        self.scripts[request_id] = script + rng.choice([[]] * 18 + [[EngineError("boom")], [Fault.HANG]])
        try:
            stream = self.harness.submit_resumable(request_id)
        except ChatStreamError:
            return
        seen = self.seen[request_id] = []
        while True:
            self.num_connections += 1
            await self.connect(stream, seen, rng.expovariate(1.0))
            if stream.is_exhausted or rng.random() < 0.1:
                stream.close()
                return
            if rng.random() < 0.7:  # the other clients reconnect before the server notices
                self.num_waiting_disconnects += not stream.has_started
                stream.close()
                await asyncio.sleep(rng.uniform(0.0, 2.0))
            del seen[len(seen) - rng.randint(0, min(3, len(seen))) :]  # still in transit
            last_id = seen[-1][0] if seen else 0
            last_id = {"last": last_id, "now": stream.log.last_id, "start": 0}[self.resumes_at]
            try:
                stream = self.harness.resume(request_id, last_id)
            except NotFound:
                return

    async def connect(self, stream: RequestStream, seen: list[tuple[int, StreamEvent]], for_s: float) -> None:
        try:
            async with asyncio.timeout(for_s):
                while (event := await anext(stream, None)) is not None:
                    seen.append((stream.last_id, event))
        except TimeoutError:
            pass

    def num_wrong(self) -> int:
        """Number of clients with a repeated, misordered, missing or altered event."""
        return sum(not self.is_correct(request_id) for request_id in self.seen)

    def is_correct(self, request_id: str) -> bool:
        seen = self.seen[request_id]
        numbers = [number for number, _ in seen]
        after_the_wait = [number for number, event in seen if event.type != "queued"]
        generated = "".join(self.harness.engine.generated.get(request_id, []))
        answer = text([event for _, event in seen])
        if numbers != sorted(set(numbers)):
            return False
        if after_the_wait and after_the_wait != [*range(numbers[-1] + 1 - len(after_the_wait), numbers[-1] + 1)]:
            return False
        has_all = bool(seen) and isinstance(seen[-1][1], Done)
        return answer == generated if has_all else generated.startswith(answer)


def test_a_thousand_reconnecting_clients_lose_and_repeat_no_event_and_leave_nothing_behind() -> None:
    crowd = Crowd(seed=1)
    run_virtual(crowd.run(1000))
    assert crowd.num_wrong() == 0
    # Each kind of event occurred often.
    ends = [end for (end,) in crowd.harness.ends.values()]
    assert len(ends) > 950
    assert crowd.num_connections > 2 * len(ends)
    assert crowd.num_waiting_disconnects > 100
    assert sum(end.by == "client_disconnected" for end in ends) > 100
    assert sum(isinstance(end.event, Done) for end in ends) > 200


@pytest.mark.parametrize("resumes_at", ["now", "start"])
def test_baseline_a_resumption_at_a_wrong_event_is_detected(resumes_at: str) -> None:
    crowd = Crowd(1, resumes_at)
    run_virtual(crowd.run(100))
    assert crowd.num_wrong() > 10
