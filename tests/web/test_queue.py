"""Waiting, being refused and losing the connection, as the visitor sees it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.web.conftest import SLOW_S, OpenPage, Serve, ask, expect_load, hold_slot


def events(*pairs: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in pairs)


def answer_with(page: Page, **response: Any) -> None:
    """The next answers to `POST chat_stream` are this one."""
    page.route("**/chat_stream", lambda route: route.fulfill(**response))


def stream(body: str) -> dict[str, Any]:
    return {"status": 200, "content_type": "text/event-stream", "body": body}


QUEUED = ("queued", {"request_id": "r", "position": 3, "eta_seconds": None, "eta_p90_seconds": None})
NEXT = ("queued", {"request_id": "r", "position": 1, "eta_seconds": None, "eta_p90_seconds": None})
STARTED = ("started", {"request_id": "r", "waited_seconds": 3.24})


def refusal(status: int, code: str, **headers: str) -> dict[str, Any]:
    body = {"error": "too_many_requests" if status == 429 else code, "code": code, "message": "Words of the server."}
    return {"status": status, "headers": {"content-type": "application/json"} | headers, "body": json.dumps(body)}


def answer_without_end(page: Page, *pairs: tuple[str, dict[str, Any]]) -> None:
    """The next answers begin so and stay open, which no route can do: they come out of the page's own fetch."""
    page.evaluate(
        """body => {
            window.fetch = async () => new Response(
                new ReadableStream({ start: (stream) => stream.enqueue(new TextEncoder().encode(body)) }),
                { headers: { "content-type": "text/event-stream" } },
            );
        }""",
        events(*pairs),
    )


def test_third_visitor_sees_the_place_live_and_starts_when_the_first_ends(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=2, time_per_token_s=SLOW_S)
    first, second, third, fourth = (open_page(url) for _ in range(4))
    hold_slot(first)
    hold_slot(second)
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are next")
    ask(fourth, "fourth asks")
    expect(fourth.locator(".answer")).to_contain_text("You are 2nd in line")
    expect(fourth).to_have_title("2nd in line · ChatStream")
    expect(fourth.get_by_role("status")).to_have_text("You are 2nd in line")
    expect(fourth.get_by_role("button", name="Leave the line")).to_be_visible()
    expect_load(fourth, processing=2, waiting=2)

    first.get_by_role("button", name="Stop").click()
    expect(third.locator(".answer")).to_contain_text("third asks")
    expect(third.locator(".meta")).to_contain_text(re.compile(r"waited [\d.]+ s · \d+ tokens · complete"))
    expect(fourth.locator(".answer")).to_contain_text("fourth asks")
    expect(fourth).to_have_title("ChatStream")


def test_leaving_the_line_gives_the_place_back_and_keeps_the_words(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, time_per_token_s=SLOW_S)
    first, second, third = (open_page(url) for _ in range(3))
    hold_slot(first)
    ask(second, "second asks")
    expect(second.locator(".answer")).to_contain_text("You are next")
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are 2nd in line")

    second.get_by_role("button", name="Leave the line").click()
    expect(second.locator(".notice")).to_contain_text("You left the line.")
    expect(third.locator(".answer")).to_contain_text("You are next")

    second.get_by_role("button", name="Edit").click()
    expect(second.get_by_role("textbox", name="Your message")).to_have_value("second asks")
    expect(second.get_by_role("textbox", name="Your message")).to_be_focused()
    expect(second.locator(".question")).to_have_count(0)


def test_closing_the_window_gives_the_place_back(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, time_per_token_s=SLOW_S)
    first, second, third = (open_page(url) for _ in range(3))
    hold_slot(first)
    ask(second, "second asks")
    expect(second.locator(".answer")).to_contain_text("You are next")
    ask(third, "third asks")
    expect(third.locator(".answer")).to_contain_text("You are 2nd in line")
    second.close()
    expect(third.locator(".answer")).to_contain_text("You are next")
    first.close()
    expect(third.locator(".answer")).to_contain_text("third asks")


