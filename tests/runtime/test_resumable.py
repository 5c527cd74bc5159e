"""Streams whose readers come back: nothing lost, nothing twice, nothing kept for longer or in more memory than said."""

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
from tests.runtime.house import House, eventually, in_virtual_time, kinds, read, text

GRACE_S = 30.0
STEP_S = 0.1
WORDS = [f"w{n} " for n in range(40)]
ANSWER = "".join(WORDS)
TOKEN_BYTES = EVENT_BYTES + getsizeof("w10 ")
"""Of most of them."""
NOTHING = ResumableStats(live=0, ended=0, disconnected=0, unread=0, bytes=0)


class Line(House):
    """A house whose requests can be resumed."""

    def ask(self, request_id: str, **details: object) -> RequestStream:
        stream = self.submit(request_id, **details)
        self.worker.resumables.keep(stream)
        return stream

    def again(self, request_id: str, last_id: int = 0) -> RequestStream:
        return self.worker.resumables.attach(request_id, last_id)

    def ended_by(self, request_id: str) -> str:
        (end,) = self.ends[request_id]
        return end.by

    @property
    def kept(self) -> ResumableStats:
        return self.worker.resumables.stats()

    async def check_nothing_is_left(self) -> None:
        """No log and no timer either."""
        await super().check_nothing_is_left()
        assert self.kept == NOTHING
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert loop.num_timers == 0


@asynccontextmanager
async def open_line(
    script: list[Step] | list[str] = WORDS, n: int = 1, engine: FakeEngine | None = None, **runtime: object
) -> AsyncIterator[Line]:
    line = Line(
        engine or FakeEngine(list(script), step_s=STEP_S),
        max_concurrency=n,
        runtime=RuntimeSettings(resume_grace_s=GRACE_S, **runtime),  # type: ignore[arg-type]
    )
    yield line
    await line.worker.stop()
    await line.check_nothing_is_left()


async def take(stream: RequestStream, count: int) -> list[StreamEvent]:
    return [await anext(stream) for _ in range(count)]


def now_s() -> float:
    return asyncio.get_running_loop().time()


# --- a reader comes back ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_who_comes_back_gets_exactly_what_follows_with_the_same_numbers() -> None:
    async with open_line() as line:
        first = line.ask("a")
        before = await take(first, 11)
        first.close()
        await asyncio.sleep(10 * STEP_S)
        second = line.again("a", first.last_id)
        numbers, after = [], []
        async for event in second:
            numbers.append(second.last_id)
            after.append(event)
        assert kinds(before) == ["started"] + ["token"] * 10
        assert text(before) + text(after) == ANSWER
        assert numbers == list(range(12, 43))
        assert line.ended_by("a") == ""
        assert now_s() == pytest.approx(len(WORDS) * STEP_S)  # nobody paused for anybody


@in_virtual_time
async def test_without_a_number_it_begins_at_the_first_event() -> None:
    async with open_line() as line:
        first = line.ask("a")
        await take(first, 20)
        first.close()
        assert text(await read(line.again("a"))) == ANSWER
        assert text(await read(line.again("a"))) == ANSWER


@in_virtual_time
async def test_an_event_of_which_only_a_part_arrived_comes_again() -> None:
    async with open_line() as line:
        (await read(line.ask("a")))[-1]
        stream = line.worker.resumables.attach("a", 3, has_whole_event=False)
        assert (await anext(stream), stream.last_id) == (Token(WORDS[1]), 3)
        stream.close()


@in_virtual_time
async def test_a_place_is_kept_for_who_comes_back_and_of_its_changes_only_the_last_is_told() -> None:
    async with open_line([Fault.HANG]) as line:
        others = [line.submit(f"o{n}") for n in range(4)]
        first = line.ask("a")
        assert [event.position for event in await take(first, 1)] == [4]  # type: ignore[union-attr]
        first.close()
        for other in others[1:]:
            await asyncio.sleep(2.0)
            other.close()
            await eventually(lambda: line.worker.stats().running == 1)
        await asyncio.sleep(2.0)
        second = line.again("a", 1)
        (queued,) = await take(second, 1)
        assert (queued.position, second.last_id) == (1, 2)  # type: ignore[union-attr]
        assert second.next_nowait() is None
        second.close()
        others[0].close()
        await eventually(lambda: line.worker.stats().waiting == 0)  # it has started without a reader
        assert (await anext(line.again("a", 2))).type == "started"


