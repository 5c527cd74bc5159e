"""The chat page while a request waits, after an error, and after a lost connection."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.web.conftest import SLOW_S, OpenPage, Serve, ask, expect_load, occupy_slot


def events(*pairs: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in pairs)


def answer_with(page: Page, **response: Any) -> None:
    """Answer all further `POST chat_stream` with this response."""
    page.route("**/chat_stream", lambda route: route.fulfill(**response))


def stream(body: str) -> dict[str, Any]:
    return {"status": 200, "content_type": "text/event-stream", "body": body}


QUEUED = ("queued", {"request_id": "r", "position": 3, "eta_seconds": None, "eta_p90_seconds": None})
NEXT = ("queued", {"request_id": "r", "position": 1, "eta_seconds": None, "eta_p90_seconds": None})
STARTED = ("started", {"request_id": "r", "waited_seconds": 3.24})


def refusal(status: int, code: str, **headers: str) -> dict[str, Any]:
    body = {"error": "too_many_requests" if status == 429 else code, "code": code, "message": "Message of the server."}
    return {"status": status, "headers": {"content-type": "application/json"} | headers, "body": json.dumps(body)}


def answer_without_end(page: Page, *pairs: tuple[str, dict[str, Any]]) -> None:
    """Answer with these events and keep the stream open. A route cannot; so replace the page's fetch."""
    page.evaluate(
        """body => {
            window.fetch = async () => new Response(
                new ReadableStream({ start: (stream) => stream.enqueue(new TextEncoder().encode(body)) }),
                { headers: { "content-type": "text/event-stream" } },
            );
        }""",
        events(*pairs),
    )


def test_a_waiting_visitor_sees_the_position_change_and_starts_when_a_slot_is_free(
    serve: Serve, open_page: OpenPage
) -> None:
    url = serve(max_concurrency=2, time_per_token_s=SLOW_S)
    first, second, third, fourth = (open_page(url) for _ in range(4))
    occupy_slot(first)
    occupy_slot(second)
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are next")
    ask(fourth, "fourth asks")
    expect(fourth.locator(".answer")).to_contain_text("You are 2nd in the queue")
    expect(fourth).to_have_title("2nd in the queue · ChatStream")
    expect(fourth.get_by_role("status")).to_have_text("You are 2nd in the queue")
    expect(fourth.get_by_role("button", name="Leave the queue")).to_be_visible()
    expect_load(fourth, processing=2, waiting=2)

    first.get_by_role("button", name="Stop").click()
    expect(third.locator(".answer")).to_contain_text("third asks")
    expect(third.locator(".meta")).to_contain_text(re.compile(r"waited [\d.]+ s · \d+ tokens · complete"))
    expect(fourth.locator(".answer")).to_contain_text("fourth asks")
    expect(fourth).to_have_title("ChatStream")


def test_leaving_the_queue_frees_the_position_and_keeps_the_message(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, time_per_token_s=SLOW_S)
    first, second, third = (open_page(url) for _ in range(3))
    occupy_slot(first)
    ask(second, "second asks")
    expect(second.locator(".answer")).to_contain_text("You are next")
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are 2nd in the queue")

    second.get_by_role("button", name="Leave the queue").click()
    expect(second.locator(".notice")).to_contain_text("You left the queue.")
    expect(third.locator(".answer")).to_contain_text("You are next")

    second.get_by_role("button", name="Edit").click()
    expect(second.get_by_role("textbox", name="Your message")).to_have_value("second asks")
    expect(second.get_by_role("textbox", name="Your message")).to_be_focused()
    expect(second.locator(".question")).to_have_count(0)


def test_closing_the_window_frees_the_position(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, time_per_token_s=SLOW_S)
    first, second, third = (open_page(url) for _ in range(3))
    occupy_slot(first)
    ask(second, "second asks")
    expect(second.locator(".answer")).to_contain_text("You are next")
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are 2nd in the queue")
    second.close()
    expect(third.locator(".answer")).to_contain_text("You are next")
    first.close()
    expect(third.locator(".answer")).to_contain_text("third asks")


