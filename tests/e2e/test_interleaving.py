"""Running requests alternate token by token, also with real models.

The same promises with the mock engine are in test_promises.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from chatstream import ChatStream
from chatstream.engines.batching import loop as step_loop
from chatstream.engines.thread import handover
from chatstream.engines.thread.handover import DeltaBuffer, Item
from chatstream.scheduler import events as ev
from chatstream.types import TokenDelta
from tests.e2e.server import Seen, Server, ask, asking, kinds, serve, text
from tests.e2e.test_promises import ENDLESS, host_app

pytestmark = pytest.mark.anyio

Id = TypeVar("Id")


def tokens_of(server: Server, *request_ids: str) -> list[str]:
    """The request of each generated token, in order, among these requests."""
    return [e.request_id for e in server.log if isinstance(e, ev.Tokens) and e.request_id in request_ids]


def while_both_run(log: list[Id], one: Id, two: Id) -> list[Id]:
    """The part of the log from the first token of the later request to the last of the one that ends first."""
    begin = max(log.index(one), log.index(two))
    end = min(len(log) - log[::-1].index(id_) for id_ in (one, two))
    return log[begin:end]


def assert_they_alternate(log: list[Id], one: Id, two: Id, at_least: int) -> None:
    together = while_both_run(log, one, two)
    assert together.count(one) >= at_least
    for n in range(len(together)):
        assert abs(together[:n].count(one) - together[:n].count(two)) <= 1


async def test_two_users_alternate_and_a_third_starts_when_one_ends() -> None:
    chat_stream = ChatStream(
        use_mock_response=True, mock_params={"type": "echo", "time_per_token_sec": 0.01}, num_of_concurrent_executions=2
    )
    with serve(chat_stream) as server:
        async with server.client() as user1, server.client() as user2, server.client() as user3:
            async with asking(user2, ENDLESS) as events2:
                second = (await anext(events2)).data["request_id"]
                async with asking(user1, "w " * 60) as events1:
                    first = (await anext(events1)).data["request_id"]
                    async with asking(user3, "w " * 30) as events3:
                        queued = await anext(events3)
                        assert (queued.kind, queued.data["position"]) == ("queued", 1)
                        third = queued.data["request_id"]
                        assert not tokens_of(server, third)
                        of_first, of_third = await asyncio.gather(collect(events1), collect(events3))
                        assert server.running == 1  # user 2 still runs
    assert kinds(of_first)[-1] == kinds(of_third)[-1] == "done"
    assert text(of_third) == "w " * 30

    assert_they_alternate(tokens_of(server, first, second), first, second, at_least=50)
    assert_they_alternate(tokens_of(server, second, third), second, third, at_least=25)

    end_of_first = next(e for e in server.log if isinstance(e, ev.Finished) and e.request_id == first)
    start_of_third = next(e for e in server.log if isinstance(e, ev.Started) and e.request_id == third)
    assert start_of_third.number == end_of_first.number + 1
    tokens_of_second = [e.at_s for e in server.log if isinstance(e, ev.Tokens) and e.request_id == second]
    assert tokens_of_second[0] < end_of_first.at_s < tokens_of_second[-1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engines.transformers.checkpoints import save

    return save("llama", tmp_path_factory.mktemp("e2e") / "llama")


@pytest.fixture(params=["demo", "transformers"])
def with_a_model(request: pytest.FixtureRequest) -> Iterator[ChatStream]:
    if request.param == "demo":
        yield ChatStream(max_concurrency=2)
    else:
        checkpoint = request.getfixturevalue("llama")
        # Random weights and a high temperature, so that no answer ends early.
        free = {"temperature": 2.0, "top_p": 1.0, "top_k": 384, "repetition_penalty": 1.0}
        yield ChatStream(str(checkpoint), device="cpu", max_concurrency=2, **free)


async def two_answers(server: Server) -> tuple[list[Seen], list[Seen]]:
    """Two requests that waited before the server started to serve."""

    async def user(words: str, seed: int) -> list[Seen]:
        async with server.client() as client:
            return await ask(client, words, max_new_tokens=60, seed=seed)

    tasks = [
        asyncio.create_task(user("Tell me a story about a queue.", 1)),
        asyncio.create_task(user("Explain ChatStream in detail.", 2)),
    ]
    await server.until(lambda: server.waiting == 2)
    async with server.client() as client:
        await client.post("/start")
    one, two = await asyncio.gather(*tasks)
    return one, two


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[DeltaBuffer]:
    """The request of each token, in the order in which the engine generates them.

    The server's log does not show this: on a busy machine the event loop may receive many tokens of the first request
    at once.
    """
    order: list[DeltaBuffer] = []

    def hand_over(deliveries: Sequence[tuple[DeltaBuffer, Item]]) -> None:
        order.extend(buffer for buffer, item in deliveries if isinstance(item, TokenDelta) and item.num_tokens)
        handover.hand_over(deliveries)

    monkeypatch.setattr(step_loop, "hand_over", hand_over)
    return order


async def test_r08_with_a_model_two_users_alternate_token_by_token(
    with_a_model: ChatStream, generated: list[DeltaBuffer]
) -> None:
    with serve(with_a_model, host_app(with_a_model)) as server:
        one, two = await two_answers(server)
        assert kinds(one)[-1] == kinds(two)[-1] == "done"
        assert_they_alternate(generated, *dict.fromkeys(generated), at_least=15)
        await server.until_idle()


async def test_r17_with_a_model_no_request_has_two_tokens_in_a_row(
    with_a_model: ChatStream, generated: list[DeltaBuffer]
) -> None:
    with serve(with_a_model, host_app(with_a_model)) as server:
        await two_answers(server)
        together = while_both_run(generated, *dict.fromkeys(generated))
        assert len(together) >= 30
        # At most two tokens in a row: the last of one step and the first of the next.
        assert all(len(set(together[n : n + 3])) == 2 for n in range(len(together) - 3))


async def collect(events) -> list[Seen]:  # type: ignore[no-untyped-def]
    return [event async for event in events]
