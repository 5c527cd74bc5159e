"""A waiting request gets an update when its ETA changes, even if its position does not."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from chatstream.runtime import RequestStream
from chatstream.testing import FakeEngine
from chatstream.types import Queued
from tests.runtime.harness import Harness, in_virtual_time, read


async def harness_with_etas(max_concurrency: int = 1) -> Harness:
    """Forty answers of about 10 s have ended. A request whose id starts with "long" takes 100 s."""

    def script(request_id: str) -> list[str]:
        return ["x"] * (1000 if request_id.startswith("long") else 100 + hash(len(request_id)) % 7)

    engine = FakeEngine(lambda request: script(request.request_id), step_s=0.1)
    harness = Harness(engine, max_concurrency=max_concurrency, max_queue_size=50)
    for n in range(40):
        await read(harness.submit("x" * (n + 1)))
    return harness


def watch(stream: RequestStream) -> tuple[list[tuple[float, Queued]], asyncio.Task[None]]:
    sent: list[tuple[float, Queued]] = []

    async def collect() -> None:
        while (event := await anext(stream, None)) is not None:
            if isinstance(event, Queued):
                sent.append((asyncio.get_running_loop().time(), event))

    return sent, asyncio.create_task(collect())


@in_virtual_time
async def test_a_new_reason_for_waiting_is_sent_although_the_position_stays() -> None:
    harness = Harness(FakeEngine(["x"] * 40, step_s=0.1), is_started=False, max_concurrency=2)
    sent, watching = watch(harness.submit("first"))
    later, watching_too = watch(harness.submit("second", conversation="k"))
    last, watching_last = watch(harness.submit("third", conversation="k"))
    await asyncio.sleep(0.1)
    harness.worker.start()
    await asyncio.gather(watching, watching_too, watching_last)
    assert [event.waits_for for _, event in sent] == ["opening"]
    assert [event.waits_for for _, event in later] == ["opening"]
    assert [event.waits_for for _, event in last] == ["conversation", "conversation"]
    assert [event.position for _, event in last] == [3, 1]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_request_that_now_waits_for_a_slot_gets_an_update() -> None:
    harness = Harness(FakeEngine(["x"] * 40, step_s=0.1), is_started=False, max_concurrency=1)
    running = asyncio.create_task(read(harness.submit("runs")))
    sent, watching = watch(harness.submit("waits"))
    await asyncio.sleep(0.1)
    harness.worker.start()
    await asyncio.gather(running, watching)
    assert [(event.position, event.waits_for) for _, event in sent] == [(2, "opening"), (1, "slot")]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_eta_that_proves_wrong_is_updated() -> None:
    """Behind an answer longer than all before, a request got an ETA of 0.1 s once, and waited for a minute."""
    harness = await harness_with_etas()
    running = asyncio.create_task(read(harness.submit("long")))
    await asyncio.sleep(0.5)
    sent, watching = watch(harness.submit("waits"))
    for _ in range(80):
        await asyncio.sleep(1.0)
        [_, view] = harness.worker.requests()
        at_s, queued = sent[-1]
        assert view.eta is not None
        assert queued.eta_seconds is not None
        shown_s = max(0.0, queued.eta_seconds - (asyncio.get_running_loop().time() - at_s))
        assert abs(shown_s - view.eta.p50_s) <= 2.0 + 0.5 * view.eta.p50_s
    assert {event.position for _, event in sent} == {1}
    assert len(sent) > 2
    assert all(later - earlier >= 0.98 for (earlier, _), (later, _) in pairwise(sent))
    await asyncio.gather(running, watching)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_eta_that_a_countdown_shows_is_not_sent_again() -> None:
    harness = await harness_with_etas()
    reading = [asyncio.create_task(read(harness.submit(f"r{n}"))) for n in range(2)]
    await asyncio.sleep(0.5)
    sent, watching = watch(harness.submit("waits"))
    await asyncio.sleep(8.0)
    assert len(sent) == 1
    await asyncio.gather(*reading, watching)


@in_virtual_time
async def test_fewer_slots_update_all_etas_at_once() -> None:
    harness = await harness_with_etas(max_concurrency=4)
    reading = [asyncio.create_task(read(harness.submit(f"r{n}"))) for n in range(7)]
    sent, watching = watch(harness.submit("waits"))
    await asyncio.sleep(1.5)
    before = sent[-1][1]
    harness.worker.set_limits(max_concurrency=1)
    harness.history.max_concurrency = 4  # running requests may finish
    await asyncio.sleep(0.3)
    after = sent[-1][1]
    assert (before.position, after.position) == (4, 4)
    assert before.eta_seconds is not None
    assert after.eta_seconds is not None
    assert after.eta_seconds > 2 * before.eta_seconds
    await asyncio.gather(*reading, watching)


@in_virtual_time
async def test_a_reconnected_client_gets_the_eta_from_now() -> None:
    """It got the ETA sent to the earlier reader, seconds old, as if it were new."""
    harness = await harness_with_etas()
    running = asyncio.create_task(read(harness.submit("r")))
    stream = harness.submit("waits")
    harness.worker.resumables.keep(stream, None)
    first = await anext(stream)
    stream.close()
    await asyncio.sleep(6.0)
    harness.worker.resend_position("waits")
    again = harness.worker.resumables.attach("waits", 0)
    second = await anext(again)
    assert isinstance(first, Queued)
    assert isinstance(second, Queued)
    assert first.eta_seconds is not None
    assert second.eta_seconds is not None
    assert first.eta_seconds - second.eta_seconds >= 5.0
    await asyncio.gather(running, read(again))


@in_virtual_time
async def test_an_eta_sent_shortly_before_a_change_is_updated_a_second_later() -> None:
    """A request updated too recently ended the round for all requests, and no ETA was checked for a second."""
    harness = await harness_with_etas(max_concurrency=4)
    reading = [asyncio.create_task(read(harness.submit(f"r{n}"))) for n in range(7)]
    sent, watching = watch(harness.submit("waits"))
    await asyncio.sleep(0.3)
    harness.worker.set_limits(max_concurrency=1)
    await asyncio.sleep(1.0)
    assert len(sent) == 2
    assert sent[1][0] - sent[0][0] <= 1.26
    await asyncio.gather(*reading, watching)
