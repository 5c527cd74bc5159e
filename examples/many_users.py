"""Five users ask at the same moment; the terminal shows who speaks and who is where in line.

    chatstream serve --engine mock --max-concurrency 2

In another terminal:

    python examples/many_users.py http://127.0.0.1:8000

Two answers grow, a word each by turns, while the other three move up in line. Where the output is not a terminal,
only the last picture is printed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

import httpx2
from rich.live import Live
from rich.table import Table


@dataclass
class User:
    name: str
    state: str = "arrives"
    answer: str = ""

    async def ask(self, url: str) -> None:
        # A client, and so a cookie, for each of them: to the server they are five browsers.
        async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
            request = client.stream(
                "POST",
                "/chat_stream",
                json={"user_input": f"I am {self.name}"},
                headers={"Accept": "text/event-stream"},
            )
            async with request as response:
                if response.status_code != 200:
                    self.state = f"refused, come back in {response.headers.get('retry-after')} s"
                    return
                async for event in httpx2.EventSource(response):
                    self.on_event(event.event, json.loads(event.data))

    def on_event(self, kind: str, data: dict[str, str]) -> None:
        match kind:
            case "queued":
                self.state = f"number {data['position']} in line"
            case "started":
                self.state = f"speaks, waited {data['waited_seconds']} s"
            case "token":
                self.answer += data["text"]
            case "done":
                self.state = self.state.replace("speaks", "done")
            case "error":
                self.state = data["code"]


def picture(users: list[User]) -> Table:
    table = Table("user", "state", "answer", min_width=70)
    for user in users:
        table.add_row(user.name, user.state, user.answer)
    return table


async def main(url: str) -> None:
    users = [User(name) for name in ("Aiko", "Ben", "Chiyo", "Dan", "Emi")]
    with Live(get_renderable=lambda: picture(users), refresh_per_second=20):
        await asyncio.gather(*(user.ask(url) for user in users))
    print()


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
try:
    asyncio.run(main(url))
except httpx2.ConnectError:
    sys.exit(f"No server answers at {url}. Start one: chatstream serve --engine mock --max-concurrency 2")
