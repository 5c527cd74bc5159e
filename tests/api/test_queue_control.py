"""`PATCH /queue`: changes at run time; and the positions and ETAs of waiting requests."""

from __future__ import annotations

import asyncio

import pytest

from chatstream import AccessSettings, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine
from tests.api.in_process import SSE, Raw, Service, ask, open_service, parse_events
from tests.api.test_native import in_virtual_time

HELLO = {"user_input": "hello"}
NOT_ON_ONE_LINE = ["\n", "\r", "\x00", "\x1b[31m", "\x7f", "\x85", "\x9b31m", "\u2028", "\u2029", "\u202e"]
"""Line breaks, terminal control characters, and the right-to-left override."""


def log_of(service: Service) -> list[ev.Event]:
    log: list[ev.Event] = []
    service.chat_stream.observe(log.append)
    return log


@in_virtual_time
async def test_every_field_takes_effect_at_once_and_the_response_is_the_changed_queue() -> None:
    async with open_service(n=1, q=5) as service:
        log = log_of(service)
        browser = service.browser()
        streams = await service.occupy(4)
        change = {
            "max_concurrency": 3, "max_queue_size": 7, "policy": "priority", "paused": True, "reason": "quiet night"
        }  # fmt: skip
        response = await browser.patch("/queue", json=change)
        assert response.status_code == 200
        queue = response.json()
        assert queue == (await browser.get("/queue")).json()
        assert {name: queue[name] for name in change if name != "reason"} == {
            name: value for name, value in change.items() if name != "reason"
        }
        assert (len(queue["running"]), len(queue["waiting"])) == (3, 1)
        changes = [e for e in log if isinstance(e, ev.LimitsChanged | ev.PolicyChanged | ev.Paused)]
        assert [(type(e), e.by, e.why) for e in changes] == [
            (kind, "admin on this machine", "quiet night") for kind in (ev.LimitsChanged, ev.PolicyChanged, ev.Paused)
        ]
        for stream in streams:
            stream.close()


@in_virtual_time
async def test_while_paused_new_requests_are_rejected_and_others_are_served() -> None:
    async with open_service(n=1, q=5) as service:
        browser = service.browser()
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as running:
            await running.until(lambda: running.body)
            assert (await browser.patch("/queue", json={"paused": True})).json()["paused"] is True
            refused = await browser.post("/chat_stream", json=HELLO, headers=SSE)
            assert (refused.status_code, refused.json()["code"]) == (503, "paused")
            assert int(refused.headers["retry-after"]) >= 1
            openai = await browser.post("/v1/chat/completions", json={
                "model": "fake", "messages": [{"role": "user", "content": "x"}]
            })  # fmt: skip
            assert (openai.status_code, openai.json()["error"]["code"]) == (503, "paused")
            await running.until(lambda: running.is_complete)
            assert parse_events(running.body)[-1].kind == "done"
        # Still ready: a load balancer that removed it would keep clients from resuming their streams.
        assert (await browser.get("/health/ready")).status_code == 200
        document = (await browser.get("/openapi.json")).json()
        description = document["paths"]["/health/ready"]["get"]["description"]
        assert {"loaded", "paused"} <= set(description.replace(",", "").split()), "the description names both"
        await browser.patch("/queue", json={"paused": False})
        assert (await ask(browser, "hello"))[-1].kind == "done"


@in_virtual_time
async def test_lowering_the_limits_ends_no_request() -> None:
    async with open_service(n=3, q=5) as service:
        browser = service.browser()
        streams = await service.occupy(8)
        change = {"max_concurrency": 1, "max_queue_size": 0}
        queue = (await browser.patch("/queue?limit=2", json=change)).json()
        assert (len(queue["running"]), len(queue["waiting"]), queue["num_waiting"]) == (3, 2, 5)
        refused = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        for stream in streams:
            stream.close()


