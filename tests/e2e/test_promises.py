"""The twenty promises of the article on ChatStream's queueing system (2023), over real sockets with the mock engine.

R8 and R17 are also shown with real models, in test_interleaving.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise

import httpx2
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from chatstream import ChatStream
from chatstream.scheduler import events as ev
from tests.e2e.server import Server, ask, ask_legacy, asking, kinds, serve, text

pytestmark = pytest.mark.anyio

TOKEN_S = 0.02
LONG = " ".join(f"w{n}" for n in range(40))
ENDLESS = " ".join(["on"] * 100_000)
SHORT = "a b c d e"


@contextmanager
def mock_server(max_concurrency: int, max_queue_size: int = 50, time_per_token_s: float = TOKEN_S) -> Iterator[Server]:
    chat_stream = ChatStream(
        use_mock_response=True,
        mock_params={"type": "echo", "time_per_token_sec": time_per_token_s},
        max_concurrency=max_concurrency,
        max_queue_size=max_queue_size,
    )
    with serve(chat_stream) as server:
        yield server


def host_app(chat_stream: ChatStream) -> FastAPI:
    """An application as in the article, with `start_queue_worker` called by the test."""
    app = FastAPI()

    @app.post("/chat_stream")
    async def stream_api(request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request)

    @app.post("/start")
    async def start() -> Response:
        await chat_stream.start_queue_worker()
        return JSONResponse({})

    return app


@asynccontextmanager
async def backlog(limit: int, count: int, words: str = SHORT) -> AsyncIterator[Server]:
    """A server that has just started to serve `count` waiting requests.

    They start in the same step, independent of the speed of the machine.
    """
    chat_stream = ChatStream(
        use_mock_response=True,
        mock_params={"type": "echo", "time_per_token_sec": 0.005},
        num_of_concurrent_executions=limit,
        max_queue_size=count,
    )
    with serve(chat_stream, host_app(chat_stream)) as server:
        crowd = [asyncio.create_task(ask_as_somebody(server, words)) for _ in range(count)]
        await server.until(lambda: server.waiting == count)
        async with server.client() as client:
            await client.post("/start")
        yield server
        assert await asyncio.gather(*crowd) == [words] * count


async def ask_as_somebody(server: Server, words: str) -> str:
    async with server.client() as client:
        return text(await ask(client, words))


def started_ids(server: Server) -> list[str]:
    return [event.request_id for event in server.log if isinstance(event, ev.Started)]


def token_log(server: Server) -> list[str]:
    """The request of each generated token, in order."""
    return [event.request_id for event in server.log if isinstance(event, ev.Tokens) for _ in range(event.num_tokens)]


async def test_r01_simultaneous_requests_are_queued_instead_of_failing() -> None:
    with mock_server(2) as server:
        answers = await asyncio.gather(*(ask_as_somebody(server, f"{n} {SHORT}") for n in range(5)))
        assert answers == [f"{n} {SHORT}" for n in range(5)]
        await server.until_idle()


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_r02_the_number_of_simultaneous_generations_is_limited(limit: int) -> None:
    async with backlog(limit, 8) as server:
        await server.until_idle()
        assert server.history.peak_running == limit


async def test_r03_waiting_requests_do_not_slow_down_running_ones() -> None:
    with mock_server(2) as server:
        async with server.client() as one, server.client() as two:
            async with asking(one, ENDLESS), asking(two, ENDLESS):
                crowd = [asyncio.create_task(ask_as_somebody(server, "x")) for _ in range(20)]
                await server.until(lambda: server.waiting == 20)
                num_before = len(token_log(server))
                await server.until(lambda: len(token_log(server)) >= num_before + 60)
        await asyncio.gather(*crowd)
        # Every step generated a token of each of the two, independent of the others.
        both = token_log(server)[num_before : num_before + 60]
        assert all(abs(both[:n].count(both[0]) - n / 2) <= 1 for n in range(60))


async def test_r04_requests_above_the_limit_wait_and_get_no_token_meanwhile() -> None:
    with mock_server(1) as server:
        async with server.client() as one, server.client() as two:
            async with asking(one, ENDLESS) as running:
                assert (await anext(running)).kind == "started"
                async with asking(two, SHORT) as waiting:
                    first = await anext(waiting)
                    assert (first.kind, first.data["position"]) == ("queued", 1)
                    assert (await load(server))["waiting"] == 1
                    reader = asyncio.create_task(collect_events(waiting))
                    num_before = len(token_log(server))
                    await server.until(lambda: len(token_log(server)) >= num_before + 10)
                    assert not reader.done()
                    await running.aclose()  # type: ignore[attr-defined]
                    assert server.running == 1
                    await one.aclose()
                    of_waiting = await reader
        assert kinds(of_waiting) == ["started", *["token"] * 5, "done"]


async def test_r05_waiting_requests_start_in_order_of_arrival() -> None:
    with mock_server(1) as server:
        async with server.client() as one, asking(one, ENDLESS):
            tasks = []
            for n in range(6):
                tasks.append(asyncio.create_task(ask_as_somebody(server, SHORT)))
                await server.until(lambda n=n: server.waiting == n + 1)  # type: ignore[misc]
        await asyncio.gather(*tasks)
        admitted = [event.request_id for event in server.log if isinstance(event, ev.Admitted)]
        assert started_ids(server) == admitted


async def test_r06_on_one_device_simultaneous_means_interleaved() -> None:
    async with backlog(2, 2, LONG) as server:
        await server.until_idle()
        log = token_log(server)
        changes = sum(a != b for a, b in pairwise(log))
        assert changes >= 70  # of 79: the two alternate to the end


async def test_r07_setting_the_number_to_k_keeps_exactly_k_running() -> None:
    async with backlog(3, 9) as server:
        await server.until_idle()
        # Six of the nine start in the call in which another one ends: no slot is free in between.
        handovers = [b for a, b in pairwise(server.log) if isinstance(a, ev.Finished) and isinstance(b, ev.Started)]
        assert len(handovers) == 6
        assert server.history.peak_running == 3


async def test_r08_two_simultaneous_requests_alternate_token_by_token() -> None:
    async with backlog(2, 2, LONG) as server:
        await server.until_idle()
        log = token_log(server)
        one, two = sorted(set(log), key=log.index)
        for n in range(len(log)):
            assert abs(log[:n].count(one) - log[:n].count(two)) <= 1


async def test_r09_each_turn_adds_one_japanese_character() -> None:
    with mock_server(2) as server:
        async with server.client() as one, server.client() as two:
            answers = await asyncio.gather(ask(one, "こんにちは、世界"), ask(two, "吾輩は猫である"))
    for answer, expected in zip(answers, ("こんにちは、世界", "吾輩は猫である"), strict=True):
        assert [event.data["text"] for event in answer if event.kind == "token"] == list(expected)


async def test_r10_alternation_continues_until_one_generation_ends() -> None:
    with mock_server(2) as server:
        await asyncio.gather(ask_as_somebody(server, LONG), ask_as_somebody(server, LONG))
        log = token_log(server)
        one, two = sorted(set(log), key=log.index)
        together = log[log.index(two) :]
        end = min(len(together) - 1 - together[::-1].index(request_id) for request_id in (one, two))
        # Two tokens of one user in a row only at the border of two steps.
        runs = [together[n : n + 3] for n in range(end - 2)]
        assert all(len(set(run)) == 2 for run in runs)


async def test_r11_a_third_user_waits_while_two_generate() -> None:
    with mock_server(2) as server:
        async with server.client() as one, server.client() as two, server.client() as three:
            async with asking(one, ENDLESS) as a, asking(two, ENDLESS) as b:
                await asyncio.gather(anext(a), anext(b))
                async with asking(three, SHORT) as c:
                    assert (await anext(c)).data["position"] == 1
                    assert (await load(server))["processing"] == 2
                    assert (await load(server))["waiting"] == 1


async def test_r12_when_one_of_two_finishes_the_third_starts_while_the_other_continues() -> None:
    with mock_server(2) as server:
        async with server.client() as one, server.client() as two, server.client() as three:
            async with asking(two, ENDLESS) as b, asking(one, LONG) as a, asking(three, SHORT) as c:
                assert (await anext(c)).kind == "queued"
                of_a, of_c = await asyncio.gather(collect_events(a), collect_events(c))
                assert server.running == 1
                assert (await anext(b)).kind == "started"
    start = next(event for event in of_c if event.kind == "started")
    assert of_a[-1].kind == "done"
    assert start.at_s >= of_a[-1].at_s - TOKEN_S
    finished = next(event for event in server.log if isinstance(event, ev.Finished))
    successor = server.log[server.log.index(finished) + 1]
    assert isinstance(successor, ev.Started)
    assert successor.at_s == finished.at_s


async def test_r13_other_requests_are_answered_while_streams_run() -> None:
    with mock_server(2) as server:
        async with server.client() as one, server.client() as other:
            async with asking(one, ENDLESS) as a:
                await anext(a)
                for _ in range(10):
                    assert (await other.get("/get_load")).json()["chatstream_workers"][0]["processing"] == 1


async def test_r14_a_blocked_client_does_not_delay_others() -> None:
    with mock_server(2, time_per_token_s=0.0) as server:
        huge = " ".join(["0123456789" * 20] * 2000)  # more than all buffers on the way
        async with server.client() as blocked, asking(blocked, huge) as never_read:
            await anext(never_read)
            answers = await asyncio.gather(*(ask_as_somebody(server, SHORT) for _ in range(5)))
            assert answers == [SHORT] * 5


async def test_r15_requests_are_tasks_on_one_event_loop() -> None:
    threads: set[int] = set()
    with mock_server(3) as server:
        server.chat_stream.observe(lambda _: threads.add(threading.get_ident()))
        await asyncio.gather(*(ask_as_somebody(server, SHORT) for _ in range(6)))
    assert len(threads) == 1


async def test_r16_one_step_at_a_time_uses_the_model_for_one_token_of_each_request() -> None:
    async with backlog(4, 4) as server:
        await server.until_idle()
        log = token_log(server)
        assert len(log) == 20
        for step in range(5):  # four users, five words each: five steps, each user once per step
            assert len(set(log[4 * step : 4 * step + 4])) == 4


async def test_r17_a_request_delays_others_by_one_token_only() -> None:
    with mock_server(2) as server:
        await asyncio.gather(ask_as_somebody(server, LONG), ask_as_somebody(server, LONG))
        log = token_log(server)
        one, two = sorted(set(log), key=log.index)
        between, longest = 0, 0
        for request_id in log[log.index(two) :]:
            between = between + 1 if request_id == one else 0
            longest = max(longest, between)
        assert longest <= 2


async def test_r18_an_endless_generation_never_blocks_a_short_one() -> None:
    with mock_server(2) as server:
        async with server.client() as one, asking(one, ENDLESS) as endless:
            await anext(endless)
            assert await ask_as_somebody(server, SHORT) == SHORT
            assert server.running == 1
        await server.until_idle()


async def test_r19_nothing_is_served_before_start_queue_worker_and_everything_after() -> None:
    chat_stream = ChatStream(
        use_mock_response=True, mock_params={"type": "echo", "time_per_token_sec": 0.0}, num_of_concurrent_executions=2
    )
    with serve(chat_stream, host_app(chat_stream)) as server:
        async with server.client() as client, asking(client, SHORT) as events:
            first = await anext(events)
            assert (first.kind, first.data["position"]) == ("queued", 1)
            assert server.running == 0
            await client.post("/start")
            assert kinds(await collect_events(events))[-1] == "done"


async def test_r20_the_backlog_from_before_the_start_is_served_in_order() -> None:
    chat_stream = ChatStream(
        use_mock_response=True,
        mock_params={"type": "echo", "time_per_token_sec": 0.0},
        num_of_concurrent_executions=1,
        max_queue_size=5,
    )
    with serve(chat_stream, host_app(chat_stream)) as server:
        tasks = []
        for n in range(4):
            tasks.append(asyncio.create_task(legacy_answer(server, f"{n} {SHORT}")))
            await server.until(lambda n=n: server.waiting == n + 1)  # type: ignore[misc]
        async with server.client() as client:
            await client.post("/start")
        answers = await asyncio.gather(*tasks)
        assert [answer.split("<::EOS::>")[-2] for answer in answers] == [f"{n} {SHORT}" for n in range(4)]
        admitted = [event.request_id for event in server.log if isinstance(event, ev.Admitted)]
        assert started_ids(server) == admitted


async def legacy_answer(server: Server, words: str) -> str:
    async with server.client() as client:
        return await ask_legacy(client, words)


async def load(server: Server) -> dict[str, int]:
    async with httpx2.AsyncClient(base_url=server.url) as client:
        worker: dict[str, int] = (await client.get("/get_load")).json()["chatstream_workers"][0]
        return worker


async def collect_events(events):  # type: ignore[no-untyped-def]
    return [event async for event in events]


async def collect(events) -> str:  # type: ignore[no-untyped-def]
    return text(await collect_events(events))