def test_full_line_refuses_with_a_time_and_try_again_sends_the_same_words(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, max_queue_size=0, time_per_token_s=SLOW_S)
    first = open_page(url)
    hold_slot(first)
    second = open_page(url, expects_failed_requests=True)
    ask(second, "kept words")
    expect(second.locator(".notice")).to_contain_text(re.compile(r"The line is full\.\s*Try again in \d+ s\."))
    expect(second.locator(".question .text")).to_have_text("kept words")

    second.reload()
    expect(second.locator(".notice")).to_contain_text("The line is full.")
    first.get_by_role("button", name="Stop").click()
    expect_load(second, processing=0, waiting=0)
    second.get_by_role("button", name="Try again").click()
    expect(second.locator(".meta")).to_contain_text("complete")
    expect(second.locator(".answer .text")).to_contain_text("kept words")
    expect(second.locator(".question")).to_have_count(1)


def test_countdown_runs_to_its_end(url: str, open_page: OpenPage) -> None:
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


def test_refusal_says_why_and_loses_nothing(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    field = page.get_by_role("textbox", name="Your message")
    field.fill("my words")
    for status, code, words in [
        (429, "client_limit", "as many requests here as one visitor may have"),
        (503, "shutting_down", "The server is shutting down."),
        (400, "prompt_too_long", "too long for the model"),
        (418, "a_code_of_the_future", "The server refused: Words of the server."),
    ]:
        answer_with(page, **refusal(status, code))
        field.press("Enter")
        expect(page.locator(".notice")).to_contain_text(words)
        expect(page.get_by_role("status")).to_contain_text(words)
        # What must be changed first is not offered to be sent again as it is.
        expect(page.get_by_role("button", name="Try again")).to_have_count(0 if status == 400 else 1)
        page.get_by_role("button", name="Edit").click()
        expect(field).to_have_value("my words")
        page.unroute("**/chat_stream")


def test_refusal_that_is_no_json_is_shown_too(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    answer_with(page, status=502, content_type="text/html", body="<h1>Bad gateway</h1>")
    ask(page, "my words")
    expect(page.locator(".notice")).to_contain_text("The server refused: Bad Gateway")


def test_refused_regeneration_leaves_the_old_answer_standing(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    ask(page, "first words")
    expect(page.locator(".meta")).to_contain_text("complete")
    answer_with(page, **refusal(429, "queue_full", **{"retry-after": "12"}))
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".notice")).to_contain_text("The line is full.")
    expect(page.locator(".answer .text")).to_contain_text("first words")
    expect(page.locator(".meta")).to_contain_text("complete")


def test_connection_lost_in_mid_answer_is_said_and_try_again_regenerates(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)
    answer_with(page, **stream(events(STARTED, ("token", {"text": "half an "}))))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The connection was lost before the answer was complete.")
    expect(page.locator(".answer .text")).to_have_text("half an ")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": None, "regenerate": True}


def test_connection_lost_in_line_sends_the_words_again(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    answer_with(page, **stream(events(QUEUED)))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The connection was lost")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_stop_before_the_first_word_leaves_the_message_unsent(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=30))
    ask(page, "hello")
    expect(page.get_by_text("Reading your message")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".notice")).to_contain_text("You stopped before the answer began.")
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_unreachable_server_is_said(url: str, open_page: OpenPage) -> None:
    page = open_page(url, expects_failed_requests=True)

    def fail(route: Route) -> None:
        route.abort("connectionrefused")

    page.route("**/chat_stream", fail)
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The server cannot be reached.")
    page.unroute("**/chat_stream")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".meta")).to_contain_text("complete")


