"""Who waits hears of it when its expected time changes, also when its place does not."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from chatstream.runtime import RequestStream
from chatstream.testing import FakeEngine
from chatstream.types import Queued
from tests.runtime.house import House, in_virtual_time, read


async def house_with_a_basis(max_concurrency: int = 1) -> House:
    """Forty answers of about 10 s have ended. One whose id begins with long takes 100 s."""

    def script(request_id: str) -> list[str]:
        return ["x"] * (1000 if request_id.startswith("long") else 100 + hash(len(request_id)) % 7)

    engine = FakeEngine(lambda request: script(request.request_id), step_s=0.1)
    house = House(engine, max_concurrency=max_concurrency, max_queue_size=50)
    for n in range(40):
        await read(house.submit("x" * (n + 1)))
    return house


def told_to(stream: RequestStream) -> tuple[list[tuple[float, Queued]], asyncio.Task[None]]:
    told: list[tuple[float, Queued]] = []

    async def watch() -> None:
        while (event := await anext(stream, None)) is not None:
            if isinstance(event, Queued):
                told.append((asyncio.get_running_loop().time(), event))

    return told, asyncio.create_task(watch())


@in_virtual_time
async def test_a_new_reason_for_waiting_is_sent_although_the_position_stays() -> None:
    house = House(FakeEngine(["x"] * 40, step_s=0.1), is_started=False, max_concurrency=2)
    told, watching = told_to(house.submit("first"))
    later, watching_too = told_to(house.submit("second", conversation="k"))
    last, watching_last = told_to(house.submit("third", conversation="k"))
    await asyncio.sleep(0.1)
    house.worker.start()
    await asyncio.gather(watching, watching_too, watching_last)
    assert [event.waits_for for _, event in told] == ["opening"]
    assert [event.waits_for for _, event in later] == ["opening"]
    assert [event.waits_for for _, event in last] == ["conversation", "conversation"]
    assert [event.position for _, event in last] == [3, 1]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_request_that_only_waits_for_a_slot_after_all_is_told_so() -> None:
    house = House(FakeEngine(["x"] * 40, step_s=0.1), is_started=False, max_concurrency=1)
    running = asyncio.create_task(read(house.submit("runs")))
    told, watching = told_to(house.submit("waits"))
    await asyncio.sleep(0.1)
    house.worker.start()
    await asyncio.gather(running, watching)
    assert [(event.position, event.waits_for) for _, event in told] == [(2, "opening"), (1, "slot")]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_the_time_is_told_again_when_it_turns_out_to_be_wrong() -> None:
    """Behind an answer that was longer than all before it, somebody was told 0.1 s once, and waited for a minute."""
    house = await house_with_a_basis()
    running = asyncio.create_task(read(house.submit("long")))
    await asyncio.sleep(0.5)
    told, watching = told_to(house.submit("waits"))
    for _ in range(80):
        await asyncio.sleep(1.0)
        [_, view] = house.worker.requests()
        at_s, queued = told[-1]
        assert view.eta is not None
        assert queued.eta_seconds is not None
        shown_s = max(0.0, queued.eta_seconds - (asyncio.get_running_loop().time() - at_s))
        assert abs(shown_s - view.eta.p50_s) <= 2.0 + 0.5 * view.eta.p50_s
    assert {event.position for _, event in told} == {1}
    assert len(told) > 2
    assert all(later - earlier >= 0.98 for (earlier, _), (later, _) in pairwise(told))
    await asyncio.gather(running, watching)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_nobody_is_told_what_a_countdown_shows() -> None:
    house = await house_with_a_basis()
    reading = [asyncio.create_task(read(house.submit(f"r{n}"))) for n in range(2)]
    await asyncio.sleep(0.5)
    told, watching = told_to(house.submit("waits"))
    await asyncio.sleep(8.0)
    assert len(told) == 1
    await asyncio.gather(*reading, watching)


@in_virtual_time
async def test_when_slots_are_taken_away_everybody_hears_of_it_at_once() -> None:
    house = await house_with_a_basis(max_concurrency=4)
    reading = [asyncio.create_task(read(house.submit(f"r{n}"))) for n in range(7)]
    told, watching = told_to(house.submit("waits"))
    await asyncio.sleep(1.5)
    before = told[-1][1]
    house.worker.set_limits(max_concurrency=1)
    house.history.max_concurrency = 4  # those who run may end
    await asyncio.sleep(0.3)
    after = told[-1][1]
    assert (before.position, after.position) == (4, 4)
    assert before.eta_seconds is not None
    assert after.eta_seconds is not None
    assert after.eta_seconds > 2 * before.eta_seconds
    await asyncio.gather(*reading, watching)


@in_virtual_time
async def test_a_reader_who_comes_back_is_told_the_time_from_now() -> None:
    """It was handed what its predecessor had been told, seconds old, as if it were new."""
    house = await house_with_a_basis()
    running = asyncio.create_task(read(house.submit("r")))
    stream = house.submit("waits")
    house.worker.resumables.keep(stream, None)
    first = await anext(stream)
    stream.close()
    await asyncio.sleep(6.0)
    house.worker.resend_position("waits")
    again = house.worker.resumables.attach("waits", 0)
    second = await anext(again)
    assert isinstance(first, Queued)
    assert isinstance(second, Queued)
    assert first.eta_seconds is not None
    assert second.eta_seconds is not None
    assert first.eta_seconds - second.eta_seconds >= 5.0
    await asyncio.gather(running, read(again))


@in_virtual_time
async def test_who_was_told_shortly_before_the_times_changed_is_told_a_second_later() -> None:
    """Whoever could not be told again yet ended the round for all, and nobody looked at the times for a second."""
    house = await house_with_a_basis(max_concurrency=4)
    reading = [asyncio.create_task(read(house.submit(f"r{n}"))) for n in range(7)]
    told, watching = told_to(house.submit("waits"))
    await asyncio.sleep(0.3)
    house.worker.set_limits(max_concurrency=1)
    await asyncio.sleep(1.0)
    assert len(told) == 2
    assert told[1][0] - told[0][0] <= 1.26
    await asyncio.gather(*reading, watching)