@in_virtual_time
async def test_a_drain_can_be_started_and_ended() -> None:
    async with open_service(n=1, q=5) as service:
        log = log_of(service)
        browser = service.browser()
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as running:
            await running.until(lambda: running.body)
            drain = {"draining": True, "reason": "new model"}
            assert (await browser.patch("/queue", json=drain)).json()["draining"] is True
            refused = await browser.post("/chat_stream", json=HELLO, headers=SSE)
            assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
            await running.until(lambda: running.is_complete)
            assert parse_events(running.body)[-1].kind == "done"
        [drained] = [e for e in log if isinstance(e, ev.DrainStarted)]
        assert (drained.by, drained.why) == ("admin on this machine", "new model")
        log.clear()
        again = {"draining": False, "reason": "it is loaded"}
        assert (await browser.patch("/queue", json=again)).json()["draining"] is False
        assert [(e.by, e.why) for e in log if isinstance(e, ev.Opened)] == [("admin on this machine", "it is loaded")]
        assert (await ask(browser, "hello"))[-1].kind == "done"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 1.5}, "max_concurrency"),
        ({"max_concurrency": True}, "max_concurrency"),
        ({"max_queue_size": -1}, "max_queue_size"),
        ({"max_queue_size": "many"}, "max_queue_size"),
        ({"policy": "lifo"}, "policy"),
        ({"policy": "lifo", "max_concurrency": 9}, "policy"),
        ({"paused": "yes"}, "paused"),
        ({"reason": "x" * 201}, "reason"),
        *(({"reason": f"fine{char}2026-11-22 ERROR forged", "paused": True}, "reason") for char in NOT_ON_ONE_LINE),
        ({"max_concurrency": 10**400}, "max_concurrency"),
        ({"max_queue_size": 10**7}, "max_queue_size"),
        ({"slots": 3}, "slots"),
    ],
    ids=str,
)
@in_virtual_time
async def test_a_wrong_change_names_its_field_and_changes_nothing(change: dict[str, object], param: str) -> None:
    async with open_service(n=2, q=5) as service:
        browser = service.browser()
        before = (await browser.get("/queue")).json()
        response = await browser.patch("/queue", json=change)
        assert (response.status_code, response.json()["param"]) == (400, param)
        assert (await browser.get("/queue")).json() == before


@pytest.mark.parametrize("body", [{}, {"reason": "only a reason"}, {"paused": None}], ids=str)
@in_virtual_time
async def test_an_empty_change_is_refused_with_the_list_of_fields(body: dict[str, object]) -> None:
    async with open_service() as service:
        response = await service.browser().patch("/queue", json=body)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
        fields = "max_concurrency, max_queue_size, policy, paused, draining"
        assert response.json()["message"] == f"there is nothing to change: give at least one of {fields}"


@in_virtual_time
async def test_a_change_to_the_current_value_is_accepted() -> None:
    async with open_service(n=1, q=5) as service:
        for body in ({"paused": False}, {"draining": False}, {"max_concurrency": 1}, {"policy": "fcfs"}):
            assert (await service.browser().patch("/queue", json=body)).status_code == 200


@pytest.mark.parametrize("size", ["AUTO", "many", "5", -1, 1.5, True, [5]], ids=str)
@in_virtual_time
async def test_a_wrong_queue_size_is_refused_with_both_possible_types(size: object) -> None:
    async with open_service() as service:
        response = await service.browser().patch("/queue", json={"max_queue_size": size})
        assert (response.status_code, response.json()["param"]) == (400, "max_queue_size")
        assert response.json()["message"] == 'max_queue_size: must be a whole number of at least 0, or "auto"'


@pytest.mark.parametrize("reason", ["quiet night, 8 → 4", "夜は静か　なので", "x" * 200])
@in_virtual_time
async def test_a_reason_is_any_text_on_one_line(reason: str) -> None:
    async with open_service() as service:
        log = log_of(service)
        assert (await service.browser().patch("/queue", json={"paused": True, "reason": reason})).status_code == 200
        assert [e.why for e in log if isinstance(e, ev.Paused)] == [reason]


@in_virtual_time
async def test_only_an_admin_may_change_the_queue() -> None:
    async with open_service(access=AccessSettings(admin_key="root")) as service:
        browser = service.browser()
        assert (await browser.patch("/queue", json={"paused": True})).status_code == 401
        wrong = await browser.patch("/queue", json={"paused": True}, headers={"authorization": "Bearer no"})
        assert wrong.status_code == 403
        right = await browser.patch("/queue", json={"paused": True}, headers={"authorization": "Bearer root"})
        assert right.json()["paused"] is True


@pytest.mark.parametrize(
    ("origin", "status"), [("http://127.0.0.1:8000", 200), ("https://evil.example", 403), ("null", 403)]
)
@in_virtual_time
async def test_a_page_of_another_origin_on_the_same_machine_is_no_admin(origin: str, status: int) -> None:
    async with open_service() as service:
        response = await service.browser().patch("/queue", json={"paused": True}, headers={"origin": origin})
        assert response.status_code == status
        assert service.chat_stream.stats().is_paused == (status == 200)


