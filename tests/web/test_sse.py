"""The page's parser of server-sent events, run in the browser."""

from __future__ import annotations

import json

from tests.web.conftest import OpenPage

READ_ALL = """async ([pieces]) => {
    const { readEvents } = await import("./static/sse.js");
    const body = new ReadableStream({
        start(controller) {
            for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
            controller.close();
        },
    });
    const events = [];
    for await (const event of readEvents(body)) events.push([event.type, event.data]);
    return JSON.stringify(events);
}"""


def cut(text: str, size: int) -> list[list[int]]:
    data = text.encode()
    return [list(data[i : i + size]) for i in range(0, len(data), size)]


STREAM = (
    ": keep-alive\n\n"
    'id: 1\nevent: token\ndata: {"text": "順番"}\n\n'
    "data: no type\ndata:second line\nretry: 3\n\n"
    "event: unfinished\n\n"
    "event: done\ndata: {}\n\n"
    "event: token\ndata: cut off"
)
EVENTS = [["token", '{"text": "順番"}'], ["message", "no type\nsecond line"], ["done", "{}"]]


def test_events_do_not_depend_on_the_chunks_of_the_network(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    for line_end in ("\n", "\r\n", "\r"):
        for size in (1, 2, 3, 7, 1000):
            pieces = cut(STREAM.replace("\n", line_end), size)
            assert json.loads(page.evaluate(READ_ALL, [pieces])) == EVENTS, (line_end, size)
