"""The queue without a web server: three requests at once, of which two run at a time.

    python examples/without_http.py

Prints the events of each request as they occur: two start at once, the third waits.
"""

from __future__ import annotations

import asyncio

from chatstream import ChatStream, Done, Queued, Started, Token


async def ask(chat_stream: ChatStream, question: str) -> None:
    answer = ""
    async for event in chat_stream.stream(question, max_new_tokens=40):
        match event:
            case Queued():
                print(f"{question!r} waits at position {event.position}")
            case Started():
                print(f"{question!r} starts after {event.waited_seconds:.1f} s")
            case Token():
                answer += event.text
            case Done():
                print(f"{question!r} -> {answer!r}, {event.usage.completion_tokens} tokens")


async def main() -> None:
    async with ChatStream(max_concurrency=2, max_queue_size=5) as chat_stream:
        questions = ("Hello", "What are you?", "こんにちは")
        await asyncio.gather(*(ask(chat_stream, question) for question in questions))
        print(chat_stream)


asyncio.run(main())