@in_virtual_time
async def test_who_left_is_counted_by_those_behind() -> None:
    async with open_line([Fault.HANG]) as line:
        line.submit("running")
        line.ask("a").close()
        behind = line.submit("b")
        assert (await anext(behind)).position == 2  # type: ignore[union-attr]
        await asyncio.sleep(GRACE_S + 2.0)
        assert (await anext(behind)).position == 1  # type: ignore[union-attr]


@in_virtual_time
async def test_a_generation_does_not_pause_for_a_reader_who_is_not_there() -> None:
    async with open_line(max_buffered_tokens=2) as line:
        line.ask("a").close()
        await asyncio.sleep(len(WORDS) * STEP_S + 0.01)
        assert line.worker.stats().running == 0
        assert text(await read(line.again("a"))) == ANSWER


@in_virtual_time
async def test_baseline_without_being_resumable_a_request_ends_with_its_reader_at_once() -> None:
    async with open_line() as line:
        stream = line.submit("a")
        await take(stream, 5)
        stream.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert line.worker.stats().running == 0
        assert line.ended_by("a") == "client_disconnected"
        with pytest.raises(NotFound):
            line.again("a")


# --- how long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_started", [True, False])
@in_virtual_time
async def test_who_does_not_come_back_is_cancelled_after_the_grace_time(has_started: bool) -> None:
    async with open_line([Fault.HANG]) as line:
        if not has_started:
            line.submit("running")
        stream = line.ask("a")
        await asyncio.sleep(5.0)
        stream.close()
        await asyncio.sleep(GRACE_S - 0.01)
        assert "a" not in line.ends
        assert line.kept.disconnected == 1
        await asyncio.sleep(0.02)
        assert line.ended_by("a") == "client_disconnected"
        assert line.ends["a"][0].has_started == has_started
        assert line.kept == NOTHING
        with pytest.raises(NotFound):
            line.again("a")


@in_virtual_time
async def test_the_grace_time_begins_anew_whenever_a_reader_leaves() -> None:
    async with open_line([Fault.HANG]) as line:
        stream = line.ask("a")
        for _ in range(3):
            stream.close()
            await asyncio.sleep(GRACE_S - 1.0)
            stream = line.again("a")
            await asyncio.sleep(GRACE_S + 1.0)  # while it is there, nothing runs out
        stream.close()
        await asyncio.sleep(GRACE_S - 1.0)
        assert line.worker.stats().running == 1
        await asyncio.sleep(2.0)
        assert line.worker.stats().running == 0


@pytest.mark.parametrize("has_reader_at_the_end", [True, False])
@in_virtual_time
async def test_an_answer_stays_readable_for_the_grace_time_after_its_end(has_reader_at_the_end: bool) -> None:
    async with open_line() as line:
        stream = line.ask("a")
        if has_reader_at_the_end:
            await read(stream)
        stream.close()
        end_s = len(WORDS) * STEP_S
        await asyncio.sleep(end_s + GRACE_S - 0.01 - now_s())
        assert text(await read(line.again("a"))) == ANSWER
        await asyncio.sleep(0.02)
        assert line.kept == NOTHING
        with pytest.raises(NotFound):
            line.again("a")


@in_virtual_time
async def test_a_request_that_has_ended_before_it_is_kept_is_kept_like_the_others() -> None:
    async with open_line() as line:
        stream = line.submit("a")
        await asyncio.sleep(len(WORDS) * STEP_S + 1.0)
        line.worker.resumables.keep(stream)
        stream.close()
        assert text(await read(line.again("a"))) == ANSWER
        await asyncio.sleep(GRACE_S)
        assert line.kept == NOTHING


