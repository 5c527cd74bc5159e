#!/usr/bin/env python3
"""Take the screenshot of the chat page for the README, with the server and the browser of the browser tests.

    .venv/bin/python scripts/screenshot.py docs/images/chat-page.png

Forty requests of about 5 s give the server a basis for its estimates. Then the visitor in the screenshot waits in the
queue.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx2
from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.web.conftest import ask, build_app, open_browser, run_in_thread

TIME_PER_TOKEN_S = 0.05
NUM_SLOTS, NUM_AHEAD = 2, 4
ANSWER = "ChatStream puts a queue and an exact limit in front of text generation. " * 8


def main() -> None:
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    url, stop = run_in_thread(build_app(time_per_token_s=TIME_PER_TOKEN_S, max_concurrency=16, max_queue_size=64))
    try:
        asyncio.run(provide_basis(url))
        with open_browser() as browser:
            visitors = [open_page(browser, url) for _ in range(NUM_AHEAD + 1)]
            *others, visitor = visitors
            ask(visitor, "What is ChatStream?")
            expect(visitor.locator(".answer")).to_contain_text("ChatStream?")
            expect(visitor.get_by_role("button", name="Send")).to_be_visible()
            for other in others:
                ask(other, ANSWER)
            ask(visitor, "How does the queue work?")
            expect(visitor.locator(".wait")).to_contain_text("about")
            visitor.wait_for_timeout(3_500)  # the page polls the load every 3 s
            visitor.screenshot(path=path)
    finally:
        stop()


async def provide_basis(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
        question = {"user_input": ANSWER}
        answers = await asyncio.gather(*(client.post("/chat_stream", json=question, cookies={}) for _ in range(40)))
        assert all(answer.is_success for answer in answers)
        (await client.patch("/queue", json={"max_concurrency": NUM_SLOTS})).raise_for_status()


def open_page(browser: Browser, url: str) -> Page:
    page = browser.new_context(
        locale="en-US", reduced_motion="reduce", viewport={"width": 880, "height": 560}, device_scale_factor=1.5
    ).new_page()
    page.goto(url)
    return page


if __name__ == "__main__":
    main()