@in_virtual_time
async def test_a_page_with_a_rebound_name_can_neither_read_nor_drain_the_queue() -> None:
    """For the browser, page and server have one origin: a GET has no `Origin`, and a PATCH has the page's."""
    async with open_service() as service:
        page = service.browser(base_url="http://evil.example:8000")
        drain = await page.patch("/queue", json={"draining": True}, headers={"origin": "http://evil.example:8000"})
        for response in (drain, await page.get("/queue")):
            assert (response.status_code, response.json()["code"]) == (403, "forbidden")
            assert "at 127.0.0.1:8000" in response.json()["message"], "the message names the right request"
            assert "admin key" in response.json()["message"]
        assert not service.chat_stream.stats().is_draining


@in_virtual_time
async def test_with_an_admin_key_the_name_of_the_server_does_not_matter() -> None:
    async with open_service(access=AccessSettings(admin_key="root")) as service:
        browser = service.browser(base_url="https://chat.example")
        assert (await browser.get("/queue", headers={"authorization": "Bearer root"})).status_code == 200


@in_virtual_time
async def test_waiting_requests_get_an_eta_once_there_is_a_basis() -> None:
    async with open_service(FakeEngine(["word "] * 10, step_s=0.1), n=1, q=5) as service:
        browser = service.browser()
        for _ in range(30):
            assert (await ask(browser, "hello"))[-1].kind == "done"
        async with (
            Raw(service.app, "/chat_stream", HELLO, headers=SSE),
            Raw(service.app, "/chat_stream", HELLO, headers=SSE) as waiting,
        ):
            await waiting.until(lambda: waiting.is_complete)
            first = parse_events(waiting.body)[0]
        assert first.kind == "queued"
        assert first.data["position"] == 1
        assert first.data["eta_seconds"] == pytest.approx(1.0, abs=0.3)
        assert first.data["eta_p90_seconds"] >= first.data["eta_seconds"]
        assert first.data["position_kind"] == "exact"
        assert service.chat_stream.stats().eta.num_measured <= 1


@in_virtual_time
async def test_under_another_policy_the_position_is_marked_as_an_estimate() -> None:
    async with open_service(n=1, q=5, policy="fair") as service:
        [running] = await service.occupy(1)
        body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        async with (
            Raw(service.app, "/chat_stream", HELLO, headers=SSE) as native,
            Raw(service.app, "/v1/chat/completions", body) as openai,
        ):
            await native.until(lambda: native.body and openai.body)
            assert parse_events(native.body)[0].data["position_kind"] == "estimate"
            assert b": queued position=2 kind=estimate" in openai.body
            running.close()
            await openai.until(lambda: openai.is_complete)


@in_virtual_time
async def test_a_request_that_cannot_start_in_time_is_rejected_as_infeasible() -> None:
    async with open_service(FakeEngine(["word "] * 10, step_s=0.5), n=1, q=9) as service:
        browser = service.browser()
        for _ in range(30):
            await ask(browser, "hello")
        streams = await service.occupy(4)
        refused = await browser.post("/chat_stream", json={**HELLO, "max_wait_seconds": 4}, headers=SSE)
        assert (refused.status_code, refused.json()["code"]) == (429, "infeasible")
        assert refused.json()["error"] == "too_many_requests"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        for stream in streams:
            stream.close()
        await asyncio.sleep(1.0)


@in_virtual_time
async def test_a_client_with_too_many_waiting_requests_gets_client_limit() -> None:
    settings = SchedulerSettings(max_waiting_per_client=1)
    async with open_service(n=1, q=9, scheduler=settings) as service:
        [running] = await service.occupy(1)
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as waiting:
            await waiting.until(lambda: waiting.body)
            refused = await service.browser().post("/chat_stream", json=HELLO, headers=SSE)
            assert (refused.status_code, refused.json()["code"]) == (429, "client_limit")
            running.close()
            await waiting.until(lambda: waiting.is_complete)


@pytest.mark.parametrize("priority", [-11, 11, 2**40])
@in_virtual_time
async def test_a_priority_beyond_the_classes_is_refused(priority: int) -> None:
    async with open_service() as service:
        response = await service.browser().post("/chat_stream", json={**HELLO, "priority": priority}, headers=SSE)
        assert (response.status_code, response.json()["param"]) == (400, "priority")