@in_virtual_time
async def test_who_reads_when_the_time_is_over_reads_on() -> None:
    async with open_line() as line:
        await read(line.ask("a"))
        slow = line.again("a")
        await take(slow, 5)
        await asyncio.sleep(GRACE_S + 1.0)
        assert line.kept == NOTHING
        assert len(await read(slow)) == len(WORDS) + 2 - 5
        slow.close()


@in_virtual_time
async def test_a_request_that_was_ended_by_its_id_while_nobody_read_says_so_to_who_comes_back() -> None:
    async with open_line() as line:
        stream = line.ask("a")
        await take(stream, 3)
        stream.close()
        assert line.worker.cancel("a")
        (end,) = (event for event in await read(line.again("a", 3)) if event.type == "error")
        assert isinstance(end, Failed)
        assert isinstance(end.error, Cancelled)
        await eventually(lambda: "a" in line.ends)
        assert line.ended_by("a") == "client"
        await asyncio.sleep(GRACE_S)
        assert line.kept == NOTHING


@pytest.mark.parametrize("has_started", [True, False])
@in_virtual_time
async def test_a_stop_ends_those_who_left_like_all_others(has_started: bool) -> None:
    async with open_line([Fault.HANG]) as line:
        if not has_started:
            line.submit("running")
        line.ask("a").close()
        stopping = asyncio.create_task(line.worker.stop(grace_s=5.0))
        await asyncio.sleep(6.0)
        await stopping
        error = line.ends["a"][0].event.error  # type: ignore[union-attr]
        assert isinstance(error, ShuttingDown)
        await line.check_nothing_is_left()


@in_virtual_time
async def test_who_left_may_finish_within_the_grace_of_a_stop() -> None:
    async with open_line() as line:
        line.ask("a").close()
        await line.worker.stop(grace_s=60.0)
        assert isinstance(line.ends["a"][0].event, Done)


# --- one reader at a time ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_later_reader_takes_over_and_the_earlier_one_ends_without_a_last_event() -> None:
    async with open_line() as line:
        first = line.ask("a")
        earlier = asyncio.create_task(all_of(first))
        await asyncio.sleep(10.5 * STEP_S)
        second = line.again("a", 5)
        seen = await earlier
        assert kinds(seen) == ["started"] + ["token"] * 10
        first.close()  # as a response does in the end: nobody's concern any more
        assert line.kept.disconnected == 0
        assert text(seen[:5]) + text(await all_of(second)) == ANSWER


@in_virtual_time
async def test_who_asks_for_what_cannot_be_had_takes_nothing_over() -> None:
    async with open_line() as line:
        first = line.ask("a")
        await take(first, 3)
        for number in (4, 10**9, -1):
            with pytest.raises(InvalidRequest, match="event") as refusal:
                line.again("a", number)
            assert refusal.value.param == "event_id"
        assert text(await all_of(first)) == "".join(WORDS[2:])


async def all_of(stream: RequestStream) -> list[StreamEvent]:
    return [event async for event in stream]


# --- how much --------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_log_probabilities_count_too() -> None:
    class Telling(FakeEngine):
        def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
            return super().stream(replace(request, sampling=SamplingParams(logprobs=1)))

    sizes = []
    for engine in (FakeEngine(WORDS), Telling(WORDS)):
        async with open_line(engine=engine) as line:
            await all_of(line.ask("a"))
            sizes.append(line.kept.bytes)
    assert sizes[1] - sizes[0] == len(WORDS) * 2 * LOGPROB_BYTES


