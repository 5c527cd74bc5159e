"""Five users send a request at the same time; the terminal shows their positions and answers.

    chatstream serve --engine mock --max-concurrency 2

In another terminal:

    python examples/many_users.py http://127.0.0.1:8000

Two answers are generated at a time, while the other three requests move up in the queue. If the output is not a
terminal, only the last table is printed.
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
    state: str = "sending"
    answer: str = ""

    async def ask(self, url: str) -> None:
        # One client, and so one cookie, for each user: the server sees five browsers.
        async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
            request = client.stream(
                "POST",
                "/chat_stream",
                json={"user_input": f"I am {self.name}"},
                headers={"Accept": "text/event-stream"},
            )
            async with request as response:
                if response.status_code != 200:
                    self.state = f"rejected, try again in {response.headers.get('retry-after')} s"
                    return
                async for event in httpx2.EventSource(response):
                    self.on_event(event.event, json.loads(event.data))

    def on_event(self, kind: str, data: dict[str, str]) -> None:
        match kind:
            case "queued":
                self.state = f"waiting at position {data['position']}"
            case "started":
                self.state = f"running, waited {data['waited_seconds']} s"
            case "token":
                self.answer += data["text"]
            case "done":
                self.state = self.state.replace("running", "done")
            case "error":
                self.state = data["code"]


def as_table(users: list[User]) -> Table:
    table = Table("user", "state", "answer", min_width=70)
    for user in users:
        table.add_row(user.name, user.state, user.answer)
    return table


async def main(url: str) -> None:
    users = [User(name) for name in ("Aiko", "Ben", "Chiyo", "Dan", "Emi")]
    with Live(get_renderable=lambda: as_table(users), refresh_per_second=20):
        await asyncio.gather(*(user.ask(url) for user in users))
    print()


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
try:
    asyncio.run(main(url))
except httpx2.ConnectError:
    sys.exit(f"No server answers at {url}. Start one: chatstream serve --engine mock --max-concurrency 2")
