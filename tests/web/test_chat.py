"""The chat page with a server that has free slots."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.web.conftest import SLOW_S, OpenPage, Serve, ask, expect_load, occupy_slot


def questions(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".question .text").all_text_contents()]


def answers(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".answer .text").all_text_contents()]


def answer(page: Page, text: str) -> str:
    """Send a message, wait for the end of the answer and return it."""
    complete = page.locator(".meta", has_text="complete")
    before = complete.count()
    ask(page, text)
    expect(complete).to_have_count(before + 1)
    return answers(page)[-1]


def test_an_answer_streams_and_ends_with_its_figures(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    ask(page, "one two three " + "more " * 20)
    last = page.locator(".answer").last
    expect(last).to_contain_text("one two")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(last).to_contain_text(re.compile(r"no wait · \d+ tokens · complete"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert "one two three" in answers(page)[0]


def test_shift_enter_starts_a_new_line_and_enter_sends_the_message(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    field = page.get_by_role("textbox", name="Your message")
    field.press_sequentially("first")
    one_line = field.bounding_box()
    field.press("Shift+Enter")
    field.press_sequentially("second")
    two_lines = field.bounding_box()
    assert one_line is not None
    assert two_lines is not None
    assert two_lines["height"] > one_line["height"]
    field.press("Enter")
    expect(page.locator(".question .text")).to_have_text("first\nsecond", use_inner_text=True)
    expect(field).to_have_value("")


def test_enter_during_an_input_method_composition_does_not_send(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    field = page.get_by_role("textbox", name="Your message")
    field.focus()
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    # For a key that the input method handles, the system sends code 229 in addition to the key.
    enter = {"type": "rawKeyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    keyboard.send("Input.dispatchKeyEvent", enter)
    keyboard.send("Input.dispatchKeyEvent", enter | {"windowsVirtualKeyCode": 229})
    keyboard.send("Input.insertText", {"text": "日本"})
    # Safari has ended the composition at this point; only the code shows it.
    keyboard.send("Input.dispatchKeyEvent", enter | {"windowsVirtualKeyCode": 229})
    expect(field).to_have_value("日本")
    assert questions(page) == []
    field.press("Enter")
    expect(page.locator(".question .text")).to_have_text("日本")


def test_nothing_is_sent_for_blank_input_or_while_an_answer_runs(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    ask(page, "  \n ")
    assert questions(page) == []
    occupy_slot(page)
    ask(page, "typed ahead")
    expect(page.get_by_role("textbox", name="Your message")).to_have_value("typed ahead")
    assert len(questions(page)) == 1


def test_markup_in_question_and_answer_stays_text(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    page.on("dialog", lambda _: pytest.fail("a script ran"))
    texts = [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "<b>bold</b> &amp; [link](javascript:alert(1))",
    ]
    for text in texts:
        assert text in answer(page, text)
    assert questions(page) == texts
    assert page.locator("main").locator("img, script, b, a").count() == 0


def test_white_space_of_an_answer_is_kept(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    answer(page, "def f():\n    return  1")
    expect(page.locator(".answer .text")).to_contain_text("def f():\n    return  1", use_inner_text=True)


def test_regenerate_replaces_the_last_answer(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    first = answer(page, "one")
    second = answer(page, "two")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    with page.expect_request("**/chat_stream") as request:
        page.get_by_role("button", name="Regenerate").click()
    assert request.value.post_data_json == {"user_input": None, "regenerate": True}
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert questions(page) == ["one", "two"]
    assert answers(page) == [first, second]


def test_regenerate_sends_the_message_again_if_the_server_has_lost_the_conversation(
    url: str, open_page: OpenPage
) -> None:
    page = open_page(url, expects_failed_requests=True)
    first = answer(page, "one")
    page.context.clear_cookies()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert (questions(page), answers(page)) == (["one"], [first])


def test_stop_keeps_the_partial_answer_and_frees_the_slot(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    occupy_slot(page)
    expect_load(page, processing=1, waiting=0)
    with page.expect_request("**/requests/*") as request:
        page.get_by_role("button", name="Stop").click()
    assert request.value.method == "DELETE"
    expect(page.locator(".meta")).to_contain_text("stopped by you")
    expect_load(page, processing=0, waiting=0)
    assert "word word" in answers(page)[0]
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_stop_frees_the_slot_even_if_the_delete_request_fails(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S), expects_failed_requests=True)
    page.route("**/requests/*", lambda route: route.abort())
    occupy_slot(page)
    page.get_by_role("button", name="Stop").click()
    expect_load(page, processing=0, waiting=0)


def test_double_click_on_send_does_not_stop_its_own_answer(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    page.get_by_role("textbox", name="Your message").fill("word " * 10)
    page.get_by_role("button", name="Send").dblclick()
    expect(page.locator(".meta")).to_contain_text("complete")


def test_copy_puts_the_answer_on_the_clipboard(url: str, open_page: OpenPage) -> None:
    page = open_page(url, permissions=["clipboard-read", "clipboard-write"])
    text = answer(page, "copy me")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").strip() == text


def test_new_chat_starts_an_empty_conversation_on_page_and_server(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    with page.expect_request("**/chat_stream") as before:
        answer(page, "old")
    with page.expect_request("**/clear_context") as cleared:
        page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    assert questions(page) == []
    with page.expect_request("**/chat_stream") as after:
        answer(page, "new")
    name = "x-chatstream-conversation"
    assert cleared.value.headers[name] == before.value.headers[name] != after.value.headers[name]


def test_new_chat_stops_the_running_answer(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    occupy_slot(page)
    page.get_by_role("button", name="New chat").click()
    expect_load(page, processing=0, waiting=0)
    assert questions(page) == []
    ask(page, "next")
    expect(page.locator(".answer")).to_contain_text("next")


def test_reload_keeps_transcript_draft_and_conversation(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    with page.expect_request("**/chat_stream") as before:
        text = answer(page, "remember me")
    page.get_by_role("textbox", name="Your message").fill("half a thou")
    page.reload()
    expect(page.get_by_role("textbox", name="Your message")).to_have_value("half a thou")
    assert (questions(page), answers(page)) == (["remember me"], [text])
    with page.expect_request("**/chat_stream") as after:
        page.get_by_role("button", name="Regenerate").click()
    name = "x-chatstream-conversation"
    assert before.value.headers[name] == after.value.headers[name]
    assert after.value.post_data_json == {"user_input": None, "regenerate": True}


def test_a_reload_during_an_answer_keeps_the_text_and_offers_a_retry(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    occupy_slot(page)
    page.reload()
    expect(page.locator(".notice")).to_contain_text("The connection was lost before the answer was complete.")
    assert "word word" in answers(page)[0]
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    expect_load(page, processing=0, waiting=0)


def test_two_tabs_of_one_browser_have_two_conversations(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    with page.expect_request("**/chat_stream") as first:
        text = answer(page, "first tab")
    other = page.context.new_page()
    other.goto(url)
    with other.expect_request("**/chat_stream") as second:
        answer(other, "second tab")
    name = "x-chatstream-conversation"
    assert first.value.headers[name] != second.value.headers[name]
    assert (questions(page), answers(page)) == (["first tab"], [text])


def test_a_duplicated_tab_starts_a_new_conversation(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    answer(page, "mine")
    with page.context.expect_page() as duplicate:
        page.evaluate("void window.open(location.href)")  # copies the session storage, as duplicating does
    copy = duplicate.value
    expect(copy.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    with copy.expect_request("**/chat_stream") as theirs:
        answer(copy, "another")
    with page.expect_request("**/chat_stream") as ours:
        page.get_by_role("button", name="Regenerate").click()
    name = "x-chatstream-conversation"
    assert theirs.value.headers[name] != ours.value.headers[name]
    assert questions(page) == ["mine"]


def test_the_view_follows_the_answer_until_the_user_scrolls_up(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S), viewport={"width": 400, "height": 400})
    ask(page, "a\n" * 40 + "word " * 5000)
    scroller = page.get_by_role("main")
    expect(page.locator(".answer .text")).to_contain_text("word word")
    assert scroller.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    scroller.hover()
    page.mouse.wheel(0, -30)
    to_newest = page.get_by_role("button", name="Jump to latest")
    expect(to_newest).to_be_visible()
    top = scroller.evaluate("e => e.scrollTop")
    seen = answers(page)[0]
    expect(page.locator(".answer .text")).not_to_have_text(seen)
    assert scroller.evaluate("e => e.scrollTop") <= top
    to_newest.click()
    expect(to_newest).to_be_hidden()
    assert scroller.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2


def test_the_model_is_named_and_only_the_demo_model_has_an_explanation(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    expect(page.locator("#model")).to_have_text("mock-echo")
    expect(page.get_by_text("This is a toy model")).to_be_hidden()


def test_the_demo_model_is_explained_with_example_questions(url: str, open_page: OpenPage) -> None:
    page = open_page("about:blank")
    models = {"object": "list", "data": [{"id": "chatstream-demo", "object": "model"}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.goto(url)
    expect(page.get_by_role("complementary")).to_contain_text("about 2 million parameters")
    expect(page.get_by_role("complementary")).to_contain_text("open this page in three windows")
    page.get_by_role("button", name="What is ChatStream?").click()
    expect(page.locator(".meta")).to_contain_text("complete")
    assert questions(page) == ["What is ChatStream?"]


def test_page_works_under_a_prefix(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(prefix="/ai") + "/ai")
    assert "under a prefix" in answer(page, "under a prefix")
    expect(page.get_by_text("of 2 generating")).to_be_visible()


def test_the_page_uses_the_browser_s_language_and_stores_a_switch(url: str, open_page: OpenPage) -> None:
    page = open_page(url, locale="ja-JP")
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    page.get_by_role("textbox", name="メッセージ").fill("こんにちは")
    page.get_by_role("button", name="送信").click()
    expect(page.locator(".meta")).to_contain_text(re.compile(r"待ち時間なし · \d+トークン · 完了"))
    expect(page.get_by_text("生成中 0 / 2、待ち 0")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.locator(".meta")).to_contain_text("complete")
    page.reload()
    expect(page.get_by_role("button", name="日本語")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_page_falls_back_to_english(url: str, open_page: OpenPage) -> None:
    page = open_page(url, locale="fi-FI")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_load_is_not_polled_again_after_a_refusal(url: str, open_page: OpenPage) -> None:
    page = open_page("about:blank", expects_failed_requests=True)
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=403, json={})

    page.route("**/get_load", refuse)
    page.goto(url)
    answer(page, "hello")
    expect(page.locator("#load")).to_be_hidden()
    assert len(asked) == 1