@in_virtual_time
async def test_a_full_log_loses_its_oldest_events_and_says_from_where_it_can_be_resumed() -> None:
    async with open_line(max_resume_bytes_per_request=10 * TOKEN_BYTES) as line:
        stream = line.ask("a")
        await asyncio.sleep(5.5 * STEP_S)
        assert len(await take(stream, 6)) == 6
        stream.close()
        await asyncio.sleep(len(WORDS) * STEP_S)
        assert line.kept.bytes <= LOG_BYTES + 10 * TOKEN_BYTES + EVENT_BYTES
        for number in (0, 6, 30):
            with pytest.raises(InvalidRequest, match=r"events up to 31 .* resume at event 31 or later"):
                line.again("a", number)
        rest = await read(line.again("a", 31))
        assert text(rest) == "".join(WORDS[30:])


@in_virtual_time
async def test_a_generation_waits_for_a_reader_who_is_there_and_would_lose_something() -> None:
    async with open_line(max_resume_bytes_per_request=10 * TOKEN_BYTES, reader_stall_timeout_s=15.0) as line:
        stream = line.ask("a")
        await asyncio.sleep(10.0)
        assert line.worker.stats().running == 1
        assert sum(map(len, line.engine.generated.values())) < 15
        assert text(await read(stream)) == ANSWER


@in_virtual_time
async def test_a_reader_who_takes_nothing_is_dismissed_and_its_request_goes_on() -> None:
    async with open_line(max_resume_bytes_per_request=10 * TOKEN_BYTES, reader_stall_timeout_s=15.0) as line:
        stream = line.ask("a")
        await asyncio.sleep(16.0 + len(WORDS) * STEP_S)
        assert line.worker.stats().running == 0
        assert line.ended_by("a") == ""
        assert await all_of(stream) == []
        assert text(await read(line.again("a", 31))) == "".join(WORDS[30:])


@in_virtual_time
async def test_of_all_logs_those_go_first_that_ended_first_and_that_nobody_reads() -> None:
    an_answer = LOG_BYTES + 42 * TOKEN_BYTES
    async with open_line(n=4, max_resume_bytes=3 * an_answer) as line:
        for name in "abc":
            await read(stream := line.ask(name))
            stream.close()
        reader = line.again("a")
        await read(line.ask("d"))
        assert line.kept.bytes <= 3 * an_answer
        with pytest.raises(NotFound):
            line.again("b")
        assert text(await read(reader)) == ANSWER
        for name in "acd":
            assert text(await read(line.again(name))) == ANSWER


@in_virtual_time
async def test_an_answer_whose_reader_has_not_left_yet_does_not_go() -> None:
    async with open_line(n=2, max_resume_bytes=LOG_BYTES + 42 * TOKEN_BYTES) as line:
        there = line.ask("a")
        await asyncio.sleep(len(WORDS) * STEP_S + 1.0)
        await read(line.ask("b"))
        assert text(await read(there)) == ANSWER
        assert text(await read(line.again("a"))) == ANSWER


@in_virtual_time
async def test_a_log_that_finds_no_room_at_all_holds_its_newest_event_and_nobody_waits() -> None:
    async with open_line(n=2, max_resume_bytes=2 * LOG_BYTES + 20 * TOKEN_BYTES) as line:
        line.ask("a").close()
        await asyncio.sleep(2.5)  # it has taken everything
        line.ask("b").close()
        await asyncio.sleep(1.0)
        assert line.kept.bytes <= 2 * LOG_BYTES + 22 * TOKEN_BYTES
        assert len(line.engine.generated["b"]) == 9
        assert text(await take(line.again("b", 10), 1)) == WORDS[9]