def test_error_event_is_said_beside_what_came(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    error = ("error", {"code": "engine_error", "message": "CUDA is unhappy"})
    answer_with(page, **stream(events(QUEUED, STARTED, ("token", {"text": "half"}), error)))
    ask(page, "hello")
    expect(page.locator(".notice")).to_contain_text("The model failed on this request.")
    expect(page.locator(".answer .text")).to_have_text("half")
    expect(page.locator(".meta")).to_have_text("waited 3.2 s")
    # The server keeps nothing of a failed answer, so there is nothing to regenerate.
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Try again").click()
    assert request.value.post_data_json == {"user_input": "hello", "regenerate": False}


def test_estimate_is_shown_and_counts_down(url: str, open_page: OpenPage) -> None:
    page = open_page("about:blank")
    page.clock.install(time=0)
    page.goto(url)
    page.clock.pause_at(60)
    answer_without_end(
        page, ("queued", {"request_id": "r", "position": 21, "eta_seconds": 30.2, "eta_p90_seconds": 160.0})
    )
    ask(page, "hello")
    expect(page.locator(".place")).to_have_text("You are 21st in line")
    expect(page.locator(".wait")).to_have_text("Your turn in about 30 s, most likely within 3 min")
    page.clock.run_for(20_000)
    expect(page.locator(".wait")).to_have_text("Your turn in about 10 s, most likely within 2 min")
    page.clock.run_for(20_000)
    expect(page.locator(".wait")).to_have_text("It is your turn any moment now")


@pytest.mark.parametrize(
    ("locale", "waits_for", "text"),
    [
        ("en-US", "conversation", "It starts when your earlier message has been answered"),
        ("en-US", "opening", "It starts when the server is ready"),
        ("ja-JP", "client_limit", "実行中のほかのリクエストが終わると始まります"),
        ("en-US", "slot", "No estimate yet"),
        ("en-US", "toString", "No estimate yet"),
    ],
)
def test_a_request_that_waits_for_more_than_a_slot_is_told_for_what(
    url: str, open_page: OpenPage, locale: str, waits_for: str, text: str
) -> None:
    page = open_page(url, locale=locale)
    name, data = NEXT
    answer_without_end(page, (name, data | {"waits_for": waits_for}))
    page.locator("#input").fill("hello")
    page.locator("#input").press("Enter")
    expect(page.locator(".wait")).to_have_text(text)


@pytest.mark.parametrize(
    ("locale", "queued", "place", "title"),
    [
        ("en-US", QUEUED, "You are about 3rd in line", "About 3rd in line · ChatStream"),
        ("en-US", NEXT, "You are probably next", "Probably next in line · ChatStream"),
        ("ja-JP", QUEUED, "およそ3番目に並んでいます", "およそ3番目 · ChatStream"),
        ("ja-JP", NEXT, "おそらく次があなたの番です", "おそらく次があなたの番です · ChatStream"),
    ],
)
def test_a_place_that_others_may_come_in_front_of_is_told_as_an_estimate(
    url: str, open_page: OpenPage, locale: str, queued: tuple[str, dict[str, Any]], place: str, title: str
) -> None:
    page = open_page(url, locale=locale, viewport={"width": 320, "height": 640})
    name, data = queued
    answer_without_end(page, (name, data | {"position_kind": "estimate"}))
    page.locator("#input").fill("hello")
    page.locator("#input").press("Enter")
    expect(page.locator(".place")).to_have_text(place)
    expect(page.locator("#status")).to_have_text(place)
    expect(page).to_have_title(title)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_place_that_becomes_exact_is_said_again(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    name, data = QUEUED
    answer_without_end(page, (name, data | {"position_kind": "estimate"}), (name, data))
    ask(page, "hello")
    expect(page.locator(".place")).to_have_text("You are 3rd in line")
    expect(page.get_by_role("status")).to_have_text("You are 3rd in line")
    expect(page).to_have_title("3rd in line · ChatStream")


def test_api_key_is_asked_for_once_and_the_message_goes_on_its_way(serve: Serve, open_page: OpenPage) -> None:
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


def test_without_a_key_the_message_stays_and_can_be_sent_again(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(api_key="open sesame"), expects_failed_requests=True)
    ask(page, "hello")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".notice")).to_contain_text("This server asks for an API key.")
    expect(page.locator(".question .text")).to_have_text("hello")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("dialog")).to_be_visible()