def test_a_full_queue_shows_the_retry_time_and_a_retry_sends_the_same_message(
    serve: Serve, open_page: OpenPage
) -> None:
    url = serve(max_concurrency=1, max_queue_size=0, time_per_token_s=SLOW_S)
    first = open_page(url)
    occupy_slot(first)
    second = open_page(url, expects_failed_requests=True)
    ask(second, "kept message")
    expect(second.locator(".notice")).to_contain_text(re.compile(r"The queue is full\.\s*Try again in \d+ s\."))
    expect(second.locator(".question .text")).to_have_text("kept message")

    second.reload()
    expect(second.locator(".notice")).to_contain_text("The queue is full.")
    first.get_by_role("button", name="Stop").click()
    expect_load(second, processing=0, waiting=0)
    second.get_by_role("button", name="Try again").click()
    expect(second.locator(".meta")).to_contain_text("complete")
    expect(second.locator(".answer .text")).to_contain_text("kept message")
    expect(second.locator(".question")).to_have_count(1)


def test_the_retry_countdown_runs_to_its_end(url: str, open_page: OpenPage) -> None:
    page = open_page("about:blank", expects_failed_requests=True)
    page.clock.install(time=0)
    page.goto(url)
    page.clock.pause_at(60)
    answer_with(page, **refusal(429, "queue_full", **{"retry-after": "12"}))
    ask(page, "hello")
    expect(page.locator(".retry")).to_have_text("Try again in 12 s.")
    page.clock.run_for(5000)
    expect(page.locator(".retry")).to_have_text("Try again in 7 s.")
    page.clock.run_for(8000)
    expect(page.locator(".retry")).to_have_text("You can try again now.")


def test_an_error_shows_its_reason_and_keeps_the_message(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    field = page.get_by_role("textbox", name="Your message")
    field.fill("my words")
    for status, code, words in [
        (429, "client_limit", "You already have the maximum number of requests."),
        (503, "shutting_down", "The server is shutting down."),
        (400, "prompt_too_long", "too long for the model"),
        (418, "a_code_of_the_future", "The server refused: Message of the server."),
    ]:
        answer_with(page, **refusal(status, code))
        field.press("Enter")
        expect(page.locator(".notice")).to_contain_text(words)
        expect(page.get_by_role("status")).to_contain_text(words)
        # After a 400 the same message would be refused again, so no retry is offered.
        expect(page.get_by_role("button", name="Try again")).to_have_count(0 if status == 400 else 1)
        page.get_by_role("button", name="Edit").click()
        expect(field).to_have_value("my words")
        page.unroute("**/chat_stream")


def test_an_error_without_a_json_body_is_shown(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    answer_with(page, status=502, content_type="text/html", body="<h1>Bad gateway</h1>")
    ask(page, "my words")
    expect(page.locator(".notice")).to_contain_text("The server refused: Bad Gateway")


def test_a_rejected_regeneration_keeps_the_previous_answer(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    ask(page, "first words")
    expect(page.locator(".meta")).to_contain_text("complete")
    answer_with(page, **refusal(429, "queue_full", **{"retry-after": "12"}))
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".notice")).to_contain_text("The queue is full.")
    expect(page.locator(".answer .text")).to_contain_text("first words")
    expect(page.locator(".meta")).to_contain_text("complete")


def test_a_connection_lost_during_the_answer_is_shown_and_a_retry_regenerates(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    answer_with(page, **stream(events(STARTED, ("token", {"text": "half an "}))))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The connection was lost before the answer was complete.")
    expect(page.locator(".answer .text")).to_have_text("half an ")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": None, "regenerate": True}


def test_after_a_connection_lost_while_waiting_a_retry_sends_the_message_again(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    answer_with(page, **stream(events(QUEUED)))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The connection was lost")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_a_stop_before_the_first_token_leaves_the_message_unsent(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=30))
    ask(page, "hello")
    expect(page.get_by_text("Reading your message")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".notice")).to_contain_text("You stopped the request before the answer started.")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_an_unreachable_server_is_shown(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)

    def fail(route: Route) -> None:
        route.abort("connectionrefused")

    page.route("**/chat_stream", fail)
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The server cannot be reached.")
    page.unroute("**/chat_stream")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".meta")).to_contain_text("complete")