@in_virtual_time
async def test_the_bound_of_all_logs_holds_also_while_they_all_grow() -> None:
    bound = 4 * LOG_BYTES + 20 * TOKEN_BYTES
    async with open_line(n=4, max_resume_bytes=bound) as line:
        for name in "abcd":
            line.ask(name).close()
        for _ in range(60):
            await asyncio.sleep(STEP_S)
            assert line.kept.bytes <= bound + 4 * TOKEN_BYTES  # by one event each, where nothing else is left to go
        assert len(line.ends) == 4
        assert all(isinstance(end.event, Done) for (end,) in line.ends.values())


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
    """A thousand clients whose connections break at random, some of whom never come back.

    `resumes_at`: "last" as promised; a server that went on with what is new ("now") would lose, one that began again
    ("start") would repeat.
    """

    def __init__(self, seed: int, resumes_at: str = "last") -> None:
        self.rng = random.Random(seed)
        self.resumes_at = resumes_at
        self.scripts: dict[str, list[Step]] = {}
        self.seen: dict[str, list[tuple[int, StreamEvent]]] = {}
        self.num_connections = 0
        self.num_left_in_line = 0
        self.line = Line(
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
        self.line.worker.start()
        clients = []
        for n in range(num_requests):
            await asyncio.sleep(self.rng.expovariate(9.0))
            clients.append(asyncio.create_task(self.client(f"r{n}")))
        await asyncio.gather(*clients)
        await asyncio.sleep(60.0)
        assert self.line.kept == NOTHING
        assert all(len(self.line.ends[request_id]) == 1 for request_id in self.seen)
        await self.line.worker.stop()
        await self.line.check_nothing_is_left()

    async def client(self, request_id: str) -> None:
        rng = self.rng
        script: list[Step] = [f"{request_id}.{n} " for n in range(rng.randint(1, 40))]
        self.scripts[request_id] = script + rng.choice([[]] * 18 + [[EngineError("boom")], [Fault.HANG]])
        try:
            stream = self.line.ask(request_id)
        except ChatStreamError:
            return
        seen = self.seen[request_id] = []
        while True:
            self.num_connections += 1
            await self.connect(stream, seen, rng.expovariate(1.0))
            if stream.is_exhausted or rng.random() < 0.1:
                stream.close()
                return
            if rng.random() < 0.7:  # the rest comes back before the server has noticed
                self.num_left_in_line += not stream.has_started
                stream.close()
                await asyncio.sleep(rng.uniform(0.0, 2.0))
            del seen[len(seen) - rng.randint(0, min(3, len(seen))) :]  # was still on its way
            last_id = seen[-1][0] if seen else 0
            last_id = {"last": last_id, "now": stream.log.last_id, "start": 0}[self.resumes_at]
            try:
                stream = self.line.again(request_id, last_id)
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
        """Requests whose client has something twice, in the wrong order, not at all, or not as it was generated."""
        return sum(not self.is_right(request_id) for request_id in self.seen)

    def is_right(self, request_id: str) -> bool:
        seen = self.seen[request_id]
        numbers = [number for number, _ in seen]
        after_the_line = [number for number, event in seen if event.type != "queued"]
        generated = "".join(self.line.engine.generated.get(request_id, []))
        answer = text([event for _, event in seen])
        if numbers != sorted(set(numbers)):
            return False
        if after_the_line and after_the_line != [*range(numbers[-1] + 1 - len(after_the_line), numbers[-1] + 1)]:
            return False
        has_all = bool(seen) and isinstance(seen[-1][1], Done)
        return answer == generated if has_all else generated.startswith(answer)


def test_a_thousand_clients_who_come_and_go_lose_nothing_get_nothing_twice_and_leave_nothing_behind() -> None:
    crowd = Crowd(seed=1)
    run_virtual(crowd.run(1000))
    assert crowd.num_wrong() == 0
    # And all of it has happened often.
    ends = [end for (end,) in crowd.line.ends.values()]
    assert len(ends) > 950
    assert crowd.num_connections > 2 * len(ends)
    assert crowd.num_left_in_line > 100
    assert sum(end.by == "client_disconnected" for end in ends) > 100
    assert sum(isinstance(end.event, Done) for end in ends) > 200


@pytest.mark.parametrize("resumes_at", ["now", "start"])
def test_baseline_a_server_that_resumes_elsewhere_is_caught(resumes_at: str) -> None:
    crowd = Crowd(1, resumes_at)
    run_virtual(crowd.run(100))
    assert crowd.num_wrong() > 10