def test_an_error_event_is_shown_with_the_partial_answer(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    error = ("error", {"code": "engine_error", "message": "CUDA is unhappy"})
    answer_with(page, **stream(events(QUEUED, STARTED, ("token", {"text": "half"}), error)))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The model failed on this request.")
    expect(page.locator(".answer .text")).to_have_text("half")
    expect(page.locator(".meta")).to_have_text("waited 3.2 s")
    # The server keeps no failed answer, so a retry sends the message again.
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_the_estimate_is_shown_and_counts_down(url: str, open_page: OpenPage) -> None:
    page = open_page("about:blank")
    page.clock.install(time=0)
    page.goto(url)
    page.clock.pause_at(60)
    answer_without_end(
        page, ("queued", {"request_id": "r", "position": 21, "eta_seconds": 30.2, "eta_p90_seconds": 160.0})
    )
    ask(page, "hello")
    expect(page.locator(".position")).to_have_text("You are 21st in the queue")
    expect(page.locator(".wait")).to_have_text("Starts in about 30 s, most likely within 3 min")
    page.clock.run_for(20_000)
    expect(page.locator(".wait")).to_have_text("Starts in about 10 s, most likely within 2 min")
    page.clock.run_for(20_000)
    expect(page.locator(".wait")).to_have_text("Starts any moment now")


@pytest.mark.parametrize(
    ("locale", "waits_for", "text"),
    [
        ("en-US", "conversation", "Starts when your earlier message has been answered"),
        ("en-US", "opening", "Starts when the server is ready"),
        ("ja-JP", "client_limit", "実行中のほかのリクエストが終わると始まります"),
        ("en-US", "slot", "No estimate yet"),
        ("en-US", "toString", "No estimate yet"),
    ],
)
def test_the_reason_of_a_wait_for_more_than_a_slot_is_shown(
    url: str, open_page: OpenPage, locale: str, waits_for: str, text: str
) -> None:
    page = open_page(url, locale=locale)
    name, data = NEXT
    answer_without_end(page, (name, data | {"waits_for": waits_for}))
    page.locator("#input").fill("hello")
    page.locator("#input").press("Enter")
    expect(page.locator(".wait")).to_have_text(text)


@pytest.mark.parametrize(
    ("locale", "queued", "position", "title"),
    [
        ("en-US", QUEUED, "You are about 3rd in the queue", "About 3rd in the queue · ChatStream"),
        ("en-US", NEXT, "You are probably next in the queue", "Probably next in the queue · ChatStream"),
        ("ja-JP", QUEUED, "およそ3番目に並んでいます", "およそ3番目 · ChatStream"),
        ("ja-JP", NEXT, "おそらく次があなたの番です", "おそらく次があなたの番です · ChatStream"),
    ],
)
def test_an_estimated_position_is_shown_as_an_estimate(
    url: str, open_page: OpenPage, locale: str, queued: tuple[str, dict[str, Any]], position: str, title: str
) -> None:
    page = open_page(url, locale=locale, viewport={"width": 320, "height": 640})
    name, data = queued
    answer_without_end(page, (name, data | {"position_kind": "estimate"}))
    page.locator("#input").fill("hello")
    page.locator("#input").press("Enter")
    expect(page.locator(".position")).to_have_text(position)
    expect(page.locator("#status")).to_have_text(position)
    expect(page).to_have_title(title)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_position_that_becomes_exact_is_announced_again(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    name, data = QUEUED
    answer_without_end(page, (name, data | {"position_kind": "estimate"}), (name, data))
    ask(page, "hello")
    expect(page.locator(".position")).to_have_text("You are 3rd in the queue")
    expect(page.get_by_role("status")).to_have_text("You are 3rd in the queue")
    expect(page).to_have_title("3rd in the queue · ChatStream")


def test_the_page_asks_for_an_api_key_once_and_then_sends_the_message(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(api_key="open sesame"), expects_failed_requests=True)
    ask(page, "hello")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_text("did not accept this key")).to_be_visible()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator(".meta")).to_contain_text("complete")
    expect(page.locator("#model")).to_be_visible()
    page.reload()
    ask(page, "again")
    expect(page.locator(".answer .text").last).to_contain_text("again")


def test_without_a_key_the_message_stays_and_can_be_retried(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(api_key="open sesame"), expects_failed_requests=True)
    ask(page, "hello")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".notice")).to_contain_text("This server requires an API key.")
    expect(page.locator(".question .text")).to_have_text("hello")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("dialog")).to_be_visible()
